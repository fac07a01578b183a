//! From the peers: the walk of a datagram, from the socket to a plaintext packet or the next step of a handshake.

use std::net::SocketAddrV4;
use std::ops::Range;

use super::cookie::AdmissionVerdict;
use super::index::{IndexTable, shard_of};
use super::messages::{CookieReply, DATA_HEADER_LEN, DataHeader, Handshake, Initiation, Message, Response};
use super::peer::{Evidence, Peer};
use super::session::Session;
use super::timers::{MIN_INITIATION_INTERVAL, REKEY_AFTER_TIME_RECEIVING};
use super::{Outgoing, PeerHome, PeerId, Tunnel};
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::fair_queue::Owner;
use crate::path::Path;

/// What reading a handshake message costs, in bytes of bulk that a shard carries meanwhile: two Diffie-Hellmans and
/// more, some 130 us, would be a whole superpacket's (64 KiB). A quarter of that favours those who want to be let in;
/// how many they are is bounded elsewhere ([`super::cookie`]).
pub const HANDSHAKE_WORK: usize = 16 * 1024;

/// What became of a datagram.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Received {
    /// A packet of `peer`'s.
    Packet {
        /// Who sent it.
        peer: PeerId,
        /// Where it lies in the datagram; zero bytes of padding may follow the inner packet.
        plaintext: Range<usize>,
    },
    /// An empty data message of `peer`'s.
    Keepalive {
        /// Who sent it.
        peer: PeerId,
    },
    /// A handshake with `peer` took a step; answers and packets that waited are in `out`.
    Handshake {
        /// With whom.
        peer: PeerId,
    },
    /// It belongs to another shard: the caller hands the datagram, as it was, to that shard's
    /// [`Tunnel::receive_forwarded`].
    OtherShard(u8),
    /// It dies here, for the caller to count.
    Drop(DropReason),
}

/// Whether it is a handshake initiation or a response to one, by its type and length.
pub fn is_handshake(datagram: &[u8]) -> bool {
    matches!(Message::parse(datagram), Ok(Message::Initiation(_) | Message::Response(_)))
}

/// Whether it is a handshake initiation, by its type and length.
pub fn is_initiation(datagram: &[u8]) -> bool {
    matches!(Message::parse(datagram), Ok(Message::Initiation(_)))
}

impl Tunnel {
    /// Receives one datagram, opened in place.
    pub fn receive(
        &mut self,
        now: Timestamp,
        from: Path,
        datagram: &mut [u8],
        out: &mut Outgoing,
    ) -> Received {
        self.walk(now, from, datagram, out, false).unwrap_or_else(Received::Drop)
    }

    /// Receives a datagram that another shard does not own; it is not sent on once more. An initiation has been
    /// admitted there, and is not judged again (the other shard's cookie would not please us). A response has not: its
    /// index tells whose it is, so that its own shard alone judges it, by the cookie that this shard gave, whatever way
    /// it took; and who merely steers it pays for nothing but the copy.
    pub fn receive_forwarded(
        &mut self,
        now: Timestamp,
        from: Path,
        datagram: &mut [u8],
        out: &mut Outgoing,
    ) -> Received {
        match self.walk(now, from, datagram, out, true) {
            Ok(Received::OtherShard(_)) => Received::Drop(DropReason::UnknownPeer),
            Ok(received) => received,
            Err(reason) => Received::Drop(reason),
        }
    }

    /// Whose datagram this seems to be, before it is opened: the peer that its index was given to, if it comes from
    /// where that peer is.
    pub fn sender(&self, datagram: &[u8], from: SocketAddrV4) -> Owner<PeerId> {
        let header = match Message::parse(datagram) {
            Ok(Message::Data(header)) => header,
            Ok(_) => return Owner::Handshake,
            Err(_) => return Owner::Unknown,
        };
        let is_there = |&id: &PeerId| {
            let endpoint = self.peers.get(id).and_then(|peer| peer.endpoint);
            endpoint.is_some_and(|path| path.remote == from)
        };
        self.indices.get(header.receiver).filter(is_there).map_or(Owner::Unknown, Owner::Client)
    }

    /// What [`Self::take_work`] would say.
    pub fn work(&self) -> usize {
        self.work
    }

    /// What the handshakes that were read since the last call have cost beyond their bytes, see [`HANDSHAKE_WORK`].
    /// Only now is it known: what shows no right MAC, or no cookie when one is due, costs next to nothing.
    pub fn take_work(&mut self) -> usize {
        std::mem::take(&mut self.work)
    }

    /// Whether it is a datagram of this gateway's own, from whichever shard, that has come back as somebody's packet.
    /// Sealed once more, it would come back again, and so on without end.
    pub fn is_own(&self, datagram: &[u8]) -> bool {
        match Message::parse(datagram) {
            Ok(Message::Data(header)) => self.own_datagrams.contains(header.receiver),
            Ok(Message::Initiation(message)) => self.indices.get(message.sender()).is_some(),
            Ok(Message::Response(message)) => self.indices.get(message.sender()).is_some(),
            Ok(Message::CookieReply(_)) | Err(_) => false,
        }
    }

    /// Whether a handshake was completed since the last call.
    pub fn take_completed(&mut self) -> bool {
        std::mem::take(&mut self.completed)
    }

    /// The indices that peers gave out for the sessions that began since the last call. The other shards are to be told
    /// of them ([`Self::set_begun_elsewhere`]); so there are none if there is only one.
    pub fn take_begun(&mut self) -> impl Iterator<Item = u32> + '_ {
        self.begun.drain(..)
    }

    /// Notes an index that a peer of another shard gave out.
    pub fn set_begun_elsewhere(&mut self, remote_index: u32, now: Timestamp) {
        self.own_datagrams.add(remote_index, now);
    }

    /// A session began under this index of the peer's.
    fn session_began(&mut self, remote_index: u32, now: Timestamp) {
        self.own_datagrams.add(remote_index, now);
        if self.shards > 1 {
            self.begun.push(remote_index);
        }
    }

    fn walk(
        &mut self,
        now: Timestamp,
        from: Path,
        datagram: &mut [u8],
        out: &mut Outgoing,
        is_forwarded: bool,
    ) -> Result<Received, DropReason> {
        match Message::parse(datagram)? {
            Message::Data(header) => self.receive_data(header, now, from, datagram, out),
            Message::Initiation(message) => {
                if !is_forwarded {
                    self.admit(&message, now, from, out)?;
                }
                self.receive_initiation(message, now, from, out)
            }
            Message::Response(message) => {
                if let Some(elsewhere) = self.steer(message.receiver())? {
                    return Ok(elsewhere);
                }
                self.admit(&message, now, from, out)?;
                self.receive_response(message, now, from, out)
            }
            Message::CookieReply(message) => self.receive_cookie(message, now),
        }
    }

    // ---- Data (whitepaper §5.4.6): the packet's way.

    fn receive_data(
        &mut self,
        header: DataHeader,
        now: Timestamp,
        from: Path,
        datagram: &mut [u8],
        out: &mut Outgoing,
    ) -> Result<Received, DropReason> {
        let Some(id) = self.indices.get(header.receiver) else {
            return self.steer(header.receiver)?.ok_or(DropReason::UnknownSession);
        };
        let peer = self.peers.get_mut(id).ok_or(DropReason::UnknownSession)?;
        let (session, is_next) = peer.sessions.find(header.receiver).ok_or(DropReason::UnknownSession)?;
        let body = datagram.get_mut(DATA_HEADER_LEN..).ok_or(DropReason::NotWireGuard)?;
        let plaintext_len = session.open(header.counter, body, now)?;

        // It is authentic from here on.
        let renew = session.is_initiator && session.age(now) >= REKEY_AFTER_TIME_RECEIVING;
        peer.heard_from(from, Evidence::Data, now);
        let received = if plaintext_len == 0 {
            Received::Keepalive { peer: id }
        } else {
            peer.timers.received_data(now);
            peer.traffic.received_packets += 1;
            peer.traffic.received_bytes += plaintext_len as u64;
            Received::Packet { peer: id, plaintext: DATA_HEADER_LEN..DATA_HEADER_LEN + plaintext_len }
        };
        if is_next {
            peer.sessions.confirm_next(&mut self.indices);
            peer.complete_handshake(&mut self.indices, now);
            self.completed = true;
            peer.flush(self.mtu, now, out, &mut self.drops);
            self.schedule.update(peer);
        }
        if renew {
            self.want_handshake(id, now, out);
        } else {
            self.schedule.bring_forward(peer);
        }
        Ok(received)
    }

    /// Whether `index` was given out by another shard, whose datagram was misdirected to us.
    fn steer(&self, index: u32) -> Result<Option<Received>, DropReason> {
        let shard = shard_of(index);
        if shard == self.shard {
            Ok(None)
        } else if shard < self.shards {
            Ok(Some(Received::OtherShard(shard)))
        } else {
            Err(DropReason::UnknownSession)
        }
    }

    // ---- Handshakes.

    /// Lets a handshake message in, or answers with a cookie (§5.3).
    fn admit(
        &mut self,
        message: &impl Handshake,
        now: Timestamp,
        from: Path,
        out: &mut Outgoing,
    ) -> Result<(), DropReason> {
        match self.admission.judge(message, from.remote, now)? {
            AdmissionVerdict::Admit => Ok(()),
            AdmissionVerdict::Challenge(reply) => {
                out.push(from, reply.to_vec());
                Err(DropReason::CookieRequired)
            }
        }
    }

    /// Answers an initiation (§5.4.2, §5.4.3). The session that this makes waits for the initiator's first data
    /// message.
    fn receive_initiation(
        &mut self,
        message: Initiation<'_>,
        now: Timestamp,
        from: Path,
        out: &mut Outgoing,
    ) -> Result<Received, DropReason> {
        self.work += HANDSHAKE_WORK;
        let initiation = self.identity.receive_initiation(message)?;
        let id = match self.homes.get(&initiation.public_key) {
            Some(PeerHome::Here(id)) => *id,
            Some(PeerHome::OnShard(shard)) => return Ok(Received::OtherShard(*shard)),
            None => return Err(DropReason::UnknownPeer),
        };
        let peer = self.peers.get_mut(id).ok_or(DropReason::UnknownPeer)?;
        if peer.greatest_timestamp.is_some_and(|greatest| initiation.timestamp <= greatest) {
            return Err(DropReason::BadHandshake);
        }
        if peer.last_initiation_received.is_some_and(|last| now.since(last) < MIN_INITIATION_INTERVAL) {
            return Err(DropReason::HandshakeRateLimited);
        }
        peer.greatest_timestamp = Some(initiation.timestamp);
        peer.last_initiation_received = Some(now);

        let (local_index, remote_index) = (self.indices.allocate(id)?, message.sender());
        let mut response = Response::template(local_index, remote_index);
        let session = initiation
            .respond(&peer.preshared_key, &mut response)
            .and_then(|keys| {
                peer.cookie_jar.sign(&peer.mac_keys, &mut response, now)?;
                let aead = (peer.cipher, self.library);
                Session::new(&keys, aead, (local_index, remote_index), false, now)
            })
            .inspect_err(|_| self.indices.release(local_index))?;
        peer.sessions.begin_as_responder(session, &mut self.indices);
        peer.heard_from(from, Evidence::Handshake, now);
        peer.timers.sent(now, peer.persistent_keepalive);
        self.schedule.update(peer);
        out.push(from, response.to_vec());
        self.session_began(remote_index, now);
        Ok(Received::Handshake { peer: id })
    }

    /// Finishes the handshake that we began (§5.4.3), and shows the responder so by a first data message.
    fn receive_response(
        &mut self,
        message: Response<'_>,
        now: Timestamp,
        from: Path,
        out: &mut Outgoing,
    ) -> Result<Received, DropReason> {
        let local_index = message.receiver();
        let id = self.indices.get(local_index).ok_or(DropReason::UnknownSession)?;
        let peer = self.peers.get_mut(id).ok_or(DropReason::UnknownSession)?;
        let mut pending = peer
            .pending
            .take_if(|pending| pending.local_index == local_index)
            .ok_or(DropReason::UnknownSession)?;
        self.work += HANDSHAKE_WORK;
        let session = pending.initiation.receive_response(message).and_then(|keys| {
            let aead = (peer.cipher, self.library);
            Session::new(&keys, aead, (local_index, message.sender()), true, now)
        });
        let session = match session {
            Ok(session) => session,
            Err(reason) => {
                peer.pending = Some(pending); // A forgery must not end the handshake.
                return Err(reason);
            }
        };
        peer.sessions.begin_as_initiator(session, &mut self.indices);
        peer.heard_from(from, Evidence::Handshake, now);
        peer.complete_handshake(&mut self.indices, now);
        self.completed = true;
        if peer.flush(self.mtu, now, out, &mut self.drops) == 0 {
            peer.send_keepalive(now, out);
        }
        self.schedule.update(peer);
        self.session_began(message.sender(), now);
        Ok(Received::Handshake { peer: id })
    }

    /// Takes the cookie that our next handshake message must show (§5.4.7).
    fn receive_cookie(&mut self, message: CookieReply<'_>, now: Timestamp) -> Result<Received, DropReason> {
        let Some(id) = self.indices.get(message.receiver()) else {
            return self.steer(message.receiver())?.ok_or(DropReason::UnknownSession);
        };
        let peer = self.peers.get_mut(id).ok_or(DropReason::UnknownSession)?;
        peer.cookie_jar.receive(&peer.mac_keys, message, now)?;
        self.schedule.update(peer);
        Ok(Received::Handshake { peer: id })
    }
}

impl Peer {
    /// An authentic message came from `from`: that tells where the peer is now, and that it is there at all.
    fn heard_from(&mut self, from: Path, by: Evidence, now: Timestamp) {
        self.follow(from, by, now);
        self.timers.received(now, self.persistent_keepalive);
    }

    /// Both sides have a session: a handshake of ours that still waits for its answer is needless.
    fn complete_handshake(&mut self, indices: &mut IndexTable, now: Timestamp) {
        self.forget_pending(indices);
        self.last_handshake = Some(now);
        self.unanswered = 0;
    }
}
