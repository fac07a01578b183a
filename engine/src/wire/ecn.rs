//! Explicit congestion notification (RFC 3168) on its way out of a tunnel (RFC 6040).

use super::checksum::Change;
use super::ipv4::{MIN_HEADER_LEN, put_u16, u16_at};
use crate::drop_reason::DropReason;

/// The ECN field of an IP header (RFC 3168 §5).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Ecn {
    /// Not ECN-capable: the sender reacts to losses only.
    #[default]
    NotEct,
    /// ECN-capable transport, codepoint 1.
    Ect1,
    /// ECN-capable transport, codepoint 0.
    Ect0,
    /// Congestion experienced: a router marked the packet where it would otherwise have dropped it.
    Ce,
}

impl Ecn {
    /// The field's bits in the type-of-service byte.
    const MASK: u8 = 0b11;

    /// What a type-of-service byte says.
    pub const fn of_tos(tos: u8) -> Self {
        match tos & Self::MASK {
            0b01 => Self::Ect1,
            0b10 => Self::Ect0,
            0b11 => Self::Ce,
            _ => Self::NotEct,
        }
    }

    /// Carries `self`, which a datagram of the tunnel came with, over to the IPv4 packet that was inside. A packet that
    /// is no IPv4 packet, or is cut short, is left to whoever reads it next.
    ///
    /// # Errors
    /// [`DropReason::CongestionMarked`]: the mark may not get lost, and the packet's sender would not understand it.
    #[inline]
    pub fn carry_over(self, packet: &mut [u8]) -> Result<(), DropReason> {
        // Nearly always, and then there is nothing to look at.
        if self == Self::NotEct { Ok(()) } else { self.mark(packet) }
    }

    /// The inner field as it is to be once `self` was outside (RFC 6040 §4.2, figure 4).
    fn decapsulated(self, inner: Self) -> Result<Self, DropReason> {
        match (inner, self) {
            (Self::NotEct, Self::Ce) => Err(DropReason::CongestionMarked),
            (Self::Ect0 | Self::Ect1, Self::Ce) => Ok(Self::Ce),
            (Self::Ect0, Self::Ect1) => Ok(Self::Ect1),
            _ => Ok(inner),
        }
    }

    fn mark(self, packet: &mut [u8]) -> Result<(), DropReason> {
        if packet.len() < MIN_HEADER_LEN || packet[0] >> 4 != 4 {
            return Ok(());
        }
        let inner = Self::of_tos(packet[1]);
        let marked = self.decapsulated(inner)?;
        if marked != inner {
            let old = u16_at(packet, 0);
            packet[1] = packet[1] & !Self::MASK | marked as u8;
            let change = Change::NONE.word(old, u16_at(packet, 0));
            let sum = change.apply(u16_at(packet, 10));
            put_u16(packet, 10, sum);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::checksum::checksum;
    use crate::wire::test_packets::Template;

    use Ecn::{Ce, Ect0, Ect1, NotEct};

    const ALL: [Ecn; 4] = [NotEct, Ect0, Ect1, Ce];

    /// The inner field afterwards.
    fn carried(outer: Ecn, inner: Ecn) -> Result<Ecn, DropReason> {
        let dscp = 0xb8;
        let mut packet = Template { tos: dscp | inner as u8, ..Template::default() }.udp(b"data");
        let before = packet.clone();
        outer.carry_over(&mut packet)?;
        assert_eq!(checksum(&packet[..MIN_HEADER_LEN]), 0);
        assert_eq!((packet[1] & !Ecn::MASK, &packet[12..]), (dscp, &before[12..]), "nothing else changes");
        Ok(Ecn::of_tos(packet[1]))
    }

    #[test]
    fn the_inner_field_becomes_what_rfc_6040_figure_4_says() {
        let lost = Err(DropReason::CongestionMarked);
        for (inner, expected) in [
            (NotEct, [Ok(NotEct), Ok(NotEct), Ok(NotEct), lost]),
            (Ect0, [Ok(Ect0), Ok(Ect0), Ok(Ect1), Ok(Ce)]),
            (Ect1, [Ok(Ect1), Ok(Ect1), Ok(Ect1), Ok(Ce)]),
            (Ce, [Ok(Ce); 4]),
        ] {
            assert_eq!(ALL.map(|outer| carried(outer, inner)), expected, "inside {inner:?}");
        }
    }

    #[test]
    fn the_codepoints_are_those_of_rfc_3168() {
        assert_eq!([0, 1, 2, 3, 0xb8 | 3].map(Ecn::of_tos), [NotEct, Ect1, Ect0, Ce, Ce]);
    }

    #[test]
    fn a_wrong_header_checksum_stays_wrong() {
        let mut packet = Template { tos: Ect0 as u8, ..Template::default() }.udp(b"data");
        packet[10] ^= 1;
        assert_eq!(Ce.carry_over(&mut packet), Ok(()));
        assert_ne!(checksum(&packet[..MIN_HEADER_LEN]), 0);
    }

    #[test]
    fn what_is_no_ipv4_packet_is_left_alone() {
        let ipv6 = vec![0x60; 40];
        for packet in [vec![], vec![0x45], vec![0x45; MIN_HEADER_LEN - 1], ipv6] {
            let mut after = packet.clone();
            assert_eq!(Ce.carry_over(&mut after), Ok(()));
            assert_eq!(after, packet);
        }
    }
}
