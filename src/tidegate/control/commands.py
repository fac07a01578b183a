"""The commands that a gateway understands, and its answers: what the command line and the control socket exchange.

Requests and answers are plain data with stable names: `--json` prints the answers unchanged.

`Administration` (`admin`) carries out ``status`` and ``reload``, and hands ``peer.*`` to `peers`, ``publish.*`` to
`publications`, and ``nat.*`` to `views`.
"""

from __future__ import annotations

from ipaddress import IPv4Address
from typing import Annotated, ClassVar, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from tidegate.ciphers import WIREGUARD_CIPHER, CipherName

PROTOCOL_VERSION = 1
MAX_MAPPINGS = 10_000


class Answer(BaseModel):
    """What a command returns; `--json` prints it."""

    model_config = ConfigDict(frozen=True)


AnswerT = TypeVar("AnswerT", bound=Answer)


class Command(BaseModel, Generic[AnswerT]):
    """A request; `answer` is the type of its answer."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    answer: ClassVar[type[Answer]]


class PeerView(Answer):
    """A peer, with its counters where a gateway runs. Bytes are inner bytes."""

    name: str
    address: str
    public_key: str
    created_at: float
    """Seconds since the epoch; of the peer, not of its keys, which may have been renewed."""
    cipher: CipherName = WIREGUARD_CIPHER
    enabled: bool = True
    """Whether it may connect."""
    endpoint: str | None = None
    """Where the peer's datagrams come from, or came from last."""
    last_handshake: float | None = None
    """Seconds ago, be it before the gateway's start; `None`: never."""
    received_bytes: int = 0
    sent_bytes: int = 0
    received_packets: int = 0
    sent_packets: int = 0
    mappings: int = 0


class PeerAdded(Answer):
    """Everything that a profile needs, apart from the client's private key."""

    peer: PeerView
    gateway_public_key: str
    gateway_address: str
    listen_port: int
    endpoint: str | None
    """From the settings, or derived from the external address."""
    mtu: int
    dns: list[str]
    """The resolvers that the profile names."""


class PeerAdd(Command[PeerAdded]):
    """Adds a peer. `public_key` and `preshared_key` are base64; without `address` it gets the first free one."""

    command: Literal["peer.add"] = "peer.add"
    name: str = Field(max_length=256)
    public_key: str = Field(max_length=64)
    preshared_key: str | None = Field(default=None, max_length=64)
    address: str | None = Field(default=None, max_length=64)
    cipher: CipherName = WIREGUARD_CIPHER
    answer = PeerAdded


class PeerListed(Answer):
    """The peers that were asked for, in the order of their addresses."""

    running: bool
    """Whether a gateway runs, so that counters mean something."""
    peers: list[PeerView]


class PeerList(Command[PeerListed]):
    """Asks for one peer or all, also where no gateway runs."""

    command: Literal["peer.list"] = "peer.list"
    name: str | None = Field(default=None, max_length=256)
    """Of the one peer to list; `None`: all."""
    answer = PeerListed


class PeerRemoved(Answer):
    """A peer that is no more."""

    peer: PeerView
    publications: list[str]
    """External ports that were published to it, and no longer are."""


class PeerRemove(Command[PeerRemoved]):
    """Removes a peer: its session, its mappings and what is published to it end at once."""

    command: Literal["peer.remove"] = "peer.remove"
    name: str = Field(max_length=256)
    answer = PeerRemoved


class PeerDisabled(Answer):
    peer: PeerView
    publications: list[str]
    """External ports that lead to it again once it is enabled."""


class PeerDisable(Command[PeerDisabled]):
    command: Literal["peer.disable"] = "peer.disable"
    name: str = Field(max_length=256)
    answer = PeerDisabled


class PeerEnabled(Answer):
    peer: PeerView
    publications: list[str]
    """External ports that lead to it."""
    warnings: list[str]
    """Why some of these ports do not, as when a program on the host has taken one meanwhile."""


class PeerEnable(Command[PeerEnabled]):
    command: Literal["peer.enable"] = "peer.enable"
    name: str = Field(max_length=256)
    answer = PeerEnabled


class PeerRenamed(Answer):
    peer: PeerView
    former_name: str
    settings: list[str]
    """Those in force that still have the former name, such as ``nat.other_protocols.gre``."""


class PeerRename(Command[PeerRenamed]):
    command: Literal["peer.rename"] = "peer.rename"
    name: str = Field(max_length=256)
    new_name: str = Field(max_length=256)
    answer = PeerRenamed


class PeerRenewed(PeerAdded):
    """Everything that the new profile needs, apart from the client's private key."""

    warnings: list[str]
    """Why some of its ports are no longer published, as when a program on the host was faster."""


class PeerRenew(Command[PeerRenewed]):
    """New keys for a peer; the former ones are no longer good."""

    command: Literal["peer.renew"] = "peer.renew"
    name: str = Field(max_length=256)
    public_key: str = Field(max_length=64)
    preshared_key: str | None = Field(default=None, max_length=64)
    dry_run: bool = False
    """Change nothing: refuse what would be refused, and otherwise answer as if it had been done."""
    answer = PeerRenewed


class PublicationView(Answer):
    """External ports that lead to a peer."""

    external: str
    """Such as ``tcp/8000-8010``."""
    to: str
    """Such as ``alice:80-90``."""
    state: Literal["active", "failed", "peer disabled", "not running"]
    detail: str | None = None
    """Why it failed."""


class PublishAdded(Answer):
    """A new publication, and whether it is in force already."""

    publication: PublicationView


class PublishAdd(Command[PublishAdded]):
    """Publishes external ports, first to last, to as many ports of a peer from `internal_port` on."""

    command: Literal["publish.add"] = "publish.add"
    protocol: Literal["tcp", "udp"]
    first_port: int = Field(ge=1, le=65535)
    last_port: int = Field(ge=1, le=65535)
    peer: str = Field(max_length=256)
    internal_port: int = Field(ge=1, le=65535)
    answer = PublishAdded


class PublishRemoved(Answer):
    """A publication that is no more."""

    publication: PublicationView


class PublishRemove(Command[PublishRemoved]):
    """Ends a publication, named by exactly the external ports that it was added with."""

    command: Literal["publish.remove"] = "publish.remove"
    protocol: Literal["tcp", "udp"]
    first_port: int = Field(ge=1, le=65535)
    last_port: int = Field(ge=1, le=65535)
    answer = PublishRemoved


class PublishListed(Answer):
    """All publications."""

    publications: list[PublicationView]


class PublishList(Command[PublishListed]):
    """Asks for all publications, also where no gateway runs."""

    command: Literal["publish.list"] = "publish.list"
    answer = PublishListed


class MappingView(Answer):
    """One NAT mapping (RFC 4787 §2). Times in seconds."""

    protocol: str
    internal: str
    external: str
    peer: str | None
    state: str
    age: float
    idle: float
    expires_in: float | None
    """`None`: never, as for a published port."""
    sessions: int


class NatListed(Answer):
    """The mappings that were asked for."""

    mappings: list[MappingView]
    truncated: bool
    """Whether there are more than were asked for."""


class NatList(Command[NatListed]):
    """All mappings, or those of a peer, or with an external port, or both."""

    command: Literal["nat.list"] = "nat.list"
    peer: str | None = Field(default=None, max_length=256)
    external: tuple[IPv4Address | None, Annotated[int, Field(ge=0, le=65535)]] | None = None
    """The external address (`None`: any), and the port or ICMP identifier."""
    limit: int = Field(default=MAX_MAPPINGS, ge=1, le=MAX_MAPPINGS)
    answer = NatListed


class NatCounted(Answer):
    """How full the NAT is, and what was dropped since the gateway was started. Counts by protocol or by reason."""

    mappings: dict[str, int]
    sessions: int
    """Remote endpoints that all mappings together talk to."""
    clients: int
    """Clients with mappings."""
    reserved_ports: dict[str, int]
    resting_ports: int
    """Reserved ports that rest before they are used again (RFC 6888 REQ-8)."""
    limits: dict[str, int]
    drops: dict[str, int]
    explanations: dict[str, str]
    """What the reasons for drops mean: all that there are."""


class NatStats(Command[NatCounted]):
    """Asks how full the NAT is, and what was dropped."""

    command: Literal["nat.stats"] = "nat.stats"
    answer = NatCounted


class GatewayStatus(Answer):
    """The whole gateway at one moment."""

    version: str
    pid: int
    uptime: float
    """Seconds."""
    listen: str
    public_key: str
    subnet: str
    gateway_address: str
    external_interface: str
    external_addresses: list[str]
    next_hop: str | None
    """The default router; `None`: only on-link destinations."""
    default_route: bool = True
    """Whether clients reach more than the external interface's own networks."""
    external_trouble: str | None = None
    """Why the external link cannot be used at the moment; the other fields show it as it was before."""
    shards: int
    offloads: dict[str, bool]
    peers: list[PeerView]
    mappings: dict[str, int]
    reserved_ports: dict[str, int]
    packets: dict[str, int]
    bytes: dict[str, int]
    drops: dict[str, int]
    dns: dict[str, int] | None
    """Counters of the DNS proxy; `None` if it is off."""


class StatusQuery(Command[GatewayStatus]):
    """Asks for the whole gateway at this moment."""

    command: Literal["status"] = "status"
    answer = GatewayStatus


class SettingsReloaded(Answer):
    """Settings are named as in the file, such as ``nat.udp_timeout``."""

    applied: list[str]
    """Changed, and in force from now on."""
    needs_restart: list[str]
    """Changed, but not applied: these take effect when the gateway is restarted."""
    warnings: list[str]


class ReloadSettings(Command[SettingsReloaded]):
    """Reads the settings again and applies what needs no restart: all of it, or nothing if one is invalid."""

    command: Literal["reload"] = "reload"
    answer = SettingsReloaded


AnyCommand = Annotated[
    PeerAdd
    | PeerList
    | PeerRemove
    | PeerDisable
    | PeerEnable
    | PeerRename
    | PeerRenew
    | PublishAdd
    | PublishRemove
    | PublishList
    | NatList
    | NatStats
    | StatusQuery
    | ReloadSettings,
    Field(discriminator="command"),
]
