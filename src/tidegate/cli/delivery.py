"""How a new peer's profile gets to somebody: the only key is in it, so that a peer whose profile does not is taken
back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from tidegate.cli.administration import Executor
from tidegate.cli.output import hand_out, remark
from tidegate.control.commands import PeerAdd, PeerAdded, PeerList, PeerRemove
from tidegate.errors import TidegateError, UnansweredError, UsageError
from tidegate.files import atomic_write


@contextmanager
def delivery(name: str, out: Path | None, force: bool) -> Iterator[Callable[[str], None]]:
    """The way out of a profile, to be used once. A file is begun before the peer is added, and appears once it
    was: nothing is ever half-done."""

    def show(text: str) -> None:
        try:
            hand_out(text)
        except OSError as cause:
            raise TidegateError(f"the profile cannot be printed: {cause.strerror}") from cause

    if out is None:
        yield show
        return
    with ExitStack() as files:
        with _explained(out):
            if out.is_dir():
                raise UsageError(
                    f"{out} is a directory", hint=f"name a file in it, such as {out / name}.conf"
                )
            if out.exists() and not out.is_file():  # /dev/stdout would be one from then on, for all programs
                raise UsageError(f"{out} is no regular file", hint="leave --out away to print the profile")
            if out.is_symlink():  # as /dev/stdout is where `>` leads to a file; or a stranger's
                raise UsageError(
                    f"{out} is a symbolic link",
                    hint="name the file itself, or leave --out away to print the profile",
                )
            file = files.enter_context(atomic_write(out, replace=force))

        def write(text: str) -> None:
            with _explained(out):
                file.write(text)
                files.close()

        yield write


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    try:
        yield
    except FileExistsError:
        raise UsageError(
            f"{out} exists, and may hold somebody's only key", hint="choose another --out, or add --force"
        ) from None
    except OSError as cause:
        raise TidegateError(f"{out}: cannot be written: {cause.strerror}") from cause


@contextmanager
def adding(command: PeerAdd, asking: Callable[[], AbstractContextManager[Executor]]) -> Iterator[PeerAdded]:
    """A peer that is there for good once the block has ended well. If it does not, or if nobody knows whether the
    peer was added, it is taken back; `asking` leads to who carries out commands, each time anew."""
    refused = True
    try:
        with asking() as executor:
            try:
                answer = executor.execute(command)
            except (UnansweredError, KeyboardInterrupt):
                refused = False
                raise
            refused = False
            yield answer
    except BaseException as failure:
        if not refused:
            _take_back(command, asking, failure)
        raise


def _take_back(
    command: PeerAdd, asking: Callable[[], AbstractContextManager[Executor]], failure: BaseException
) -> None:
    """Removes the peer if it has our key: another of that name may be why ours was refused. What became of it is
    said with the `failure`, in place of what may be the matter with the gateway; other advice stays."""
    name = command.name
    try:
        with asking() as executor:
            peers = executor.execute(PeerList()).peers
            if any((peer.name, peer.public_key) == (name, command.public_key) for peer in peers):
                executor.execute(PeerRemove(name=name))
        removed = True
    except (TidegateError, KeyboardInterrupt):
        removed = False
    fate = (
        f"{name} was not added"
        if removed
        else f"{name} may have been added, with a key that nobody has: look with `tidegate peer show {name}`"
    )
    if isinstance(failure, UnansweredError) or (isinstance(failure, TidegateError) and not failure.hint):
        failure.hint = fate
    elif not removed:
        remark(fate)
