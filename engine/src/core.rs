//! What the event loop drives: a gateway's shard or a client.

use std::net::{Ipv4Addr, SocketAddrV4};

use crate::arena::{Arena, Span};
use crate::clock::Timestamp;
use crate::drop_reason::DropCounters;
use crate::external::reservation::ReserveRequest;
use crate::fair_queue::Owner;
use crate::handoffs::Handoff;
use crate::messages::{Command, ShardStatus};
use crate::outbox::Outbox;
use crate::transport::ReceivedTrain;
use crate::tunnel::{PeerId, Tunnel};
use crate::wire::Offload;

/// A packet core without I/O: packets and `now` come in as arguments, packets and the next wake-up come out.
pub trait Core {
    /// Takes a train of datagrams.
    fn receive_datagrams(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        train: ReceivedTrain,
        outbox: &mut Outbox,
    );

    /// Whose datagrams these seem to be, so that they wait in that peer's queue. Nothing has been verified yet.
    fn sender(&self, _train: &[u8], _from: SocketAddrV4) -> Owner<PeerId> {
        Owner::Unknown
    }

    /// Which client this packet of the external interface seems to be for, so that it waits in that client's queue.
    /// Nothing has been verified yet.
    fn recipient(&self, _packet: &[u8]) -> Owner<Ipv4Addr> {
        Owner::Unknown
    }

    /// Routes what was opened since the last flush.
    fn flush_peers(&mut self, now: Timestamp, arena: &mut Arena, outbox: &mut Outbox);

    /// Takes a packet of the TUN device.
    fn receive_host(
        &mut self,
        now: Timestamp,
        arena: &mut Arena,
        packet: Span,
        offload: Offload,
        outbox: &mut Outbox,
    );

    /// The one place where timers run and state expires.
    fn poll(&mut self, now: Timestamp, outbox: &mut Outbox);

    /// When [`Self::poll`] has something to do next; `None`: not before another packet comes.
    fn next_wakeup(&self) -> Option<Timestamp>;

    /// What [`crate::outbox::send_to_peers`] needs: the tunnel and the drop counters.
    fn sealing(&mut self) -> (&mut Tunnel, &mut DropCounters);

    /// The sessions with the peers.
    fn tunnel(&mut self) -> &mut Tunnel {
        self.sealing().0
    }

    /// Packets that were not delivered.
    fn drops(&mut self) -> &mut DropCounters;

    /// A snapshot of the counters.
    fn status(&self, now: Timestamp) -> ShardStatus;

    /// Carries out a command.
    fn carry_out(&mut self, now: Timestamp, command: Command, outbox: &mut Outbox);

    /// The end of a turn: tells Python what there is to tell, and returns which external ports should be reserved. Not
    /// called before there is a reserver.
    fn end_turn(&mut self) -> Vec<ReserveRequest> {
        Vec::new()
    }

    /// Fetches what [`Self::receive_external`] will need for this packet into the processor's caches.
    fn prefetch_external(&self, _arena: &Arena, _packet: Span) {}

    /// Takes a packet of the external interface.
    fn receive_external(
        &mut self,
        _now: Timestamp,
        _arena: &mut Arena,
        _packet: Span,
        _offload: Offload,
        _outbox: &mut Outbox,
    ) {
    }

    /// Takes packets of the external interface that arrived in one
    /// ([`split_encapsulated`](crate::wire::VirtioNetHeader::split_encapsulated)).
    fn receive_external_segments(
        &mut self,
        _now: Timestamp,
        _arena: &mut Arena,
        _segments: Vec<Vec<u8>>,
        _outbox: &mut Outbox,
    ) {
    }

    /// Takes an ARP reply.
    fn receive_arp(&mut self, _now: Timestamp, _frame: &[u8], _outbox: &mut Outbox) {}

    /// Takes what another shard found to belong here.
    fn receive_handoff(
        &mut self,
        _now: Timestamp,
        _arena: &mut Arena,
        _handoff: Handoff,
        _outbox: &mut Outbox,
    ) {
    }
}
