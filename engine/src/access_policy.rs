//! `AccessPolicy`: what clients may not reach, by the operator's word.
//!
//! What goes from client to client, or from a client to the external side, passes no firewall of the host's, so what an
//! operator would write there is asked here: about clients' packets alone, and before anything is done for them.

use std::net::Ipv4Addr;

use crate::prefix::Prefix;

/// What clients may reach.
#[derive(Clone, Debug)]
pub struct AccessPolicy {
    /// Whether they may reach each other at their addresses in the VPN.
    pub between_clients: bool,
    /// What they may not reach through the external interface: from the lowest to the highest, none within another.
    denied: Vec<Prefix>,
}

impl Default for AccessPolicy {
    /// Everything.
    fn default() -> Self {
        Self { between_clients: true, denied: Vec::new() }
    }
}

impl AccessPolicy {
    /// `denied` may be in any order, and overlap.
    pub fn new(between_clients: bool, mut denied: Vec<Prefix>) -> Self {
        // Of two that overlap, one contains the other; it comes first, and takes the place of what it contains.
        denied.sort_unstable_by_key(|prefix| (prefix.network(), prefix.len()));
        denied.dedup_by(|next, kept| kept.contains(next.network()));
        Self { between_clients, denied }
    }

    /// Whether clients may not reach this address through the external interface.
    pub fn denies(&self, destination: Ipv4Addr) -> bool {
        let after = self.denied.partition_point(|prefix| prefix.network() <= destination);
        self.denied[..after].last().is_some_and(|prefix| prefix.contains(destination))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn denying(prefixes: &[&str]) -> AccessPolicy {
        AccessPolicy::new(true, prefixes.iter().map(|text| text.parse().unwrap()).collect())
    }

    fn denies(policy: &AccessPolicy, destination: &str) -> bool {
        policy.denies(destination.parse().unwrap())
    }

    #[test]
    fn by_default_everything_may_be_reached() {
        let policy = AccessPolicy::default();
        assert!(policy.between_clients);
        assert!(!denies(&policy, "0.0.0.0") && !denies(&policy, "192.168.0.1"));
    }

    #[test]
    fn a_network_is_denied_from_its_first_address_to_its_last() {
        let policy = denying(&["192.168.0.0/16", "10.0.0.0/8", "198.51.100.7/32"]);
        for (first, last) in [
            ("10.0.0.0", "10.255.255.255"),
            ("192.168.0.0", "192.168.255.255"),
            ("198.51.100.7", "198.51.100.7"),
        ] {
            assert!(denies(&policy, first) && denies(&policy, last), "{first} to {last}");
            let [before, after] =
                [first.parse::<Ipv4Addr>(), last.parse()].map(|edge| edge.unwrap().to_bits());
            assert!(
                !policy.denies((before - 1).into()) && !policy.denies((after + 1).into()),
                "{first} to {last}"
            );
        }
    }

    #[test]
    fn a_wide_network_is_not_forgotten_over_a_narrow_one_inside_it() {
        for prefixes in [["10.0.0.0/8", "10.1.0.0/16"], ["10.1.0.0/16", "10.0.0.0/8"]] {
            let policy = denying(&prefixes);
            assert!(
                denies(&policy, "10.0.0.1") && denies(&policy, "10.1.0.1") && denies(&policy, "10.200.0.1")
            );
        }
        assert!(denies(&denying(&["0.0.0.0/0", "128.0.0.0/1"]), "255.255.255.255"));
    }

    proptest! {
        #[test]
        fn what_is_denied_is_what_one_of_the_prefixes_contains(
            prefixes in proptest::collection::vec((any::<u32>(), 0u8..=32), 0..8),
            destination in any::<u32>(),
            shared in 0u32..=32,
        ) {
            let prefixes: Vec<Prefix> = prefixes
                .iter()
                // Near the destination, or else hardly any contains it.
                .map(|&(bits, len)| {
                    let far = u32::MAX.checked_shr(shared).unwrap_or(0);
                    Prefix::new((destination ^ (bits & far)).into(), len).unwrap()
                })
                .collect();
            let destination = Ipv4Addr::from(destination);
            let expected = prefixes.iter().any(|prefix| prefix.contains(destination));
            prop_assert_eq!(AccessPolicy::new(true, prefixes).denies(destination), expected);
        }
    }
}
