//! The Noise handshake (`Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s`, whitepaper §5.4): messages 1 and 2 around `snow`.
//!
//! `snow` runs the pattern; X25519 comes from `x25519-dalek` through a resolver of our own, because `snow`'s neither
//! refuses low-order points (which would make a shared secret public) nor erases its private keys. What `snow` keeps
//! of the chaining key it does not erase either; a handshake's state is dropped as soon as it is answered, given up or
//! replaced.

use std::time::Duration;

use snow::params::{CipherChoice, DHChoice, HashChoice, NoiseParams};
use snow::resolvers::{CryptoResolver, DefaultResolver};
use snow::types::{Cipher, Dh, Hash, Random};
use snow::{Builder, HandshakeState};
use x25519_dalek::{PublicKey, StaticSecret};
use zeroize::Zeroizing;

use super::messages::{INITIATION_NOISE, Initiation, RESPONSE_NOISE, Response, TIMESTAMP_LEN};
use super::session::TransportKeys;
use crate::clock::Timestamp;
use crate::drop_reason::DropReason;

const PATTERN: &str = "Noise_IKpsk2_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"WireGuard v1 zx2c4 Jason@zx2c4.com";
/// The place of the `psk` token in IKpsk2: the end of message 2.
const PSK_LOCATION: usize = 2;

/// The public key of a private key (X25519, RFC 7748).
pub fn public_key(private_key: &[u8; 32]) -> [u8; 32] {
    PublicKey::from(&StaticSecret::from(*private_key)).to_bytes()
}

/// `N` bytes of the kernel's randomness.
///
/// # Errors
/// [`DropReason::NoRandomness`] if it has none to give.
pub fn random_bytes<const N: usize>() -> Result<[u8; N], DropReason> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|_| DropReason::NoRandomness)?;
    Ok(bytes)
}

/// Who we are.
pub struct Identity {
    private_key: Zeroizing<[u8; 32]>,
    public_key: [u8; 32],
    /// `None` only if `snow` no longer knew the pattern, which a test would notice.
    params: Option<NoiseParams>,
}

/// An initiation that we received and understood, and may answer.
pub struct ReceivedInitiation {
    /// The initiator's static public key, authenticated.
    pub public_key: [u8; 32],
    /// The initiator's TAI64N timestamp, greater than any that it sent before.
    pub timestamp: [u8; TIMESTAMP_LEN],
    state: HandshakeState,
}

/// An initiation that we sent, and that waits for its response.
pub struct SentInitiation(HandshakeState);

impl Identity {
    /// The identity behind `private_key`.
    pub fn new(private_key: [u8; 32]) -> Self {
        let public_key = public_key(&private_key);
        Self { private_key: Zeroizing::new(private_key), public_key, params: PATTERN.parse().ok() }
    }

    /// Our static public key.
    pub fn public_key(&self) -> &[u8; 32] {
        &self.public_key
    }

    /// Message 1, as the initiator: writes its Noise part into `message`.
    ///
    /// # Errors
    /// [`DropReason::BadHandshake`] if `peer` is no valid public key (or randomness fails).
    pub fn initiate(
        &self,
        peer: &[u8; 32],
        psk: &[u8; 32],
        timestamp: &[u8; TIMESTAMP_LEN],
        message: &mut [u8],
    ) -> Result<SentInitiation, DropReason> {
        let builder = self.builder()?;
        let mut state = builder
            .remote_public_key(peer)
            .and_then(|builder| builder.psk(PSK_LOCATION as u8, psk))
            .and_then(Builder::build_initiator)
            .map_err(bad_handshake)?;
        state.write_message(timestamp, &mut message[INITIATION_NOISE]).map_err(bad_handshake)?;
        Ok(SentInitiation(state))
    }

    /// Message 1, as the responder.
    ///
    /// # Errors
    /// [`DropReason::BadHandshake`] if it does not authenticate.
    pub fn receive_initiation(&self, message: Initiation<'_>) -> Result<ReceivedInitiation, DropReason> {
        let mut state = self.builder()?.build_responder().map_err(bad_handshake)?;
        let mut timestamp = [0; TIMESTAMP_LEN];
        state.read_message(message.noise(), &mut timestamp).map_err(bad_handshake)?;
        let public_key =
            state.get_remote_static().and_then(|key| key.try_into().ok()).ok_or(DropReason::BadHandshake)?;
        Ok(ReceivedInitiation { public_key, timestamp, state })
    }

    fn builder(&self) -> Result<Builder<'_>, DropReason> {
        let params = self.params.clone().ok_or(DropReason::BadHandshake)?;
        Builder::with_resolver(params, Box::new(Resolver))
            .local_private_key(&*self.private_key)
            .and_then(|builder| builder.prologue(PROLOGUE))
            .map_err(bad_handshake)
    }
}

impl ReceivedInitiation {
    /// Message 2, as the responder: writes its Noise part into `message` and derives the transport keys.
    ///
    /// # Errors
    /// [`DropReason::BadHandshake`] if the initiator's ephemeral key is of low order.
    pub fn respond(mut self, psk: &[u8; 32], message: &mut [u8]) -> Result<TransportKeys, DropReason> {
        self.state.set_psk(PSK_LOCATION, psk).map_err(bad_handshake)?;
        self.state.write_message(&[], &mut message[RESPONSE_NOISE]).map_err(bad_handshake)?;
        let (initiator, responder) = self.state.dangerously_get_raw_split();
        Ok(TransportKeys { sealing: Zeroizing::new(responder), opening: Zeroizing::new(initiator) })
    }
}

impl SentInitiation {
    /// Message 2, as the initiator: derives the transport keys. A forged response leaves the handshake as it was.
    ///
    /// # Errors
    /// [`DropReason::BadHandshake`] if it does not authenticate.
    pub fn receive_response(&mut self, message: Response<'_>) -> Result<TransportKeys, DropReason> {
        self.0.read_message(message.noise(), &mut []).map_err(bad_handshake)?;
        let (initiator, responder) = self.0.dangerously_get_raw_split();
        Ok(TransportKeys { sealing: Zeroizing::new(initiator), opening: Zeroizing::new(responder) })
    }
}

/// Whatever `snow` objects to, the message is not one that we can use.
fn bad_handshake(_: snow::Error) -> DropReason {
    DropReason::BadHandshake
}

/// 17 ms, in nanoseconds: as fine as timestamps are.
const WHITENING: u32 = 1 << 24;

/// The wall clock as TAI64N (whitepaper §5.1): 2^62 + 10 s + Unix seconds, then nanoseconds, both big-endian.
///
/// The nanoseconds are rounded down to [`WHITENING`], as everybody does, so that they do not tell how fast we compute.
pub fn tai64n(unix_time_at_origin: Duration, now: Timestamp) -> [u8; TIMESTAMP_LEN] {
    const TAI64_EPOCH: u64 = (1 << 62) + 10;
    let unix_time = unix_time_at_origin + now.since(Timestamp::ORIGIN);
    let mut timestamp = [0; TIMESTAMP_LEN];
    timestamp[..8].copy_from_slice(&(TAI64_EPOCH + unix_time.as_secs()).to_be_bytes());
    timestamp[8..].copy_from_slice(&(unix_time.subsec_nanos() & !(WHITENING - 1)).to_be_bytes());
    timestamp
}

/// `snow`'s own algorithms, except for X25519.
struct Resolver;

impl CryptoResolver for Resolver {
    fn resolve_rng(&self) -> Option<Box<dyn Random>> {
        DefaultResolver.resolve_rng()
    }

    fn resolve_dh(&self, choice: &DHChoice) -> Option<Box<dyn Dh>> {
        (*choice == DHChoice::Curve25519).then(|| Box::new(X25519::default()) as Box<dyn Dh>)
    }

    fn resolve_hash(&self, choice: &HashChoice) -> Option<Box<dyn Hash>> {
        DefaultResolver.resolve_hash(choice)
    }

    fn resolve_cipher(&self, choice: &CipherChoice) -> Option<Box<dyn Cipher>> {
        DefaultResolver.resolve_cipher(choice)
    }
}

/// A key pair of `x25519-dalek`, which erases itself.
#[derive(Default)]
struct X25519 {
    private_key: Option<StaticSecret>,
    public_key: [u8; 32],
}

impl Dh for X25519 {
    fn name(&self) -> &'static str {
        "25519"
    }

    fn pub_len(&self) -> usize {
        32
    }

    fn priv_len(&self) -> usize {
        32
    }

    fn set(&mut self, private_key: &[u8]) {
        self.private_key = <[u8; 32]>::try_from(private_key).ok().map(StaticSecret::from);
        self.public_key =
            self.private_key.as_ref().map(|key| PublicKey::from(key).to_bytes()).unwrap_or_default();
    }

    fn generate(&mut self, rng: &mut dyn Random) -> Result<(), snow::Error> {
        let mut private_key = Zeroizing::new([0; 32]);
        rng.try_fill_bytes(&mut *private_key)?;
        self.set(&*private_key);
        Ok(())
    }

    fn pubkey(&self) -> &[u8] {
        &self.public_key
    }

    fn privkey(&self) -> &[u8] {
        self.private_key.as_ref().map_or(&[], |key| key.as_bytes())
    }

    fn dh(&self, public_key: &[u8], out: &mut [u8]) -> Result<(), snow::Error> {
        let public_key = public_key.first_chunk::<32>().ok_or(snow::Error::Dh)?;
        let private_key = self.private_key.as_ref().ok_or(snow::Error::Dh)?;
        let shared = private_key.diffie_hellman(&PublicKey::from(*public_key));
        if !shared.was_contributory() {
            return Err(snow::Error::Dh);
        }
        out.get_mut(..32).ok_or(snow::Error::Dh)?.copy_from_slice(shared.as_bytes());
        Ok(())
    }
}

/// The least timestamp after `last` that [`tai64n`] can give: for a clock that was set back.
pub fn after_tai64n(last: [u8; TIMESTAMP_LEN]) -> [u8; TIMESTAMP_LEN] {
    let [seconds @ .., n0, n1, n2, n3] = last;
    let mut seconds = u64::from_be_bytes(seconds);
    let mut nanos = u32::from_be_bytes([n0, n1, n2, n3]).saturating_add(WHITENING);
    if nanos >= 1_000_000_000 {
        (seconds, nanos) = (seconds.saturating_add(1), 0);
    }
    let mut next = [0; TIMESTAMP_LEN];
    next[..8].copy_from_slice(&seconds.to_be_bytes());
    next[8..].copy_from_slice(&nanos.to_be_bytes());
    next
}

#[cfg(test)]
mod tests {
    use super::super::messages::Message;
    use super::*;

    #[test]
    fn x25519_agrees_with_rfc_7748() {
        // RFC 7748 §6.1: Alice's private and public key.
        let alice = [
            0x77, 0x07, 0x6d, 0x0a, 0x73, 0x18, 0xa5, 0x7d, 0x3c, 0x16, 0xc1, 0x72, 0x51, 0xb2, 0x66, 0x45,
            0xdf, 0x4c, 0x2f, 0x87, 0xeb, 0xc0, 0x99, 0x2a, 0xb1, 0x77, 0xfb, 0xa5, 0x1d, 0xb9, 0x2c, 0x2a,
        ];
        let public = [
            0x85, 0x20, 0xf0, 0x09, 0x89, 0x30, 0xa7, 0x54, 0x74, 0x8b, 0x7d, 0xdc, 0xb4, 0x3e, 0xf7, 0x5a,
            0x0d, 0xbf, 0x3a, 0x0d, 0x26, 0x38, 0x1a, 0xf4, 0xeb, 0xa4, 0xa9, 0x8e, 0xaa, 0x9b, 0x4e, 0x6a,
        ];
        assert_eq!(public_key(&alice), public);
    }

    #[test]
    fn both_sides_derive_the_same_keys() {
        let (alice, bob) = (Identity::new([1; 32]), Identity::new([2; 32]));
        let psk = [3; 32];
        let mut first = Initiation::template(1);
        let mut sent = alice.initiate(bob.public_key(), &psk, &[4; 12], &mut first).unwrap();
        let Ok(Message::Initiation(initiation)) = Message::parse(&first) else { panic!("no initiation") };
        let received = bob.receive_initiation(initiation).unwrap();
        assert_eq!(&received.public_key, alice.public_key());
        assert_eq!(received.timestamp, [4; 12]);
        let mut second = Response::template(2, 1);
        let bobs = received.respond(&psk, &mut second).unwrap();

        let mut forged = second;
        forged[20] ^= 1;
        let Ok(Message::Response(response)) = Message::parse(&forged) else { panic!("no response") };
        assert!(sent.receive_response(response).is_err());
        let Ok(Message::Response(response)) = Message::parse(&second) else { panic!("no response") };
        let alices = sent.receive_response(response).unwrap();
        assert_eq!((&*alices.sealing, &*alices.opening), (&*bobs.opening, &*bobs.sealing));
        assert_ne!(&*alices.sealing, &*alices.opening);
    }

    #[test]
    fn a_low_order_public_key_is_refused() {
        let alice = Identity::new([1; 32]);
        for key in [[0; 32], {
            let mut one = [0; 32];
            one[0] = 1;
            one
        }] {
            assert!(alice.initiate(&key, &[0; 32], &[0; 12], &mut Initiation::template(1)).is_err());
        }
    }

    #[test]
    fn the_timestamp_after_another_is_later_and_as_coarse() {
        let second = Duration::from_secs(1_700_000_000);
        for nanos in [0, 1 << 24, 59 << 24] {
            let last = tai64n(second, Timestamp::from_nanos(nanos));
            let next = after_tai64n(last);
            assert!(next > last);
            let expected = if nanos == 59 << 24 { 1_000_000_000 } else { nanos + (1 << 24) };
            assert_eq!(next, tai64n(second, Timestamp::from_nanos(expected)));
        }
        assert!(after_tai64n([0xff; TIMESTAMP_LEN]) <= [0xff; TIMESTAMP_LEN], "and never panics");
    }

    #[test]
    fn tai64n_counts_from_1970_with_ten_leap_seconds() {
        let timestamp = tai64n(Duration::from_secs(1_700_000_000), Timestamp::from_nanos(0x0100_0001));
        assert_eq!(timestamp, [0x40, 0, 0, 0, 0x65, 0x53, 0xf1, 0x0a, 0x01, 0, 0, 0]);
    }
}
