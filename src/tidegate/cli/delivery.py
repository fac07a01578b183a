"""Delivers a new peer's profile, by printing it or writing it to a file. The profile holds the only copy of the private
key, so a peer whose profile is not delivered is removed again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO, Protocol

from tidegate.cli.administration import Executor
from tidegate.cli.output import Handout, remark
from tidegate.control.commands import PeerAdd, PeerAdded, PeerList, PeerRemove
from tidegate.errors import TidegateError, UnansweredError, UsageError
from tidegate.files import atomic_write
from tidegate.interrupts import Unwinding


class Delivery(Protocol):
    """One way to deliver a profile. Can be used once."""

    where: str
    """Where the profile is once it has arrived."""

    def send(self, text: str) -> None: ...
    def arrived(self) -> bool:
        """Whether the profile was delivered, whatever failed afterwards."""


class Printing(Delivery):
    where = "printed"

    def __init__(self) -> None:
        self._handout: Handout | None = None

    def send(self, text: str) -> None:
        self._handout = Handout(text)
        try:
            self._handout.print()
        except OSError as cause:
            raise TidegateError(f"the profile cannot be printed: {cause.strerror}") from cause

    def arrived(self) -> bool:
        """Asks what was actually written: Ctrl-C may arrive right after the write, before anything else is recorded."""
        return self._handout is not None and self._handout.is_out()


class _Write(Delivery):
    def __init__(self, out: Path, file: IO[str], move: Callable[[], None]) -> None:
        self.where = f"in {out}"
        self._out = out
        self._file = file
        self._move = move
        self._text: str | None = None

    def send(self, text: str) -> None:
        self._text = text
        with explained(self._out):
            self._file.write(text)
            self._move()

    def arrived(self) -> bool:
        """Asks the file itself: Ctrl-C may arrive right after the move, before anything could be recorded."""
        try:
            return self._text is not None and self._out.read_bytes() == self._text.encode()
        except OSError:
            return False


@contextmanager
def delivery(name: str, out: Path | None, force: bool) -> Iterator[Delivery]:
    """A temporary file is opened before the peer is added, and moved into place after: nothing is ever half-done."""
    if out is None:
        yield Printing()
        return
    with ExitStack() as files:
        with explained(out):
            check_place(name, out)
            file = files.enter_context(atomic_write(out, replace=force))
        yield _Write(out, file, files.close)


def check_place(name: str, out: Path) -> None:
    """Whether the profile of that peer can go there. Raises `UsageError`, and `OSError` if that cannot be looked up."""
    if out.is_dir():
        raise UsageError(f"{out} is a directory", hint=f"name a file in it, such as {out / name}.conf")
    if out.exists() and not out.is_file():  # replacing /dev/stdout would break it for all programs
        raise UsageError(f"{out} is not a regular file", hint="omit --out to print the profile")
    if out.is_symlink():  # such as /dev/stdout, redirected to a file; or planted by somebody else
        raise UsageError(
            f"{out} is a symbolic link", hint="name the file itself, or omit --out to print the profile"
        )


@contextmanager
def explained(out: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise UsageError(
            f"{out} exists, and may hold somebody's only key", hint="choose another --out, or add --force"
        ) from None
    except OSError as cause:
        raise TidegateError(f"{out}: cannot be written: {cause.strerror}") from cause


@contextmanager
def adding(
    command: PeerAdd,
    asking: Callable[[], AbstractContextManager[Executor]],
    way_out: Delivery,
    unwinding: Unwinding,
    *,
    new_key: bool,
) -> Iterator[PeerAdded]:
    """Adds a peer, which is permanent once its profile is delivered. If that fails, or if it is not known whether the
    peer was added, it is removed again. `asking` opens a new connection to whatever carries out commands. `new_key`:
    nobody else can have added a peer with this key."""
    added: bool | None = False
    """`None`: not known."""
    try:
        with asking() as executor:
            try:
                answer = executor.execute(command)
            except (UnansweredError, KeyboardInterrupt):
                added = None
                raise
            added = True
            yield answer
    except BaseException as failure:
        unwinding.begin()
        if way_out.arrived():
            tell(f"{command.name} was added, and its profile is {way_out.where}", failure, always=True)
        elif added or (added is None and new_key):
            _take_back(command, asking, failure, new_key=new_key)
        elif added is None:
            tell(
                f"{command.name} may have been added: see `tidegate peer show {command.name}`",
                failure,
                always=True,
            )
        raise


def _take_back(
    command: PeerAdd,
    asking: Callable[[], AbstractContextManager[Executor]],
    failure: BaseException,
    *,
    new_key: bool,
) -> None:
    """Removes the peer if it has our key: ours may have been refused because another has its name."""
    name = command.name
    try:
        with asking() as executor:
            peers = executor.execute(PeerList(name=name)).peers
            if any(peer.public_key == command.public_key for peer in peers):
                executor.execute(PeerRemove(name=name))
        removed = True
    except (TidegateError, KeyboardInterrupt):
        removed = False
    lost = ", with a key that nobody has" if new_key else ""
    fate = (
        f"{name} was not added"
        if removed
        else f"{name} may have been added{lost}: see `tidegate peer show {name}`"
    )
    tell(fate, failure, always=not removed)


def tell(fate: str, failure: BaseException, *, always: bool) -> None:
    """Reports what became of the peer: as the hint of `failure` if that has none, or only guesses at what is wrong with
    the gateway; otherwise in a line of its own, but only if it is not what anybody would expect (`always`)."""
    if isinstance(failure, UnansweredError) or (isinstance(failure, TidegateError) and not failure.hint):
        failure.hint = fate
    elif always:
        remark(fate)
