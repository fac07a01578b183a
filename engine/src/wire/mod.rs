//! Bytes as they stand on the wire: checked header views, checksums, offload metadata, split and coalesce.
//!
//! Everything here is pure: slices in, slices out. All integers on the wire are in network byte order; all integers
//! in the types are in the machine's.

pub mod checksum;
pub mod coalesce;
pub mod ecn;
pub mod ipv4;
pub mod offload;
pub mod shape;
pub mod split;
#[cfg(test)]
pub(crate) mod test_packets;

pub use coalesce::{CoalesceOptions, Coalescer, Gathered};
pub use ecn::Ecn;
pub use ipv4::{Ipv4Packet, Transport, protocol};
pub use offload::{ChecksumState, Gso, GsoKind, Offload, VirtioNetHeader};
pub use shape::Shape;
pub use split::{Segments, SegmentsInPlace};
