"""The parts that a set does not have: a test and a validation part, split off the training part by content."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from numbers import Integral

import numpy as np
import torch

from fastadv._warnings import warn
from fastadv.data.source import DataSource, DigestedPart, Part

TEST_SHARE = 0.2
_NAMES = ("test", "val", "train")  # in the order of a picture's place
_CALLED = {"test": "test", "val": "validation", "train": "training"}


@dataclass(frozen=True)
class Split:
    """How the parts that a set lacks are made: by what a picture contains, a seed and shares, and nothing else.

    A picture's place is u = H(seed, content) in [0, 1). With test = 0.2 and validation = 0.1 it is

        0          0.2             0.28                  1      a test picture, a validation picture (0.1 of the
        |   test    |  validation   |     training       |      other 0.8) or a training picture.

    Equal pictures have one place whatever their names and classes, and one more picture moves no other.

    Attributes:
        seed: of H.
        test: share of the pictures, in (0, 1), of a set that has no test part.
        validation: share in [0, 1) of the pictures that are not the test part's, of a set that has no validation part.
    """

    seed: int = 0
    test: float = TEST_SHARE
    validation: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.seed, Integral):
            raise ValueError(f"the seed of a split must be a whole number, got {self.seed!r}")
        # A model's file has the split as JSON, which does not know NumPy's numbers.
        for name, kind in (("seed", int), ("test", float), ("validation", float)):
            value = getattr(self, name)
            object.__setattr__(self, name, value if isinstance(value, int | float) else kind(value))
        if not 0 < self.test < 1:
            raise ValueError(f"test must be a share in (0, 1), got {self.test}")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation must be a share in [0, 1), got {self.validation}")

    def places(self, digests: np.ndarray) -> np.ndarray:
        """u of each content, float64 in [0, 1), from its digest, int64 (N,)."""
        key = str(self.seed).encode()
        hashed = (blake2b(digest, digest_size=8, key=key).digest() for digest in digests)
        words = np.frombuffer(b"".join(hashed), "<u8")
        places: np.ndarray = (words >> np.uint64(11)) * 2.0**-53
        return places


def with_splits(
    source: DataSource, split: Split, wanted: Sequence[int]
) -> tuple[dict[str, DigestedPart], tuple[str, ...]]:
    """All parts of a set: those that it brings, and those that it lacks, which are split off its training part.

    Args:
        source: the set.
        split: how the parts that it lacks are made.
        wanted: labels of the classes that need images in every part; others may lack them.

    Returns:
        The parts "train", "val" and "test", and notes on those that were split off.

    Raises:
        ValueError: a wanted class has too few different images.
    """
    given = parts = {name: part.digested() for name, part in source.parts.items()}
    _warn_of_empty_classes(given, source.classes, wanted)
    warn_of_repetitions(given, source.classes, wanted)
    notes: tuple[str, ...] = ()
    if len(given) < len(_NAMES):
        test = 0.0 if "test" in given else split.test
        validation = 0.0 if "val" in given else split.validation * (1 - test)
        whole = given["train"]
        owner, moved = _owners(whole, split, test, validation, source.classes, wanted)
        pieces = {name: whole.take((owner == i).nonzero()[:, 0]) for i, name in enumerate(_NAMES)}
        parts = {**pieces, **given, "train": pieces["train"]}
        notes = _notes(split, len(pieces["test"].labels) if test else 0, len(whole.labels), moved)
    return {name: parts[name] for name in ("train", "val", "test")}, notes


def split_off(
    whole: DigestedPart, split: Split, names: Sequence[str], wanted: Sequence[int]
) -> tuple[DigestedPart, tuple[str, ...]]:
    """The test part that `with_splits` makes of a training part, and notes on it.

    Args:
        whole: the training part.
        split: how the test part is made.
        names: of the classes.
        wanted: labels of the classes that need images in both parts.

    Raises:
        ValueError: a wanted class has too few different images.
    """
    owner, moved = _owners(whole, split, split.test, 0.0, names, wanted)
    test = whole.take((owner == _NAMES.index("test")).nonzero()[:, 0])
    return test, _notes(split, len(test.labels), len(whole.labels), moved)


def _notes(split: Split, test: int, count: int, moved: Sequence[str]) -> tuple[str, ...]:
    """Notes on a split of `count` images, of which `test` are the test part (0: none was made)."""
    made = (
        f"the set has no test part: {test} of the {count} images of its training part ({test / max(count, 1):.0%}) are "
        f"the test part, chosen by seed {split.seed}"
    )
    filled = (
        f"where the shares gave a part no picture of a class, it has the nearest one: {', '.join(moved)} "
        "(only there can one more picture move another)"
    )
    return ((made,) if test else ()) + ((filled,) if moved else ())


def _owners(
    whole: DigestedPart, split: Split, test: float, validation: float, names: Sequence[str], wanted: Sequence[int]
) -> tuple[torch.Tensor, list[str]]:
    """Which part gets each picture of `whole`; `test` and `validation` are shares of all, 0 where no part is made.

    Returns:
        The index in _NAMES of each picture's part, (N,), and the names of classes that a part lacked until `_fill`.
    """
    contents, which = np.unique(whole.digests.numpy(), return_inverse=True)
    places, labels = split.places(contents), whole.labels.numpy()
    owner = np.searchsorted((test, test + validation), places, side="right")
    classes = {label: np.unique(which[labels == label]) for label in np.unique(labels).tolist()}
    needed = 1 + (test > 0) + (validation > 0)
    for label in wanted:
        count = len(classes.get(label, ()))
        if 0 < count < needed:
            raise ValueError(
                f"class {names[label]!r} has {count} different training image{'s' if count > 1 else ''}, and {needed} "
                "parts need one each: add images, leave the class out, or give parts of your own (validation=0 makes "
                "no validation part)"
            )
    # The test part first, whatever the validation share: evaluation has the same without one.
    several = {label: mine for label, mine in classes.items() if len(mine) > 1}
    moved = _fill(owner, places, several, 0) if test else set()
    large = {label: mine for label, mine in classes.items() if len(mine) >= needed}
    moved |= _fill(owner, places, large, 1) if validation else set()
    for label in large.keys() & set(wanted):
        if len(np.unique(owner[large[label]])) < needed:
            raise ValueError(
                f"class {names[label]!r} shares so many of its few images with other classes that a part has none of "
                "it: delete images that are there under two labels"
            )
    return torch.from_numpy(owner[which]), [names[label] for label in sorted(moved.intersection(wanted))]


def _fill(owner: np.ndarray, places: np.ndarray, classes: dict[int, np.ndarray], part: int) -> set[int]:
    """Give a part a picture of each class that has none there, and leave one to the parts after it.

    A class with the places 0.3, 0.5 and 0.9 has no test picture where the test part is what lies below 0.2: it gets
    the nearest, 0.3.

    Args:
        owner: index in _NAMES for each content; it is changed.
        places: u of each content, see `Split`.
        classes: the contents of each class.
        part: index of the part, 0 (test) or 1 (validation).

    Returns:
        The labels of the classes that got one.
    """
    changed = set()
    for label, mine in classes.items():
        mine = mine[owner[mine] >= part]  # what the parts before it have they keep
        mine = mine[np.lexsort((places[mine], owner[mine] > part))]
        last = (owner[mine] == part).sum()
        left = 2 if part == 0 and len(mine) > 2 else 1  # of a test part, for validation too
        new = min(max(last, 1), len(mine) - left)
        if 0 < new != last:
            owner[mine[:new]] = part
            owner[mine[new:last]] = owner[mine[last]] if last < len(mine) else len(_NAMES) - 1
            changed.add(label)
    return changed


def _warn_of_empty_classes(parts: Mapping[str, Part], names: Sequence[str], wanted: Sequence[int]) -> None:
    for part, given in parts.items():
        there = set(given.labels.tolist())
        empty = [names[label] for label in wanted if label not in there]
        if empty:
            more = ", ..." if len(empty) > 5 else ""
            so = "cannot be learnt" if part == "train" else f"{_CALLED[part]} accuracy says nothing about them"
            warn(
                f"{len(empty)} of {len(wanted)} classes have no {_CALLED[part]} images ({', '.join(empty[:5])}{more}), "
                f"and {so}: add some, or choose the other classes"
            )


def warn_of_repetitions(parts: Mapping[str, DigestedPart], names: Sequence[str], wanted: Sequence[int]) -> None:
    """Equal pictures under two labels, or in two parts that the set itself brings."""
    kept = {name: np.isin(part.labels, wanted) for name, part in parts.items()}
    found = {name: part.digests.numpy()[kept[name]] for name, part in parts.items()}
    labels = np.concatenate([part.labels.numpy()[kept[name]] for name, part in parts.items()])
    pairs = np.unique(np.stack([np.concatenate(list(found.values())), labels], axis=1), axis=0)
    contents, counts = np.unique(pairs[:, 0], return_counts=True)
    if (counts > 1).any():
        several = [names[label] for label in pairs[pairs[:, 0] == contents[counts > 1][0], 1]]
        warn(
            f"{(counts > 1).sum()} of {len(contents)} different pictures are there under two labels, one of them as "
            f"{' and as '.join(several)}: one of the labels is wrong"
        )
    for one, other in itertools.combinations([name for name in _NAMES if name in parts], 2):
        among = np.isin(found[one], found[other]).sum()
        if among:
            warn(
                f"{among} of the {len(found[one])} {_CALLED[one]} pictures are {_CALLED[other]} pictures as well: "
                "accuracy on them says nothing about new pictures"
            )
