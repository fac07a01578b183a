//! What Python passes, as the engine wants it; what does not fit is a `ValueError` that names it.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::nat::Proto;
use crate::prefix::Prefix;
use crate::tunnel::Cipher;

pub(super) fn value_error(message: impl Into<String>) -> PyErr {
    PyValueError::new_err(message.into())
}

pub(super) fn key(name: &str, bytes: &[u8]) -> PyResult<[u8; 32]> {
    bytes.try_into().map_err(|_| value_error(format!("{name} must be 32 bytes, not {}", bytes.len())))
}

pub(super) fn address(text: &str) -> PyResult<Ipv4Addr> {
    text.parse().map_err(|_| value_error(format!("{text:?} is not an IPv4 address")))
}

pub(super) fn addresses(texts: &[String]) -> PyResult<Vec<Ipv4Addr>> {
    texts.iter().map(|text| address(text)).collect()
}

pub(super) fn prefix(text: &str) -> PyResult<Prefix> {
    text.parse().map_err(value_error)
}

pub(super) fn prefixes(texts: &[String]) -> PyResult<Vec<Prefix>> {
    texts.iter().map(|text| prefix(text)).collect()
}

pub(super) fn endpoint((host, port): &(String, u16)) -> PyResult<SocketAddrV4> {
    Ok(SocketAddrV4::new(address(host)?, *port))
}

pub(super) fn seconds(name: &str, value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| value_error(format!("{name} must be a number of seconds, not {value}")))
}

pub(super) fn transport_protocol(name: &str) -> PyResult<Proto> {
    match name {
        "tcp" => Ok(Proto::Tcp),
        "udp" => Ok(Proto::Udp),
        _ => Err(value_error(format!("{name:?} is neither \"tcp\" nor \"udp\""))),
    }
}

pub(super) fn cipher(name: &str) -> PyResult<Cipher> {
    Cipher::from_name(name).ok_or_else(|| {
        let known = Cipher::ALL.map(Cipher::name).join(" or ");
        value_error(format!("cipher must be {known}, not {name:?}"))
    })
}
