//! MACs and cookies: what a handshake message must show before it may cost a Diffie-Hellman (whitepaper §5.3, §5.4.4,
//! §5.4.7).
//!
//! *mac1* proves that the sender knows our public key. Above [`LOAD_THRESHOLD`] handshake messages per second the
//! gateway is *under load*, and demands *mac2* too: a MAC under a cookie that it sent to the very address that the
//! message claims to come from. Whoever shows it is then held to [`SOURCE_RATE`] messages per second, and all together
//! to [`TOTAL_RATE`]. So a flood from forged addresses costs two hashes a message, and one from real addresses is
//! bounded, however many they are.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use blake2::digest::consts::U16;
use blake2::digest::{FixedOutput, KeyInit, Mac};
use blake2::{Blake2s256, Blake2sMac, Digest};
use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use foldhash::fast::RandomState;
use hashbrown::HashMap;
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::handshake::random_bytes;
use super::messages::{COOKIE_REPLY_LEN, CookieReply, Handshake, MAC_LEN};
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;
use crate::rate_limit::TokenBucket;

/// A cookie lives this long on either side (whitepaper §5.4.7: the secret changes every two minutes).
pub const COOKIE_LIFETIME: Duration = Duration::from_secs(120);
/// Handshake messages per second from which on we are under load. 1,000 peers renew their sessions at 8 per second; a
/// core answers some 5,000.
pub const LOAD_THRESHOLD: u32 = 200;
/// Handshake messages per second that one source address may send while we are under load (as in Linux).
pub const SOURCE_RATE: u32 = 20;
/// How many it may send at once (as in Linux).
pub const SOURCE_BURST: u32 = 5;
/// Handshake messages per second that are read in all while we are under load: a quarter to half of a core's time.
/// Whoever has more addresses than that gets no more; and 1,000 peers whose gateway was restarted are back within
/// seconds.
pub const TOTAL_RATE: u32 = 2_000;
/// How many at once: a tenth of a second's.
pub const TOTAL_BURST: u32 = 200;
/// How many source addresses are watched; further ones are refused while we are under load.
const MAX_SOURCES: usize = 8192;
/// How long a source is remembered: its bucket is full again by then.
const SOURCE_LIFETIME: Duration = Duration::from_secs(1);

const LABEL_MAC1: &[u8] = b"mac1----";
const LABEL_COOKIE: &[u8] = b"cookie--";

type Cookie = Zeroizing<[u8; MAC_LEN]>;

/// The keys that follow from a public key: those who know it can write to its owner.
pub struct MacKeys {
    mac1: Zeroizing<[u8; 32]>,
    cookie: Zeroizing<[u8; 32]>,
}

impl MacKeys {
    /// The keys to write to (or to be written to as) the owner of `public_key`.
    pub fn new(public_key: &[u8; 32]) -> Self {
        let key = |label: &[u8]| {
            Zeroizing::new(Blake2s256::new().chain_update(label).chain_update(public_key).finalize().into())
        };
        Self { mac1: key(LABEL_MAC1), cookie: key(LABEL_COOKIE) }
    }
}

/// The sender's side: the last mac1 that we sent to a peer, and the cookie that the peer gave us.
#[derive(Default)]
pub struct CookieJar {
    last_mac1: Option<[u8; MAC_LEN]>,
    cookie: Option<(Cookie, Timestamp)>,
}

impl CookieJar {
    /// Ends a handshake message with mac1, and with mac2 if we have a cookie.
    ///
    /// # Errors
    /// [`DropReason::BadMac`] if the message has no room for them, which a template has.
    pub fn sign(&mut self, keys: &MacKeys, message: &mut [u8], now: Timestamp) -> Result<(), DropReason> {
        self.expire(now);
        let (unsigned, macs) = message.split_last_chunk_mut::<{ 2 * MAC_LEN }>().ok_or(DropReason::BadMac)?;
        let mac1 = mac(&*keys.mac1, &[unsigned])?;
        macs[..MAC_LEN].copy_from_slice(&mac1);
        if let Some((cookie, _)) = &self.cookie {
            macs[MAC_LEN..].copy_from_slice(&mac(&**cookie, &[unsigned, &mac1])?);
        }
        self.last_mac1 = Some(mac1);
        Ok(())
    }

    /// Takes a cookie out of the peer's reply to our last handshake message; the next one will carry mac2.
    ///
    /// # Errors
    /// [`DropReason::BadHandshake`] if it answers nothing or does not authenticate.
    pub fn receive(
        &mut self,
        keys: &MacKeys,
        reply: CookieReply<'_>,
        now: Timestamp,
    ) -> Result<(), DropReason> {
        let last_mac1 = self.last_mac1.ok_or(DropReason::BadHandshake)?;
        let payload = Payload { msg: &reply.sealed_cookie(), aad: &last_mac1 };
        let opened = XChaCha20Poly1305::new((&*keys.cookie).into())
            .decrypt(XNonce::from_slice(&reply.nonce()), payload)
            .map(Zeroizing::new)
            .map_err(|_| DropReason::BadHandshake)?;
        let mut cookie = Zeroizing::new([0; MAC_LEN]);
        cookie.copy_from_slice(opened.get(..MAC_LEN).ok_or(DropReason::BadHandshake)?);
        self.cookie = Some((cookie, now));
        self.last_mac1 = None; // One reply to a message is enough.
        Ok(())
    }

    /// Erases a cookie that is too old.
    pub fn expire(&mut self, now: Timestamp) {
        if self.expiry().is_some_and(|expiry| expiry <= now) {
            self.cookie = None;
        }
    }

    /// When there is something to expire.
    pub fn expiry(&self) -> Option<Timestamp> {
        self.cookie.as_ref().map(|(_, received)| *received + COOKIE_LIFETIME)
    }
}

/// What becomes of a handshake message, before anything expensive is done for it.
pub enum AdmissionVerdict {
    /// Read it.
    Admit,
    /// Drop it, and send this.
    Challenge([u8; COOKIE_REPLY_LEN]),
}

/// The receiver's side: which handshake messages are worth a Diffie-Hellman.
pub struct Admission {
    keys: MacKeys,
    secret: Option<(Zeroizing<[u8; 32]>, Timestamp)>,
    load: Load,
    /// What all sources together may send under load.
    total: TokenBucket,
    sources: HashMap<Ipv4Addr, Bucket, RandomState>,
    /// When sources that were quiet are forgotten next.
    sources_expiry: Option<Timestamp>,
}

impl Admission {
    /// The gate of the owner of `public_key`.
    pub fn new(public_key: &[u8; 32]) -> Self {
        Self {
            keys: MacKeys::new(public_key),
            secret: None,
            load: Load::default(),
            total: TokenBucket::new(TOTAL_RATE, TOTAL_BURST),
            sources: HashMap::default(),
            sources_expiry: None,
        }
    }

    /// Judges a handshake message from `source`.
    ///
    /// # Errors
    /// [`DropReason::BadMac`] or [`DropReason::HandshakeRateLimited`].
    pub fn judge(
        &mut self,
        message: &impl Handshake,
        source: SocketAddrV4,
        now: Timestamp,
    ) -> Result<AdmissionVerdict, DropReason> {
        let mac1 = mac(&*self.keys.mac1, &[message.before_mac1()])?;
        if !bool::from(mac1.ct_eq(&message.mac1())) {
            return Err(DropReason::BadMac);
        }
        if !self.load.count(now) {
            return Ok(AdmissionVerdict::Admit);
        }
        let cookie = self.cookie(source, now)?;
        let mac2 = mac(&*cookie, &[message.before_mac2()])?;
        if !bool::from(mac2.ct_eq(&message.mac2())) {
            return self.challenge(message.sender(), &mac1, &cookie).map(AdmissionVerdict::Challenge);
        }
        if self.spend(*source.ip(), now) && self.total.take(now) {
            Ok(AdmissionVerdict::Admit)
        } else {
            Err(DropReason::HandshakeRateLimited)
        }
    }

    /// The cookie of `source`: a MAC of its address under a secret that changes every [`COOKIE_LIFETIME`].
    fn cookie(&mut self, source: SocketAddrV4, now: Timestamp) -> Result<Cookie, DropReason> {
        self.expire_secret(now);
        let secret = match &self.secret {
            Some((secret, _)) => secret,
            None => &self.secret.insert((Zeroizing::new(random_bytes()?), now)).0,
        };
        mac(&**secret, &[&source.ip().octets(), &source.port().to_be_bytes()]).map(Zeroizing::new)
    }

    fn challenge(
        &self,
        receiver: u32,
        mac1: &[u8; MAC_LEN],
        cookie: &Cookie,
    ) -> Result<[u8; COOKIE_REPLY_LEN], DropReason> {
        let nonce = random_bytes::<24>()?;
        let sealed = XChaCha20Poly1305::new((&*self.keys.cookie).into())
            .encrypt(XNonce::from_slice(&nonce), Payload { msg: &**cookie, aad: mac1 })
            .ok()
            .and_then(|sealed| sealed.try_into().ok())
            .ok_or(DropReason::CookieRequired)?;
        Ok(CookieReply::build(receiver, &nonce, &sealed))
    }

    /// Takes a token from the source's bucket.
    fn spend(&mut self, source: Ipv4Addr, now: Timestamp) -> bool {
        if self.sources.len() >= MAX_SOURCES && !self.sources.contains_key(&source) {
            return false;
        }
        self.sources_expiry.get_or_insert(now + SOURCE_LIFETIME);
        self.sources.entry(source).or_insert(Bucket { nanos: Bucket::FULL, at: now }).spend(now)
    }

    /// Erases an old cookie secret, and forgets sources that were quiet.
    pub fn expire(&mut self, now: Timestamp) {
        self.expire_secret(now);
        if self.sources_expiry.is_some_and(|expiry| expiry <= now) {
            self.sources.retain(|_, bucket| now.since(bucket.at) < SOURCE_LIFETIME);
            self.sources_expiry = (!self.sources.is_empty()).then(|| now + SOURCE_LIFETIME);
        }
    }

    fn expire_secret(&mut self, now: Timestamp) {
        if self.secret.as_ref().is_some_and(|(_, born)| *born + COOKIE_LIFETIME <= now) {
            self.secret = None;
        }
    }

    /// When there is something to expire.
    pub fn expiry(&self) -> Option<Timestamp> {
        let secret = self.secret.as_ref().map(|(_, born)| *born + COOKIE_LIFETIME);
        secret.into_iter().chain(self.sources_expiry).min()
    }
}

/// Handshake messages per second.
#[derive(Default)]
struct Load {
    since: Timestamp,
    messages: u32,
    was_high: bool,
}

impl Load {
    /// Counts a message; whether we are under load, as we stay for a second after the last second that was.
    fn count(&mut self, now: Timestamp) -> bool {
        let elapsed = now.since(self.since);
        if elapsed >= Duration::from_secs(1) {
            self.was_high = elapsed < Duration::from_secs(2) && self.messages > LOAD_THRESHOLD;
            (self.since, self.messages) = (now, 0);
        }
        self.messages = self.messages.saturating_add(1);
        self.was_high || self.messages > LOAD_THRESHOLD
    }
}

/// A token bucket, in nanoseconds of credit.
struct Bucket {
    nanos: u64,
    at: Timestamp,
}

impl Bucket {
    const COST: u64 = 1_000_000_000 / SOURCE_RATE as u64;
    const FULL: u64 = Self::COST * SOURCE_BURST as u64;

    fn spend(&mut self, now: Timestamp) -> bool {
        let earned = u64::try_from(now.since(self.at).as_nanos()).unwrap_or(u64::MAX);
        self.nanos = self.nanos.saturating_add(earned).min(Self::FULL);
        self.at = now;
        let remaining = self.nanos.checked_sub(Self::COST);
        self.nanos = remaining.unwrap_or(self.nanos);
        remaining.is_some()
    }
}

/// `MAC(key, input)`: keyed BLAKE2s with 16 bytes of output (RFC 7693).
///
/// # Errors
/// [`DropReason::BadMac`] for a key above 32 bytes, which no caller has.
fn mac(key: &[u8], parts: &[&[u8]]) -> Result<[u8; MAC_LEN], DropReason> {
    let mut state = <Blake2sMac<U16> as KeyInit>::new_from_slice(key).map_err(|_| DropReason::BadMac)?;
    for part in parts {
        state.update(part);
    }
    Ok(state.finalize_fixed().into())
}
