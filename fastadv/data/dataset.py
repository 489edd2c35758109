"""A data set in memory."""

from dataclasses import dataclass, field

import torch

from fastadv.data.share import Batch, Share
from fastadv.data.splits import Split


@dataclass(frozen=True)
class Data:
    """A training, a validation and a test part, and the names of their classes.

    Of a set that several processes load together each holds a `Share` of the images, and all that is not images.

    Attributes:
        x_train: images (N, C, H, W), float32 in [0, 1] or uint8.
        y_train: labels int64 (N,).
        x_val: images of the validation part, which may have none.
        y_val: its labels.
        x_test: images of the test part.
        y_test: its labels.
        classes: a name for each label.
        notes: sentences for whoever reads the results, on what the set did not say itself, such as that its test part
            was split off here.
        split: how the parts that the set lacks were made.
        digests: for each of "train", "val" and "test" eight bytes of each picture's content, int64 (N,).
    """

    x_train: torch.Tensor | Share
    y_train: torch.Tensor
    x_val: torch.Tensor | Share
    y_val: torch.Tensor
    x_test: torch.Tensor | Share
    y_test: torch.Tensor
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    split: Split | None = None
    digests: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def train(self) -> Batch:
        return self.x_train, self.y_train

    @property
    def val(self) -> Batch:
        return self.x_val, self.y_val

    @property
    def test(self) -> Batch:
        return self.x_test, self.y_test

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return tuple(self.x_train.shape[1:])
