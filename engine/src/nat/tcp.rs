//! What the NAT knows about one TCP connection: RFC 5382, RFC 7857 §2, and the sequence checks that keep strangers out.
//!
//! # Theory of operation
//!
//! The NAT is no TCP endpoint. It follows the connection just far enough to answer three questions: which idle timer
//! applies, is an RST from outside to be believed, and does an ICMP error quote a segment that really is in flight.
//! For these it keeps, for each end, what RFC 9293 §3.3.1 calls SND.UNA and SND.NXT, and the right edge of the window
//! that the other end offers.
//!
//! The client is trusted with its own connection; the outside is not. A segment from outside moves the state only if
//! it fits the window and acknowledges what was sent, so that nobody can first poison the numbers and then pass the
//! checks (ReDAN). Others are still translated, for the client's own TCP is the better judge, but they refresh nothing;
//! except for RST, which is dropped.
//!
//! A SYN from outside counts until the client has answered one: then it tells, by what its SYN-ACK acknowledges, which
//! one it believes. That may be one that did not fit, where the client has forgotten a connection that stands here.
//!
//! ```text
//!   outbound SYN, or an inbound one that the filter admits
//!        |
//!        v          both SYNs acknowledged
//!     Opening ------------------------------> Established
//!        |                                     |    ^
//!        | RST                  FIN both ways, |    | the client sends data after an RST
//!        v                              or RST v    | (RFC 7857 §2.2)
//!     Closing <-------------------------------------+
//!        |   a new SYN: Opening again; the client's, and its SYN-ACK with a new number, in any state
//!        v
//!     removed, when the timer of its state has run out
//! ```

use crate::wire::Ipv4Packet;
use crate::wire::ipv4::{TcpFields, tcp_flags};

/// The largest window scale (RFC 7323 §2.3).
const MAX_WINDOW_SCALE: u8 = 14;
/// The window assumed before the receiver has said otherwise: the largest without scaling.
const UNSCALED_WINDOW: u32 = 65_535;

/// The state of a connection; each has its own idle timer. Of several connections, the greatest counts.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum TcpState {
    /// FIN both ways, or RST.
    Closing,
    /// The handshake is not complete.
    Opening,
    /// It is.
    Established,
}

/// What to do with a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum SegmentVerdict {
    /// Translate it; it is a sign of life.
    Refresh,
    /// Translate it, but it proves nothing.
    Pass,
    /// The same, and it is a call with which the connection begins anew.
    Call,
    /// Drop it: a forged RST.
    Refuse,
}

/// A TCP segment, or a superpacket that stands for several in a row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    sequence: u32,
    acknowledgment: u32,
    flags: u8,
    window: u16,
    payload: u32,
    window_scale: Option<u8>,
}

impl Segment {
    /// The segment that `packet` carries; `fields` are its TCP header's.
    pub(super) fn of(packet: &Ipv4Packet<'_>, fields: TcpFields) -> Self {
        let window_scale = if fields.flags & tcp_flags::SYN != 0 {
            let header = packet.transport_bytes();
            window_scale(header.get(20..packet.transport_header_len()).unwrap_or(&[]))
        } else {
            None
        };
        Self {
            sequence: fields.sequence,
            acknowledgment: fields.acknowledgment,
            flags: fields.flags,
            window: fields.window,
            payload: packet.transport_payload_len() as u32,
            window_scale,
        }
    }

    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// Whether it asks for a new connection: SYN without ACK, RST or FIN.
    pub(super) fn opens(&self) -> bool {
        const MASK: u8 = tcp_flags::SYN | tcp_flags::ACK | tcp_flags::RST | tcp_flags::FIN;
        self.flags & MASK == tcp_flags::SYN
    }

    /// Whether its receiver may take it for a call: SYN without ACK, whatever else it has, for that may be processed
    /// after the SYN has been answered (RFC 9293 §3.10.7.2).
    pub(super) fn may_open(&self) -> bool {
        self.has(tcp_flags::SYN) && !self.has(tcp_flags::ACK)
    }

    /// Whether it ends its connection.
    pub(super) fn resets(&self) -> bool {
        self.has(tcp_flags::RST)
    }

    /// The sequence number behind its last byte; SYN and FIN count as one each (RFC 9293 §3.4).
    fn end(&self) -> u32 {
        self.sequence
            .wrapping_add(self.payload)
            .wrapping_add(u32::from(self.has(tcp_flags::SYN)))
            .wrapping_add(u32::from(self.has(tcp_flags::FIN)))
    }
}

/// One end of the connection, as a sender. Packed, so that a session is one cache line.
#[repr(Rust, packed)]
#[derive(Clone, Copy, Debug)]
struct Sender {
    /// Its initial sequence number.
    initial: u32,
    /// SND.UNA: the oldest byte that the other end has not acknowledged. The other end's RCV.NXT.
    unacknowledged: u32,
    /// SND.NXT.
    next: u32,
    /// The right edge of the window that the other end offers it.
    limit: u32,
    progress: Progress,
}

/// What one end has done, as a set of flags, and its window scale.
#[derive(Clone, Copy, Debug)]
struct Progress(u8);

impl Progress {
    /// The scale of the windows that it offers; all ones if its SYN had no such option.
    const WINDOW_SCALE: u8 = 0x0f;
    /// Its SYN was seen.
    const STARTED: u8 = 0x10;
    /// Its SYN was acknowledged.
    const SYNCHRONIZED: u8 = 0x20;
    /// It has sent FIN.
    const FINISHED: u8 = 0x40;
    /// It has begun: its SYN was the first, or the client's, which calls whom it has not answered.
    const OPENED: u8 = 0x80;

    fn new(flags: u8, window_scale: Option<u8>) -> Self {
        Self(flags | window_scale.unwrap_or(Self::WINDOW_SCALE))
    }

    fn has(self, flag: u8) -> bool {
        self.0 & flag != 0
    }

    fn add(&mut self, flag: u8) {
        self.0 |= flag;
    }

    fn remove(&mut self, flags: u8) {
        self.0 &= !flags;
    }

    fn window_scale(self) -> Option<u8> {
        Some(self.0 & Self::WINDOW_SCALE).filter(|&scale| scale <= MAX_WINDOW_SCALE)
    }
}

impl Sender {
    /// Of whom nothing has been seen.
    fn silent() -> Self {
        Self { initial: 0, unacknowledged: 0, next: 0, limit: 0, progress: Progress::new(0, None) }
    }

    fn start(syn: &Segment) -> Self {
        let finished = if syn.has(tcp_flags::FIN) { Progress::FINISHED } else { 0 };
        Self {
            initial: syn.sequence,
            unacknowledged: syn.sequence,
            next: syn.end(),
            limit: syn.end().wrapping_add(UNSCALED_WINDOW),
            progress: Progress::new(Progress::STARTED | finished, syn.window_scale),
        }
    }

    /// One that begins.
    fn open(syn: &Segment) -> Self {
        let mut sender = Self::start(syn);
        sender.progress.add(Progress::OPENED);
        sender
    }

    /// Its SYN was another one than we know of: the one that the other end acknowledges here.
    fn restart(&mut self, acknowledgment: u32) {
        self.initial = acknowledgment.wrapping_sub(1);
        self.unacknowledged = self.initial;
        self.next = acknowledgment;
        self.limit = acknowledgment.wrapping_add(UNSCALED_WINDOW);
        self.progress.remove(Progress::SYNCHRONIZED | Progress::FINISHED);
    }

    fn has(&self, flag: u8) -> bool {
        self.progress.has(flag)
    }

    /// Whether this acknowledges its SYN, and nothing that it has not sent.
    fn is_answered_by(&self, acknowledgment: u32) -> bool {
        after(acknowledgment, self.initial) && !after(acknowledgment, self.next)
    }

    /// Whether this can be an acknowledgment by the other end: of nothing that it has not sent, and not of what was
    /// acknowledged so long ago that it cannot be under way any more: further back than by a window (RFC 5961 §5), or
    /// before its SYN, while that is not acknowledged (RFC 9293 §3.10.7.4).
    fn can_be_acknowledged(&self, acknowledgment: u32) -> bool {
        let late = self.unacknowledged.wrapping_sub(self.window());
        let oldest = if self.has(Progress::SYNCHRONIZED) { late } else { self.initial.wrapping_add(1) };
        !after(oldest, acknowledgment) && !after(acknowledgment, self.next)
    }

    fn window_scale(&self) -> Option<u8> {
        self.progress.window_scale()
    }

    fn note_fin(&mut self, segment: &Segment) {
        if segment.has(tcp_flags::FIN) {
            self.progress.add(Progress::FINISHED);
        }
    }

    /// Takes in an acknowledgment by the other end, and the window that comes with it.
    fn acknowledge(&mut self, acknowledgment: u32, window: u32) {
        if after(acknowledgment, self.unacknowledged) && !after(acknowledgment, self.next) {
            self.unacknowledged = acknowledgment;
            self.progress.add(Progress::SYNCHRONIZED);
        }
        let limit = acknowledgment.wrapping_add(window);
        if acknowledgment == self.unacknowledged && after(limit, self.limit) {
            self.limit = limit;
        }
    }

    /// The window that the receiver offers.
    fn window(&self) -> u32 {
        self.limit
            .wrapping_sub(self.unacknowledged)
            .clamp(UNSCALED_WINDOW, UNSCALED_WINDOW << MAX_WINDOW_SCALE)
    }

    /// Whether a segment of this sender that ends at `end` lies in the receiver's window, or not further behind it than
    /// a retransmission can be.
    fn fits(&self, end: u32) -> bool {
        let window = self.window();
        !after(end, self.unacknowledged.wrapping_add(window))
            && !after(self.unacknowledged.wrapping_sub(window), end)
    }
}

/// One TCP connection. See the module's text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Connection {
    state: TcpState,
    /// Closing because of an RST, which may turn out to be forged.
    reset: bool,
    client: Sender,
    remote: Sender,
}

impl Connection {
    /// The connection that a client's SYN asks for.
    pub(super) fn opened_by_client(syn: &Segment) -> Self {
        Self { state: TcpState::Opening, reset: false, client: Sender::open(syn), remote: Sender::silent() }
    }

    /// The connection that a SYN from outside asks for.
    pub(super) fn opened_by_remote(syn: &Segment) -> Self {
        Self { state: TcpState::Opening, reset: false, client: Sender::silent(), remote: Sender::open(syn) }
    }

    /// Its state.
    pub(super) fn state(&self) -> TcpState {
        self.state
    }

    /// Whether somebody outside began it, the client did not, and it does not stand: the handshake is not complete,
    /// which whoever forges the source of a SYN never completes; or the client has sent its FIN, which whoever has
    /// vanished never answers; or all is over.
    pub(super) fn is_only_a_call(&self) -> bool {
        (self.state != TcpState::Established || self.client.has(Progress::FINISHED)) && self.is_visit()
    }

    /// Whether somebody outside began it, and the client did not.
    pub(super) fn is_visit(&self) -> bool {
        self.remote.has(Progress::OPENED) && !self.client.has(Progress::OPENED)
    }

    /// Takes in a segment from the client. Whatever it is, it counts: it can only harm the client's own connection.
    pub(super) fn outbound(&mut self, segment: &Segment) -> SegmentVerdict {
        if segment.resets() {
            // RFC 7857 §7.1: it refreshes nothing. But a live connection's last 4 minutes begin now.
            let was = self.close_by_reset();
            return if was == TcpState::Established { SegmentVerdict::Refresh } else { SegmentVerdict::Pass };
        }
        if segment.has(tcp_flags::SYN) {
            self.outbound_syn(segment);
        }
        if after(segment.end(), self.client.next) {
            self.client.next = segment.end();
        }
        if segment.has(tcp_flags::ACK) && self.remote.has(Progress::STARTED) {
            if after(segment.acknowledgment, self.remote.next) {
                // The client has seen more than we; it knows.
                self.remote.next = segment.acknowledgment;
            }
            self.remote.acknowledge(segment.acknowledgment, self.window_of(&self.client, segment));
        }
        self.client.note_fin(segment);
        if self.reset && segment.payload > 0 {
            self.reset = false;
            self.state = TcpState::Established;
        }
        self.advance();
        SegmentVerdict::Refresh
    }

    /// The client begins, or answers who has begun.
    fn outbound_syn(&mut self, syn: &Segment) {
        let answers = syn.has(tcp_flags::ACK);
        if !self.client.has(Progress::STARTED) {
            self.client = if syn.opens() { Sender::open(syn) } else { Sender::start(syn) };
            (self.state, self.reset) = (TcpState::Opening, false); // also where an RST has ended a call
        } else if syn.opens() {
            // After its own RST of a stale connection, the client repeats the SYN as it was (RFC 9293 §3.5.1).
            if syn.sequence != self.client.initial || self.state == TcpState::Closing {
                *self = Self::opened_by_client(syn);
            }
        } else if answers && syn.sequence != self.client.initial {
            // A SYN that did not fit the connection that stood; the client has forgotten that one.
            self.client = Sender::start(syn);
            self.remote.restart(syn.acknowledgment);
            (self.state, self.reset) = (TcpState::Opening, false);
        }
        let is_settled = !self.remote.has(Progress::STARTED) || self.remote.has(Progress::SYNCHRONIZED);
        if answers && !is_settled && !self.remote.is_answered_by(syn.acknowledgment) {
            self.remote.restart(syn.acknowledgment); // of several, the client tells which one it has
        }
    }

    /// Takes in a segment from outside.
    pub(super) fn inbound(&mut self, segment: &Segment) -> SegmentVerdict {
        if segment.resets() {
            return self.inbound_reset(segment);
        }
        if segment.has(tcp_flags::SYN) && self.inbound_syn(segment) {
            return SegmentVerdict::Call; // as with every call, it is the client's answer that counts
        }
        if !self.client.has(Progress::STARTED) {
            return SegmentVerdict::Pass; // a stranger may knock as often as it likes
        }
        if !self.may_count(segment) {
            return SegmentVerdict::Pass; // the client's TCP drops or challenges it
        }
        let acknowledges = segment.has(tcp_flags::ACK);
        if acknowledges && !self.client.can_be_acknowledged(segment.acknowledgment) {
            return SegmentVerdict::Pass;
        }
        if !self.remote.has(Progress::STARTED) {
            self.remote = Sender::start(segment);
        } else if !self.remote.fits(segment.end()) {
            return SegmentVerdict::Pass;
        }
        if after(segment.end(), self.remote.next) {
            self.remote.next = segment.end();
        }
        if acknowledges {
            self.client.acknowledge(segment.acknowledgment, self.window_of(&self.remote, segment));
        }
        self.remote.note_fin(segment);
        self.advance();
        SegmentVerdict::Refresh
    }

    /// Whether a segment from outside can move anything: one that acknowledges, or, until both ends are synchronized,
    /// the SYN that we know. The client's TCP drops what has no ACK, and challenges all other SYNs (RFC 9293 §3.10.7.4,
    /// RFC 5961 §4); if one that fits by luck moved the numbers, its sender would know where the next RST fits.
    fn may_count(&self, segment: &Segment) -> bool {
        let has_started = self.remote.has(Progress::STARTED);
        if segment.has(tcp_flags::SYN) {
            !has_started || (segment.sequence == self.remote.initial && !self.is_synchronized())
        } else {
            has_started && segment.has(tcp_flags::ACK)
        }
    }

    /// Whether the SYN of either end was acknowledged.
    fn is_synchronized(&self) -> bool {
        self.client.has(Progress::SYNCHRONIZED) && self.remote.has(Progress::SYNCHRONIZED)
    }

    /// Somebody outside begins, or answers. Says whether it is a call with which a connection begins anew.
    fn inbound_syn(&mut self, syn: &Segment) -> bool {
        if syn.opens() {
            // What the client has opened and an RST has closed may go on; only the client can tell.
            let over = self.state == TcpState::Closing && (self.remote.has(Progress::OPENED) || !self.reset);
            let begins = over || !self.client.has(Progress::STARTED);
            if begins {
                *self = Self::opened_by_remote(syn);
            }
            return begins;
        }
        // Whoever called before, it is this one whom the client calls now.
        if syn.sequence != self.remote.initial && self.is_answered_by(syn) {
            self.remote = Sender::silent();
        }
        false
    }

    /// Whether the client calls, and neither end's SYN has been acknowledged: whose SYN we have may be a stranger.
    fn is_calling(&self) -> bool {
        self.client.has(Progress::STARTED)
            && !self.client.has(Progress::SYNCHRONIZED)
            && !self.remote.has(Progress::SYNCHRONIZED)
    }

    /// Whether it answers the client's call: it acknowledges the SYN, of which a stranger does not know the number.
    fn is_answered_by(&self, segment: &Segment) -> bool {
        self.is_calling() && segment.has(tcp_flags::ACK) && self.client.is_answered_by(segment.acknowledgment)
    }

    /// RFC 5382 REQ-10, RFC 7857 §2.2, RFC 5961 §3.2: believed only where the client's TCP will believe it.
    fn inbound_reset(&mut self, segment: &Segment) -> SegmentVerdict {
        // A refusal of our SYN has no sequence number of its own, but must acknowledge the SYN (RFC 9293 §3.10.7.3);
        // also where somebody had called before, with a number that was never answered.
        if self.is_answered_by(segment) {
            self.close_by_reset();
            return SegmentVerdict::Pass;
        }
        if !self.remote.has(Progress::STARTED) {
            return SegmentVerdict::Refuse;
        }
        let (expected, next) = (self.remote.unacknowledged, self.remote.next);
        if (segment.sequence == expected || segment.sequence == next) && !self.is_calling() {
            let was = self.close_by_reset();
            return if was == TcpState::Established { SegmentVerdict::Refresh } else { SegmentVerdict::Pass };
        }
        let in_window = !after(expected, segment.sequence)
            && (after(self.remote.limit, segment.sequence) || after(next, segment.sequence));
        // In the window but not at its edge, or of somebody whom the client has not answered: the client challenges it
        // (RFC 5961) or believes it, we keep the state.
        if in_window { SegmentVerdict::Pass } else { SegmentVerdict::Refuse }
    }

    /// Whether an ICMP error from outside that quotes this sequence number of the client's can be genuine: the segment
    /// is in flight (RFC 5927 §4.1).
    pub(super) fn is_in_flight(&self, sequence: u32) -> bool {
        self.client.has(Progress::STARTED)
            && !after(self.client.unacknowledged, sequence)
            && after(self.client.next, sequence)
    }

    /// The window that `sender` offers in `segment`, scaled if both ends agreed on it (RFC 7323 §2.2).
    fn window_of(&self, sender: &Sender, segment: &Segment) -> u32 {
        let window = u32::from(segment.window);
        match (self.client.window_scale(), self.remote.window_scale(), sender.window_scale()) {
            (Some(_), Some(_), Some(scale)) if !segment.has(tcp_flags::SYN) => window << scale,
            _ => window,
        }
    }

    fn advance(&mut self) {
        if self.state == TcpState::Opening && self.is_synchronized() {
            self.state = TcpState::Established;
        }
        if self.client.has(Progress::FINISHED) && self.remote.has(Progress::FINISHED) {
            self.state = TcpState::Closing;
        }
    }

    /// Returns the state before.
    fn close_by_reset(&mut self) -> TcpState {
        let was = std::mem::replace(&mut self.state, TcpState::Closing);
        self.reset |= was == TcpState::Established;
        was
    }
}

/// Whether sequence number `a` comes after `b` (RFC 9293 §3.4: arithmetic modulo 2^32).
fn after(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) > 0
}

/// The window scale option (RFC 7323 §2.2) among a SYN's options.
fn window_scale(mut options: &[u8]) -> Option<u8> {
    const END: u8 = 0;
    const NO_OPERATION: u8 = 1;
    const WINDOW_SCALE: u8 = 3;
    loop {
        match *options {
            [] | [END, ..] => return None,
            [NO_OPERATION, ref rest @ ..] => options = rest,
            [WINDOW_SCALE, 3, shift, ..] => return Some(shift.min(MAX_WINDOW_SCALE)),
            [_, length, ..] if length >= 2 => options = options.get(usize::from(length)..)?,
            [..] => return None,
        }
    }
}
