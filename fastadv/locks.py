"""A lock that keeps two runs from using the same folder at the same time."""

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastadv._extras import require
from fastadv._warnings import warn


class InUseError(OSError):
    """Another process, or another thread, holds the lock."""


@contextmanager
def held(path: str | Path, what: str) -> Iterator[None]:
    """Hold a lock until the end, or until this process dies.

    The same thread may take the lock several times. It is a lock of the operating system (flock; on NFS the server's)
    on the file {path}.lock, and the file {path}.owner says who holds it. A killed process leaves both files, but no
    lock. Where the file system has no locks, a warning says so, and nothing is locked.

    Args:
        path: the file or folder to protect; the two files lie beside it.
        what: words for the error, such as "the run in photos".

    Raises:
        InUseError: another process or thread holds the lock; the message says who, where and since when.
        OSError: the folder cannot be written to.
    """
    filelock = require("filelock")  # PyTorch brings it
    path = Path(path)
    new = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, owner = (path.with_name(path.name + ending) for ending in (".lock", ".owner"))
    mine = filelock.FileLock(str(lock.absolute()), timeout=0, is_singleton=True)
    first = not mine.is_locked
    try:
        mine.acquire()
    except filelock.Timeout:
        raise InUseError(
            f"{what} is in use by another process{_told(owner)}: wait for its end, end it, or choose another place"
        ) from None
    except NotImplementedError:
        warn(f"the file system of {path.parent} has no locks: nothing keeps a second run out of it")
        yield
        return
    try:
        if first:
            owner.write_text(json.dumps(_who()) + "\n")
        yield
    finally:
        if first:
            owner.unlink(missing_ok=True)
            with suppress(OSError):  # other files are there
                lock.unlink()
                if new:  # a run that is refused leaves no empty folder
                    path.parent.rmdir()
        mine.release()


def _who() -> dict[str, str | int]:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:2]]) if sys.argv else "python"
    return {"pid": os.getpid(), "host": socket.gethostname(), "since": since, "command": command}


def _told(owner: Path) -> str:
    """Who holds the lock, in words; "" where that process has just begun and has not written it yet."""
    try:
        who = json.loads(owner.read_text())
        return f" ({who['command']}, process {who['pid']} on {who['host']}, since {who['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
