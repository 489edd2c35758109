"""The images of a set that judge a model: its test part, what the training split off, or all."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastadv.data.classes import Chosen, labels_of, selected
from fastadv.data.decoding import decode_all
from fastadv.data.loading import as_pictures, find
from fastadv.data.parquet import Columns
from fastadv.data.share import Samples
from fastadv.data.source import DataSource, DigestedPart, Part, concatenated, judging
from fastadv.data.splits import Split, split_off, warn_of_repetitions
from fastadv.data.trained import MOST_OVERLAP, TrainedOn, known
from fastadv.names import instead
from fastadv.preprocessing import Preprocessing

PARTS = ("test", "all")


@dataclass(frozen=True)
class HeldOut:
    """Images that are to judge a model, nothing decoded yet.

    Attributes:
        part: the images, with the model's labels.
        notes: sentences on which images they are, for whoever reads the results.
    """

    part: DigestedPart
    notes: tuple[str, ...]

    def decoded(self, preprocessing: Preprocessing | None, skip_corrupt: bool, workers: int | None = None) -> Samples:
        """The images and labels, decoded.

        Args:
            preprocessing: of the model, as of `load`.
            skip_corrupt: leave out pictures that cannot be read, with a warning, instead of raising.
            workers: threads that decode pictures; None means one for each core that this process may use.

        Returns:
            Images (N, C, H, W), float32 in [0, 1] or uint8, and labels int64 (N,).

        Raises:
            ValueError: pictures cannot be read, differ in size, or do not fit in memory.
        """
        part = as_pictures(self.part, preprocessing)
        if isinstance(part.images, torch.Tensor):
            return part.images.contiguous(), part.labels
        images, readable = decode_all(part.images, preprocessing, skip_corrupt, workers)
        return images, part.labels[readable]


def held_out(
    name_or_path: str | Path,
    model_classes: Sequence[str],
    *,
    trained_on: Sequence[TrainedOn] = (),
    part: str | None = None,
    split: Split | None = None,
    classes: Sequence[Chosen] | None = None,
    limit: int | None = None,
    codes: bool = True,
    folder: str | Path | None = None,
    columns: Columns | None = None,
) -> HeldOut:
    """The images of a set that are to judge a model. The set needs no training part, and no other part is looked at.

    Args:
        name_or_path: as of `load`; also a plain folder CLASS/..., or one with the part test alone.
        model_classes: names of the model's classes, in its order. Those of the set are told by their names; not all
            of them need be there.
        trained_on: what the model's file says of its training.
        part: "test" is the set's test part, or what `split` makes of a set that has none. "all" is every image of every
            part. None is the test part; of a set that has none, what the training split off where the model was trained
            on more than MOST_OVERLAP of it, and else all.
        split: None: the last training's; else "test" is meant.
        classes: of the set, as of `load`.
        limit: number of images, a sample that is always the same; None: all.
        codes: whether "digits" are uint8.
        folder: where "cifar10" is, as of `load`.
        columns: of parquet files: names of the columns of images and labels.

    Raises:
        FileNotFoundError: no such data set, file or folder.
        ValueError: the content is not as `load` wants it; a class is unknown to the model or has no images.
    """
    if part not in (None, *PARTS):
        raise ValueError(f"unknown part {part!r}{instead(part, PARTS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    judge = "all" if part == "all" else "test"
    source = find(name_or_path, folder, columns or Columns(), codes=codes, judge=judge)
    source = replace(source, parts={name: source.parts[name] for name in judging(source.parts, judge)})
    wanted = list(range(len(source.classes))) if classes is None else labels_of(classes, source.classes)
    notes: tuple[str, ...] = ()
    if part == "all" or "test" in source.parts:
        whole = concatenated(list(source.parts.values()))
    else:
        whole, notes = _without_test_part(source, wanted, trained_on, part, split)
    chosen = _named(selected(whole, wanted), [source.classes[label] for label in wanted], model_classes)
    there = {model_classes[label] for label in chosen.labels.unique().tolist()}
    lacking = [source.classes[label] for label in wanted if source.classes[label] not in there]
    if classes is not None and lacking:
        raise ValueError(f"there are no images of {', '.join(lacking)} to judge the model by")
    order = torch.randperm(len(chosen.labels), generator=torch.Generator().manual_seed(0))  # a folder's first are alike
    chosen = chosen.take(order[:limit].sort()[0]).digested()
    warn_of_repetitions({"test": chosen}, model_classes, range(len(model_classes)))
    return HeldOut(chosen, notes)


def _without_test_part(
    source: DataSource, wanted: Sequence[int], trained_on: Sequence[TrainedOn], part: str | None, split: Split | None
) -> tuple[Part, tuple[str, ...]]:
    """The images of a set without a test part, and a note on which they are."""
    whole = concatenated(list(source.parts.values())).digested()
    mine = torch.isin(whole.labels, torch.tensor(wanted))
    count = known(trained_on, whole.digests[mine])
    if part is None and split is None:
        if count is None and not trained_on:
            return whole, (
                "the set has no test part, and the model's file does not say which images it was trained on: all judge "
                "it (if it was trained on them, part test keeps to those that the training split off)",
            )
        if count is not None and count <= MOST_OVERLAP * int(mine.sum()):
            return whole, (
                f"the set has no test part, and {count} of its {int(mine.sum())} images are the model's training "
                "images: all judge it (files are compared byte by byte, so a picture that was saved again is another)",
            )
    training = source.parts.get("train", whole).digested()
    split = split or (trained_on[-1].split if trained_on else Split())
    test, notes = split_off(training, split, source.classes, wanted)
    if count:
        notes += (
            f"{count} of the set's {int(mine.sum())} images are the model's training images (part all: all judge it)",
        )
    return test, notes


def _named(part: Part, names: Sequence[str], model_classes: Sequence[str]) -> Part:
    """The part with the model's labels instead of its own, which are indices in `names`."""
    there = [names[label] for label in part.labels.unique().tolist()]
    unknown = [name for name in there if name not in model_classes]
    if unknown:
        some = [name for name in there if name in model_classes]
        hint = f"choose those that it knows: {', '.join(some)}" if some else f"it knows {', '.join(model_classes)}"
        raise ValueError(f"the model does not know the classes {', '.join(unknown)}: {hint}")
    if not there:
        raise ValueError("there are no images to judge the model by")
    label_of = torch.tensor([model_classes.index(name) if name in there else -1 for name in names])
    return replace(part, labels=label_of[part.labels])
