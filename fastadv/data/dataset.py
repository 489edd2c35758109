"""A data set in memory."""

from dataclasses import dataclass, field

import torch

from fastadv.data.share import Batch, Share
from fastadv.data.splits import Split


@dataclass(frozen=True)
class Data:
    """Images (N, C, H, W), float32 in [0, 1] or uint8; labels int64 (N,); a name for each class.

    Of a set that several processes load together each holds a `Share` of the images, and all that is not images.

    The validation part may have no images. `notes` are for whoever reads the results: what the set did not say
    itself, such as that its test part was split off here. `split` says how the parts that it lacks were made, and
    `digests` holds for each of "train", "val" and "test" eight bytes of each picture's content, int64 (N,).
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
