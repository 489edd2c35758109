"""The images of a training run: for training, for the choice of weights (validation), and for the final evaluation."""

from dataclasses import dataclass

import numpy as np
import torch

from fastadv.attacks.checks import check_one_class
from fastadv.data.common import common_images
from fastadv.data.dataset import Data
from fastadv.data.share import Batch, Share
from fastadv.evaluation.identity import known_hash
from fastadv.evaluation.samples import as_tensors
from fastadv.nn.logits import AnyModel
from fastadv.team import Team


@dataclass(frozen=True)
class Parts:
    """Pairs of images and labels, as tensors.

    Attributes:
        train: the training images.
        val: the validation images, for the choice of weights; None where there are none.
        test: the images of the final evaluation; `val` where there are no others.
    """

    train: Batch
    val: Batch | None
    test: Batch | None

    @classmethod
    def of(cls, model: AnyModel, train: object, val: object, test: object) -> "Parts":
        """The parts as the caller of `Trainer.fit` gives them.

        Raises:
            TypeError: one of them is no pair, or has other labels than int64 (N,).
        """
        learnt, chosen = _pair("train", train, model), _held_out("val", val, model)
        return cls(learnt, chosen, _held_out("test", test, model) or chosen)

    @property
    def present(self) -> list[Batch]:
        """The parts that are not None."""
        return [part for part in (self.train, self.val, self.test) if part is not None]

    def facts(self, team: Team, device: torch.device) -> dict[str, object]:
        """{name of a part: the facts by which a fingerprint identifies it}.

        Args:
            team: the processes of the run; all of them call this together.
            device: the device over which images are sent from one process to another.
        """
        parts = {"training data": self.train, "validation data": self.val, "test data": self.test}
        return {name: None if part is None else _facts(part, team, device) for name, part in parts.items()}

    def in_common(self, device: torch.device) -> list[str]:
        """Sentences, in the first process, about images that two of the parts have in common; `device` as of `facts`.

        That `test` is `val` where there is no other is known, and not told.
        """
        parts = {"train": self.train, "val": self.val, "test": None if self.test is self.val else self.test}
        return common_images({name: part for name, part in parts.items() if part is not None}, device)

    def unlearnt(self) -> list[str]:
        """Sentences about labels of `val` and `test` that no training image has."""
        held_out = {"val": self.val, "test": None if self.test is self.val else self.test}
        known, sentences = self.train[1].unique(), []
        for name, part in held_out.items():
            if part is None or not (new := ~torch.isin(part[1], known)).any():
                continue
            classes = part[1][new].unique().tolist()
            sentences.append(
                f"no training image has the label{'s' * (len(classes) > 1)} {', '.join(map(str, classes[:5]))}"
                f"{', ...' * (len(classes) > 5)} of {int(new.sum())} of the {len(new)} images of {name}, which the "
                "model cannot learn: are labels of both numbered alike?"
            )
        return sentences

    def shares(self, team: Team) -> tuple[Share, Batch | None, Batch | None]:
        """The training images, `val` and `test`, of which each process holds its share."""
        images, _ = self.train
        train = images if isinstance(images, Share) else Share.of(images, team)
        val = _shared(self.val, team)
        return train, val, val if self.test is self.val else _shared(self.test, team)


def _pair(name: str, data: object, model: AnyModel) -> Batch:
    """A pair of images and labels, NumPy arrays as tensors."""
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        todo = "give data.train, data.val and data.test" if isinstance(data, Data) else "torch.cat makes one of batches"
        raise TypeError(
            f"{name} must be a pair (images, labels) of tensors or NumPy arrays with all images, got "
            f"{type(data).__name__}: {todo}"
        )
    images, labels = data
    if isinstance(labels, np.ndarray) and labels.dtype.kind in "OSU":
        raise TypeError(
            f"labels of {name} must be whole numbers, got a NumPy array of {labels.dtype}: "
            "np.unique(labels, return_inverse=True) numbers names"
        )
    images, labels = as_tensors(images, labels, model)
    check_one_class(labels)
    # The graph of the caller's images would grow with each epoch.
    return (images.detach() if isinstance(images, torch.Tensor) and images.requires_grad else images), labels


def _held_out(name: str, data: object, model: AnyModel) -> Batch | None:
    """None where there are no images."""
    pair = None if data is None else _pair(name, data, model)
    return pair if pair is not None and len(pair[1]) else None


def _facts(part: Batch, team: Team, device: torch.device) -> object:
    images, labels = part
    if not isinstance(images, Share):
        return known_hash(images.dtype, images.shape, [images]), labels
    hashed = known_hash(images.dtype, images.shape, images.chunks(device))
    return team.from_first(lambda: hashed), labels


def _shared(part: Batch | None, team: Team) -> Batch | None:
    if part is None or team.alone or isinstance(part[0], Share):
        return part
    return Share.of(part[0], team), part[1]
