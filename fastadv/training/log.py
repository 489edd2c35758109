"""log.jsonl: the records of a run, one JSON object on each line."""

import json
import logging
from collections.abc import Iterable
from itertools import count
from pathlib import Path

from fastadv.files import write_atomically
from fastadv.training.progress import Record

FORMAT = 1  # in the last line
NAME = "log.jsonl"

logger = logging.getLogger("fastadv")


def begin(path: Path, records: Iterable[Record], *, new: bool) -> None:
    """Write the records so far.

    Args:
        path: of the log.
        records: of the run.
        new: the run begins now. A log that is there is another run's and is kept under another name, log.1.jsonl.
    """
    if new and path.exists() and path.stat().st_size:
        aside = next(name for i in count(1) if not (name := path.with_name(f"log.{i}.jsonl")).exists())
        path.rename(aside)
        logger.info("%s is of another run: it is %s now", path, aside.name)
    write_atomically(path, "".join(map(_line, records)).encode())


def append(path: Path, record: Record) -> None:
    """Add a record to the log."""
    with open(path, "a") as file:
        file.write(_line(record))


def _line(record: Record) -> str:
    return json.dumps(record) + "\n"
