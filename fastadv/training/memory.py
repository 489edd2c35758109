"""Keeps a row of numbers for each training image from one epoch to the next."""

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
HEADER = 4096  # bytes before the first row: JSON, then spaces
FILES = 3  # one is read, one is written, and the third belongs to the last checkpoint but one
CHUNK = 2**20  # bytes that are written at a time
ELSEWHERE = "the run cannot go on; begin again in another folder"

Facts = dict[str, Any]  # the header of a file, as JSON has it


class SampleMemory:
    """A row for each training image. An epoch reads the rows that the epoch before wrote, and writes new ones.

    It reads one file and writes another. So a killed run that takes some steps again reads the same rows as before. The
    three files take turns:

        epoch    reads    writes
        4        .1       .2
        5        .2       .0
        6        .0       .1

    A checkpoint has the number of the epoch, which says which file is which; and each file says for which epoch its
    rows are. Write each row once in every epoch, and call `flush` before a checkpoint is written.

    The processes of one machine share the files, which are memory-mapped. Without a folder the rows are in memory.

    Args:
        folder: the folder of the files, which is made; None for one process without checkpoints.
        name: the beginning of the files' names: {name}.0, ...
        count: the number of images.
        shape: the shape of a row.
        dtype: the dtype of a row. Rows are zeros until they are written.
        resume: whether to continue with files that are there; else all rows begin with zeros.
        first: the number of the first epoch, which reads zeros.
        team: the processes of the run; all of them make this object, and call `begin`, together.

    Raises:
        FormatError: another version of fastadv wrote a file.
        OSError: there is no room for the files; or a file that is needed to resume is missing.
        ValueError: the processes do not share the folder; or a file has other rows.
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
        """Begin an epoch: from now on read the rows of the epoch before, and write rows for the next epoch.

        Args:
            epoch: the number of the epoch.

        Raises:
            ValueError: the file to read has the rows of another epoch.
        """
        read, write = epoch % len(self._rows), (epoch + 1) % len(self._rows)
        if self._files:
            self.team.by_all(lambda: self._files[read].check(epoch))
            self.team.from_first(lambda: self._files[write].say(epoch + 1))
        self._epoch, self._read, self._write = epoch, self._rows[read], self._rows[write]

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows that the epoch before wrote.

        Args:
            rows: int64 (n,), on the CPU, the numbers of the images.

        Returns:
            (n, *shape), on the CPU.
        """
        return self._read[rows]

    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Write rows for the next epoch.

        Args:
            rows: int64 (n,), on the CPU, the numbers of the images.
            values: (n, *shape), on any device.
        """
        self._write[rows] = values.to("cpu", self._write.dtype)

    @property
    def empty(self) -> bool:
        """Whether this is the first epoch, and all rows to read are zeros."""
        return self._epoch == self.first

    @property
    def before(self) -> torch.Tensor:
        """All rows (count, *shape) that the epoch before wrote. Do not write to them."""
        return self._read

    @property
    def written(self) -> torch.Tensor:
        """All rows (count, *shape) for the next epoch, as far as this epoch has written them."""
        return self._write

    def flush(self) -> None:
        """Bring all rows that the processes of this machine have written to the disk."""
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
        except (FileNotFoundError, ValueError) as error:  # ValueError: the file is empty
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
        """Write into the header for which epoch the rows are."""
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
    """Make the files, and write every byte: a full disk is an error here, not a signal that kills the run later."""
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
