"""What the NAT looks like to a client that asks a STUN server (RFC 5780), as a call or a game would.

::

    client ─── tunnel ─── gateway ─── internet 203.0.113.9, 203.0.113.10
                                      (a STUN server on both addresses, two ports each)
"""

from __future__ import annotations

import sys

import pytest

from tidegate.lab.topology import GATEWAY_EXTERNAL, INTERNET

from .conftest import MakeWorld
from .lab import stun
from .lab.stun import Behaviour

pytestmark = pytest.mark.namespaces

OTHER_ADDRESS = "203.0.113.10"


@pytest.mark.parametrize(
    ("setting", "filtering"),
    [
        (None, Behaviour.ADDRESS_DEPENDENT),
        ("endpoint-independent", Behaviour.ENDPOINT_INDEPENDENT),
        ("address-and-port-dependent", Behaviour.ADDRESS_AND_PORT_DEPENDENT),
    ],
    ids=["default", "endpoint-independent", "address-and-port-dependent"],
)
def test_mapping_is_endpoint_independent_and_filtering_as_the_setting_says(
    make_world: MakeWorld, setting: str | None, filtering: Behaviour
) -> None:
    world = make_world(config=f'[nat]\nfiltering = "{setting}"\n' if setting else None)
    gateway, lab = world.tidegate, world.lab
    world.connect(lab.client)
    lab.internet.ip(f"address add {OTHER_ADDRESS}/24 dev external")
    server = lab.internet.popen([sys.executable, stun.__file__, INTERNET, OTHER_ADDRESS], name="stun")
    server.wait_for(stun.READY)
    found = lab.client.call(lambda: stun.discover((INTERNET, stun.PORT)))
    assert found.mapped[0] == GATEWAY_EXTERNAL
    assert (found.mapping, found.filtering) == (Behaviour.ENDPOINT_INDEPENDENT, filtering)
    # Silence was the filter's doing, not a lost packet.
    assert ("filtered" in gateway.status()["drops"]) == (filtering != Behaviour.ENDPOINT_INDEPENDENT)
    gateway.stop()
