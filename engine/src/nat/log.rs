//! The log of mappings (RFC 6888 REQ-12): which client had which external port, and when. It names no destinations.
//!
//! # Theory of operation
//!
//! The NAT only notes what happened, in a list that its caller takes away ([`Nat::take_log`]) at the end of a turn. The
//! list is bounded: what does not fit is counted, so that a log with gaps says that it has them. Where no log is wanted
//! a new mapping costs one branch, and a packet of an old one nothing.

use super::config::{Endpoint, Proto};
use super::table::Mapping;
use crate::clock::Timestamp;

/// Records between two calls of [`Nat::take_log`], at most. Only the end of many mappings at once fills it.
const MAX_RECORDS: usize = 8_192;

/// What became of a mapping.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum MappingEvent {
    /// It was made.
    Created,
    /// It ended.
    Ended,
}

impl MappingEvent {
    /// Its name in the log.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Ended => "ended",
        }
    }
}

/// One line of the log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MappingRecord {
    /// What happened.
    pub event: MappingEvent,
    /// When.
    pub at: Timestamp,
    /// The protocol.
    pub protocol: Proto,
    /// The client's endpoint.
    pub internal: Endpoint,
    /// The endpoint that stands, or stood, for it outside.
    pub external: Endpoint,
    /// When the mapping was made.
    pub created: Timestamp,
}

/// The records that nobody has taken yet.
#[derive(Debug, Default)]
pub(super) struct MappingLogBuffer {
    records: Vec<MappingRecord>,
    missing: u64,
}

impl MappingLogBuffer {
    pub(super) fn note(&mut self, event: MappingEvent, mapping: &Mapping, at: Timestamp) {
        if self.records.len() >= MAX_RECORDS {
            self.missing += 1;
            return;
        }
        let Mapping { protocol, internal, external, created, .. } = *mapping;
        self.records.push(MappingRecord { event, at, protocol, internal, external, created });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.records.is_empty() && self.missing == 0
    }

    /// The records, and how many more there would be.
    pub(super) fn take(&mut self) -> (Vec<MappingRecord>, u64) {
        (std::mem::take(&mut self.records), std::mem::take(&mut self.missing))
    }
}
