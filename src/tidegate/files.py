"""Files that must be complete, and secret: written to a temporary name beside their own, synced, then moved."""

import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PRIVATE_FILE = 0o600
PRIVATE_DIRECTORY = 0o700


def make_private(path: Path) -> None:
    """Leaves the file (of a link, the one that it leads to) to its owner (0600), if others may do anything with it:
    what they may read is no secret. What is no file, such as /dev/null, is left as it is. Raises `OSError`."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode) and mode & 0o077:
        path.chmod(PRIVATE_FILE)


@contextmanager
def atomic_write(path: Path, *, replace: bool) -> Iterator[IO[str]]:
    """A text file (0600) that appears at `path` complete when the block succeeds, and not at all when it fails.

    Without `replace` an existing file raises `FileExistsError`, even one that appears meanwhile. Raises `OSError`
    before the block begins if the directory cannot be written to, and when it ends if the file cannot be moved into
    place.
    """
    if not replace and os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # made with mode 0600
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            _move_to_free_name(temporary, path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    try:
        _sync_directory(path.parent)
    except OSError as cause:
        if cause.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some file systems cannot sync directories
            raise


def _move_to_free_name(temporary: Path, path: Path) -> None:
    """Raises `FileExistsError` where the name is taken."""
    try:
        os.link(temporary, path)
        return
    except FileExistsError:
        raise
    except OSError:
        pass  # some file systems have no hard links, such as FAT
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, PRIVATE_FILE))  # the name is ours, and empty
    try:
        temporary.replace(path)
    except BaseException:
        path.unlink()
        raise


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
