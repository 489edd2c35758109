"""The batches of a training run. The order of the images and their augmentation depend on the seed alone."""

import torch

from fastadv.data.share import Share
from fastadv.functional import sample_seeds
from fastadv.training.augment import Augment
from fastadv.training.progress import Progress

# The rounds of `sample_seeds`: the attack's seeds have the epoch as their round, others have these.
AUGMENTING = 2**31  # plus the epoch, for the seeds of the augmentation
ORDERING = 2**32 - 1  # for the seed of the order


class Batches:
    """Cuts the training images into the batches of each epoch.

    A method may take each batch `repeats` times in a row. Then 8 epochs of updates with 4 repeats are 2 passes over the
    images.

    Args:
        images: (N, C, H, W), floats in [0, 1] or uint8.
        labels: int64 (N,).
        count: the number of batches in an epoch.
        seed: the seed of the order and of the augmentation.
        augment: the augmentation; None means none.
        memory_format: the memory format of a batch; None means that of `images`.
        device: the device of a batch.
    """

    def __init__(
        self,
        images: Share,
        labels: torch.Tensor,
        count: int,
        *,
        seed: int,
        augment: Augment | None,
        memory_format: torch.memory_format | None,
        device: torch.device,
    ):
        self.images, self.labels, self.count = images, labels, count
        self.seed, self.augment, self.memory_format, self.device = seed, augment, memory_format, device

    def order(self, epoch: int) -> torch.Tensor:
        """The order of the images in an epoch, int64 (N,). It depends on the seed and the epoch alone."""
        seed = sample_seeds(self.seed, torch.tensor([epoch]), ORDERING)
        return torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(int(seed)))

    def of_epoch(self, at: Progress, repeats: int) -> list[torch.Tensor]:
        """The numbers of the images in each update of an epoch, int64.

        Args:
            at: the progress, which says the epoch.
            repeats: how often a batch is taken in a row.
        """
        first = (at.epoch - at.first_epoch) * self.count
        numbers = [update // repeats for update in range(first, first + self.count)]
        passes = {number // self.count for number in numbers}
        batches = {p: self.order(at.first_epoch + p).tensor_split(self.count) for p in passes}
        return [batches[number // self.count][number % self.count] for number in numbers]

    def load(self, part: torch.Tensor, at: Progress, repeats: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The images numbered `part`, augmented, and their labels, on the device."""
        images, labels = self.images.take(part).to(self.device), self.labels[part].to(self.device)
        if self.memory_format is not None:
            images = images.contiguous(memory_format=self.memory_format)
        if self.augment is not None:
            images = self.augment(images, self._moves(part, at, repeats))
        return images, labels

    def moves(self, part: torch.Tensor, at: Progress, repeats: int) -> torch.Tensor | None:
        """The seeds of the augmentation of the images numbered `part`, int64; None without an augmentation."""
        return None if self.augment is None else self._moves(part, at, repeats)

    def _moves(self, part: torch.Tensor, at: Progress, repeats: int) -> torch.Tensor:
        return sample_seeds(self.seed, part.to(self.device), self._passed(at, repeats) + AUGMENTING)

    def _passed(self, at: Progress, repeats: int) -> int:
        """The number of complete passes over the images: in epoch 8 it is 8, and 2 for a method with 4 repeats."""
        done = (at.epoch - at.first_epoch) * self.count + at.batch
        return at.first_epoch + done // repeats // self.count
