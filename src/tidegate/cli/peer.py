"""``tidegate peer``: who may connect."""

from __future__ import annotations

import re
from ipaddress import IPv4Address, IPv4Interface, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tidegate.ciphers import WIREGUARD_CIPHER, CipherName
from tidegate.cli.options import (
    ConfigOption,
    JsonOption,
    StateDirOption,
    examples,
    file_named,
    given_as,
    read_settings,
)
from tidegate.cli.runtime import Runtime, runtime_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tidegate.control.commands import PeerAdded, PeerView
    from tidegate.errors import UsageError
    from tidegate.identity import Profile
    from tidegate.net import Endpoint
    from tidegate.settings import GatewaySettings, Settings

app = typer.Typer(
    help="Peers: who may connect.",
    no_args_is_help=True,
    epilog=examples(
        ("tidegate peer add alice --out alice.conf", "alice may connect, with this profile"),
        ("tidegate peer list", "who may, and who has"),
        ("tidegate peer remove alice", "she may no longer"),
    ),
)

STDOUT = "-"
KEEPALIVE = 25  # seconds; WireGuard's advice for clients behind a NAT

_IMPORTED_NAME = re.compile(r"[A-Za-z0-9_=+.-]{1,15}")
"""What a profile's name may be for wg-quick(8), NetworkManager and the app for Android: their interfaces get it."""

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The peer's name.", show_default=False)]
EndpointOption = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Where clients reach the gateway. [dim]\\[settings, or external address][/]",
    ),
]
OutOption = Annotated[
    str,
    typer.Option(
        metavar="FILE",
        help="Write the profile here, readable by its owner only (0600). [dim]\\[-, standard output][/]",
        show_default=False,
    ),
]
PublicKeyOption = Annotated[
    str | None,
    typer.Option(
        metavar="KEY",
        help="The public key (base64) of a device that keeps its private key to itself. "
        "[dim]\\[a new pair of keys][/]",
    ),
]
QrOption = Annotated[
    bool, typer.Option("--qr", help="Show the profile as a QR code, for the camera of a phone.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace an existing FILE.")]

_ADD_EXAMPLES = examples(
    ("tidegate peer add alice --out alice.conf", "a profile for any WireGuard app"),
    (
        "tidegate peer add bob --endpoint vpn.example.com:51820 --out bob.conf",
        "with the name that clients connect to",
    ),
    ("tidegate peer add eve --qr", "as a QR code, for a phone's camera"),
    ("tidegate peer add carol --address 10.66.77.20", "with a chosen address"),
    ("tidegate peer add frank --public-key KEY", "for a device that keeps its private key to itself"),
    ("tidegate peer add dave --cipher aes-256-gcm --out dave.conf", "faster, for Tidegate's own client only"),
)


@app.command("add", epilog=_ADD_EXAMPLES)
def add(
    context: typer.Context,
    name: NameArgument,
    endpoint: EndpointOption = None,
    out: OutOption = STDOUT,
    address: Annotated[
        str | None,
        typer.Option(metavar="A.B.C.D", help="The peer's address. [dim]\\[the lowest free one][/]"),
    ] = None,
    public_key: PublicKeyOption = None,
    cipher: Annotated[
        CipherName,
        typer.Option(
            metavar="CIPHER",
            help="What encrypts its data: chacha20-poly1305, or [b]aes-256-gcm[/], which is faster, needs CPUs with "
            "AES instructions, and works with Tidegate's own client only.",
        ),
    ] = WIREGUARD_CIPHER,
    qr: QrOption = False,
    force: ForceOption = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Add a peer, and write its profile (wg-quick format). Its private key is in the profile and nowhere else; or, with
    --public-key, on its device and nowhere else."""
    from functools import partial

    from tidegate.cli.administration import administration
    from tidegate.cli.delivery import adding, delivery
    from tidegate.cli.interruptible import interruptible
    from tidegate.cli.output import remark, written
    from tidegate.cli.qr import check_qr, qr_code
    from tidegate.control.commands import PeerAdd
    from tidegate.identity import encode_key, make_preshared_key, make_private_key, public_key_of
    from tidegate.store import check_peer_name

    settings = read_settings(context, config, state_dir)
    check_peer_name(name)
    file = None if out == STDOUT else file_named(out, "--out")
    if qr:
        check_qr(out=file, json=json, public_key=public_key)
    # A bad one is refused before anything is done.
    wanted = endpoint_given(endpoint, settings.gateway.listen.port)
    private_key: bytes | None = None
    if public_key is not None:
        key = public_key_given(public_key)
    else:
        private_key = make_private_key()
        key = public_key_of(private_key)
    runtime = runtime_of(context)
    if _is_missing(settings.state_dir):
        _refuse_early(wanted, address, settings, runtime)
    preshared_key = make_preshared_key()
    with given_as(name="NAME", address="--address"):
        command = PeerAdd(
            name=name,
            public_key=encode_key(key),
            preshared_key=encode_key(preshared_key),
            address=address,
            cipher=cipher,
        )
    comment = comment_for(name)
    asking = partial(
        administration,
        settings,
        runtime.host(),
        make=True,
        suggest_endpoint=endpoint is None,
        engine=runtime.engine,
    )
    with (
        interruptible() as unwinding,
        delivery(name, file, force) as way_out,
        adding(command, asking, way_out, unwinding, new_key=public_key is None) as added,
    ):
        wanted = endpoint_given(endpoint, added.listen_port)
        refuse_endpoint_inside(wanted, settings.gateway, added)
        profile = profile_for(added, wanted, private_key, preshared_key)
        text = profile.render(comment)
        answer = answer_for_programs(added, profile, text, file)
        way_out.send(qr_code(profile) if qr else answer if json and file is None else text)
    done = f"peer {name} has address {added.peer.address}; its profile is in {out}"
    if file is not None and json:
        with written(done):
            print(answer, end="")
    elif file is not None:
        remark(done)
    remark_on(profile, file, explicit=endpoint is not None or settings.gateway.endpoint is not None)


def remark_on(profile: Profile, file: Path | None, *, explicit: bool) -> None:
    """Says what is special about a profile, which is in `file` unless it was printed. `explicit`: somebody chose its
    endpoint."""
    from tidegate.cli.output import remark

    if profile.private_key is None:
        remark("the device's private key is to be put into the profile, where its comment says so")
    if profile.cipher != WIREGUARD_CIPHER:
        remark(
            f"{profile.cipher} works with `tidegate connect` only: other WireGuard programs will pass no data"
        )
    else:
        _warn_of_importers(profile, file)
    if not profile.dns:
        remark(
            "the profile names no resolver, but sends everything through the tunnel: the client asks that of its own "
            "network, past the tunnel or in vain; name one with [dns] profile_servers"
        )
    _warn_of_local_endpoint(profile, explicit=explicit)


def endpoint_given(text: str | None, default_port: int) -> Endpoint | None:
    from tidegate.errors import UsageError
    from tidegate.net import Endpoint

    if text is None:
        return None
    try:
        return Endpoint.parse(text, default_port)
    except ValueError as cause:
        raise UsageError(f"--endpoint: {cause}") from None


def public_key_given(text: str) -> bytes:
    from tidegate.errors import UsageError
    from tidegate.identity import parse_public_key

    try:
        return parse_public_key(text)
    except ValueError as cause:
        raise UsageError(f"--public-key {cause}") from None


def _is_missing(path: Path) -> bool:
    try:
        return not path.exists()
    except OSError:
        return False  # making it will fail, with the reason


def _refuse_early(
    endpoint: Endpoint | None, address: str | None, settings: Settings, runtime: Runtime
) -> None:
    """Refuses what would be refused anyway, before a state directory is made for nothing. Without one no gateway runs,
    so this command's own settings are the ones that count."""
    from tidegate.cli.administration import suggested_endpoint
    from tidegate.errors import UsageError
    from tidegate.net import parse_peer_address

    gateway = settings.gateway
    if endpoint is None and gateway.endpoint is None and suggested_endpoint(settings, runtime.host()) is None:
        raise _endpoint_unknown()
    if endpoint is not None and endpoint.address is not None and endpoint.address in gateway.subnet:
        raise _endpoint_inside(endpoint)
    if address is not None:
        try:
            parse_peer_address(address, gateway.subnet)
        except ValueError as cause:
            raise UsageError(str(cause)) from None


def refuse_endpoint_inside(endpoint: Endpoint | None, ours: GatewaySettings, added: PeerAdded) -> None:
    """A client would send the tunnel's own packets into the tunnel. If the gateway's settings differ from this
    command's, only two of its subnet's addresses are known."""
    if endpoint is None or endpoint.address is None:
        return
    if str(ours.address) == added.gateway_address:
        inside = endpoint.address in ours.subnet
    else:
        inside = endpoint.host in {added.gateway_address, added.peer.address}
    if inside:
        raise _endpoint_inside(endpoint)


def _endpoint_inside(endpoint: Endpoint) -> UsageError:
    from tidegate.errors import UsageError

    return UsageError(f"--endpoint: {endpoint} lies inside the VPN's own subnet")


def _endpoint_unknown() -> UsageError:
    from tidegate.errors import UsageError

    return UsageError(
        "it is not known where clients can reach the gateway",
        hint="give --endpoint HOST:PORT, or set [gateway] endpoint",
    )


def profile_for(
    added: PeerAdded, endpoint: Endpoint | None, private_key: bytes | None, preshared_key: bytes
) -> Profile:
    from tidegate.identity import Profile, decode_key
    from tidegate.net import Endpoint

    if endpoint is None and added.endpoint is None:
        raise _endpoint_unknown()
    return Profile(
        private_key=private_key,
        address=IPv4Interface(f"{added.peer.address}/32"),
        dns=tuple(map(IPv4Address, added.dns)),
        mtu=added.mtu,
        peer_public_key=decode_key(added.gateway_public_key),
        preshared_key=preshared_key,
        # IPv6 is not carried; claiming it keeps it from bypassing the tunnel.
        allowed_ips=(ip_network("0.0.0.0/0"), ip_network("::/0")),
        endpoint=endpoint or Endpoint.parse(str(added.endpoint)),
        persistent_keepalive=KEEPALIVE,
        cipher=added.peer.cipher,
    )


def _warn_of_importers(profile: Profile, file: Path | None) -> None:
    """Says what other WireGuard programs refuse without a word of why."""
    from tidegate.cli.output import remark
    from tidegate.net import flaw_in_uri

    if file is not None and not _IMPORTED_NAME.fullmatch(file.name.removesuffix(".conf")):
        remark(
            f"{file} cannot be imported under this name: WireGuard programs want a name of 1 to 15 letters, digits "
            "or _=+.- before .conf"
        )
    if (flaw := flaw_in_uri(profile.endpoint.host)) is not None:
        remark(f"the endpoint {profile.endpoint} has {flaw}; WireGuard's app for Android refuses it")


def comment_for(name: str) -> str:
    """The first line of a peer's profile."""
    return f"Tidegate profile of {name}. It holds secret keys: keep it to yourself."


def _warn_of_local_endpoint(profile: Profile, *, explicit: bool) -> None:
    from tidegate.cli.output import remark
    from tidegate.net import PRIVATE_NETWORKS

    address = profile.endpoint.address
    if address is None:
        return  # a host name: it may resolve differently elsewhere
    if address.is_loopback:
        remark(f"the endpoint {profile.endpoint} is a loopback address; clients elsewhere need another")
    elif not explicit and any(address in network for network in PRIVATE_NETWORKS):
        remark(f"the endpoint {profile.endpoint} is a private address; clients elsewhere need --endpoint")


def answer_for_programs(added: PeerAdded, profile: Profile, text: str, out: Path | None) -> str:
    from json import dumps

    answer = {
        "name": added.peer.name,
        "address": added.peer.address,
        "public_key": added.peer.public_key,
        "endpoint": str(profile.endpoint),
        "cipher": profile.cipher,
        "file": str(out) if out is not None else None,
        "profile": text if out is None else None,
    }
    return dumps(answer, indent=2) + "\n"


@app.command(
    "list",
    epilog=examples(("tidegate peer list", "all peers"), ("tidegate peer list --json", "for programs")),
)
def list_peers(
    context: typer.Context,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """List the peers."""
    from tidegate.cli.administration import administration
    from tidegate.cli.output import print_json, print_rich
    from tidegate.control.commands import PeerList

    settings = read_settings(context, config, state_dir)
    with administration(settings, runtime_of(context).host(), make=False) as executor:
        answer = executor.execute(PeerList())
    if json:
        print_json(answer)
    else:
        print_rich(peer_table(answer.peers, running=answer.running))


@app.command(
    "show",
    epilog=examples(
        ("tidegate peer show alice", "one peer with its counters"),
        ("tidegate peer show alice --json | jq .last_handshake", "how many seconds ago"),
        ("tidegate peer show alice --json | jq '.created_at | todate'", "seconds since 1970, as a date"),
    ),
)
def show(
    context: typer.Context,
    name: NameArgument,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Show one peer."""
    from tidegate.cli.administration import administration
    from tidegate.cli.output import ago, amount, moment, print_json, print_rich, table
    from tidegate.control.commands import PeerList
    from tidegate.errors import NotFoundError

    settings = read_settings(context, config, state_dir)
    with given_as(name="NAME"):
        command = PeerList(name=name)
    with administration(settings, runtime_of(context).host(), make=False) as executor:
        answer = executor.execute(command)
    if not answer.peers:
        raise NotFoundError(f"there is no peer named {name!r}", hint="see `tidegate peer list`")
    (peer,) = answer.peers
    if json:
        print_json(peer)
        return
    rows = [
        ("name", peer.name),
        ("address", peer.address),
        ("public key", peer.public_key),
        ("cipher", peer.cipher),
        ("state", state(peer)),
        ("created", moment(peer.created_at)),
    ]
    if answer.running and peer.enabled:
        rows += [
            ("endpoint", peer.endpoint or "-"),
            ("last handshake", ago(peer.last_handshake)),
            ("received", f"{amount(peer.received_bytes)} in {peer.received_packets} packets"),
            ("sent", f"{amount(peer.sent_bytes)} in {peer.sent_packets} packets"),
            ("NAT mappings", str(peer.mappings)),
        ]
    print_rich(table(None, ("", ""), rows, empty=""))


@app.command("remove", epilog=examples(("tidegate peer remove alice", "alice can no longer connect")))
def remove(
    context: typer.Context,
    name: NameArgument,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Remove a peer, and what is published to it."""
    from tidegate.cli.administration import administration
    from tidegate.cli.output import print_json, remark
    from tidegate.control.commands import PeerRemove

    settings = read_settings(context, config, state_dir)
    with given_as(name="NAME"):
        command = PeerRemove(name=name)
    with administration(settings, runtime_of(context).host(), make=False) as executor:
        answer = executor.execute(command)
    also = f"; no longer published: {', '.join(answer.publications)}" if answer.publications else ""
    done = f"peer {name} ({answer.peer.address}) is removed{also}"
    if json:
        print_json(answer, done=done)
    else:
        remark(done)


def state(peer: PeerView) -> str:
    return "enabled" if peer.enabled else "disabled"


def peer_table(peers: list[PeerView], *, running: bool) -> RenderableType:
    """Peers as a table, with counters if a gateway runs."""
    from tidegate.cli.output import ago, amount, table

    empty = "no peers; add one with `tidegate peer add NAME --out NAME.conf`"
    if not running:
        columns = ["peer", "address!", "public key!"]
        rows = [[peer.name, peer.address, peer.public_key] for peer in peers]
    else:
        columns = ["peer", "address!", "endpoint", "last handshake", "received>", "sent>", "mappings>"]
        rows = [
            [
                peer.name,
                peer.address,
                peer.endpoint or "-",
                ago(peer.last_handshake),
                amount(peer.received_bytes),
                amount(peer.sent_bytes),
                str(peer.mappings),
            ]
            for peer in peers
        ]
    # Two columns for what is seldom: 80 columns are full.
    if any(peer.cipher != WIREGUARD_CIPHER for peer in peers):
        columns.insert(2, "cipher")
        for peer, row in zip(peers, rows, strict=True):
            row.insert(2, peer.cipher)
    if not all(peer.enabled for peer in peers):
        columns.insert(2, "state")
        for peer, row in zip(peers, rows, strict=True):
            row.insert(2, state(peer))
    return table(None, columns, rows, empty=empty)
