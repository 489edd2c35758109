"""A data set by its name or path."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastadv._warnings import warn
from fastadv.data import parquet
from fastadv.data.arrays import digits, npz
from fastadv.data.cifar10 import cifar10
from fastadv.data.classes import Chosen, labels_of, selected, warn_of_twins
from fastadv.data.dataset import Data
from fastadv.data.decoding import decode_all
from fastadv.data.folders import folders
from fastadv.data.pictures import Picture, extensions
from fastadv.data.share import Share, dealt
from fastadv.data.source import AnyPart, DataSource, DigestedPart, Part, digest
from fastadv.data.splits import TEST_SHARE, Split, with_splits
from fastadv.data.walking import files_below
from fastadv.names import instead
from fastadv.preprocessing import Preprocessing
from fastadv.team import Team

# A folder with one of these is what a command wrote.
_RESULTS = ("report.json", "report.html", "log.jsonl", "study.yaml", "state.safetensors")


def load(
    name_or_path: str | Path,
    *,
    preprocessing: Preprocessing | None = None,
    classes: Sequence[Chosen] | None = None,
    validation: float = 0.1,
    test: float = TEST_SHARE,
    folder: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    skip_corrupt: bool = False,
    workers: int | None = None,
    seed: int = 0,
    team: Team | None = None,
) -> Data:
    """A data set: "digits", "cifar10", an .npz file, parquet files, or a folder of pictures.

    Where the set has no test part, a share `test` of its training part becomes one, and `Data.notes` says so. Where it
    has no validation part, a share `validation` of what is left becomes one. Which pictures depends on what each of
    them contains and on the seed alone (see `Split`): equal pictures fall on one side, and one more moves no other.
    Every class has at least one picture in each part; where that takes another one than the shares, a note says so.
    Equal pictures under two labels, or in two parts that the set brings, are warned of.

    Args:
        name_or_path: "digits" is scikit-learn's (1,797 grey 8x8 images, float32, without a test part), "./digits" a
            folder. "cifar10" is
            read from `folder`: parquet files, or the archive cifar-10-binary.tar.gz or cifar-10-python.tar.gz,
            extracted or not. An .npz file holds x_train, y_train, x_test, y_test and, if it likes, x_val, y_val:
            images (N, C, H, W), uint8 or floats in [0, 1]; integer labels (N,). A parquet file, or a folder with
            train*.parquet, val*.parquet and test*.parquet as the Hugging Face hub has them, has a column such as image
            of encoded pictures or of their files' paths and a column such as label of integers or names; a part whose
            labels are all -1 or null is left out with a warning. Classes that have no names are called by their labels,
            those that are there. A folder of pictures is photos/CLASS/..., or photos/train/CLASS/... with val (or
            valid, validation) and test beside it.
        preprocessing: of the model the images are for; they become uint8 of its size, JPEGs of four times the size or
            more decoded at a fraction of theirs (see `Preprocessing.enough`). None leaves images as they are: those of
            one set must then have one size.
        classes: names or labels of the classes to keep, relabelled 0, 1, ... in the order given. Numbers are names
            where all of them are.
        validation: share in [0, 1) of the images that are not for the test; 0 means none. Of a large set a small share
            is enough: 0.04 of CIFAR-10's training part are 2,000 images.
        test: share in (0, 1).
        folder: where "cifar10" is, itself or as the subfolder cifar10; None means the environment variable
            FASTADV_DATA, else ./data.
        image_column: of parquet files, the column of pictures; None: the first of those that are usual.
        label_column: of parquet files, the column of labels; None: the first of those that are usual.
        skip_corrupt: leave out pictures that cannot be read, with a warning, instead of raising.
        workers: threads that decode pictures; None means one for each core that this process may use.
        seed: of the splits.
        team: processes that load the set together, each from its own disk: all of them call this, each decodes and
            holds its share of the images (see `Share`), and all fail where one does.

    Raises:
        FileNotFoundError: no such data set, file or folder.
        ImportError: the `train` extra is not installed.
        ValueError: the content is not as above, a class is missing, pictures cannot be read or have different sizes
            without a preprocessing, there is too little memory, or the processes have different pictures.
    """
    team, split = team or Team(), Split(seed, test, validation)
    columns = parquet.Columns(image_column, label_column)
    given, names, parts, notes = team.by_all(
        lambda: _chosen(find(name_or_path, folder, columns, codes=preprocessing is not None), classes, split)
    )
    _check_agreed(team, names, parts)
    decoded = _decoded(parts, preprocessing, skip_corrupt, workers, names, given, team)
    train, val, test_part = (decoded[name] for name in ("train", "val", "test"))
    return Data(
        *(train.images, train.labels, val.images, val.labels, test_part.images, test_part.labels),
        classes=names,
        notes=notes,
        split=split,
        digests={name: part.digests for name, part in decoded.items()},
    )


def _chosen(
    source: DataSource, classes: Sequence[Chosen] | None, split: Split
) -> tuple[Collection[str], tuple[str, ...], dict[str, DigestedPart], tuple[str, ...]]:
    """(the parts that the set brings, the names of the classes, the parts of these, notes), nothing decoded yet."""
    names = source.classes
    chosen = list(range(len(names))) if classes is None else labels_of(classes, names)
    parts, notes = with_splits(source, split, chosen)
    if classes is not None:
        parts = {name: selected(part, chosen) for name, part in parts.items()}
        names = tuple(names[label] for label in chosen)
        _check_present(parts, names)
    return tuple(source.parts), names, parts, notes


def _check_agreed(team: Team, names: tuple[str, ...], parts: Mapping[str, DigestedPart]) -> None:
    """Refuse processes with different pictures: what one of them trains on would be another's test."""
    mine: dict[str, object] = {"classes": names}
    for name, part in parts.items():
        mine[f"{name} pictures"] = (len(part.labels), digest(torch.stack((part.labels, part.digests)).numpy().data))
    for rank, there in enumerate(everyone := team.gathered(mine)):
        other = [what for what in mine if there[what] != everyone[0][what]]
        if other:
            raise ValueError(
                f"process {rank} has other {other[0]} than process 0: {there[other[0]]!s:.100}, not "
                f"{everyone[0][other[0]]!s:.100} (of pictures their number and a digest). All processes of a run need "
                "the same data"
            )


def find(
    name_or_path: str | Path,
    folder: str | Path | None,
    columns: parquet.Columns,
    *,
    codes: bool,
    judge: str | None = None,
) -> DataSource:
    """The set where it lies; `judge` says which of its parts, see `judging`, and None that it is for training.

    Raises:
        FileNotFoundError, ValueError: as `load`.
    """
    source = _found(name_or_path, folder, columns, codes, judge)
    warn_of_twins(source.classes)
    return source


def _found(
    name_or_path: str | Path, folder: str | Path | None, columns: parquet.Columns, codes: bool, judge: str | None
) -> DataSource:
    path = Path(name_or_path)
    sets = {"digits": lambda: digits(codes), "cifar10": lambda: cifar10(folder)}
    named = sets.get(name_or_path) if isinstance(name_or_path, str) else None
    if name_or_path == "digits":
        check_one_digits(Path())
    files = {} if named or not path.is_dir() else parquet.find(path, training=judge is None)
    if path.suffix == ".parquet" and path.is_file():
        files = {"train": [path]}
    if folder is not None and name_or_path != "cifar10":
        raise ValueError(
            f"folder is where cifar10 is, and the data are {str(name_or_path)!r}: leave folder out, and give the path "
            "of the data themselves"
        )
    if columns != parquet.Columns() and not files:
        raise ValueError(f"image_column and label_column are for parquet files, and {str(name_or_path)!r} has none")
    if named:
        return named()
    if files:
        return parquet.read(files, columns, judge=judge)
    if path.is_dir():
        return folders(path, judge)
    if not path.is_file():
        raise FileNotFoundError(
            f"no data set or file called {str(path)!r}: give the path of an .npz file, a parquet file, or a folder of "
            f"parquet files or pictures, or a name{instead(path, sets)}"
        )
    return npz(path, judge)


def check_one_digits(folder: Path) -> None:
    """Refuse the name digits, scikit-learn's, where a folder has a set that is called so, too.

    A command's results may be there (--out digits): their figures and attacked images are no set.

    Raises:
        ValueError: there are pictures, or parquet files, below `folder`/digits.
    """
    theirs = folder / "digits"
    files = files_below(theirs) if theirs.is_dir() else []
    results = {path.parent for path in files if path.name in _RESULTS}
    kinds = {path.suffix.lower() for path in files if results.isdisjoint(path.parents)}
    if kinds and kinds & (extensions() | {".parquet"}):
        raise ValueError(
            f"digits is the name of scikit-learn's, and {theirs.absolute()} has pictures, too: write ./digits for "
            "these, or rename the folder"
        )


def _check_present(parts: Mapping[str, Part], names: Sequence[str]) -> None:
    for label, name in enumerate(names):
        if not all((parts[part].labels == label).any() for part in ("train", "test")):
            raise ValueError(f"class {name} has no training or no test images")


@dataclass(frozen=True)
class _Decoded:
    """A part whose images are a tensor, or this process's share of one."""

    images: torch.Tensor | Share
    labels: torch.Tensor
    digests: torch.Tensor


def _decoded(
    parts: dict[str, DigestedPart],
    preprocessing: Preprocessing | None,
    skip_corrupt: bool,
    workers: int | None,
    names: tuple[str, ...],
    given: Collection[str],
    team: Team,
) -> dict[str, _Decoded]:
    """The parts with their images as tensors, or this process's share of them.

    Raises:
        ValueError: a part of `given`, which the set brings, has no readable picture left of one of its classes.
    """
    parts = {name: as_pictures(part, preprocessing) for name, part in parts.items()}
    tensors = {name: part.images for name, part in parts.items() if isinstance(part.images, torch.Tensor)}
    if tensors:
        images_of = {name: _divided(images.contiguous(), team) for name, images in tensors.items()}
        return {name: _Decoded(images_of[name], part.labels, part.digests) for name, part in parts.items()}
    pictures = [picture for part in parts.values() for picture in part.images]
    if len(pictures) < team.size:
        team = Team()
    owners = dealt(len(pictures), team)
    rows = (owners == team.rank).nonzero()[:, 0]
    images, readable = team.by_all(
        lambda: decode_all([pictures[i] for i in rows.tolist()], preprocessing, skip_corrupt, workers)
    )
    shapes = team.gathered(tuple(images.shape[1:]))
    if len(set(shapes)) > 1:
        raise ValueError(
            f"the pictures have different sizes ({' and '.join(map(str, sorted(set(shapes))))}): choose a model with "
            "an input size, or give a size"
        )
    kept = torch.ones(len(owners), dtype=torch.bool)
    kept[[i for lost in team.gathered(rows[~readable].tolist()) for i in lost]] = False
    sizes = [len(part.labels) for part in parts.values()]
    decoded = {}
    for (name, part), mask, owner in zip(parts.items(), kept.split(sizes), owners.split(sizes), strict=True):
        piece, images = images.tensor_split([int((mask & (owner == team.rank)).sum())])
        share = piece if team.alone else Share(piece, owner[mask], team)
        decoded[name] = _Decoded(share, part.labels[mask], part.digests[mask])
    for name, part in parts.items():
        for label in set(part.labels.tolist()) - set(decoded[name].labels.tolist()):
            lost = f"none of the {name} pictures of the class {names[label]!r} can be read"
            if name in given:
                raise ValueError(f"{lost}: add some")
            warn(f"{lost}: it has none in the part that was split off")
    return decoded


def _divided(images: torch.Tensor, team: Team) -> torch.Tensor | Share:
    return images if team.alone else Share.of(images, team)


def as_pictures(part: AnyPart, preprocessing: Preprocessing | None) -> AnyPart:
    """The part; the images of a tensor become pictures, which are then resized, where the model takes another shape."""
    images = part.images
    if not isinstance(images, torch.Tensor) or preprocessing is None or images.shape[1:] == preprocessing.shape:
        return part
    shape = tuple(images.shape[1:])
    if images.dtype != torch.uint8 or shape[0] not in (1, 3):
        raise ValueError(
            f"the images are {images.dtype} of the shape {shape}, the model takes {preprocessing.shape}: "
            "only uint8 images with 1 or 3 channels can be resized"
        )
    pixels = images.permute(0, 2, 3, 1).contiguous().numpy()
    pixels = pixels[..., 0] if shape[0] == 1 else pixels
    return replace(part, images=[Picture(f"image {i}", image) for i, image in enumerate(pixels)])
