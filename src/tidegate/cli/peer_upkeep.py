"""``tidegate peer``: what happens to a peer between its coming and its going."""

from __future__ import annotations

from typing import Annotated

import typer

from tidegate.cli.options import (
    ConfigOption,
    JsonOption,
    StateDirOption,
    examples,
    file_named,
    given_as,
    read_settings,
)
from tidegate.cli.peer import (
    STDOUT,
    EndpointOption,
    ForceOption,
    NameArgument,
    OutOption,
    PublicKeyOption,
    QrOption,
    answer_for_programs,
    comment_for,
    endpoint_given,
    profile_for,
    public_key_given,
    refuse_endpoint_inside,
    remark_on,
)
from tidegate.cli.runtime import runtime_of

DISABLE_EXAMPLES = examples(
    ("tidegate peer disable alice", "alice cannot connect until she is enabled"),
    ("tidegate peer list", "says who is disabled"),
)
ENABLE_EXAMPLES = examples(
    ("tidegate peer enable alice", "alice can connect again, with the profile she has")
)

RENAME_EXAMPLES = examples(("tidegate peer rename alice alice-phone", "what is published to her follows"))

RENEW_EXAMPLES = examples(
    ("tidegate peer renew alice --out alice-new.conf", "a new profile; the former one is good no longer"),
    ("tidegate peer renew alice --qr", "as a QR code, for a phone's camera"),
    ("tidegate peer renew frank --public-key KEY", "for a device that keeps its private key to itself"),
)


def disable(
    context: typer.Context,
    name: NameArgument,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Shut a peer out, at once and after every restart, until it is enabled. Its keys and address are kept, and so are
    its published ports and other protocols, which lead nowhere meanwhile."""
    from tidegate.cli.administration import administration
    from tidegate.cli.output import print_json, remark
    from tidegate.control.commands import PeerDisable

    settings = read_settings(context, config, state_dir)
    with given_as(name="NAME"):
        command = PeerDisable(name=name)
    with administration(settings, runtime_of(context).host(), make=False) as executor:
        answer = executor.execute(command)
    kept = f"; not published until it is enabled: {', '.join(answer.publications)}"
    done = f"peer {name} ({answer.peer.address}) is disabled{kept if answer.publications else ''}"
    if json:
        print_json(answer, done=done)
    else:
        remark(done)


def enable(
    context: typer.Context,
    name: NameArgument,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Let a peer that was disabled connect again, with the keys, address, published ports and other protocols that it
    had."""
    from tidegate.cli.administration import administration
    from tidegate.cli.output import print_json, remark
    from tidegate.control.commands import PeerEnable

    settings = read_settings(context, config, state_dir)
    with given_as(name="NAME"):
        command = PeerEnable(name=name)
    runtime = runtime_of(context)
    with administration(settings, runtime.host(), make=False, engine=runtime.engine) as executor:
        answer = executor.execute(command)
    done = [f"peer {name} ({answer.peer.address}) is enabled"]
    done += (f"warning: {warning}" for warning in answer.warnings)
    if json:
        print_json(answer, done="; ".join(done))
        return
    for text in done:
        remark(text)


def rename(
    context: typer.Context,
    old: Annotated[str, typer.Argument(metavar="OLD", help="The peer's name.", show_default=False)],
    new: Annotated[str, typer.Argument(metavar="NEW", help="Its new name.", show_default=False)],
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Give a peer another name. It stays connected, and its profile and published ports stay as they are. Settings are
    not changed: one that has the former name is told of."""
    from tidegate.cli.administration import administration
    from tidegate.cli.output import print_json, remark
    from tidegate.control.commands import PeerRename

    settings = read_settings(context, config, state_dir)
    with given_as(name="OLD", new_name="NEW"):
        command = PeerRename(name=old, new_name=new)
    with administration(settings, runtime_of(context).host(), make=False) as executor:
        answer = executor.execute(command)
    done = f"peer {old} ({answer.peer.address}) is now called {new}"
    if json:
        print_json(answer, done=done)
    else:
        remark(done)
    places = _places_that_name(old, context, config) if answer.settings else {}
    for setting in answer.settings:
        place = places.get(setting.rpartition(".")[2])
        remark(f"warning: {setting} still says {old}: {_advice(place, new)}")


def renew(
    context: typer.Context,
    name: NameArgument,
    endpoint: EndpointOption = None,
    out: OutOption = STDOUT,
    public_key: PublicKeyOption = None,
    qr: QrOption = False,
    force: ForceOption = False,
    config: ConfigOption = None,
    state_dir: StateDirOption = None,
    json: JsonOption = False,
) -> None:
    """Give a peer new keys, and write its new profile, as `add` does. Address, cipher, published ports and other
    protocols stay. The former profile is good for nothing from then on, and not before the new one is printed or on the
    disk."""
    from functools import partial

    from tidegate.cli.administration import administration
    from tidegate.cli.interruptible import interruptible
    from tidegate.cli.output import remark, written
    from tidegate.cli.qr import check_qr, qr_code
    from tidegate.cli.renewal import handover
    from tidegate.cli.renewal import renew as renew_keys
    from tidegate.control.commands import PeerRenew
    from tidegate.identity import encode_key, make_preshared_key, make_private_key, public_key_of

    settings = read_settings(context, config, state_dir)
    file = None if out == STDOUT else file_named(out, "--out")
    if qr:
        check_qr(out=file, json=json, public_key=public_key)
    wanted = endpoint_given(endpoint, settings.gateway.listen.port)
    private_key = make_private_key() if public_key is None else None
    key = public_key_of(private_key) if private_key is not None else public_key_given(str(public_key))
    preshared_key = make_preshared_key()
    with given_as(name="NAME"):
        command = PeerRenew(name=name, public_key=encode_key(key), preshared_key=encode_key(preshared_key))
    runtime = runtime_of(context)
    asking = partial(
        administration,
        settings,
        runtime.host(),
        make=False,
        suggest_endpoint=endpoint is None,
        engine=runtime.engine,
    )
    with interruptible() as unwinding:
        way_out = handover(name, file, force)
        with asking() as executor:
            planned = executor.execute(command.model_copy(update={"dry_run": True}))
        wanted = endpoint_given(endpoint, planned.listen_port)
        refuse_endpoint_inside(wanted, settings.gateway, planned)
        profile = profile_for(planned, wanted, private_key, preshared_key)
        text = profile.render(comment_for(name))
        answer = answer_for_programs(planned, profile, text, file)
        shown = qr_code(profile) if qr else answer if json and file is None else text
        renewed = renew_keys(command, shown, asking, way_out, unwinding)
    done = f"peer {name} ({renewed.peer.address}) is renewed; its new profile is in {out}"
    if file is not None and json:
        with written(done):
            print(answer, end="")
    elif file is not None:
        remark(done)
    for warning in renewed.warnings:
        remark(f"warning: {warning}")
    if not renewed.peer.enabled:
        remark(f"{name} is disabled, and cannot connect until `tidegate peer enable {name}`")
    remark_on(profile, file, explicit=endpoint is not None or settings.gateway.endpoint is not None)


def _places_that_name(peer: str, context: typer.Context, config: str | None) -> dict[str, str | None]:
    """As far as the settings that this command reads are those of the gateway."""
    import os

    from tidegate.settings.sources import protocols_of

    return protocols_of(
        peer,
        config=file_named(config, "--config") if config is not None else None,
        environment=os.environ,
        default_path=runtime_of(context).default_config,
    )


def _advice(place: str | None, name: str) -> str:
    where = f"in {place}" if place is not None else "where the gateway's settings say so"
    # A running gateway keeps the environment that it was started with.
    apply = "restart the gateway" if place is not None and place.startswith("$") else "run `tidegate reload`"
    return f"write {name} {where}, and {apply}, or the next reload or restart takes the protocol from it"
