//! What a turn sends: the outbox, emptied into the devices.
//!
//! A superpacket that a device refuses is split here and sent in pieces, and from then on all are. Whatever the kernel
//! has no room for dies and is counted.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::TrySendError;

use super::{HandoffSender, Links, Shard};
use crate::clock::Timestamp;
use crate::core::Core;
use crate::drop_reason::{DropCounters, DropReason};
use crate::handoffs::Handoff;
use crate::messages::{EventKind, Events};
use crate::outbox::send_to_peers;
use crate::transport::{SendTrain, Transport};
use crate::wire::{Offload, VirtioNetHeader};

impl Links {
    /// Tells the other shards by which indices they know what is sealed here: see
    /// [`Tunnel::is_own`](crate::tunnel::Tunnel::is_own).
    pub(crate) fn tell_what_began(&self, remote_indices: impl IntoIterator<Item = u32>) {
        let remote_indices: Vec<u32> = remote_indices.into_iter().collect();
        if remote_indices.is_empty() {
            return;
        }
        for other in self.shards.iter().filter(|other| !Arc::ptr_eq(&other.wake, &self.wake)) {
            remote_indices.iter().for_each(|&index| other.begun.tell(index));
            self.wake(other);
        }
    }

    /// Puts packets into the queues before their shards, and wakes each of these once.
    pub(crate) fn hand_over(
        &self,
        handoffs: impl IntoIterator<Item = (u8, Handoff)>,
        drops: &mut DropCounters,
    ) {
        let mut reached = [false; 1 + u8::MAX as usize];
        for (shard, handoff) in handoffs {
            let shard = usize::from(shard);
            let queued = match self.shards.get(shard) {
                Some(other) => other.queue.try_send(handoff),
                None => Err(TrySendError::Disconnected(handoff)),
            };
            match queued {
                Ok(()) => reached[shard] = true,
                Err(TrySendError::Full(mut handoff) | TrySendError::Disconnected(mut handoff)) => {
                    drops.add(DropReason::QueueFull, handoff.packets() as u64);
                }
            }
        }
        for (other, _) in self.shards.iter().zip(reached).filter(|(_, is_reached)| *is_reached) {
            self.wake(other);
        }
    }

    /// Wakes another shard. Should that fail, what it was sent still waits for it, and is not lost.
    fn wake(&self, other: &HandoffSender) {
        if let Err(error) = other.wake.notify() {
            let detail = format!("a shard cannot wake another: {error}");
            self.events.push(EventKind::ShardFailed, detail);
        }
    }
}

impl<C: Core> Shard<C> {
    /// Sends all that the core put into the outbox.
    pub(super) fn send(&mut self, now: Timestamp) {
        // Before the first of it leaves.
        self.links.tell_what_began(self.core.tunnel().take_begun());
        self.send_external();
        self.send_tun();
        self.send_peers(now);
        self.send_handoffs();
        self.outbox.clear();
    }

    fn send_external(&mut self) {
        let Some(external) = &mut self.devices.external else { return };
        for frame in self.outbox.arp.drain(..) {
            if external.arp.send(&frame).is_err() {
                self.core.drops().count(DropReason::SendFailed);
            }
        }
        if self.outbox.external.is_empty() {
            return;
        }
        let offload_before = external.offload;
        let dropped =
            external.send_outbound(&self.outbox.external, &self.outbox.tails, &self.arena, &mut self.segment);
        self.core.drops().add(DropReason::SendFailed, dropped as u64);
        if offload_before && !external.offload {
            self.links.events.push(
                EventKind::OffloadDisabled,
                "the external interface refused a superpacket: packets are split before they are sent",
            );
        }
    }

    fn send_tun(&mut self) {
        for frame in &self.outbox.tun {
            let tails = frame.packet.tails_of(&self.outbox.tails);
            let head = frame.packet.head.get(&self.arena);
            let sent = if self.devices.tun_offload || frame.shape.offload() == Offload::NONE {
                let mut slices = Vec::with_capacity(1 + tails.len());
                slices.push(io::IoSlice::new(head));
                slices.extend(tails.iter().map(|&tail| io::IoSlice::new(self.arena.get(tail))));
                self.devices.tun.send(frame.header, &slices)
            } else {
                Err(io::Error::from_raw_os_error(libc::EINVAL))
            };
            let Err(error) = sent else { continue };
            if error.raw_os_error() != Some(libc::EINVAL) || frame.shape.offload() == Offload::NONE {
                self.core.drops().count_segments(DropReason::SendFailed, frame.shape);
                continue;
            }
            if self.devices.tun_offload {
                self.devices.tun_offload = false;
                self.links.events.push(
                    EventKind::OffloadDisabled,
                    "the TUN device refused a superpacket: packets are split before they are injected",
                );
            }
            let mut segments = frame.packet.segments(frame.shape, &self.outbox.tails, &self.arena);
            while let Some(len) = segments.next_into(&mut self.segment) {
                let segment = io::IoSlice::new(&self.segment[..len]);
                if self.devices.tun.send(VirtioNetHeader::default(), &[segment]).is_err() {
                    self.core.drops().count(DropReason::SendFailed);
                }
            }
        }
    }

    fn send_peers(&mut self, now: Timestamp) {
        let Self { core, devices, links, arena, outbox, sealed, .. } = self;
        let send = |trains: &[SendTrain<'_>], core: &mut C| {
            send_trains(&mut *devices.transport, trains, core, &links.events);
        };
        send_to_peers(outbox, core, arena, sealed, now, send);
    }

    fn send_handoffs(&mut self) {
        self.links.hand_over(self.outbox.handoffs.drain(..), self.core.drops());
    }
}

fn send_trains(
    transport: &mut dyn Transport,
    trains: &[SendTrain<'_>],
    core: &mut impl Core,
    events: &Events,
) {
    let gso_before = transport.gso();
    let outcome = transport.send(trains);
    core.drops().add(DropReason::SendFailed, outcome.dropped as u64);
    if let Some(address) = outcome.gone {
        core.tunnel().forget_local(address);
    }
    if gso_before && !transport.gso() {
        let why = outcome.error.map_or_else(String::new, |error| format!(" ({error})"));
        events.push(
            EventKind::OffloadDisabled,
            format!("the kernel refused UDP_SEGMENT{why}: datagrams are sent one by one"),
        );
    }
}
