//! Fragments in any order, from several sources, while time passes; and packets cut and put together again.
//!
//! The bounds hold after each fragment, a datagram that comes out is well-formed, what one cuts the other makes whole,
//! and after the timeout nothing is left.

use std::net::Ipv4Addr;
use std::time::Duration;

use tidegate_engine::clock::Timestamp;
use tidegate_engine::fragment::fragmentation::Fragments;
use tidegate_engine::fragment::reassembly::{
    MAX_DATAGRAMS, MAX_DATAGRAMS_PER_SOURCE, MAX_FRAGMENTS, Reassembly, TIMEOUT,
};
use tidegate_engine::wire::{Ipv4Packet, Offload};

use super::packets::mend;
use super::script::Script;

/// Follows the script.
pub fn run(input: &[u8]) {
    let mut script = Script::new(input);
    match script.byte() % 3 {
        0 => cut_and_mend(script),
        1 => cut_anything(script),
        _ => sequences(script),
    }
}

/// A packet is cut, the pieces are cut once more and handed over in some order: it comes out as it was.
fn cut_and_mend(mut script: Script<'_>) {
    let (first_mtu, second_mtu) = (usize::from(script.word()), usize::from(script.word()));
    let (step, times) = (usize::from(script.byte()) | 1, usize::from(script.byte() % 16) + 1);
    let mut packet = script.bytes(4096).repeat(times);
    if packet.len() < 20 {
        return;
    }
    // No fragment and no DF, which reassembly forgets.
    packet[6] &= 0x80;
    packet[7] = 0;
    mend(&mut packet);
    if Ipv4Packet::parse(&mut packet, 0, Offload::NONE).is_err() {
        return;
    }
    let Some(pieces) = cut(&packet, first_mtu) else { return };
    let mut fragments = Vec::new();
    for piece in pieces {
        let Some(pieces) = cut(&piece, second_mtu) else { return };
        fragments.extend(pieces);
    }
    let count = fragments.len();
    if count > MAX_FRAGMENTS {
        return;
    }
    // An odd step visits each place of a ring whose size is a power of two.
    let ring = count.next_power_of_two();
    let order = (0..ring).map(|turn| turn * step % ring).filter(|&place| place < count);
    let mut reassembly = Reassembly::default();
    let mut whole = None;
    for (nth, place) in order.enumerate() {
        let fragment = Ipv4Packet::parse(&mut fragments[place], 0, Offload::NONE).expect("well-formed");
        whole = reassembly.push(&fragment, Timestamp::ORIGIN).expect("it is taken");
        assert_eq!(whole.is_some(), nth + 1 == count, "complete with the last, and not before");
    }
    assert_eq!(whole, Some(packet));
    assert!(reassembly.is_empty());
}

fn cut(packet: &[u8], mtu: usize) -> Option<Vec<Vec<u8>>> {
    let mut fragments = Fragments::new(packet, mtu).ok()?;
    let mut out = vec![0; mtu.max(packet.len())];
    let mut pieces = Vec::new();
    while let Some(len) = fragments.next_into(&mut out) {
        assert!(len <= mtu || len == packet.len());
        pieces.push(out[..len].to_vec());
    }
    assert!(pieces.len() == 1 || pieces.iter().all(|piece| piece.len() <= mtu));
    Some(pieces)
}

/// Bytes that nobody has checked are cut, or refused.
fn cut_anything(mut script: Script<'_>) {
    let mtu = usize::from(script.word());
    let bytes = script.bytes(usize::MAX);
    if let Some(pieces) = cut(&bytes, mtu) {
        assert!(!pieces.is_empty());
    }
}

fn sequences(mut script: Script<'_>) {
    let mut now = Timestamp::from_secs(1_000);
    let mut reassembly = Reassembly::default();
    while !script.is_over() {
        match script.byte() % 8 {
            0 => {
                now = now + Duration::from_millis(u64::from(script.word()));
                expire(&mut reassembly, now);
            }
            // A flood of first fragments.
            1 => {
                let (source, times, len) = (script.byte(), script.word() % 512, script.byte());
                for identification in 0..times {
                    let payload = vec![0; usize::from(len) * 256];
                    push(&mut reassembly, &mut fragment(source, identification, 0x2000, payload), now);
                }
            }
            // A fragment with the script's own header.
            2 => {
                let mut bytes = script.some_bytes(128);
                mend(&mut bytes);
                push(&mut reassembly, &mut bytes, now);
            }
            _ => {
                let (source, identification) = (script.byte() % 4, u16::from(script.byte() % 4));
                let field = script.word();
                let len = usize::from(script.byte()) * usize::from(script.pick([1_u8, 8, 64, 255]));
                let payload = script.bytes(8).into_iter().cycle().take(len).collect();
                push(&mut reassembly, &mut fragment(source, identification, field, payload), now);
            }
        }
        assert!(reassembly.len() <= MAX_DATAGRAMS);
        assert!(reassembly.is_empty() || reassembly.next_expiry().is_some_and(|due| due <= now + TIMEOUT));
    }
    let end = now + TIMEOUT;
    expire(&mut reassembly, end);
    assert!(reassembly.is_empty());
    assert_eq!(reassembly.next_expiry(), None);
    // Nothing is held that is not seen: one source has its whole share again.
    for identification in 0..MAX_DATAGRAMS_PER_SOURCE as u16 {
        push(&mut reassembly, &mut fragment(0, identification, 0x2000, vec![0; 8]), end);
    }
    assert_eq!(reassembly.len(), MAX_DATAGRAMS_PER_SOURCE);
}

fn expire(reassembly: &mut Reassembly, now: Timestamp) {
    reassembly.expire_with(now, |first| {
        let first = Ipv4Packet::parse(first, 0, Offload::NONE).expect("well-formed");
        assert_eq!(first.fragment_offset(), 0);
    });
    assert!(reassembly.next_expiry().is_none_or(|due| due > now));
}

fn push(reassembly: &mut Reassembly, bytes: &mut [u8], now: Timestamp) {
    let Ok(packet) = Ipv4Packet::parse(bytes, 0, Offload::NONE) else { return };
    if let Ok(Some(mut whole)) = reassembly.push(&packet, now) {
        let len = whole.len();
        match Ipv4Packet::parse(&mut whole, 0, Offload::NONE) {
            Ok(whole) => assert!(!whole.is_fragment() && whole.total_len() == len),
            // The transport header is seen for the first time.
            Err(reason) => assert_eq!(reason, tidegate_engine::drop_reason::DropReason::BadTransportHeader),
        }
    }
    reassembly.take_discarded();
}

fn fragment(source: u8, identification: u16, field: u16, payload: Vec<u8>) -> Vec<u8> {
    let mut bytes = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
    bytes[4..6].copy_from_slice(&identification.to_be_bytes());
    bytes[6..8].copy_from_slice(&field.to_be_bytes());
    bytes.extend(Ipv4Addr::new(198, 51, 100, source).octets());
    bytes.extend(Ipv4Addr::new(203, 0, 113, 1).octets());
    bytes.extend(payload);
    mend(&mut bytes);
    bytes
}
