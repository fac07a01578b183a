"""Files that must be whole, and secret: written beside their place, synced, then moved there."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

PRIVATE_FILE = 0o600
PRIVATE_DIRECTORY = 0o700


@contextmanager
def atomic_write(path: Path, *, replace: bool) -> Iterator[IO[str]]:
    """A text file (0600) that appears at `path` whole when the block ends well, and not at all when it does
    not.

    Without `replace` an existing file raises `FileExistsError`, also one that appears meanwhile. Raises
    `OSError` before the block begins if the directory cannot be written, and when the block ends if the file
    does not get to its place.
    """
    if not replace and os.path.lexists(path):
        raise FileExistsError(17, "File exists", str(path))
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
        if cause.errno not in {errno.EINVAL, errno.ENOTSUP}:  # of file systems that sync no directories
            raise


def _move_to_free_name(temporary: Path, path: Path) -> None:
    """Raises `FileExistsError` where the name is taken."""
    try:
        os.link(temporary, path)
        return
    except FileExistsError:
        raise
    except OSError:
        pass  # there are file systems without hard links, such as FAT
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
