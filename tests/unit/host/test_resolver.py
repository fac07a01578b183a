"""What a client tells the program that manages resolv.conf, and how it undoes that."""

from __future__ import annotations

import os
import time
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from tidegate.host import resolver
from tidegate.host.resolver import configured_dns, remove_leftover_record
from tidegate.log import configure_logging
from tidegate.settings import LogSettings

SERVERS = (IPv4Address("10.66.77.1"), IPv4Address("192.0.2.53"))
STUB = "nameserver 127.0.0.53\noptions edns0 trust-ad\n"
STATIC = "# by hand\nnameserver 192.0.2.1\nsearch 127.0.0.53\n"
DEBIAN_ORDER = "# interface-order(5)\nlo.inet6\nlo.@(dnsmasq|pdnsd)\nlo\ntun*\ntap*\neth*([^.]).inet6\n*\n"


class Host:
    """A host whose programs record their arguments and their input."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "bin"
        self.programs.mkdir()
        self.calls_file = folder / "calls"
        self.order = folder / "interface-order"
        self.resolved_files = folder / "resolve"
        self.resolved_files.mkdir()
        self.resolved = self.resolved_files / "io.systemd.Resolve"
        self.resolv_conf = folder / "resolv.conf"
        self.resolv_conf.write_text(STUB)
        self.nsswitch = folder / "nsswitch.conf"

    def install(self, name: str, *, fails: str = "") -> Path:
        """A program that fails when one of its arguments is `fails`."""
        program = self.programs / name
        program.write_text(
            f"""#!/bin/sh
echo "{name} $*" >>{self.calls_file}
case "$1" in -a) while read -r line; do echo "    $line" >>{self.calls_file}; done;; esac
for argument; do
    if [ "$argument" = "{fails}" ]; then echo "not today" >&2; exit 1; fi
done
"""
        )
        program.chmod(0o755)
        return program

    def calls(self) -> list[str]:
        """What has been called since the last call of this."""
        told = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        self.calls_file.unlink(missing_ok=True)
        return told


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.setenv("PATH", str(made.programs))
    monkeypatch.setattr(resolver, "SYSTEMD_RESOLVED", made.resolved)
    monkeypatch.setattr(resolver, "RESOLVED_FILES", made.resolved_files)
    monkeypatch.setattr(resolver, "RESOLV_CONF", made.resolv_conf)
    monkeypatch.setattr(resolver, "NSSWITCH", made.nsswitch)
    monkeypatch.setattr(resolver, "INTERFACE_ORDER", made.order)
    return made


def test_resolved_is_told_which_servers_and_that_they_are_for_every_name(host: Host) -> None:
    host.resolved.touch()
    host.install("resolvectl")
    host.install("resolvconf")
    with configured_dns("tun9", SERVERS, ("corp.example",)) as outcome:
        assert outcome == "applied"
        assert host.calls() == [
            "resolvectl dns tun9 10.66.77.1 192.0.2.53",
            "resolvectl domain tun9 ~. corp.example",
        ]
    assert host.calls() == ["resolvectl revert tun9"]


@pytest.mark.parametrize(
    ("resolv_conf", "nsswitch"),
    [
        ("-> stub-resolv.conf", "hosts: files dns\n"),
        ("-> resolv.conf", ""),
        (STUB, ""),
        ("nameserver 192.0.2.1\nnameserver 127.0.0.54\n", ""),
        (STATIC, "passwd: files\nhosts: mymachines resolve [!UNAVAIL=return] files dns # as shipped\n"),
        (STATIC, "hosts:resolve[!UNAVAIL=return] dns\n"),
        ("", "hosts: resolve\n"),
    ],
    ids=[
        "stub's file",
        "servers' file",
        "stub",
        "other stub",
        "NSS",
        "NSS without spaces",
        "no file, but NSS",
    ],
)
def test_resolved_is_told_where_programs_ask_it(host: Host, resolv_conf: str, nsswitch: str) -> None:
    host.resolved.touch()
    host.install("resolvectl")
    host.nsswitch.write_text(nsswitch)
    host.resolv_conf.unlink()
    if resolv_conf.startswith("-> "):
        (host.resolved_files / resolv_conf[3:]).write_text(STATIC)
        host.resolv_conf.symlink_to(f"resolve/{resolv_conf[3:]}")
    elif resolv_conf:
        host.resolv_conf.write_text(resolv_conf)
    with configured_dns("tun9", SERVERS[:1], ()) as outcome:
        assert outcome == "applied"
        assert host.calls()[0] == "resolvectl dns tun9 10.66.77.1"


@pytest.mark.parametrize(
    "nsswitch",
    [None, "hosts: files dns # not resolve\n", "networks: resolve\n"],
    ids=["none", "hosts", "networks"],
)
def test_resolved_is_not_told_where_nobody_asks_it(host: Host, nsswitch: str | None) -> None:
    """It runs, but the host's file names other servers: these go on being asked."""
    host.resolved.touch()
    resolvectl = host.install("resolvectl")
    host.resolv_conf.write_text(STATIC)
    if nsswitch is not None:
        host.nsswitch.write_text(nsswitch)
    with configured_dns("tun9", SERVERS[:1], ()) as outcome:
        assert outcome == "unmanaged"
    resolvconf = host.programs / "resolvconf"
    resolvconf.symlink_to(resolvectl)  # systemd's, which tells nobody else
    with configured_dns("tun9", SERVERS[:1], ()) as outcome:
        assert outcome == "unmanaged"
    remove_leftover_record("gone9")
    assert host.calls() == []
    resolvconf.unlink()
    host.install("resolvconf")
    with configured_dns("tun9", SERVERS[:1], ()) as outcome:
        assert outcome == "applied"
        assert host.calls()[0] == "resolvconf -a tun9.inet -m 0 -x"
    host.calls()
    remove_leftover_record("gone9")
    assert host.calls() == ["resolvconf -d gone9.inet -f"]


def test_resolvconf_gets_a_record_of_its_own_that_keeps_all_others_out(host: Host) -> None:
    host.install("resolvconf")
    with configured_dns("tun9", SERVERS, ("corp.example", "example")) as outcome:
        assert outcome == "applied"
        assert host.calls() == [
            "resolvconf -a tun9.inet -m 0 -x",
            "    nameserver 10.66.77.1",
            "    nameserver 192.0.2.53",
            "    search corp.example example",
        ]
    assert host.calls() == ["resolvconf -d tun9.inet -f"]


def test_where_records_have_an_order_by_name_the_tunnels_comes_early(host: Host) -> None:
    host.install("resolvconf")
    host.order.write_text(DEBIAN_ORDER)
    with configured_dns("tidegate-client", SERVERS[:1], ()):
        assert host.calls()[0] == "resolvconf -a tun.tidegate-client.inet -m 0 -x"
    assert host.calls() == ["resolvconf -d tun.tidegate-client.inet -f"]


@pytest.mark.parametrize("order", ["", "*\n", "lo\neth*([^.]).inet6\n"], ids=["empty", "any", "patterns"])
def test_an_order_without_a_plain_kind_changes_no_name(host: Host, order: str) -> None:
    host.install("resolvconf")
    host.order.write_text(order)
    with configured_dns("tun9", SERVERS[:1], ()):
        assert host.calls()[0] == "resolvconf -a tun9.inet -m 0 -x"


def test_systemds_resolvconf_takes_names_of_interfaces_alone(host: Host) -> None:
    (host.programs / "resolvconf").symlink_to(host.install("resolvectl"))
    host.order.write_text(DEBIAN_ORDER)
    with configured_dns("tun9", SERVERS[:1], ()):
        assert host.calls()[0] == "resolvectl -a tun9.inet -m 0 -x"
    assert host.calls() == ["resolvectl -d tun9.inet -f"]


@pytest.mark.parametrize(
    ("program", "step", "undo"),
    [
        ("resolvectl", "dns", "resolvectl revert tun9"),
        ("resolvectl", "domain", "resolvectl revert tun9"),
        ("resolvconf", "-a", "resolvconf -d tun9.inet -f"),
    ],
)
def test_a_program_that_fails_is_told_apart_from_none_and_what_it_did_is_taken_back(
    host: Host, program: str, step: str, undo: str
) -> None:
    if program == "resolvectl":
        host.resolved.touch()
    host.install(program, fails=step)
    with configured_dns("tun9", SERVERS[:1], ()) as outcome:
        assert outcome == "refused"
        assert host.calls()[-1] == undo
    assert host.calls() == []


def test_where_nothing_manages_it_nothing_is_called(host: Host) -> None:
    host.install("resolvectl")  # but systemd-resolved does not run
    with configured_dns("tun9", SERVERS, ()) as outcome:
        assert outcome == "unmanaged"
    assert host.calls() == []


def test_what_a_killed_client_told_resolvconf_is_taken_back(host: Host) -> None:
    remove_leftover_record("gone9")
    assert host.calls() == [], "there is nothing here that could be told"
    host.install("resolvconf")
    host.order.write_text(DEBIAN_ORDER)
    remove_leftover_record("gone9")
    assert host.calls() == ["resolvconf -d tun.gone9.inet -f"]
    remove_leftover_record("lo")
    assert host.calls() == [], "a client with this device may be running"
    host.install("resolvectl")
    host.resolved.touch()
    remove_leftover_record("gone9")
    assert host.calls() == [], "systemd-resolved has forgotten it"


def test_a_program_with_nothing_to_take_back_is_no_reason_to_complain(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    host.install("resolvconf", fails="-d")
    configure_logging(LogSettings())
    remove_leftover_record("gone9")
    assert host.calls() == ["resolvconf -d gone9.inet -f"]
    assert capsys.readouterr().err == ""


def test_a_program_that_hangs_holds_up_no_start_for_long(host: Host) -> None:
    host.install("resolvconf").write_text("#!/bin/sh\nexec /bin/sleep 30\n")
    began = time.monotonic()
    remove_leftover_record("gone9")
    assert time.monotonic() - began < 8


def test_a_ctrl_c_on_the_terminal_does_not_reach_the_program_that_takes_dns_back(host: Host) -> None:
    """It goes to the whole process group in the foreground, and killed half-way the host would have no DNS."""
    seen = host.programs.parent / "seen"
    host.install("resolvconf").write_text(f"#!/bin/sh\nread -r line </proc/$$/stat; echo $line >>{seen}\n")
    with configured_dns("tun9", SERVERS[:1], ()):
        pass
    lines = seen.read_text().splitlines()
    assert len(lines) == 2
    for line in lines:
        pid, _, _, _, group, session, *_ = line.split()
        assert (group, session) == (pid, pid)


def test_a_program_does_not_read_what_is_typed(host: Host) -> None:
    host.install("resolvconf").write_text("#!/bin/sh\nwhile read -r line; do :; done\n")
    reader, writer = os.pipe()
    os.write(writer, b"typed\n")
    own = os.dup(0)
    os.dup2(reader, 0)
    try:
        with configured_dns("tun9", SERVERS[:1], ()):
            os.close(writer)
        assert os.read(0, 100) == b"typed\n"
    finally:
        os.dup2(own, 0)
        os.close(own)
        os.close(reader)


def test_a_complaint_that_is_no_text_is_one_all_the_same(
    host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    host.install("resolvconf").write_text("#!/bin/sh\nprintf 'not \\377 today\\n' >&2; exit 1\n")
    with configured_dns("tun9", SERVERS[:1], ()) as outcome:
        assert outcome == "refused"
    told = "".join(capsys.readouterr())
    assert "a resolver command failed" in told
    assert "not restored" not in told, "it was never given"


@pytest.mark.parametrize("gone", [False, True], ids=["fails", "is gone"])
def test_a_record_that_cannot_be_taken_back_is_told_with_the_command_that_would(
    host: Host, capsys: pytest.CaptureFixture[str], gone: bool
) -> None:
    """It outlives the device."""
    configure_logging(LogSettings())
    path = host.install("resolvconf")
    with configured_dns("tun9", SERVERS[:1], ()):
        if gone:
            path.unlink()
        else:
            host.install("resolvconf", fails="-d")
    (line,) = capsys.readouterr().err.splitlines()
    assert "names cannot be looked up" in line and "run the command by hand" in line
    assert f"{path} -d tun9.inet -f" in line
    assert ("No such file" if gone else "not today") in line


@pytest.mark.parametrize("gone", [False, True], ids=["fails", "is gone"])
@pytest.mark.parametrize("device", ["lo", "tun9"], ids=["device is there", "device is gone"])
def test_what_resolved_does_not_take_back_ends_with_the_device_and_nobody_is_asked_to_do_it(
    host: Host, capsys: pytest.CaptureFixture[str], gone: bool, device: str
) -> None:
    configure_logging(LogSettings())
    host.resolved.touch()
    path = host.install("resolvectl")
    with configured_dns(device, SERVERS[:1], ()):
        if gone:
            path.unlink()
        else:
            host.install("resolvectl", fails="revert")
    lines = capsys.readouterr().err.splitlines()
    if device == "tun9":
        assert lines == []
        return
    (line,) = lines
    assert "until its device is gone" in line and "by hand" not in line
    assert ("No such file" if gone else "not today") in line
