"""A data set in memory."""

from dataclasses import dataclass, field

import torch

from fastadv.data.share import Share
from fastadv.data.splits import Split
from fastadv.functional import random_init


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
    def train(self) -> tuple[torch.Tensor | Share, torch.Tensor]:
        return self.x_train, self.y_train

    @property
    def val(self) -> tuple[torch.Tensor | Share, torch.Tensor]:
        return self.x_val, self.y_val

    @property
    def test(self) -> tuple[torch.Tensor | Share, torch.Tensor]:
        return self.x_test, self.y_test

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of one image."""
        return tuple(self.x_train.shape[1:])


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Images as a model takes them: uint8 becomes float32 images / 255, floats stay as they are."""
    # The ops' own conversion: a division by 255 is not rounded correctly on every device.
    return random_init(images, 0.0, seed=0) if images.dtype == torch.uint8 else images
