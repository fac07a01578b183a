//! Packets that name the routers by which they want to travel: IPv4's options Loose and Strict Source Route (RFC 791
//! §3.1).
//!
//! Each of these routers is the destination until it has put the next one there. So the destination that is looked at
//! here does not tell where such a packet ends, and it could leave for an address that clients may reach, to end at one
//! that they may not. Nobody needs them; routers drop them by default (RFC 7126 §4.3.5, §4.4.5).

use crate::drop_reason::DropReason;
use crate::wire::ipv4::{Ipv4Packet, MIN_HEADER_LEN};

/// Option types (IANA "IP Option Numbers"), with the bit that has them copied into every fragment.
const OPTION_END: u8 = 0;
const OPTION_NOP: u8 = 1;
const OPTION_LOOSE_SOURCE_ROUTE: u8 = 131;
const OPTION_STRICT_SOURCE_ROUTE: u8 = 137;

/// Refuses a packet, or a fragment, with a source route in it. Costs one comparison where there are no options.
///
/// # Errors
/// [`DropReason::SourceRoute`].
pub fn refuse(packet: &Ipv4Packet<'_>) -> Result<(), DropReason> {
    let has_options = packet.header_len() > MIN_HEADER_LEN;
    if has_options && has_source_route(&packet.head()[MIN_HEADER_LEN..packet.header_len()]) {
        return Err(DropReason::SourceRoute);
    }
    Ok(())
}

/// Whether the list of options has a source route. What follows an option whose length makes no sense is not looked at:
/// no router can find it either.
fn has_source_route(mut options: &[u8]) -> bool {
    loop {
        let len = match *options {
            [] | [OPTION_END, ..] => return false,
            [OPTION_LOOSE_SOURCE_ROUTE | OPTION_STRICT_SOURCE_ROUTE, ..] => return true,
            [OPTION_NOP, ..] => 1,
            [_, len, ..] if len >= 2 => usize::from(len),
            _ => return false,
        };
        options = options.get(len..).unwrap_or_default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_route_is_found_wherever_it_is_in_the_list() {
        let route = [OPTION_LOOSE_SOURCE_ROUTE, 7, 4, 203, 0, 113, 77];
        for before in [&[][..], &[OPTION_NOP], &[7, 4, 4, 0], &[148, 4, 0, 0, OPTION_NOP, 68, 3, 5]] {
            assert!(has_source_route(&[before, &route].concat()), "{before:?}");
        }
        assert!(
            has_source_route(&[OPTION_NOP, OPTION_NOP, OPTION_NOP, OPTION_STRICT_SOURCE_ROUTE]),
            "cut off"
        );
    }

    #[test]
    fn what_is_no_option_is_not_taken_for_one() {
        for options in [
            &[][..],
            &[OPTION_END, OPTION_LOOSE_SOURCE_ROUTE, 3, 4], // behind the end of the list
            &[7, 6, 4, OPTION_STRICT_SOURCE_ROUTE, 3, 4],   // within another option
            &[7, 0, OPTION_LOOSE_SOURCE_ROUTE, 3],          // behind what makes no sense
            &[7, 1, OPTION_LOOSE_SOURCE_ROUTE, 3],
            &[7, 40, 4, 0],
            &[OPTION_NOP, OPTION_NOP, OPTION_NOP, 7],
        ] {
            assert!(!has_source_route(options), "{options:?}");
        }
    }
}
