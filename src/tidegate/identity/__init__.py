"""Identities: keys and profiles."""

from tidegate.identity.keys import (
    decode_key,
    encode_key,
    load_or_make_private_key,
    make_preshared_key,
    make_private_key,
    parse_public_key,
    public_key_of,
)
from tidegate.identity.profile import Profile, others_can_read, parse_profile, read_profile

__all__ = [
    "Profile",
    "decode_key",
    "encode_key",
    "load_or_make_private_key",
    "make_preshared_key",
    "make_private_key",
    "others_can_read",
    "parse_profile",
    "parse_public_key",
    "public_key_of",
    "read_profile",
]
