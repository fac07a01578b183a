//! The reserved ports over an engine's life: in its own hands until it is started, then in those of a thread.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4};

use super::EngineError;
use crate::external::reservation::{Batch, PortProtocol, PortReservation, Reserver, ReserverHandle};

/// Who holds the sockets of the reserved ports. A method means the same in each state; those that ask for nothing do
/// nothing once the engine was stopped, when there are no ports.
pub(super) enum Ports {
    /// The engine itself: it has not been started, and no shard asks for ports. Publications are claimed already.
    Waiting(PortReservation),
    /// The thread that reserves ports for the shards. What it is asked for, it does in order.
    Running(Reserver),
    /// Nobody: the engine was stopped, or could not be started.
    Stopped,
}

impl Ports {
    /// Hands the sockets to the reserver's thread, which calls `deliver` with each batch for a shard.
    ///
    /// # Errors
    /// If that was done before, also if the engine has been stopped since; if there are no more threads: then it is as
    /// if stopped.
    pub(super) fn start(
        &mut self,
        deliver: impl FnMut(Batch) + Send + 'static,
    ) -> Result<ReserverHandle, EngineError> {
        match std::mem::replace(self, Self::Stopped) {
            Self::Waiting(reservation) => {
                let reserver = Reserver::start(reservation, deliver)?;
                let handle = reserver.handle();
                *self = Self::Running(reserver);
                Ok(handle)
            }
            started @ (Self::Running(_) | Self::Stopped) => {
                *self = started;
                Err(EngineError::State(
                    "the engine has already been started and cannot be started again".into(),
                ))
            }
        }
    }

    /// Whether the thread runs: then the shards do, too, or are about to.
    pub(super) fn is_running(&self) -> bool {
        matches!(self, Self::Running(_))
    }

    /// Claims a port, to publish it ([`PortReservation::claim`]).
    ///
    /// # Errors
    /// Why it cannot be; `BrokenPipe` once the engine was stopped.
    pub(super) fn claim(&mut self, protocol: PortProtocol, port: SocketAddrV4) -> io::Result<()> {
        match self {
            Self::Waiting(reservation) => reservation.claim(protocol, port),
            Self::Running(reserver) => reserver.claim(protocol, port),
            Self::Stopped => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }

    /// Ends a claim that came to nothing ([`PortReservation::disclaim`]).
    pub(super) fn disclaim(&mut self, protocol: PortProtocol, port: SocketAddrV4) {
        match self {
            Self::Waiting(reservation) => reservation.disclaim(protocol, port),
            Self::Running(reserver) => reserver.disclaim(protocol, port),
            Self::Stopped => {}
        }
    }

    /// Closes the socket of a port that is published no longer ([`PortReservation::unreserve`]).
    pub(super) fn unreserve(&mut self, protocol: PortProtocol, port: SocketAddrV4) {
        match self {
            Self::Waiting(reservation) => _ = reservation.unreserve(protocol, port),
            Self::Running(reserver) => reserver.unreserve(protocol, port),
            Self::Stopped => {}
        }
    }

    /// Keeps these ports, first and last, for the host's programs ([`PortReservation::keep`]).
    pub(super) fn keep(&mut self, ports: Option<(u16, u16)>) {
        match self {
            Self::Waiting(reservation) => reservation.keep(ports),
            Self::Running(reserver) => reserver.keep(ports),
            Self::Stopped => {}
        }
    }

    /// Unreserves the ports of all other addresses ([`PortReservation::retain_addresses`]). What the thread has
    /// reserved of them before is in the shards' queues when this returns ([`Reserver::retain_addresses`]).
    pub(super) fn retain_addresses(&mut self, addresses: &[Ipv4Addr]) {
        match self {
            Self::Waiting(reservation) => reservation.retain_addresses(addresses),
            Self::Running(reserver) => reserver.retain_addresses(addresses),
            Self::Stopped => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_handed_to_the_thread_once_and_none_is_claimed_after_the_end() {
        let (udp, port) = (PortProtocol::Udp, SocketAddrV4::new(Ipv4Addr::new(127, 0, 78, 10), 63_600));
        let mut ports = Ports::Waiting(PortReservation::new(10));
        ports.claim(udp, port).unwrap();
        assert!(!ports.is_running());
        ports.start(drop).unwrap();
        let refusal = ports.claim(udp, port).unwrap_err();
        assert_eq!(refusal.raw_os_error(), Some(libc::EADDRINUSE), "what was claimed before still is");
        assert!(matches!(ports.start(drop), Err(EngineError::State(_))));
        assert!(ports.is_running(), "nothing has changed");
        ports.unreserve(udp, port);
        ports.claim(udp, port).unwrap();

        ports = Ports::Stopped;
        drop(std::net::UdpSocket::bind(port).unwrap());
        assert!(matches!(ports.start(drop), Err(EngineError::State(_))));
        assert_eq!(ports.claim(udp, port).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
