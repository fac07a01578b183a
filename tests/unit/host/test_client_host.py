"""The host as a client sees it: it does what it is asked to, and nothing else."""

from __future__ import annotations

import pytest

from tidegate.host.client import LinuxClientHost


@pytest.mark.parametrize("routes", [False, True], ids=["", "routes"])
@pytest.mark.parametrize("dns", [False, True], ids=["", "dns"])
def test_leftovers_are_removed_of_what_the_client_uses(
    monkeypatch: pytest.MonkeyPatch, routes: bool, dns: bool
) -> None:
    removed = []
    monkeypatch.setattr("tidegate.host.client.remove_leftovers", lambda: removed.append("routes"))
    monkeypatch.setattr(
        "tidegate.host.client.remove_leftover_record", lambda tun_name: removed.append(f"dns of {tun_name}")
    )
    LinuxClientHost().remove_leftovers("test0", routes=routes, dns=dns)
    assert removed == ["dns of test0"] * dns + ["routes"] * routes
