//! The event loop of one thread, and, on a packet's way, the only place that reads the clock.
//!
//! Theory of operation. A turn: wait for a device, a command or a deadline; empty what is ready into the fair queues
//! ([`crate::intake`]); let the core route a bounded share of what waits there; send what the core put into the outbox;
//! start over, at once if something still waits. So nobody waits long behind somebody else's bulk flow. Packets of the
//! TUN device are routed as they come, [`TUN_PACKETS`] a turn: the device has a queue of its own in the kernel.
//! Readiness is level-triggered, so what a turn left is taken by the next. Between two turns a busy thread lets others
//! go first now and then ([`TimeSlice`]). When nothing waits, is ready or is due, the thread looks again for some
//! microseconds if more is likely to come ([`PollWindow`]), and then waits in the kernel without a timeout: idle costs
//! nothing.

use std::io;
use std::net::Ipv4Addr;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::mpsc::{Receiver, SyncSender};
use std::time::Duration;

use crate::arena::{Arena, BUFFER_SIZE, LARGEST_PACKET};
use crate::clock::{Timestamp, monotonic_now, unix_time_at_origin};
use crate::core::Core;
use crate::drop_reason::DropReason;
use crate::external::ExternalGateway;
use crate::external::packet_socket::Frame;
use crate::external::reservation::{PendingRequests, ReserverHandle};
use crate::handoffs::{BegunSessions, Handoff, Handoffs};
use crate::intake::Intake;
use crate::messages::{Command, EventKind, Events};
use crate::outbox::{Outbox, TrainBuffer};
use crate::poll_window::PollWindow;
use crate::time_slice::TimeSlice;
use crate::transport::{ReceivedTrain, Transport};
use crate::tun::Tun;
use crate::tunnel::PeerId;
use crate::wake::{AlarmClock, Epoll, EventFd, Readiness};

mod send;

/// Enough for all that may wait, in whatever order it goes. Buffers that are never written to cost no memory.
const TRANSPORT_BUFFERS: usize = 96;
const EXTERNAL_BUFFERS: usize = 96;
const TUN_BUFFERS: usize = 8;
const TUN_PACKETS: usize = 64;

/// Where each device's buffers lie in the arena.
const TRANSPORT_RANGE: Range<usize> = 0..TRANSPORT_BUFFERS;
const EXTERNAL_RANGE: Range<usize> = TRANSPORT_RANGE.end..TRANSPORT_RANGE.end + EXTERNAL_BUFFERS;
const TUN_RANGE: Range<usize> = EXTERNAL_RANGE.end..EXTERNAL_RANGE.end + TUN_BUFFERS;

/// How often the wall clock is looked at: more rarely than handshakes are repeated.
const WALL_CLOCK_PAUSE: Duration = Duration::from_secs(1);
/// After what time a reserver that was too busy is asked again.
const ASK_AGAIN: Duration = Duration::from_millis(10);
/// Commands, or ARP messages, that one turn carries out, at most.
const MESSAGES_PER_TURN: usize = 64;

/// What a segment that is split off a frame costs beyond its bytes, in bytes of bulk: it is a packet that is routed on
/// its own, and handed to another shard as often as not. With that, what one turn splits fills at most three quarters
/// of the queue before that shard, and leaves the rest to handshakes and other clients.
const SEGMENT_WORK: usize = 2 * 1024;

/// The devices of one shard.
pub struct Devices {
    /// Where sealed datagrams travel.
    pub transport: Box<dyn Transport + Send>,
    /// The TUN device: every shard writes, one reads (several queues would reorder).
    pub tun: Tun,
    /// Whether this shard reads it.
    pub reads_tun: bool,
    /// Whether the TUN device takes superpackets.
    pub tun_offload: bool,
    /// A gateway's external interface.
    pub external: Option<ExternalGateway>,
}

/// How a shard is reached, and reaches others.
pub struct Links {
    /// Wakes this shard.
    pub wake: EventFdHandle,
    /// What it is told to do.
    pub commands: Receiver<Command>,
    /// What other shards found to belong here.
    pub handoffs: Handoffs,
    /// What sessions began there.
    pub begun: BegunSessions,
    /// The other shards, by number.
    pub shards: Vec<HandoffSender>,
    /// Whom to ask for external ports, once it has been started.
    pub reserver: Option<ReserverHandle>,
    /// What Python should know.
    pub events: Events,
}

/// The way into another shard's queue.
#[derive(Clone)]
pub struct HandoffSender {
    /// Its queue.
    pub queue: SyncSender<Handoff>,
    /// What it is told of sessions.
    pub begun: BegunSessions,
    /// Its alarm clock.
    pub wake: EventFdHandle,
}

/// A shared handle of a shard's wake-up descriptor.
pub type EventFdHandle = std::sync::Arc<EventFd>;

#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
enum Token {
    Wake,
    Transport,
    Tun,
    External,
    Arp,
    Alarm,
}

/// One shard: a core and its devices.
pub struct Shard<C> {
    core: C,
    devices: Devices,
    links: Links,
    epoll: Epoll,
    alarm: AlarmClock,
    poll_window: PollWindow,
    time_slice: TimeSlice,
    arena: Arena,
    outbox: Outbox,
    sealed: TrainBuffer,
    /// What the transport has brought, by the peer that seems to have sent it.
    trains: Intake<PeerId, ReceivedTrain>,
    /// What the external interface has brought, by the client that it seems to be for.
    frames: Intake<Ipv4Addr, Frame>,
    segment: Box<[u8]>,
    /// What the reserver will be asked for once it has room for another request.
    port_requests: PendingRequests,
    /// What the transport said of its overruns last.
    overruns: u32,
    /// When the wall clock is looked at again, if there is a turn then.
    wall_clock_due: Timestamp,
}

/// How a turn ends.
#[derive(PartialEq, Eq)]
enum Turn {
    Again,
    Stop,
}

impl<C: Core> Shard<C> {
    /// Puts the parts together; nothing runs yet.
    ///
    /// # Errors
    /// Where the kernel has no room for another epoll instance.
    pub fn new(core: C, devices: Devices, links: Links) -> Result<Self, crate::sys::DeviceError> {
        let (epoll, alarm) = (Epoll::new()?, AlarmClock::new()?);
        epoll.add(&alarm, Token::Alarm as u64)?;
        epoll.add(&*links.wake, Token::Wake as u64)?;
        epoll.add(devices.transport.as_fd(), Token::Transport as u64)?;
        if devices.reads_tun {
            epoll.add(&devices.tun, Token::Tun as u64)?;
        }
        if let Some(external) = &devices.external {
            epoll.add(&external.packets, Token::External as u64)?;
            epoll.add(&external.arp, Token::Arp as u64)?;
        }
        Ok(Self {
            core,
            devices,
            links,
            epoll,
            alarm,
            poll_window: PollWindow::default(),
            time_slice: TimeSlice::default(),
            arena: Arena::new(TUN_RANGE.end),
            outbox: Outbox::default(),
            sealed: TrainBuffer::default(),
            trains: Intake::new(TRANSPORT_RANGE),
            frames: Intake::new(EXTERNAL_RANGE),
            segment: vec![0; crate::wire::ipv4::MAX_PACKET_LEN].into_boxed_slice(),
            port_requests: PendingRequests::default(),
            overruns: 0,
            wall_clock_due: Timestamp::ORIGIN,
        })
    }

    /// Runs until told to stop.
    ///
    /// # Errors
    /// What the kernel says of the epoll instance, or that the TUN device was deleted; a device's other trouble is
    /// counted or told as an event, and survived.
    pub fn run(mut self) -> io::Result<()> {
        let mut ready = Readiness::with_capacity(8);
        loop {
            let now = self.wait(&mut ready)?;
            if let Some(slice) = self.time_slice.change(now) {
                // A kernel that does not know slices does without.
                crate::sys::run_in_slices_of(slice).ok();
            }
            for token in ready.tokens() {
                if self.receive(now, token)? == Turn::Stop {
                    return Ok(());
                }
            }
            if now >= self.wall_clock_due {
                self.core.tunnel().set_wall_clock(unix_time_at_origin());
                self.wall_clock_due = now + WALL_CLOCK_PAUSE;
            }
            self.serve_datagrams(now);
            self.serve_external(now);
            self.serve_handoffs(now);
            if self.core.next_wakeup().is_some_and(|deadline| deadline <= now) {
                self.core.poll(now, &mut self.outbox);
            }
            self.send(now);
            self.trains.end_turn();
            self.frames.end_turn();
            self.links.handoffs.end_turn();
            self.end_turn();
        }
    }

    /// Waits until a device is ready or a deadline has come, and returns what time it is then. While packets wait in
    /// the queues, it only looks; but lets others go first if its slice is over.
    fn wait(&mut self, ready: &mut Readiness) -> io::Result<Timestamp> {
        let began = self.let_others_go_first();
        if self.trains.is_waiting() || self.frames.is_waiting() || self.links.handoffs.is_waiting() {
            self.epoll.wait(ready, Some(Duration::ZERO))?;
            return Ok(began);
        }
        let ask_again = (!self.port_requests.is_empty()).then(|| began + ASK_AGAIN);
        let deadline = self.core.next_wakeup().into_iter().chain(ask_again).min();
        let until_due = deadline.map_or(Duration::MAX, |deadline| deadline.since(began));
        let look = until_due.min(self.poll_window.length());
        let mut now = began;
        while now.since(began) < look {
            self.epoll.wait(ready, Some(Duration::ZERO))?;
            if !ready.is_empty() {
                now = monotonic_now();
                self.time_slice.waited(began, now);
                return Ok(now);
            }
            std::thread::yield_now();
            now = monotonic_now();
        }
        match deadline {
            Some(deadline) if deadline <= now => self.epoll.wait(ready, Some(Duration::ZERO))?,
            Some(deadline) => {
                self.alarm.ring_by(deadline)?;
                self.epoll.wait(ready, None)?;
            }
            None => self.epoll.wait(ready, None)?,
        }
        now = monotonic_now();
        self.poll_window.slept(now.since(began));
        self.time_slice.waited(began, now);
        Ok(now)
    }

    /// Hands the processor to whoever waits for it if this thread's slice is over. Returns what time it is then.
    fn let_others_go_first(&mut self) -> Timestamp {
        let now = monotonic_now();
        if !self.time_slice.is_over(now) {
            return now;
        }
        std::thread::yield_now();
        let now = monotonic_now();
        self.time_slice.begin(now);
        now
    }

    fn receive(&mut self, now: Timestamp, token: u64) -> io::Result<Turn> {
        const WAKE: u64 = Token::Wake as u64;
        const TRANSPORT: u64 = Token::Transport as u64;
        const TUN: u64 = Token::Tun as u64;
        const EXTERNAL: u64 = Token::External as u64;
        const ALARM: u64 = Token::Alarm as u64;
        match token {
            // What is due is found by its time, every turn.
            ALARM => self.alarm.silence()?,
            WAKE => return Ok(self.receive_messages(now)),
            TRANSPORT => self.receive_datagrams(now),
            TUN => self.receive_host(now)?,
            EXTERNAL => self.receive_external(now),
            _ => self.receive_arp(now),
        }
        Ok(Turn::Again)
    }

    // ---- What comes in, in the order of a packet's walk.

    fn receive_datagrams(&mut self, now: Timestamp) {
        let Self { core, devices, arena, trains, .. } = self;
        while let Some((slots, arrived)) = trains.room(now) {
            if devices.transport.receive(arena, slots, arrived).is_err() {
                // An ICMP error about an earlier datagram (a client that went away): the next read goes on.
                core.drops().count(DropReason::ReceiveFailed);
            }
            let half_full = || devices.transport.is_half_full();
            let owner = |arena: &Arena, train: &ReceivedTrain| {
                core.sender(arena.get(train.span.take(train.segment_size)), train.from.remote)
            };
            if !trains.accept(now, arena, half_full, owner) {
                return;
            }
        }
    }

    fn receive_external(&mut self, now: Timestamp) {
        let Self { core, devices, links, arena, frames, .. } = self;
        let Some(external) = &mut devices.external else { return };
        while let Some((slots, arrived)) = frames.room(now) {
            if let Err(error) = external.packets.receive(arena, slots, arrived) {
                core.drops().count(DropReason::ReceiveFailed);
                links.events.push(EventKind::ExternalDown, format!("the external interface: {error}"));
            }
            for frame in &*arrived {
                core.prefetch_external(arena, frame.span);
            }
            let half_full = || external.packets.is_half_full();
            let owner = |arena: &Arena, frame: &Frame| core.recipient(arena.get(frame.span));
            if !frames.accept(now, arena, half_full, owner) {
                return;
            }
        }
    }

    /// Small packets come one by one, at a system call each, and are packed one behind another: so many of them fit
    /// into a turn that they leave in long trains.
    fn receive_host(&mut self, now: Timestamp) -> io::Result<()> {
        let (mut buffer, mut offset) = (TUN_RANGE.start, 0);
        for _ in 0..TUN_PACKETS {
            match self.devices.tun.receive(&mut self.arena, buffer, offset) {
                Ok(Some(received)) => match received.offload.offload_of(self.arena.get_mut(received.span)) {
                    Some(offload) => {
                        self.core.receive_host(
                            now,
                            &mut self.arena,
                            received.span,
                            offload,
                            &mut self.outbox,
                        );
                        offset = received.span.range().end;
                    }
                    None => self.core.drops().count(DropReason::UnknownOffload),
                },
                Ok(None) => break,
                Err(error) if Tun::is_gone(&error) => {
                    let name = self.devices.tun.name();
                    return Err(io::Error::new(error.kind(), format!("the TUN device {name} was deleted")));
                }
                Err(_) => {
                    self.core.drops().count(DropReason::ReceiveFailed);
                    break;
                }
            }
            if offset + LARGEST_PACKET > BUFFER_SIZE {
                (buffer, offset) = (buffer + 1, 0);
                if buffer == TUN_RANGE.end {
                    break;
                }
            }
        }
        Ok(())
    }

    fn receive_arp(&mut self, now: Timestamp) {
        let Some(external) = &mut self.devices.external else { return };
        for _ in 0..MESSAGES_PER_TURN {
            match external.arp.receive(&mut self.segment) {
                Ok(Some(frame)) => self.core.receive_arp(now, frame, &mut self.outbox),
                Ok(None) => return,
                // The interface went down: the packet socket tells it, too.
                Err(_) => return self.core.drops().count(DropReason::ReceiveFailed),
            }
        }
    }

    fn receive_messages(&mut self, now: Timestamp) -> Turn {
        // Cleared first: whoever adds a message from here on wakes us again.
        if self.links.wake.clear().is_err() {
            return Turn::Again;
        }
        for taken in 1..=MESSAGES_PER_TURN {
            match self.links.commands.try_recv() {
                Ok(Command::Stop) => return Turn::Stop,
                Ok(command) => self.carry_out(now, command),
                Err(_) => break,
            }
            if taken == MESSAGES_PER_TURN {
                self.wake_again();
            }
        }
        self.links.handoffs.collect(now);
        for remote_index in self.links.begun.take() {
            self.core.tunnel().set_begun_elsewhere(remote_index, now);
        }
        Turn::Again
    }

    fn wake_again(&self) {
        if let Err(error) = self.links.wake.notify() {
            self.links.events.push(EventKind::ShardFailed, format!("a shard cannot wake itself: {error}"));
        }
    }

    fn carry_out(&mut self, now: Timestamp, command: Command) {
        match command {
            Command::Status(reply) => {
                self.count_overruns();
                let mut status = self.core.status(now);
                status.drops.merge(self.trains.drops());
                status.drops.merge(self.frames.drops());
                status.drops.merge(self.links.handoffs.drops());
                status.offloads = self.offloads_in_use();
                // Whoever asked may have given up: then nobody misses the answer.
                drop(reply.try_send(status));
            }
            Command::SetExternal { link, host_addresses, filter } => {
                if let Some(external) = &mut self.devices.external {
                    if let Err(error) = external.set_link(&link, &filter) {
                        self.links.events.push(EventKind::ExternalDown, error.to_string());
                    }
                }
                let command = Command::SetExternal { link, host_addresses, filter };
                self.core.carry_out(now, command, &mut self.outbox);
            }
            Command::ExternalSockets(sockets) => self.replace_external(*sockets),
            Command::SetFilter(filter) => {
                if let Some(external) = &self.devices.external {
                    if let Err(error) = external.packets.set_filter(&filter) {
                        self.links.events.push(EventKind::ExternalDown, error.to_string());
                    }
                }
            }
            Command::Reserver(reserver) => self.links.reserver = Some(reserver),
            other => self.core.carry_out(now, other, &mut self.outbox),
        }
    }

    /// What the kernel dropped before we could see it. It counts by itself; we ask when somebody asks us.
    fn count_overruns(&mut self) {
        let overruns = self.devices.transport.overruns();
        let new = overruns.wrapping_sub(self.overruns);
        self.overruns = overruns;
        self.core.drops().add(DropReason::ReceiveOverrun, u64::from(new));
        if let Some(Ok(statistics)) =
            self.devices.external.as_ref().map(|external| external.packets.statistics())
        {
            self.core.drops().add(DropReason::ReceiveOverrun, u64::from(statistics.overruns));
        }
        if let Some(external) = &mut self.devices.external {
            self.core.drops().add(DropReason::UnknownOffload, external.packets.take_undescribable());
        }
    }

    /// Turns to new sockets. Of the old ones, whatever they still hold is lost.
    fn replace_external(&mut self, sockets: ExternalGateway) {
        let added = self
            .epoll
            .add(&sockets.packets, Token::External as u64)
            .and_then(|()| self.epoll.add(&sockets.arp, Token::Arp as u64));
        if let Err(error) = added {
            // With any sockets, this shard would miss its part of what comes: the others share the interface's packets
            // with the new ones by now.
            let detail = format!("a shard cannot watch its new sockets of the external interface: {error}");
            return self.links.events.push(EventKind::ShardFailed, detail);
        }
        // Closing the old ones ends their membership in epoll and fanout.
        self.devices.external = Some(sockets);
    }

    fn offloads_in_use(&self) -> Vec<(&'static str, bool)> {
        let mut offloads = vec![
            ("tun", self.devices.tun_offload),
            ("tun_uso", self.devices.tun_offload && self.devices.tun.offloads().uso),
            ("udp_gso", self.devices.transport.gso()),
            ("udp_gro", self.devices.transport.gro()),
        ];
        if let Some(external) = &self.devices.external {
            offloads.push(("external", external.offload));
        }
        offloads
    }

    // ---- What waits, in fair order.

    fn serve_datagrams(&mut self, now: Timestamp) {
        serve_trains(now, &mut self.trains, &mut self.core, &mut self.arena, &mut self.outbox);
    }

    fn serve_external(&mut self, now: Timestamp) {
        serve_frames(now, &mut self.frames, &mut self.core, &mut self.arena, &mut self.outbox);
    }

    fn serve_handoffs(&mut self, now: Timestamp) {
        while let Some(handoff) = self.links.handoffs.next(now) {
            self.core.receive_handoff(now, &mut self.arena, handoff, &mut self.outbox);
            self.links.handoffs.charge(self.core.tunnel().take_work());
        }
    }

    fn end_turn(&mut self) {
        let Some(reserver) = &self.links.reserver else { return };
        if !self.port_requests.send(self.core.end_turn(), reserver) {
            self.links.events.push(EventKind::PortsExhausted, "the port reserver is gone");
        }
    }
}

/// Hands the core what waits in `trains`, as much as the turn may serve.
fn serve_trains(
    now: Timestamp,
    trains: &mut Intake<PeerId, ReceivedTrain>,
    core: &mut impl Core,
    arena: &mut Arena,
    outbox: &mut Outbox,
) {
    while let Some(train) = trains.next(now) {
        core.receive_datagrams(now, arena, train, outbox);
        trains.charge(core.tunnel().take_work());
    }
    core.flush_peers(now, arena, outbox);
}

/// Hands the core what waits in `frames`, as much as the turn may serve.
fn serve_frames(
    now: Timestamp,
    frames: &mut Intake<Ipv4Addr, Frame>,
    core: &mut impl Core,
    arena: &mut Arena,
    outbox: &mut Outbox,
) {
    while let Some(frame) = frames.next(now) {
        if let Some(offload) = frame.header.offload_of(arena.get_mut(frame.span)) {
            core.receive_external(now, arena, frame.span, offload, outbox);
        } else if let Some(segments) = frame.header.split_encapsulated(arena.get(frame.span)) {
            frames.charge(segments.len() * SEGMENT_WORK);
            core.receive_external_segments(now, arena, segments, outbox);
        } else {
            core.drops().count(DropReason::UnknownOffload);
        }
    }
}

#[cfg(test)]
mod tests;
