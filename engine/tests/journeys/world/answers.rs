//! What a test asks, and what must be true.

use super::*;

impl World {
    /// Takes what arrived at a client.
    pub fn take(&mut self, client: usize) -> Vec<Ip> {
        std::mem::take(&mut self.delivered[client])
    }

    /// Takes the only packet that arrived at a client.
    pub fn take_one(&mut self, client: usize) -> Ip {
        let mut taken = self.take(client);
        assert_eq!(taken.len(), 1, "what arrived at client {client}: {taken:#?}");
        taken.remove(0)
    }

    pub fn take_outside(&mut self) -> Vec<Ip> {
        std::mem::take(&mut self.outside)
    }

    pub fn take_one_outside(&mut self) -> Ip {
        let mut taken = self.take_outside();
        assert_eq!(taken.len(), 1, "what arrived outside: {taken:#?}");
        taken.remove(0)
    }

    pub fn status(&self, shard: usize) -> ShardStatus {
        self.shards[shard].core.status(self.now)
    }

    /// Mappings of all shards and protocols.
    pub fn mappings(&self) -> usize {
        (0..self.shards.len()).map(|shard| self.status(shard).mappings.iter().sum::<usize>()).sum()
    }

    /// Undelivered packets, of gateway and clients.
    pub fn drops(&self) -> BTreeMap<&'static str, u64> {
        let mut all = DropCounters::default();
        for shard in 0..self.shards.len() {
            all.merge(&self.status(shard).drops);
        }
        for client in &self.clients {
            all.merge(&client.core.status(self.now).drops);
        }
        all.nonzero().map(|(reason, count)| (reason.name(), count)).collect()
    }

    /// Does something that ends in silence, counted once under `reason` and under nothing else.
    pub fn dies(&mut self, reason: DropReason, act: impl FnOnce(&mut Self)) {
        self.dies_times(reason, 1, act);
    }

    pub fn dies_times(&mut self, reason: DropReason, times: u64, act: impl FnOnce(&mut Self)) {
        let (mut before, packets) = (self.drops(), self.device_packets);
        act(self);
        self.settle();
        *before.entry(reason.name()).or_default() += times;
        assert_eq!(self.drops(), before, "{}", reason.name());
        assert_eq!(self.device_packets, packets, "{}: in silence", reason.name());
    }
}
