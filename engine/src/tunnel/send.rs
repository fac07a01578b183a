//! Towards the peers: sealing, waiting for a session, beginning a handshake.

use std::time::Duration;

use super::cookie::LOAD_THRESHOLD;
use super::handshake::{after_tai64n, random_bytes, tai64n};
use super::messages::{DATA_HEADER_LEN, Initiation, TAG_LEN};
use super::peer::{Peer, PeerTraffic, Pending};
use super::session::Session;
use super::timers::{MAX_JITTER, REKEY_AFTER_TIME};
use super::{Outgoing, PeerId, Tunnel};
use crate::clock::Timestamp;
use crate::drop_reason::{DropCounters, DropReason};
use crate::path::Path;

/// Packets that may wait for a session with one peer (as in Linux: `MAX_STAGED_PACKETS`).
pub const QUEUE_LIMIT: usize = 128;
/// Handshakes per second that we begin, with all peers together: half of what puts us under load, so that their
/// responses alone, those to retries included, do not make us ask for cookies.
pub const INITIATION_RATE: u32 = LOAD_THRESHOLD / 2;
/// How many at once: each costs two Diffie-Hellmans and a key pair, some 130 us of a turn that nobody can interrupt.
pub const INITIATION_BURST: u32 = 16;
/// How many of them are begun anew for want of an answer, per second, beside the others: nobody waits for a handshake
/// behind those with peers that are not there.
pub const RETRY_RATE: u32 = INITIATION_RATE / 2;
/// And at once.
pub const RETRY_BURST: u32 = INITIATION_BURST / 2;
/// Data messages are padded to a multiple of this many bytes (whitepaper §5.4.6).
const PADDING_MULTIPLE: usize = 16;

/// Seals packets for one peer, under one session.
pub struct Sealer<'a> {
    session: &'a mut Session,
    traffic: &'a mut PeerTraffic,
    endpoint: Path,
    mtu: usize,
    /// Shorter packets are padded to this length.
    least: usize,
}

impl Sealer<'_> {
    /// Bytes that a buffer needs before the plaintext.
    pub const HEADER_LEN: usize = DATA_HEADER_LEN;
    /// Bytes that sealing adds, padding left out.
    pub const OVERHEAD: usize = DATA_HEADER_LEN + TAG_LEN;

    /// Where to send the datagrams.
    pub fn endpoint(&self) -> Path {
        self.endpoint
    }

    /// Pads packets from now on to `len` bytes at least, so that their datagrams are of one length. (Zeros behind a
    /// packet are nothing new to a receiver, which cuts them off by the packet's own length.)
    pub fn pad_to(&mut self, len: usize) {
        self.least = len;
    }

    /// The length of the datagram that a packet of `plaintext_len` bytes becomes.
    pub fn datagram_len(&self, plaintext_len: usize) -> usize {
        Self::OVERHEAD + plaintext_len + padding(plaintext_len, self.least, self.mtu)
    }

    /// Seals one packet in place. `buffer` is [`Self::HEADER_LEN`] bytes of room, the packet, and room for padding
    /// and tag ([`Self::datagram_len`] in all); the datagram begins where `buffer` does. Returns its length.
    ///
    /// # Errors
    /// [`DropReason::TooBig`] if `buffer` is too short, [`DropReason::NoSession`] if the session is used up.
    pub fn seal(&mut self, buffer: &mut [u8], plaintext_len: usize) -> Result<usize, DropReason> {
        let len = self.session.seal(buffer, plaintext_len, padding(plaintext_len, self.least, self.mtu))?;
        self.count(plaintext_len);
        Ok(len)
    }

    /// Seals `packet` into `buffer`, which has [`Self::datagram_len`] bytes of room; the datagram begins where `buffer`
    /// does. Returns its length.
    ///
    /// # Errors
    /// As [`Self::seal`].
    pub fn seal_from(&mut self, packet: &[u8], buffer: &mut [u8]) -> Result<usize, DropReason> {
        if self.datagram_len(packet.len()) > Self::OVERHEAD + packet.len() {
            // The zeros have to lie behind the packet.
            let room = buffer.get_mut(DATA_HEADER_LEN..DATA_HEADER_LEN + packet.len());
            room.ok_or(DropReason::TooBig)?.copy_from_slice(packet);
            return self.seal(buffer, packet.len());
        }
        let len = self.session.seal_from(packet, buffer)?;
        self.count(packet.len());
        Ok(len)
    }

    /// Seals a copy of `packet`.
    fn seal_copy(&mut self, packet: &[u8]) -> Result<Vec<u8>, DropReason> {
        let mut buffer = vec![0; self.datagram_len(packet.len())];
        self.seal_from(packet, &mut buffer)?;
        Ok(buffer)
    }

    fn count(&mut self, plaintext_len: usize) {
        self.traffic.sent_packets += 1;
        self.traffic.sent_bytes += plaintext_len as u64;
    }
}

/// Zero bytes behind a packet: up to a multiple of 16, of at least `least` bytes, but not beyond the tunnel's MTU.
fn padding(plaintext_len: usize, least: usize, mtu: usize) -> usize {
    let padded = plaintext_len.max(least).next_multiple_of(PADDING_MULTIPLE).min(mtu);
    padded.saturating_sub(plaintext_len)
}

impl Tunnel {
    /// Seals for `peer`, if there is a session and an endpoint; otherwise the caller hands the packet to
    /// [`Self::enqueue`]. To be asked for with at least one packet in hand, for it counts as traffic.
    ///
    /// Renewing a session that grows old is noted here and done by the next [`Self::poll`].
    pub fn sealer(&mut self, peer: PeerId, now: Timestamp) -> Option<Sealer<'_>> {
        let peer = self.peers.get_mut(peer)?;
        peer.prepare_to_seal(now)?;
        peer.timers.sent_data(now);
        self.schedule.bring_forward(peer);
        peer.sealer(self.mtu, now)
    }

    /// Sends a packet that found no session: it waits for the handshake, which this begins if need be.
    ///
    /// # Errors
    /// The reason why *a* packet had to die: [`DropReason::NoEndpoint`] this one, [`DropReason::NoSession`] the oldest
    /// of those that wait, since there are [`QUEUE_LIMIT`].
    pub fn enqueue(
        &mut self,
        peer: PeerId,
        packet: &[u8],
        now: Timestamp,
        out: &mut Outgoing,
    ) -> Result<(), DropReason> {
        if let Some(mut sealer) = self.sealer(peer, now) {
            let datagram = sealer.seal_copy(packet)?;
            out.push(sealer.endpoint(), datagram);
            return Ok(());
        }
        let id = peer;
        let peer = self.peers.get_mut(id).ok_or(DropReason::NoSuchPeer)?;
        if peer.endpoint.is_none() {
            return Err(DropReason::NoEndpoint);
        }
        let oldest = if peer.queue.len() >= QUEUE_LIMIT { peer.queue.pop_front() } else { None };
        peer.queue.push_back(packet.to_vec());
        self.want_handshake(id, now, out);
        if oldest.is_some() { Err(DropReason::NoSession) } else { Ok(()) }
    }

    /// Begins a handshake with `peer` without waiting for a packet, as a client does when it starts.
    pub fn start_handshake(&mut self, peer: PeerId, now: Timestamp, out: &mut Outgoing) {
        self.want_handshake(peer, now, out);
    }

    /// Begins a handshake now, if the last one is not too recent; otherwise when it no longer is. It may have to wait
    /// for those of other peers.
    pub(super) fn want_handshake(&mut self, id: PeerId, now: Timestamp, out: &mut Outgoing) {
        let Some(peer) = self.peers.get_mut(id) else { return };
        peer.timers.want_handshake(now);
        if peer.timers.handshake_due(now) {
            self.begin_handshake(id, now, out);
        }
        if let Some(peer) = self.peers.get_mut(id) {
            self.schedule.update(peer);
        }
    }

    /// Begins the handshake that is due, or leaves it to [`Self::poll`] to begin it in its turn: a packet to each of a
    /// thousand idle peers, which one client can send within a turn, would otherwise hold everybody up for 130 ms.
    pub(super) fn begin_handshake(&mut self, id: PeerId, now: Timestamp, out: &mut Outgoing) {
        let Some(peer) = self.peers.get_mut(id) else { return };
        // The first retry goes with the first calls: a datagram may be lost, and who is there is not to wait for it
        // behind all those who are not.
        let in_vain_before = peer.pending.is_some() && peer.unanswered > 1;
        if peer.timers.has_to_wait(&mut self.pace, in_vain_before, now) {
            return;
        }
        if peer.pending.is_some() {
            // Nobody answered: perhaps the way from the address that the peer knew us by is cut (as in Linux).
            peer.forget_local();
        }
        if let Err(reason) = self.initiate(id, now, out) {
            self.drops.count(reason);
        }
    }

    /// Sends an initiation (§5.4.2), in place of an earlier one that was not answered.
    ///
    /// # Errors
    /// Why none was sent: [`DropReason::NoEndpoint`], a public key that is none, no randomness. It is tried again.
    fn initiate(&mut self, id: PeerId, now: Timestamp, out: &mut Outgoing) -> Result<(), DropReason> {
        let peer = self.peers.get_mut(id).ok_or(DropReason::NoSuchPeer)?;
        peer.forget_pending(&mut self.indices);
        let endpoint = peer.endpoint.ok_or(DropReason::NoEndpoint)?;
        peer.timers.initiated(now, Duration::ZERO); // Whatever goes wrong below is tried again.
        let jitter = f64::from(u32::from_le_bytes(random_bytes()?)) / f64::from(u32::MAX);
        peer.timers.initiated(now, MAX_JITTER.mul_f64(jitter));
        peer.unanswered = peer.unanswered.saturating_add(1);

        let clock = tai64n(self.unix_time_at_origin, now);
        let timestamp = peer.last_timestamp_sent.map_or(clock, |last| clock.max(after_tai64n(last)));
        peer.last_timestamp_sent = Some(timestamp);
        let local_index = self.indices.allocate(id)?;
        let mut message = Initiation::template(local_index);
        let initiation = self
            .identity
            .initiate(&peer.public_key, &peer.preshared_key, &timestamp, &mut message)
            .and_then(|initiation| {
                peer.cookie_jar.sign(&peer.mac_keys, &mut message, now)?;
                Ok(initiation)
            })
            .inspect_err(|_| self.indices.release(local_index))?;
        peer.pending = Some(Pending { local_index, initiation });
        peer.timers.sent(now, peer.persistent_keepalive);
        out.push(endpoint, message.to_vec());
        Ok(())
    }
}

impl Peer {
    /// Moves the timers for a message that is about to be sealed; `None` if there is nothing to seal it with.
    fn prepare_to_seal(&mut self, now: Timestamp) -> Option<()> {
        self.endpoint?;
        if needs_renewal(self.sessions.sealing(now)?, now) {
            self.timers.want_handshake(now);
        }
        self.timers.sent(now, self.persistent_keepalive);
        Some(())
    }

    fn sealer(&mut self, mtu: usize, now: Timestamp) -> Option<Sealer<'_>> {
        let (endpoint, session) = (self.endpoint?, self.sessions.sealing(now)?);
        Some(Sealer { session, traffic: &mut self.traffic, endpoint, mtu, least: 0 })
    }

    /// Sends an empty data message, if there is a session; whether there is.
    pub(super) fn send_keepalive(&mut self, now: Timestamp, out: &mut Outgoing) -> bool {
        let traffic = self.traffic;
        if self.prepare_to_seal(now).is_none() {
            return false;
        }
        let Some(mut sealer) = self.sealer(0, now) else { return false };
        let endpoint = sealer.endpoint();
        let sealed = sealer.seal_copy(&[]);
        self.traffic = traffic; // A keepalive is no traffic.
        sealed.map(|datagram| out.push(endpoint, datagram)).is_ok()
    }

    /// Sends what waited for the session that there is now; how many packets.
    pub(super) fn flush(
        &mut self,
        mtu: usize,
        now: Timestamp,
        out: &mut Outgoing,
        drops: &mut DropCounters,
    ) -> usize {
        if self.queue.is_empty() || self.prepare_to_seal(now).is_none() {
            return 0;
        }
        let mut queue = std::mem::take(&mut self.queue);
        let Some(mut sealer) = self.sealer(mtu, now) else {
            self.queue = queue;
            return 0;
        };
        let mut sent = 0;
        for packet in queue.drain(..) {
            match sealer.seal_copy(&packet) {
                Ok(datagram) => {
                    out.push(sealer.endpoint(), datagram);
                    sent += 1;
                }
                Err(reason) => drops.count(reason),
            }
        }
        self.timers.sent_data(now);
        sent
    }
}

/// Whether sealing with `session` should renew it (§6.2): only the initiator does because of its age, so that not both
/// do at once.
fn needs_renewal(session: &Session, now: Timestamp) -> bool {
    session.is_initiator && session.age(now) >= REKEY_AFTER_TIME || session.is_worn()
}
