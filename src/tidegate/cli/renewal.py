"""Renews a peer's keys and loses none: the new profile is printed, or complete on the disk under a temporary name,
before the gateway gives up the former keys."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Protocol

from tidegate.cli.administration import Executor
from tidegate.cli.delivery import Printing, check_place, explained, tell
from tidegate.control.commands import PeerList, PeerRenew, PeerRenewed
from tidegate.errors import TidegateError
from tidegate.files import StagedFile
from tidegate.interrupts import Unwinding


class Handover(Protocol):
    """One way to hand over a new profile, in two steps: between them, the keys are renewed. Can be used once."""

    def secure(self, text: str) -> None:
        """From now on the profile cannot get lost. Raises `TidegateError`."""

    def complete(self) -> None:
        """The keys are renewed: the profile goes to its place. Raises `TidegateError` if it stays where it is. Once it
        has succeeded, another call changes nothing."""

    def withdraw(self) -> str | None:
        """The keys are not renewed: the profile is good for nothing. Returns what has to be said about it."""

    def where(self) -> str:
        """Where the profile is now."""


class _PrintedAtOnce(Handover):
    def __init__(self) -> None:
        self._printing = Printing()

    def secure(self, text: str) -> None:
        self._printing.send(text)

    def complete(self) -> None:
        pass

    def withdraw(self) -> str | None:
        return "the profile that was printed is good for nothing" if self._printing.arrived() else None

    def where(self) -> str:
        return self._printing.where


class _MovedIntoPlace(Handover):
    def __init__(self, out: Path, force: bool) -> None:
        self._out = out
        self._force = force
        self._staged: StagedFile | None = None

    def secure(self, text: str) -> None:
        with explained(self._out):
            self._staged = StagedFile(self._out, text)

    def complete(self) -> None:
        if self._staged is not None and self._staged.waits():
            with explained(self._out):
                self._staged.move(replace=self._force)

    def withdraw(self) -> str | None:
        if self._staged is not None:
            self._staged.discard()
        return None

    def where(self) -> str:
        if self._staged is not None and self._staged.waits():
            return f"in {self._staged.temporary}"
        return f"in {self._out}"


def handover(name: str, out: Path | None, force: bool) -> Handover:
    """To standard output, or to the file `out`. Raises `UsageError` if that is no place for a profile."""
    if out is None:
        return _PrintedAtOnce()
    with explained(out):
        check_place(name, out)
        if not force and out.exists():
            raise FileExistsError
    return _MovedIntoPlace(out, force)


def renew(
    command: PeerRenew,
    text: str,
    asking: Callable[[], AbstractContextManager[Executor]],
    way_out: Handover,
    unwinding: Unwinding,
) -> PeerRenewed:
    """Hands over the profile `text` and renews the keys: both, or neither. Where it is not known whether the keys are
    renewed, or the profile does not get to its place, both profiles are kept, and it is told where the new one is.
    `asking` opens a new connection to whatever carries out commands."""
    renewed: bool | None = False
    """`None`: not known."""
    try:
        way_out.secure(text)
        unwinding.begin()  # what comes now takes a moment, and is better finished than asked about
        with asking() as executor:
            renewed = None
            answer = executor.execute(command)
            renewed = True
            way_out.complete()
        return answer
    except BaseException as failure:
        unwinding.begin()
        if renewed is None:
            renewed = _is_renewed(command, asking)
        _settle(command, renewed, way_out, failure)
        raise


def _is_renewed(command: PeerRenew, asking: Callable[[], AbstractContextManager[Executor]]) -> bool | None:
    """Whether the peer has the new key; `None` if nobody says."""
    try:
        with asking() as executor:
            peers = executor.execute(PeerList(name=command.name)).peers
    except (TidegateError, KeyboardInterrupt):
        return None
    return any(peer.public_key == command.public_key for peer in peers)


def _settle(command: PeerRenew, renewed: bool | None, way_out: Handover, failure: BaseException) -> None:
    """Does with the profile what became of the keys, and tells."""
    name = command.name
    if renewed:
        with suppress(
            TidegateError
        ):  # it has been tried before, or where the profile is tells that it failed
            way_out.complete()
        tell(f"{name} was renewed, and its new profile is {way_out.where()}", failure, always=True)
    elif renewed is None:
        fate = (
            f"{name} may have been renewed: if `tidegate peer show {name}` says public key {command.public_key}, "
            f"its new profile is {way_out.where()}"
        )
        tell(fate, failure, always=True)
    else:
        void = way_out.withdraw()
        tell(f"{name} was not renewed{f': {void}' if void else ''}", failure, always=void is not None)
