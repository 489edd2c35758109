"""Encoded pictures into one tensor."""

import logging
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from fastadv._extras import require
from fastadv._warnings import warn
from fastadv.data.pictures import CorruptPictureError, Picture, extensions
from fastadv.preprocessing import Preprocessing

logger = logging.getLogger("fastadv")


def cores() -> int:
    """How many cores this process may use: those of its affinity and its container, divided among a run's processes."""
    here: int = require("joblib").cpu_count()
    return max(1, here // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def decode_all(
    pictures: list[Picture], preprocessing: Preprocessing | None, skip_corrupt: bool, workers: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All pictures as uint8 (N, C, H, W), and which of them could be read, bool (N,).

    On a terminal there is a progress bar, elsewhere a line in the log.

    Args:
        pictures: to be decoded, N of them.
        preprocessing: of the model that takes them; None: they have one size, and keep it.
        skip_corrupt: leave out pictures that cannot be read, with a warning.
        workers: threads that decode; None means `cores()`.

    Raises:
        ValueError: a picture cannot be read and `skip_corrupt` is False; none can be; they have different sizes and
            there is no preprocessing; they do not fit in memory; workers is below 1.
    """
    workers = cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    extensions()  # the formats, before threads register them at the same time
    settings = preprocessing or _settings_of_first(pictures)
    _check_memory(len(pictures), settings.shape)
    images = torch.empty((len(pictures), *settings.shape), dtype=torch.uint8)
    pixels = images.numpy()

    def place(i: int) -> str | None:
        try:
            pixels[i] = pictures[i].prepared(preprocessing) if preprocessing else _unchanged(pictures[i], settings)
        except CorruptPictureError as error:
            return str(error)
        return None

    bar = require("tqdm").tqdm(total=len(pictures), desc="decoding", unit="picture", disable=None, delay=1)
    if bar.disable:
        logger.info("decoding %s pictures with %d workers", f"{len(pictures):,}", workers)
    problems = []
    with bar, ThreadPoolExecutor(workers) as pool:
        for problem in pool.map(place, range(len(pictures))):
            problems.append(problem)
            bar.update()
    readable = torch.tensor([problem is None for problem in problems])
    _report([problem for problem in problems if problem is not None], len(pictures), skip_corrupt)
    return (images if readable.all() else images[readable]), readable


def _unchanged(picture: Picture, settings: Preprocessing) -> np.ndarray:
    """The pixels of a picture that must have the size that these settings leave as it is."""
    found = picture.read()
    if found.size != settings.size[::-1]:
        raise ValueError(
            f"the pictures have different sizes ({picture.name}: {found.height} x {found.width}, others: "
            f"{settings.size[0]} x {settings.size[1]}): choose a model with an input size, or give a size"
        )
    return settings.apply(found)


def _settings_of_first(pictures: list[Picture]) -> Preprocessing:
    """Settings that leave a picture of the first one's size as it is."""
    for picture in pictures:
        try:
            return Preprocessing(picture.read().size[::-1])
        except CorruptPictureError as error:
            problem = error
    raise ValueError(f"none of the {len(pictures)} pictures can be read: {problem}")


def _report(problems: list[str], count: int, skip_corrupt: bool) -> None:
    if not problems:
        return
    if skip_corrupt and len(problems) < count:
        warn(f"{len(problems)} of {count} pictures were left out: {problems[0]}")
        return
    more = f"\n... and {len(problems) - 5} more" if len(problems) > 5 else ""
    listed = "\n".join(problems[:5]) + more
    hint = "" if skip_corrupt else "; skip_corrupt=True (--skip-corrupt) leaves them out"
    raise ValueError(f"{len(problems)} of {count} pictures cannot be read{hint}:\n{listed}")


def _check_memory(count: int, shape: tuple[int, ...]) -> None:
    needed, free = count * math.prod(shape), _free_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"{count:,} images of {shape[1]} x {shape[2]} take {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB "
            "are free: choose a smaller size, fewer classes or fewer images"
        )


def _free_memory() -> int | None:
    """Bytes that can be had; None where the system does not say."""
    try:
        # Free pages alone leave out the file cache, which the pictures themselves have just filled.
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        known = getattr(os, "sysconf_names", {})
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in known else None
