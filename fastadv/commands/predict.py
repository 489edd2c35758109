"""fastadv predict: the classes of pictures, one or a folder of them."""

import argparse
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch

from fastadv import models
from fastadv._warnings import warn
from fastadv.attacks.verdicts import NONE, SILENT, predicted
from fastadv.commands.arguments import TRAINED, add_device, add_trust, adder, load_model
from fastadv.commands.tables import ENDINGS, table, table_file
from fastadv.data.decoding import cores
from fastadv.data.pictures import CorruptPictureError, Picture, extensions
from fastadv.data.walking import files_below
from fastadv.functional import to_float
from fastadv.nn.frozen import frozen
from fastadv.nn.logits import find_logits
from fastadv.preprocessing import Preprocessing

logger = logging.getLogger("fastadv")

BATCH = 64

Pixels = npt.NDArray[np.uint8]  # of a picture, (C, H, W)


@dataclass(frozen=True)
class Prediction:
    """The model's prediction for a picture.

    Attributes:
        path: of the picture.
        shares: the probability of each class; None where the picture cannot be read.
        best: the class; NONE where the model gives no prediction.
        error: why the picture cannot be read.
    """

    path: Path
    shares: tuple[float, ...] | None = None
    best: int = NONE
    error: str | None = None


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.set_defaults(run=run)
    add = adder(parser)
    parser.add_argument("pictures", type=Path, nargs="+", help="pictures, or folders of them")
    add("--model", required=True, help=TRAINED)
    add_trust(parser)
    add("--out", table_file, help=f"file {' or '.join(ENDINGS)} (CSV to the terminal if not given)")
    add("--top-k", int, help="so many classes with their probabilities, the best first (each class's if not given)")
    add("--batch-size", int, BATCH, help="pictures that are decoded and classified at a time")
    add("--workers", int, help="threads that decode pictures (one for each core if not given)")
    parser.add_argument("--skip-corrupt", action="store_true", help="leave out pictures that cannot be read")
    add_device(add)


def run(arguments: argparse.Namespace) -> None:
    """Write a row for each picture; one that cannot be read has a row with the reason, and makes the exit status 1."""
    model = load_model(arguments.model, arguments.trust_code)
    if model.preprocessing is None:
        raise ValueError(f"{arguments.model} does not say what size of images it takes: it cannot classify pictures")
    for name, most in (("top_k", len(model.classes)), ("batch_size", None), ("workers", None)):
        value = getattr(arguments, name)
        if value is not None and (value < 1 or (most and value > most)):
            limit = f"from 1 to {most}, the number of the model's classes" if most else "at least 1"
            raise ValueError(f"--{name.replace('_', '-')} must be {limit}, got {value}")
    pictures = list(itertools.chain.from_iterable(map(found, arguments.pictures)))
    workers = arguments.workers or cores()
    if arguments.out and os.path.realpath(arguments.out) in {os.path.realpath(each.path) for each in pictures}:
        raise ValueError(f"--out {arguments.out} is one of the pictures, and would be overwritten: choose another")
    given = iter(predictions(model, pictures, arguments.device, arguments.batch_size, workers))
    first = list(itertools.islice(given, 1))  # an error before it leaves the file as it is
    errors, silent = [], 0
    with table(arguments.out, model.classes, arguments.top_k) as write:
        for prediction in itertools.chain(first, given):
            errors += [prediction.error] if prediction.error else []
            silent += prediction.error is None and prediction.best == NONE
            if not (prediction.error and arguments.skip_corrupt):
                write(str(prediction.path), prediction.shares, prediction.best, prediction.error)
    if silent:
        warn(f"no prediction for {silent} of {len(pictures)} pictures: {SILENT}")
    _report(errors, len(pictures), arguments.skip_corrupt)


def _report(errors: list[str], count: int, skipped: bool) -> None:
    if errors and skipped and len(errors) < count:
        warn(f"{len(errors)} of {count} pictures were left out: {errors[0]}")
    elif errors:
        hint = "" if skipped else " (the rows of all such are in the table; --skip-corrupt leaves them out)"
        raise SystemExit(f"fastadv: error: {len(errors)} of {count} pictures cannot be read{hint}: {errors[0]}")


def found(path: Path) -> list[Prediction]:
    """The pictures to classify: the picture `path`, or those in this folder and below it, in order.

    Every file counts whose name ends as a picture's does, hidden or not; hidden folders do not count. For a folder that
    cannot be read there is a prediction with an error.

    Raises:
        FileNotFoundError: there is no such file, or no picture in the folder.
    """
    if not os.path.isdir(path) and os.path.lexists(path):
        return [Prediction(path)]
    endings = extensions()
    closed: list[OSError] = []
    below = files_below(path, hidden=True, onerror=closed.append) if os.path.isdir(path) else []
    pictures = [Prediction(file) for file in below if file.suffix.lower() in endings]
    pictures += [
        Prediction(Path(error.filename), error=f"{error.filename} cannot be read ({error.strerror})")
        for error in closed
    ]
    if not pictures:
        raise FileNotFoundError(f"no picture {str(path)!r}, and no folder of pictures of this name")
    others = [file for file in below if file.suffix.lower() not in endings and not file.name.startswith(".")]
    if others:
        logger.info("left out, no pictures by their names: %d, such as %s", len(others), others[0])
    return pictures


def predictions(
    model: models.Model, pictures: list[Prediction], device: torch.device, batch_size: int, workers: int
) -> Iterator[Prediction]:
    """The predictions for pictures, in their order; for pictures that cannot be read the error.

    A picture goes through the preprocessing of the validation images, bit for bit. No more than two batches are decoded
    at a time.

    Args:
        model: which says what size of images it takes.
        pictures: to classify; those that have an error already keep it.
        device: where the model runs.
        batch_size: pictures that are decoded and classified at a time.
        workers: threads that decode.
    """
    preprocessing = cast(Preprocessing, model.preprocessing)  # `run` refuses a model without
    network = model.on_pixels.to(device)
    with torch.no_grad(), frozen(network):
        for part, decoded in _decoded(pictures, preprocessing, batch_size, workers):
            pixels = [each for each in decoded if not isinstance(each, str)]
            said = iter(_classified(network, pixels, device) if pixels else ())
            for picture, each in zip(part, decoded, strict=True):
                if isinstance(each, str):
                    yield Prediction(picture.path, error=each)
                else:
                    yield Prediction(picture.path, *next(said))


def _classified(
    network: torch.nn.Module, pixels: list[np.ndarray], device: torch.device
) -> Iterable[tuple[tuple[float, ...], int]]:
    """The probabilities and the best class of each image uint8 (C, H, W)."""
    images = torch.from_numpy(np.stack(pixels)).to(device)
    logits = find_logits(network(to_float(images)), len(images)).float().cpu()
    return zip(map(tuple, logits.softmax(1).tolist()), predicted(logits).tolist(), strict=True)


def _decoded(
    pictures: list[Prediction], preprocessing: Preprocessing, batch_size: int, workers: int
) -> Iterator[tuple[list[Prediction], list[Pixels | str]]]:
    """Batches with their pixels or errors; while one is classified the next is decoded."""
    extensions()  # the formats, before threads register them at the same time

    def pixels(picture: Prediction) -> Pixels | str:
        try:
            return picture.error or Picture(str(picture.path)).prepared(preprocessing)
        except CorruptPictureError as error:
            return str(error)

    parts = [pictures[i : i + batch_size] for i in range(0, len(pictures), batch_size)]
    with ThreadPoolExecutor(workers) as pool:
        coming = pool.map(pixels, parts[0])
        for part, following in zip(parts, [*parts[1:], []], strict=True):
            here, coming = coming, pool.map(pixels, following)
            yield part, list(here)
