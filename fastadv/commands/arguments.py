"""Options that several commands have, and what they mean."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol

import torch

from fastadv import data, models
from fastadv._warnings import warn
from fastadv.commands.speech import say
from fastadv.commands.values import Listed, WithDefaults, one_of
from fastadv.data.classes import class_list
from fastadv.data.trained import known
from fastadv.devices import present
from fastadv.models.sources import is_file
from fastadv.preprocessing import Preprocessing
from fastadv.team import Team

Kind = Callable[[str], object]  # from an option's text to its value; argparse shows its ArgumentTypeError


class Add(Protocol):
    """Adds an option to a parser: `add("--epochs", int, 20, help="passes over the training images")`."""

    def __call__(self, name: str, kind: Kind = str, default: object = None, **options: Any) -> None: ...


def adder(parser: argparse.ArgumentParser) -> Add:
    """What adds options to a parser whose help shows the defaults."""
    parser.formatter_class = WithDefaults

    def add(name: str, kind: Kind = str, default: object = None, **options: Any) -> None:
        if choices := options.get("choices"):
            kind = one_of(choices)
        parser.add_argument(name, type=kind, default=default, **options)

    return add


class Renamed(argparse.Action):
    """An old name of an option: it works until the next minor release, and warns."""

    def __init__(self, option_strings: list[str], dest: str, **options: Any):
        super().__init__(option_strings, dest, **options | {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS})

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        new = "--" + self.dest.replace("_", "-")
        warn(f"{option_string} is now {new}", FutureWarning)
        setattr(namespace, self.dest, values)


def add_data(
    parser: argparse.ArgumentParser,
    add: Add,
    default: str | None = None,
    classes: str | None = None,
    split_seed: int | None = 0,
) -> None:
    """Add the options that say where the images are, and what is taken of them.

    Args:
        parser: of the command.
        add: its `adder`.
        default: of --data; None means that it must be given.
        classes: default of --classes; None means all.
        split_seed: default of --split-seed.
    """
    add(
        "--data",
        default=default,
        required=default is None,
        help="digits, cifar10, a folder of pictures, of parquet files, or an .npz file",
    )
    add("--data-folder", Path, help="where cifar10 is (the variable FASTADV_DATA, else data, if not given)")
    add(
        "--classes",
        class_list,
        classes,
        action=Listed,
        help='labels or names to keep, such as 5-9 or cat,dog or "salt, rock",pepper in its quotes (all if not given)',
    )
    add("--image-column", help="column of the images in parquet files (image, img or another usual name if not given)")
    add(
        "--label-column",
        help="column of the labels in parquet files (label, labels or another usual name if not given)",
    )
    parser.add_argument("--skip-corrupt", action="store_true", help="leave out pictures that cannot be read")
    add("--workers", int, help="threads that decode pictures (one for each core if not given)")
    add(
        "--split-seed",
        int,
        split_seed,
        help="seed of the split that makes missing parts; evaluate takes the training's",
    )
    add("--seed", int, 0, help="seed of everything that is random")
    add_device(add)


def add_device(add: Add) -> None:
    """Add --device: a GPU where there is one."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", device, here, help="where the model runs: cpu, cuda, cuda:1")


def device(text: str) -> torch.device:
    """A device that is here.

    Raises:
        argparse.ArgumentTypeError: it is not.
    """
    try:
        return present(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_folder(path: Path) -> None:
    """Refuse a folder that cannot be made or written to, before time is spent on its content.

    Raises:
        OSError: it is no folder, or nothing can be written there.
    """
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"--out is a folder, and {place} is a file: choose another")
    try:
        with TemporaryFile(dir=place, buffering=0) as file:
            file.write(bytes(4096))
    except OSError as error:
        where = "" if place == path.absolute() else f" (to make it in {place})"
        raise OSError(f"cannot write to --out {path}{where}: {error.strerror}") from error


def check_outside(out: Path, data: Path) -> None:
    """Refuse a folder within a data set, of which it would become a class.

    Raises:
        ValueError: `out` is within the folder `data`.
    """
    if data.is_dir() and out.resolve().is_relative_to(data.resolve()):
        raise ValueError(
            f"--out {out} is within the data set {data.resolve()}, and would become images of that: choose another"
        )


def load_data(
    arguments: argparse.Namespace,
    preprocessing: Preprocessing | None,
    *,
    validation: float,
    team: Team | None = None,
) -> data.Data:
    """The data that `add_data`'s options name; the parts that the set itself does not have are printed.

    Args:
        arguments: of the command.
        preprocessing: of the pictures, as in `fastadv.data.load`.
        validation: share of the training images to choose weights on, where the set sets none apart.
        team: the processes of a run, each of which holds a share of the images; None means that this one holds all.

    Raises:
        ValueError: the data have a single class.
    """
    dataset = data.load(
        arguments.data,
        preprocessing=preprocessing,
        classes=arguments.classes,
        folder=arguments.data_folder,
        image_column=arguments.image_column,
        label_column=arguments.label_column,
        skip_corrupt=arguments.skip_corrupt,
        workers=arguments.workers,
        seed=arguments.split_seed,
        validation=validation,
        team=team,
    )
    for note in dataset.notes:
        say(note)
    if len(dataset.classes) < 2:
        raise ValueError(
            f"the data have a single class, {dataset.classes[0]}, and there is nothing to tell apart: give a folder "
            "that holds a folder for each class, and --classes with two or more of them"
        )
    return dataset


def overlap(model: models.Model, digests: torch.Tensor) -> int | None:
    """How many of the pictures with these digests the model was trained on; None where its file does not say.

    Where there are any this is printed: training pictures say nothing about how good a model is.
    """
    count = known(model.trained_on, digests)
    if count:
        say(
            f"the model was trained on {count} of the {len(digests)} test images (about one new image in 10,000 is "
            "taken for such a one)"
        )
    return count


TRAINED = "a checkpoint.safetensors, hf:NAME_OR_FOLDER or robust-resnet"


def add_trust(parser: argparse.ArgumentParser) -> None:
    """Add --trust-code."""
    parser.add_argument(
        "--trust-code",
        action="store_true",
        help="let a checkpoint whose model is a function module:function run that code: only if you trust its maker",
    )


def check_new(weights: Path, resume: bool) -> None:
    """Refuse to write over the weights of another run.

    Args:
        weights: the file to be written.
        resume: whether the run goes on from the state beside that file.

    Raises:
        FileExistsError: there are such weights.
    """
    if not weights.exists():
        return
    if not resume:
        raise FileExistsError(f"{weights} exists; choose another --out, or --resume")
    if not (weights.parent / "state").exists():
        raise FileExistsError(f"{weights} exists, and beside it no state to resume: choose another --out, or move it")


def model_source(name: str, trust_code: bool) -> models.ModelSource:
    """`models.source`, where a module:function may lie in the working folder."""
    if trust_code or not name.endswith(".safetensors"):
        _see_working_folder()
    return models.source(name, trust_code=trust_code)


def load_model(name: str, trust_code: bool) -> models.Model:
    """A trained model: `models.load`, or a source whose pretrained head names its classes.

    The module of a trusted file's architecture may lie in the working folder.

    Raises:
        FileNotFoundError: there is no such file or model.
        ValueError: the model names no classes.
    """
    if trust_code:
        _see_working_folder()
    if is_file(name) or Path(name).is_file():
        return models.load(name, trust_code=trust_code)
    found = models.source(name)
    if found.classes is None:
        raise ValueError(
            f"{name} does not name its classes: give {TRAINED}; fastadv finetune --model {name} writes a checkpoint"
        )
    return found.build(found.classes)


def _see_working_folder() -> None:
    """Let modules be imported from the working folder; last, so that no file there takes the place of a package."""
    if "" not in sys.path:
        sys.path.append("")
