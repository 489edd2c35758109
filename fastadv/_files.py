"""Files that are there whole or not at all."""

import os
from pathlib import Path


def write(path: str | Path, content: bytes) -> None:
    """Write `content` to `path`; whatever happens on the way, the file there before stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    if os.name == "posix":  # the renaming too must be on the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
