"""Inspects DNS messages as far as a forwarding proxy must; the codec is dnspython's.

Queries and answers travel as the bytes they came in; only the id is replaced (RFC 5452 §9.2).

Whoever writes a message decides what it costs to parse: dnspython keeps names in dicts, under hashes that anybody can
make collide, so a few KiB can take seconds. So the header is looked at first, and nothing is parsed that has more
records than a query needs; of an answer, only the question is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.opcode
import dns.rcode
import dns.rdatatype

HEADER_BYTES = 12  # RFC 1035 §4.1.1
MINIMUM_UDP_PAYLOAD = 512  # RFC 1035 §4.2.1
MAX_QUERY_BYTES = 4096
MAX_ADDITIONAL_RECORDS = 2
"""Of a query: EDNS's OPT (RFC 6891) and a signature (RFC 8945, RFC 2931)."""
QR = 0x8000  # RFC 1035 §4.1.1: a response
TC = 0x0200  # RFC 1035 §4.1.1: truncated

RETRY_ELSEWHERE = frozenset({dns.rcode.SERVFAIL, dns.rcode.NOTIMP, dns.rcode.REFUSED})
"""Answers after which another resolver is worth asking."""


class MalformedError(Exception):
    """The message cannot be forwarded. `answer` is what to send back: FORMERR, NOTIMP, or nothing (`None`)."""

    def __init__(self, why: str, answer: bytes | None) -> None:
        super().__init__(why)
        self.answer = answer


@dataclass(frozen=True, slots=True)
class Query:
    """A parsed query."""

    wire: bytes
    id: int
    question: tuple[dns.name.Name, int, int]
    """Name, type, class."""
    udp_payload: int
    """The largest UDP answer that the client accepts, in bytes (RFC 6891 §6.2.3)."""
    message: dns.message.Message

    def with_id(self, number: int) -> bytes:
        return replace_id(self.wire, number)


def parse_query(wire: bytes) -> Query:
    """Raises `MalformedError`. What a query costs is bounded by its length, which is bounded."""
    if len(wire) < HEADER_BYTES:
        raise MalformedError("shorter than a header", None)
    number, flags, questions, answered, authority, additional = struct.unpack_from("!HHHHHH", wire)
    if flags & QR:
        # Answering it could make two proxies talk to each other for ever.
        raise MalformedError("a response, not a query", None)
    opcode = dns.opcode.from_flags(flags)
    if opcode != dns.opcode.QUERY:
        raise MalformedError("not a QUERY", _bare_answer(number, flags, dns.rcode.NOTIMP))
    if questions != 1:
        raise MalformedError(f"{questions} questions", _bare_answer(number, flags, dns.rcode.FORMERR))
    if answered or authority or additional > MAX_ADDITIONAL_RECORDS:
        raise MalformedError("too many records", _bare_answer(number, flags, dns.rcode.FORMERR))
    if len(wire) > MAX_QUERY_BYTES:
        raise MalformedError(f"{len(wire)} bytes", _bare_answer(number, flags, dns.rcode.FORMERR))
    try:
        # We hold no TSIG key, so signed queries are forwarded with their signature (RFC 8945 §5.5).
        message = dns.message.from_wire(wire, keyring=False)
    except (dns.exception.DNSException, ValueError, struct.error):
        raise MalformedError("cannot be parsed", _bare_answer(number, flags, dns.rcode.FORMERR)) from None
    question = message.question[0]
    return Query(
        wire=wire,
        id=number,
        question=(question.name, question.rdtype, question.rdclass),
        udp_payload=max(MINIMUM_UDP_PAYLOAD, message.payload) if message.edns >= 0 else MINIMUM_UDP_PAYLOAD,
        message=message,
    )


PROBE = parse_query(dns.message.make_query(dns.name.root, dns.rdatatype.NS).to_wire())
"""What any resolver can answer by itself: which are the root's name servers, from which it begins (RFC 9609)."""


def answers(wire: bytes, query: Query, number: int) -> bool:
    """Whether `wire` is a response to the query that was sent with id `number` (RFC 5452 §9.1: id and
    question; and its kind, RFC 1035 §4.1.1)."""
    if len(wire) < HEADER_BYTES:
        return False
    got, flags, questions = struct.unpack_from("!HHH", wire)
    if got != number or not flags & QR or dns.opcode.from_flags(flags) != dns.opcode.QUERY or questions > 1:
        return False
    try:
        message = dns.message.from_wire(wire, question_only=True)
    except (dns.exception.DNSException, ValueError, struct.error):
        return False
    if not message.question:
        # Servers that cannot parse a query answer without its question.
        return message.rcode() in {dns.rcode.FORMERR, *RETRY_ELSEWHERE}
    question = message.question[0]
    return (question.name, question.rdtype, question.rdclass) == query.question


def rcode_of(wire: bytes) -> dns.rcode.Rcode:
    """The response code in the header (without EDNS's extension)."""
    return dns.rcode.from_flags(struct.unpack_from("!H", wire, 2)[0], 0)


def replace_id(wire: bytes, number: int) -> bytes:
    return struct.pack("!H", number) + wire[2:]


def truncate(wire: bytes, query: Query) -> bytes:
    """An answer that fits the client's UDP payload: `wire` itself, or else the question with TC set, so that the client
    asks again over TCP (RFC 2181 §9)."""
    if len(wire) <= query.udp_payload:
        return wire
    return _bare_response(query, rcode_of(wire), dns.flags.TC)


def failure(query: Query, rcode: dns.rcode.Rcode) -> bytes:
    """An answer without records, which says why there are none."""
    return _bare_response(query, rcode)


def _bare_response(query: Query, rcode: dns.rcode.Rcode, flags: int = 0) -> bytes:
    """Header, question and OPT."""
    response = dns.message.make_response(query.message, recursion_available=True, pad=0)
    response.flags |= query.message.flags & dns.flags.CD | flags  # RFC 4035 §3.2.2
    response.set_rcode(rcode)
    # dnspython compresses names by looking for each of their endings in a dict, where they too may collide. There is
    # nothing to compress here, so the question is added to what it makes of the rest.
    response.question = []
    wire = bytearray(response.to_wire())
    struct.pack_into("!H", wire, 4, 1)
    name, kind, of_class = query.question
    encoded = name.to_wire() or b""  # None only with a file to write to
    wire[HEADER_BYTES:HEADER_BYTES] = encoded + struct.pack("!HH", kind, of_class)
    return bytes(wire)


def _bare_answer(number: int, flags: int, rcode: dns.rcode.Rcode) -> bytes:
    """A header alone, in answer to a message that cannot be parsed. Opcode, RD and CD are copied."""
    return struct.pack("!HHHHHH", number, QR | (flags & 0x7910) | rcode, 0, 0, 0, 0)
