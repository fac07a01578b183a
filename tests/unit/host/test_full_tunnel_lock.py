"""The lock of the client that routes everything, in a network namespace of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tidegate.errors import HostNetworkError
from tidegate.host import full_tunnel_lock

INSIDE = """
import json, os, signal, socket, subprocess, sys, threading, time
from tidegate.errors import TidegateError
from tidegate.host.full_tunnel_lock import LOCK_FILE, full_tunnel_lock

NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
OPEN = ["dd", f"if={LOCK_FILE}", "count=0", "status=none"]
TAKE = "from tidegate.host.full_tunnel_lock import full_tunnel_lock\\nwith full_tunnel_lock(): print(\\"taken\\")"
told = {}

def take(patience=0.0):
    try:
        with full_tunnel_lock(patience=patience):
            return "taken"
    except TidegateError as refused:
        return str(refused)

def opened(*program):
    return subprocess.run([*program, *OPEN], stderr=subprocess.DEVNULL).returncode == 0

told["first"] = take()
reader, writer = os.pipe()
holder = os.fork()
if holder == 0:
    with full_tunnel_lock():
        os.write(writer, b"!")
        signal.pause()
os.read(reader, 1)
told["while another has it"] = take()
told["pid"] = holder
began = time.monotonic()
told["after a while"] = take(0.3)
told["waited"] = time.monotonic() - began
told["in another namespace"] = subprocess.run(
    ["unshare", "--net", sys.executable, "-c", TAKE], capture_output=True, text=True).stdout
threading.Timer(0.3, os.kill, [holder, signal.SIGKILL]).start()
told["of one that was about to give it back"] = take(30)
os.waitpid(holder, 0)
told["after it was killed"] = take()
with socket.socket(socket.AF_UNIX) as name:  # anybody can
    name.bind(b"\\0tidegate/policy-routing")
    told["with a name taken"] = take()
told["anybody"] = opened(*NOBODY)
told["an administrator of the network"] = opened(
    *NOBODY, "--inh-caps=+net_admin", "--ambient-caps=+net_admin")
print(json.dumps(told))
"""


@pytest.mark.namespaces
def test_one_client_of_a_namespace_has_it_and_nobody_without_rights_can_keep_it_from_one() -> None:
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", INSIDE],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["first"] == "taken"
    assert (
        f"another client already routes everything through its tunnel (pid {told['pid']})"
        in told["while another has it"]
    )
    assert told["after a while"] == told["while another has it"]
    assert 0.3 <= told["waited"] < 10
    assert told["of one that was about to give it back"] == "taken"
    assert told["in another namespace"] == "taken\n"
    assert told["after it was killed"] == "taken"
    assert told["with a name taken"] == "taken"
    assert not told["anybody"]
    assert told["an administrator of the network"]


@pytest.mark.parametrize(("name", "mount"), [("missing", True), ("unfit/missing", False)])
def test_a_host_without_the_lock_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, mount: bool
) -> None:
    (tmp_path / "unfit").touch()
    monkeypatch.setattr(full_tunnel_lock, "LOCK_FILE", tmp_path / name)
    with (
        pytest.raises(HostNetworkError, match=r"missing cannot be opened .*--no-routes") as refused,
        full_tunnel_lock.full_tunnel_lock(),
    ):
        pass
    assert ("mount /proc" in str(refused.value)) == mount, "not where it is there, but closed"
