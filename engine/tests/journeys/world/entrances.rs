//! What comes in: from applications, from the internet, and from an attacker.

use super::*;

impl World {
    // ---- What comes in.

    /// A client's application sends.
    pub fn send(&mut self, client: usize, packet: &Ip) {
        self.send_bytes(client, &packet.bytes(), [0; 10]);
        self.settle();
    }

    /// A client's kernel sends a superpacket.
    pub fn send_superpacket(&mut self, client: usize, packet: &Ip, gso_size: usize) {
        let virtio = kernel::superpacket_header(packet, gso_size, 0);
        self.send_bytes(client, &packet.clone().partial().bytes(), virtio);
        self.settle();
    }

    /// Without waiting for what follows.
    pub fn send_bytes(&mut self, client: usize, bytes: &[u8], virtio: [u8; 10]) {
        let now = self.now;
        let node = &mut self.clients[client];
        let span = node.store(0, bytes);
        match VirtioNetHeader::from_bytes(virtio).offload_of(node.arena.get_mut(span)) {
            Some(offload) => node.core.receive_host(now, &mut node.arena, span, offload, &mut node.outbox),
            None => node.core.drops().count(DropReason::UnknownOffload),
        }
        self.finish_client(client);
    }

    /// The gateway's host sends into the VPN.
    pub fn send_from_host(&mut self, packet: &Ip) {
        self.send_from_host_bytes(&packet.bytes(), [0; 10]);
        self.settle();
    }

    pub fn send_from_host_bytes(&mut self, bytes: &[u8], virtio: [u8; 10]) {
        let now = self.now;
        let node = &mut self.shards[0];
        let span = node.store(0, bytes);
        match VirtioNetHeader::from_bytes(virtio).offload_of(node.arena.get_mut(span)) {
            Some(offload) => node.core.receive_host(now, &mut node.arena, span, offload, &mut node.outbox),
            None => node.core.drops().count(DropReason::UnknownOffload),
        }
        self.finish_shard(0);
    }

    /// A packet arrives from the internet.
    pub fn arrive(&mut self, packet: &Ip) {
        self.arrive_bytes(packet.bytes(), [0; 10]);
        self.settle();
    }

    /// The network card has merged what arrived (GRO).
    pub fn arrive_superpacket(&mut self, packet: &Ip, gso_size: usize) {
        let virtio = kernel::superpacket_header(packet, gso_size, LINK_HEADER);
        self.arrive_bytes(packet.clone().partial().bytes(), virtio);
        self.settle();
    }

    pub fn arrive_bytes(&mut self, bytes: Vec<u8>, virtio: [u8; 10]) {
        let shard = fanout(&bytes, self.shards.len());
        self.events.push_back(Event::FromOutside(shard, DevicePacket { virtio, bytes, mac: OUR_MAC }));
    }

    /// A datagram arrives at the gateway's UDP socket.
    pub fn strike(&mut self, from: SocketAddrV4, datagram: Vec<u8>, segment_size: usize) {
        let train = Train { from, segment_size, bytes: datagram, ecn: self.link.ecn };
        let shard = self.steer(&train.bytes);
        self.events.push_back(Event::ToShard(shard, train));
    }

    /// The same, from where a client is.
    pub fn strike_from(&mut self, client: usize, datagram: Vec<u8>) {
        let len = datagram.len();
        self.strike(self.endpoints[client], datagram, len);
    }

    /// The same at a client's.
    pub fn strike_client(&mut self, client: usize, datagram: Vec<u8>) {
        let (segment_size, ecn) = (datagram.len(), self.link.ecn);
        let train = Train { from: GATEWAY_ENDPOINT, segment_size, bytes: datagram, ecn };
        self.events.push_back(Event::ToClient(client, train));
    }

    pub fn arp(&mut self, shard: usize, frame: Vec<u8>) {
        self.events.push_back(Event::Arp(shard, frame));
    }

    pub fn cross(&mut self, shard: usize, handoff: Handoff) {
        self.events.push_back(Event::Handoff(shard, handoff));
    }

    /// Every client has a session and a neighbour is known: the journeys begin after that.
    pub fn connected(mut self) -> Self {
        for client in 0..self.clients.len() {
            self.ping(client, GATEWAY);
            self.ping(client, SERVER);
            assert_eq!(self.take(client).len(), 2, "client {client} is connected");
        }
        self.outside.clear();
        self.host.clear();
        self
    }

    pub fn ping(&mut self, client: usize, to: Ipv4Addr) {
        self.send(client, &Ip::echo(8, client_address(client), to, 0x7a7a, 1, b"are you there?"));
    }

    // ---- What only an attacker or a test does.

    /// Seals a packet under a client's session without a look at it.
    pub fn seal_unchecked(&mut self, client: usize, packet: &[u8]) {
        assert!(self.seal_if_possible(client, packet), "client {client} has a session");
    }

    /// The same, if the client has a session; whether it has.
    pub fn seal_if_possible(&mut self, client: usize, packet: &[u8]) -> bool {
        let tunnel = self.clients[client].core.tunnel();
        let Some(datagram) = sealed(tunnel, &GATEWAY_KEY, packet, self.now) else { return false };
        let (from, len) = (self.endpoints[client], datagram.len());
        self.strike(from, datagram, len);
        true
    }

    /// A message of a client's that it does not send.
    pub fn sealed_by(&mut self, client: usize, packet: &Ip) -> Vec<u8> {
        sealed(self.clients[client].core.tunnel(), &GATEWAY_KEY, &packet.bytes(), self.now).unwrap()
    }

    /// Packets of one length arrive in one train at the gateway.
    pub fn seal_train(&mut self, client: usize, packets: &[Ip]) {
        let tunnel = self.clients[client].core.tunnel();
        let (bytes, segment_size) = train(tunnel, &GATEWAY_KEY, packets, self.now);
        self.strike(self.endpoints[client], bytes, segment_size);
        self.settle();
    }

    /// The same at a client.
    pub fn seal_train_for_client(&mut self, client: usize, packets: &[Ip]) {
        let home = self.home_of(client);
        let tunnel = self.shards[home].core.tunnel();
        let (bytes, segment_size) = train(tunnel, &client_key(client), packets, self.now);
        let train = Train { from: GATEWAY_ENDPOINT, segment_size, bytes, ecn: self.link.ecn };
        self.events.push_back(Event::ToClient(client, train));
        self.settle();
    }

    /// The trains that clients send meanwhile.
    pub fn record(&mut self, act: impl FnOnce(&mut Self)) -> Vec<Train> {
        self.recorded = Some(Vec::new());
        act(self);
        self.recorded.take().unwrap_or_default()
    }

    /// A client's datagrams come from elsewhere now, and what is sent to where it was is lost.
    pub fn move_client(&mut self, client: usize, to: SocketAddrV4) {
        self.endpoints[client] = to;
    }

    /// What `hand_...` does in `act`, the loop of the shard does in one turn.
    pub fn in_one_turn(&mut self, shard: usize, act: impl FnOnce(&mut Self)) {
        act(self);
        self.finish_shard(shard);
        self.settle();
    }

    pub fn hand_from_host(&mut self, buffer: usize, packet: &Ip) {
        let (now, node) = (self.now, &mut self.shards[0]);
        let span = node.store(buffer, &packet.bytes());
        node.core.receive_host(now, &mut node.arena, span, Offload::NONE, &mut node.outbox);
    }

    pub fn hand_from_client(&mut self, client: usize, buffer: usize, packet: &Ip) {
        let (now, node) = (self.now, &mut self.clients[client]);
        let span = node.store(buffer, &packet.bytes());
        node.core.receive_host(now, &mut node.arena, span, Offload::NONE, &mut node.outbox);
    }

    pub fn hand_removal(&mut self, client: usize) {
        let (now, node) = (self.now, &mut self.shards[0]);
        let command = Command::RemovePeer {
            public_key: public_key(&client_key(client)),
            address: client_address(client),
        };
        node.core.carry_out(now, command, &mut node.outbox);
    }

    pub fn hand_new_peer(&mut self, client: usize) {
        let (now, node) = (self.now, &mut self.shards[0]);
        let config = peer(public_key(&client_key(client)), Some(client_endpoint(client)));
        let command = Command::SetPeer { config, address: client_address(client), shard: 0, call: false };
        node.core.carry_out(now, command, &mut node.outbox);
    }
}

/// One packet, sealed for the peer with this private key; `None` without a session.
fn sealed(tunnel: &mut Tunnel, peer: &[u8; 32], packet: &[u8], now: Timestamp) -> Option<Vec<u8>> {
    let id = tunnel.peer_by_key(&public_key(peer)).unwrap().id;
    let mut sealer = tunnel.sealer(id, now)?;
    let mut datagram = vec![0; sealer.datagram_len(packet.len())];
    datagram[Sealer::HEADER_LEN..][..packet.len()].copy_from_slice(packet);
    let len = sealer.seal(&mut datagram, packet.len()).unwrap();
    assert_eq!(len, datagram.len());
    Some(datagram)
}

/// Packets of one length, sealed one behind another; and the length of each datagram.
fn train(tunnel: &mut Tunnel, peer: &[u8; 32], packets: &[Ip], now: Timestamp) -> (Vec<u8>, usize) {
    let datagrams: Vec<_> =
        packets.iter().map(|packet| sealed(tunnel, peer, &packet.bytes(), now).unwrap()).collect();
    assert!(datagrams.iter().all(|datagram| datagram.len() == datagrams[0].len()));
    (datagrams.concat(), datagrams[0].len())
}
