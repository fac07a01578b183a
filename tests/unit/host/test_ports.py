"""The ports that the host's programs cannot do without."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from tidegate.errors import PrivilegeError
from tidegate.host.ports import explain_bind, kept_ports


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("32768\t60999\n", (53_942, 60_999)),
        ("1024\t65535\n", (49_408, 65_535)),
        ("40000\t40003\n", (40_003, 40_003)),
        ("40000\t40000\n", (40_000, 40_000)),
        ("what?", (53_942, 60_999)),
    ],
)
def test_the_last_quarter_of_the_ports_that_the_kernel_gives_out_is_kept(
    tmp_path: Path, told: str, kept: tuple[int, int]
) -> None:
    file = tmp_path / "ip_local_port_range"
    file.write_text(told)
    assert kept_ports(file) == kept


def test_without_proc_the_kernels_own_range_is_taken(tmp_path: Path) -> None:
    assert kept_ports(tmp_path / "nothing") == (53_942, 60_999)


def test_a_port_that_may_not_be_bound_is_explained_by_what_even_root_may_lack() -> None:
    refused = explain_bind(
        OSError(errno.EACCES, os.strerror(errno.EACCES)), "UDP", "10.66.77.1", 53, hint="turn it off"
    )
    assert isinstance(refused, PrivilegeError)
    assert str(refused) == (
        "UDP 10.66.77.1:53 cannot be bound: permission denied; grant CAP_NET_BIND_SERVICE, or turn it off"
    )
