"""Files that are replaced whole, even where the process is killed, and the numbers of their formats."""

import os
from pathlib import Path


def write_atomically(path: str | Path, content: bytes) -> None:
    """Replace a file, or make it: a reader finds the old content or the new one, never a part.

    The content goes to a temporary file beside `path`, then to the disk, and then that file gets the name.

    Args:
        path: the file; its folder is made where it is missing.
        content: the bytes.

    Raises:
        OSError: it cannot be written, as on a full disk; the old file is still there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    try:
        with open(new, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # which a full disk does not say
        raise
    if os.name == "posix":  # the renaming too must be on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_format(what: str, found: object, known: int, oldest: int | None = None) -> None:
    """Refuse the format `found` of a file that this version of fastadv writes in the format `known`.

    Args:
        what: the file, in words.
        found: what stands in the file where its format belongs.
        known: the newest format that is read.
        oldest: the first format that is still read; None means `known` alone.

    Raises:
        FormatError: it is another one; what to do about it.
    """
    if isinstance(found, int) and (known if oldest is None else oldest) <= found <= known:
        return
    newer = isinstance(found, int) and found > known
    todo = "install a newer fastadv, such as the one that wrote it" if newer else "install the fastadv that wrote it"
    reads = known if oldest is None else f"{oldest} to {known}"
    raise FormatError(f"{what} has the format {found}, this fastadv reads {reads}: {todo}")


class FormatError(ValueError):
    """A file is of a version of fastadv that this one does not read."""
