"""Writes files that are never half written, even where the process is killed, and checks the formats of files."""

import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # there is none on Windows
    fcntl = None  # type: ignore[assignment]


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace a file, or make it. A reader finds the old content or the new one, never a part.

    The content is written to the temporary file {path}.new and flushed to the disk. Then that file is renamed. Where
    several processes or threads write the same file at once, each waits for the one before it, and the last one's
    content stays; on Windows, and where the file system has no locks, only one may write it at a time.

    Args:
        path: the file; a missing folder is made.
        content: the bytes.

    Raises:
        OSError: the file cannot be written, as on a full disk; the old file is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        with _opened(new) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                if fcntl is not None:  # while the lock is held; Windows renames no open file
                    new.replace(path)
            except BaseException:
                with suppress(OSError):
                    new.unlink()
                raise
        if fcntl is None:
            new.replace(path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # the error of a full disk does not name the file
        raise
    if os.name == "posix":  # the new name, too, must be on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _opened(new: Path) -> BinaryIO:
    """Open a temporary file, empty, that no other writer has. One that a killed process has left is taken over."""
    while True:
        file = open(new, "ab")  # noqa: SIM115 (it is returned) without truncating: it may be another writer's
        with suppress(OSError):  # a file system without locks
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        # The writer before has renamed or removed the file that it had: then the name stands for another, or for none.
        with suppress(FileNotFoundError):
            if fcntl is None or os.path.samestat(os.fstat(file.fileno()), os.stat(new)):
                file.truncate(0)
                return file
        file.close()


def check_format(what: str, found: object, known: int, oldest: int | None = None) -> None:
    """Refuse a file of a format that this version of fastadv does not read.

    Args:
        what: the file, in words.
        found: the entry "format" of the file, which may be anything.
        known: the newest format that is read.
        oldest: the oldest format that is read; None means `known` alone.

    Raises:
        FormatError: the format is not read; the message says which version to install.
    """
    if isinstance(found, int) and (known if oldest is None else oldest) <= found <= known:
        return
    newer = isinstance(found, int) and found > known
    todo = "install a newer fastadv, such as the one that wrote it" if newer else "install the fastadv that wrote it"
    reads = known if oldest is None else f"{oldest} to {known}"
    raise FormatError(f"{what} has the format {found}, this fastadv reads {reads}: {todo}")


class FormatError(ValueError):
    """Another version of fastadv wrote a file, in a format that this version does not read."""
