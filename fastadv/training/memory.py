"""Rows of numbers, one for each training image, that are kept from one epoch to the next."""

import json
import math
import mmap
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastadv.files import check_format
from fastadv.team import Team

FORMAT = 1
HEADER = 4096  # bytes: JSON, and spaces up to the first row
FILES = 3  # one is read, one is written, and the third is for the last checkpoint but one
CHUNK = 2**20  # bytes
ELSEWHERE = "the run cannot go on; begin again in another folder"

Facts = dict[str, Any]  # the header of a file, as JSON has it


class SampleMemory:
    """A row for each training image: an epoch reads what the epoch before it wrote.

    An epoch reads one file and writes another. A killed run that takes some steps again therefore reads and writes the
    same. With three files:

        epoch    reads    writes
        4        .1       .2
        5        .2       .0
        6        .0       .1

    The epoch's number, which a checkpoint has, says which file is which, and each file says which epoch its rows are
    for. Call `flush` before a checkpoint is written, and write each row once in every epoch.

    Several processes of one machine share the files (they are memory-mapped). Without a folder the rows are in memory.

    Args:
        folder: of the files, which it makes; None for one process without checkpoints.
        name: of the files: {name}.0, ...
        count: how many images there are.
        shape: of a row.
        dtype: of a row. Rows are zeros until they are written.
        resume: take the files that are there; else they begin with zeros.
        first: the first epoch, which reads zeros.
        team: the processes of the run; all of them make it, and call `begin`, together.

    Raises:
        OSError: there is no room for the files, or one that is needed to go on is missing.
        ValueError: the processes have no folder in common, or a file has other rows, or another format.
    """

    def __init__(
        self,
        folder: str | Path | None,
        name: str,
        count: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        resume: bool = False,
        first: int = 0,
        team: Team | None = None,
    ):
        self.team, self.first = team or Team(), first
        self._rows: list[torch.Tensor] = []
        self._files: list[_File] = []
        if folder is None:
            if not self.team.alone:
                raise ValueError(f"several processes share the {name} of their images by files: give a folder")
            self._rows = [torch.zeros(count, *shape, dtype=dtype) for _ in range(2)]
        else:
            size = math.prod((count, *shape)) * dtype.itemsize
            facts = {"format": FORMAT, "rows": [count, *shape], "dtype": str(dtype), "bytes": size}
            paths = [Path(folder) / f"{name}.{number}" for number in range(FILES)]
            if not resume:
                self.team.from_first(lambda: _make(paths, facts))
            self._files = self.team.by_all(lambda: [_File(path, facts) for path in paths])
            self._rows = [file.rows(dtype).view(count, *shape) for file in self._files]
            self._check_shared()
            if not resume:
                self.team.from_first(lambda: self._files[first % FILES].say(first))

    def begin(self, epoch: int) -> None:
        """Read from now on what epoch `epoch - 1` wrote, and write for `epoch + 1`.

        Raises:
            ValueError: the file has the rows of another epoch.
        """
        read, write = epoch % len(self._rows), (epoch + 1) % len(self._rows)
        if self._files:
            self.team.by_all(lambda: self._files[read].check(epoch))
            self.team.from_first(lambda: self._files[write].say(epoch + 1))
        self._epoch, self._read, self._write = epoch, self._rows[read], self._rows[write]

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """What the epoch before wrote for the images `rows`, int64 (n,) on the CPU: (n, *shape), on the CPU."""
        return self._read[rows]

    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Keep `values` (n, *shape), on any device, of the images `rows`, int64 (n,) on the CPU."""
        self._write[rows] = values.to("cpu", self._write.dtype)

    @property
    def empty(self) -> bool:
        """Whether no epoch has been before: all rows are zeros then."""
        return self._epoch == self.first

    @property
    def before(self) -> torch.Tensor:
        """All rows (count, *shape) that the epoch before wrote; not to be written to."""
        return self._read

    @property
    def written(self) -> torch.Tensor:
        """All rows (count, *shape) of this epoch, where they have been written."""
        return self._write

    def flush(self) -> None:
        """Have on the disk what all processes of this machine have written."""
        for file in self._files:
            file.flush()

    def _check_shared(self) -> None:
        places = self.team.gathered((socket.gethostname(), [file.number for file in self._files]))
        other = [rank for rank, place in enumerate(places) if place != places[0]]
        if other:
            raise ValueError(
                f"process {other[0]} does not share the files of process 0, {self._files[0].path.parent} on "
                f"{places[0][0]}: what a run keeps for each of its images is shared by the processes of one machine"
            )


class _File:
    """A memory-mapped file of rows with a header."""

    def __init__(self, path: Path, facts: Facts):
        self.path = path
        try:
            with open(path, "r+b") as file:
                self._map = mmap.mmap(file.fileno(), 0)
                self.number = os.fstat(file.fileno()).st_ino
        except (FileNotFoundError, ValueError) as error:  # a file that is empty
            raise FileNotFoundError(f"{path} is missing or empty: {ELSEWHERE}") from error
        found = self._header()
        check_format(str(path), found.get("format"), FORMAT)
        for name, value in facts.items():
            if found[name] != value:
                raise ValueError(f"{path} has {name} {found[name]}, not {value}, and is of another run: {ELSEWHERE}")
        size = HEADER + facts["bytes"]
        if len(self._map) != size:
            raise ValueError(f"{path} has {len(self._map)} bytes, not {size}: {ELSEWHERE}")
        self._facts = facts

    def rows(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(self._map, dtype=dtype, offset=HEADER)

    def check(self, epoch: int) -> None:
        found = self._header()["epoch"]
        if found != epoch:
            raise ValueError(
                f"{self.path} has the rows for epoch {found}, counted from 0, and the run goes on in epoch {epoch}: "
                f"they are not of this checkpoint. {ELSEWHERE.capitalize()}"
            )

    def say(self, epoch: int) -> None:
        """That its rows are for this epoch."""
        self._map[:HEADER] = _header(self._facts | {"epoch": epoch})

    def flush(self) -> None:
        self._map.flush()

    def _header(self) -> Facts:
        try:
            facts: Facts = json.loads(self._map[:HEADER])
            return facts
        except ValueError as error:
            raise ValueError(f"the header of {self.path} is damaged: {ELSEWHERE}") from error


def _make(paths: Sequence[Path], facts: Facts) -> None:
    """Write every byte now: a full disk is then an error here, and not a signal when the memory is written to."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with open(path, "wb") as file:
            file.write(_header(facts | {"epoch": None}))
            for start in range(0, facts["bytes"], CHUNK):
                file.write(bytes(min(CHUNK, facts["bytes"] - start)))
            file.flush()
            os.fsync(file.fileno())


def _header(facts: Facts) -> bytes:
    return (json.dumps(facts) + "\n").encode().ljust(HEADER)
