//! The test vectors of `docs/protocol.md`, read from there, so that what is written and what is done stay the same.

use aws_lc_rs::hkdf;
use zeroize::Zeroizing;

use super::super::cipher::{AES_KEY_INFO, AES_KEY_SALT, AesKeyLength};
use super::super::messages::{DATA_HEADER_LEN, Message};
use super::super::session::{Session, TransportKeys};
use super::*;

/// One sealed message.
struct Sealed {
    counter: u64,
    plaintext: Vec<u8>,
    message: Vec<u8>,
}

struct Vectors {
    transport_key: [u8; 32],
    aes_key: [u8; 32],
    receiver: u32,
    sealed: Vec<Sealed>,
}

fn vectors() -> Vectors {
    let document = include_str!("../../../../docs/protocol.md");
    let (_, section) = document.split_once("### Test vectors").unwrap();
    let block = section.split("```").nth(1).unwrap();
    let rows: Vec<(&str, &str)> = block
        .lines()
        .filter(|line| !line.is_empty())
        .map(|line| line.split_once(' ').map_or((line, ""), |(name, value)| (name, value.trim())))
        .collect();
    let [("T", transport_key), ("K", aes_key), ("receiver", receiver), sealed @ ..] = &rows[..] else {
        panic!("unexpected rows: {rows:?}");
    };
    let sealed = sealed.chunks(3).map(|rows| {
        let [("counter", counter), ("plaintext", plaintext), ("message", message)] = rows else {
            panic!("unexpected rows: {rows:?}");
        };
        let counter = u64::from_str_radix(counter, 16).unwrap();
        Sealed { counter, plaintext: hex(plaintext), message: hex(message) }
    });
    Vectors {
        transport_key: hex(transport_key).try_into().unwrap(),
        aes_key: hex(aes_key).try_into().unwrap(),
        receiver: u32::from_str_radix(receiver, 16).unwrap(),
        sealed: sealed.collect(),
    }
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// A session that seals and opens with the same transport key, so that one of them serves both directions.
fn session(cipher: Cipher, vectors: &Vectors) -> Box<Session> {
    let key = || Zeroizing::new(vectors.transport_key);
    let keys = TransportKeys { sealing: key(), opening: key() };
    Session::new(
        &keys,
        (cipher, Library::fastest(1)),
        (vectors.receiver, vectors.receiver),
        true,
        Timestamp::ORIGIN,
    )
    .unwrap()
}

#[test]
fn the_aes_key_is_derived_as_documented() {
    let vectors = vectors();
    let mut key = [0; 32];
    let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, AES_KEY_SALT).extract(&vectors.transport_key);
    prk.expand(&[AES_KEY_INFO], AesKeyLength).unwrap().fill(&mut key).unwrap();
    assert_eq!(key, vectors.aes_key);
    assert_ne!(key, vectors.transport_key);
}

#[test]
fn messages_are_sealed_as_documented() {
    let vectors = vectors();
    let mut session = session(Cipher::Aes256Gcm, &vectors);
    for (counter, sealed) in vectors.sealed.iter().take_while(|sealed| sealed.counter < 2).enumerate() {
        assert_eq!(sealed.counter, counter as u64);
        let mut buffer = vec![0xee; sealed.message.len()];
        // The zero bytes at the end are padding, which sealing adds.
        let len = sealed.plaintext.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
        buffer[DATA_HEADER_LEN..][..len].copy_from_slice(&sealed.plaintext[..len]);
        assert_eq!(session.seal(&mut buffer, len, sealed.plaintext.len() - len), Ok(buffer.len()));
        assert_eq!(buffer, sealed.message);
    }
}

#[test]
fn messages_are_opened_as_documented_and_by_no_other_cipher() {
    let vectors = vectors();
    assert_eq!(vectors.sealed.len(), 3);
    let mut session_aes = session(Cipher::Aes256Gcm, &vectors);
    let mut session_chacha = session(Cipher::ChaCha20Poly1305, &vectors);
    for sealed in &vectors.sealed {
        let mut message = sealed.message.clone();
        let Ok(Message::Data(header)) = Message::parse(&message) else { panic!("no data message") };
        assert_eq!((header.receiver, header.counter), (vectors.receiver, sealed.counter));
        let refused =
            session_chacha.open(header.counter, &mut message.clone()[DATA_HEADER_LEN..], Timestamp::ORIGIN);
        assert_eq!(refused, Err(DropReason::BadAuthentication));
        let len = session_aes.open(header.counter, &mut message[DATA_HEADER_LEN..], Timestamp::ORIGIN);
        assert_eq!(len, Ok(sealed.plaintext.len()));
        assert_eq!(message[DATA_HEADER_LEN..][..sealed.plaintext.len()], sealed.plaintext[..]);
    }
}
