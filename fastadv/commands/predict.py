"""fastadv predict: the classes of pictures, one or a folder of them."""

import argparse
import csv
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch

from fastadv import models
from fastadv.attacks.objective import find_logits
from fastadv.attacks.state import frozen
from fastadv.attacks.verdicts import NONE, SILENT, predicted
from fastadv.commands.arguments import add_device, add_trust, adder, load_model
from fastadv.data import to_float
from fastadv.data.pictures import extensions, read

BATCH = 64


def add(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    add = adder(parser)
    parser.add_argument("pictures", type=Path, nargs="+", help="pictures, or folders of them")
    add("--model", required=True, help="a checkpoint.safetensors")
    add_trust(parser)
    add("--out", Path, help="CSV file (the terminal if not given)")
    add_device(add)


def run(arguments: argparse.Namespace) -> None:
    model = load_model(arguments.model, arguments.trust_code)
    if model.preprocessing is None:
        raise ValueError(f"{arguments.model} does not say what size of images it takes: it cannot classify pictures")
    paths = [path for given in arguments.pictures for path in found(given)]
    rows = predictions(model, paths, arguments.device)
    with open(arguments.out, "w", newline="") if arguments.out else nullcontext(sys.stdout) as file:
        writer = csv.writer(file)
        writer.writerow(("picture", "class", "probability", *model.classes))
        writer.writerows(rows)


def found(path: Path) -> list[Path]:
    """The picture `path`, or the pictures in this folder and those below it, in order.

    Raises:
        FileNotFoundError: there is no such file, or no picture in the folder.
    """
    if path.is_file():
        return [path]
    endings = extensions()
    pictures = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in endings)
    if not pictures:
        raise FileNotFoundError(f"no picture {str(path)!r}, and no folder of pictures of this name")
    return pictures


def predictions(model: models.Model, paths: list[Path], device: torch.device) -> Iterator[tuple]:
    """(path, class, its probability, the probability of each class), for each picture.

    A picture goes through the preprocessing of the validation images, bit for bit. One for which the model gives no
    prediction has these words for its class and nothing for its probability; at the end a warning counts them.
    """
    network, silent = model.pixels.to(device), 0
    with torch.no_grad(), frozen(network):
        for part in (paths[i : i + BATCH] for i in range(0, len(paths), BATCH)):
            images = torch.stack([torch.from_numpy(model.preprocessing.apply(read(path))) for path in part])
            logits = find_logits(network(to_float(images.to(device))), len(part)).float().cpu()
            for path, best, row in zip(part, predicted(logits).tolist(), logits.softmax(1).tolist(), strict=True):
                says = ("no prediction", "") if best == NONE else (model.classes[best], f"{row[best]:.6f}")
                silent += best == NONE
                yield (str(path), *says, *(f"{share:.6f}" for share in row))
    if silent:
        warnings.warn(f"no prediction for {silent} of {len(paths)} pictures: {SILENT}", stacklevel=2)
