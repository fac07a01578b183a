"""`tidegate connect PROFILE` with every offload off. As a program: ``python plain_client.py PROFILE``."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from tidegate.cli.connect import DEFAULT_INTERFACE
from tidegate.client import Client, LinuxClientHost
from tidegate.engine import load
from tidegate.identity import read_profile
from tidegate.lab.stacks import INNER_GATEWAY, TidegateClient, wait_for_gateway
from tidegate.settings import OffloadSettings

NONE = OffloadSettings(**dict.fromkeys(OffloadSettings.model_fields, False))
GATEWAY_WITHOUT = "\n[offloads]\n" + "".join(f"{name} = false\n" for name in OffloadSettings.model_fields)
"""The same for a gateway's settings."""


class PlainTidegateClient(TidegateClient):
    """Our own client, where no offload helps."""

    def start(self) -> None:
        if self._set_resolver:
            self._host.resolve_with(INNER_GATEWAY)
        command = [sys.executable, __file__, str(self._profile)]
        self.process = self._host.popen(command, name="tidegate-connect")
        wait_for_gateway(self._host, self.process)


def main() -> None:
    """Connects until SIGTERM."""
    profile = read_profile(Path(sys.argv[1]))
    client = Client(profile, load(), LinuxClientHost(), tun_name=DEFAULT_INTERFACE, offloads=NONE)
    asyncio.run(client.run())


if __name__ == "__main__":
    main()
