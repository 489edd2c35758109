"""FGSM-PGI: FGSM that starts from the image's perturbation of the epoch before."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastadv.attacks.noise import uniform
from fastadv.attacks.samplewise import per_sample
from fastadv.functional import pgd_step
from fastadv.training.augment import Augment, moved
from fastadv.training.fast.base import Epoch, FastMethod, needed
from fastadv.training.memory import SampleMemory

AGAIN = 40  # epochs after which the perturbations begin again
DECAY = 0.3  # the decay of the momentum


class FGSMPGI(FastMethod):
    """FGSM from x + delta, where delta follows a momentum from epoch to epoch.

    This is FGSM-MEP, the variant of prior-guided initialisation (PGI) with a momentum. The gradient g is taken at x +
    delta, which may lie outside [0, 1]. C clamps a perturbation to [-eps, eps], P an image to [0, 1]:

        images to learn from    P(x + C(delta + eps sign g))
        momentum                m <- g / |g|_1 + 0.3 m
        the next epoch's delta  C(delta + eps sign m), such that x + delta is in [0, 1]

    delta begins with eps times random signs, and m with 0. Both begin again every 40 epochs. The loss is cross-entropy
    with label smoothing 0.4, plus weight times the mean squared difference of the logits at x + delta and at the
    result; both sides have gradients. The norm |g|_1 is that of the sample. (Public code takes the norm of the batch.)

    delta and m of each image are kept as floats, in memory or in three files in the run's folder. They belong to the
    pixels of the stored picture, so a crop or a flip moves them with the pixels. Padding has zeros, and pixels that
    were cropped off keep their numbers.

    Source: Jia et al. 2022 (arXiv 2207.08859).
    """

    OPTIONS = ("penalty",)
    DEFAULTS: Mapping[str, float] = {"label_smoothing": 0.4}
    WEIGHT = 10.0
    compares = True

    def __init__(self, model: nn.Module, eps: float, **options: Any):
        super().__init__(model, eps, **options)
        self._memory: SampleMemory  # set by `begin_epoch`
        self._augment: Augment | None = None
        self._begins = True

    def begin_epoch(self, epoch: Epoch) -> None:
        super().begin_epoch(epoch)
        self._augment = epoch.augment
        self._memory = epoch.memory("fgsm-pgi", (2, *epoch.shape), _kept_as(epoch.dtype))

    def begin(self, number: int, epoch: int, epochs: int) -> None:
        super().begin(number, epoch, epochs)
        self._begins = epoch % AGAIN == 0

    def attacked(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        seeds: torch.Tensor,
        rows: torch.Tensor | None = None,
        moves: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        numbers = needed(rows).cpu()
        kept = self._memory.read(numbers).to(images.device)
        if self._begins:
            kept = torch.stack((self.eps * (uniform(images, seeds) - 0.5).sign(), torch.zeros_like(images)), 1)
        delta, momentum = self._moved(kept, moves, "sources", torch.zeros_like(kept)).unbind(1)
        start = images + delta.to(images.dtype)
        gradient = self.gradient_at(start, labels)
        size = per_sample(gradient.abs().flatten(1).sum(1), gradient).clamp_min(torch.finfo(gradient.dtype).tiny)
        momentum = gradient / size + DECAY * momentum
        attacked, following = (pgd_step(start, g, images, alpha=self.eps, eps=self.eps) for g in (gradient, momentum))
        after = torch.stack((following - images, momentum), 1)
        self._memory.write(numbers, self._moved(after, moves, "targets", kept))
        return attacked, start

    def _moved(
        self, pairs: torch.Tensor, moves: torch.Tensor | None, where: str, elsewhere: torch.Tensor
    ) -> torch.Tensor:
        """Move delta and momentum from the pixels of the stored pictures to those of the augmented images, or back.

        Args:
            pairs: (N, 2, C, H, W), delta and momentum of each sample.
            moves: int64 (N,), the seeds of the augmentation; None without one.
            where: "sources": to the augmented images; "targets": back to the stored pictures.
            elsewhere: (N, 2, C, H, W), the numbers to take where a pixel has no partner.

        Returns:
            (N, 2, C, H, W).
        """
        if moves is None:
            return pairs
        rows, columns = getattr(self._augment, where)(moves, *pairs.shape[3:])
        together = moved(pairs.flatten(1, 2), rows, columns, elsewhere.flatten(1, 2))
        apart: torch.Tensor = together.unflatten(1, pairs.shape[1:3])
        return apart

    def distances(self, logits: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """The weighted squared difference of the logits, the mean over the classes, (N,)."""
        return self.weight * (logits - start).square().mean(1)


def _kept_as(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else torch.float32
