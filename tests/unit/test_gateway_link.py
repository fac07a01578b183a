"""A whole gateway on a fake engine and a fake host whose link needs more than one try."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Sequence
from itertools import pairwise

import pytest

from tests.unit.fakes import FakeEvent
from tests.unit.running import serving, until
from tidegate.engine import ExternalLink
from tidegate.errors import HostNetworkError
from tidegate.gateway import FIRST_RETRY, LONGEST_RETRY
from tidegate.host import HostNetwork
from tidegate.settings import Settings


def test_a_link_that_the_engine_refuses_is_tried_again_without_another_notice(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example for want of descriptors: nothing tells when there are some again."""
    monkeypatch.setattr("tidegate.gateway.SETTLE", 0.02)
    monkeypatch.setattr("tidegate.gateway.FIRST_RETRY", 0.04)
    tried_at: list[float] = []

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            take = running.packets.set_external

            def refuse(link: ExternalLink, own: Sequence[str]) -> None:
                tried_at.append(time.monotonic())
                if len(tried_at) <= 4:
                    raise OSError(errno.EMFILE, "Too many open files")
                take(link, own)

            monkeypatch.setattr(running.packets, "set_external", refuse)
            running.packets.tell(FakeEvent("external_down", "Network is down"))
            await until(lambda: len(tried_at) == 1)
            assert running.gateway.external_trouble == "Too many open files"
            await until(lambda: running.gateway.external_trouble is None)
            assert running.packets.links == [running.packets.options.external]
            await asyncio.sleep(0.5)
            assert len(tried_at) == 5, "and is left alone then"

    asyncio.run(scenario())
    pauses = [after - before for before, after in pairwise(tried_at)]
    assert all(pause >= least for pause, least in zip(pauses, (0.04, 0.08, 0.16, 0.32), strict=True))
    assert capsys.readouterr().out.count("the external link is not usable") == 1, "the same each time"


def test_a_network_that_cannot_be_read_is_read_again_in_a_minute_at_the_latest(
    settings: Settings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (FIRST_RETRY, LONGEST_RETRY) == (0.5, 60)
    monkeypatch.setattr("tidegate.gateway.SETTLE", 0.02)
    monkeypatch.setattr("tidegate.gateway.FIRST_RETRY", 0.01)
    monkeypatch.setattr("tidegate.gateway.LONGEST_RETRY", 0.02)

    async def scenario() -> None:
        async with serving(settings, capsys) as running:
            await asyncio.sleep(0.1)
            reads, read = 0, running.host.read_network

            def refuse() -> HostNetwork:
                nonlocal reads
                reads += 1
                if reads <= 20:
                    raise HostNetworkError("cannot read the host's network: Cannot allocate memory")
                return read()

            monkeypatch.setattr(running.host, "read_network", refuse)
            assert running.host.changed is not None
            running.host.changed()
            await until(lambda: reads > 20 and running.gateway.external_trouble is None)

    asyncio.run(scenario())
