//! IPv4 fragments: datagrams are made whole where they enter, and cut up where they leave.

pub mod fragmentation;
pub mod reassembly;

#[cfg(test)]
mod tests;
