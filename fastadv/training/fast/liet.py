"""LIET: FGSM that starts from a perturbation of the sample's class; its update also sees the images at the start."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastadv.attacks.noise import uniform, uniform_per_sample
from fastadv.attacks.samplewise import per_sample, seeds_for
from fastadv.functional import fgsm_step, pgd_step
from fastadv.nn.frozen import frozen
from fastadv.nn.logits import find_logits
from fastadv.training.fast.base import FastMethod

EVERY = 20  # updates after which the perturbations of the classes are computed again
SMALL = 8 / 255 + 1e-6  # up to this budget the result is projected into the ball


class LIET(FastMethod):
    """FGSM that starts from the perturbation of the sample's class.

    - Every 20 updates the perturbation of each class c is computed: LI_c = eps sign g, where g is the gradient of class
      c at a grey picture, all pixels 0.5, with the model in eval mode.
    - A sample of class y starts at x + LI_y or x - LI_y, clamped to [0, 1]; the sign is drawn once for the sample.
      Before that, each number of the perturbation is replaced by noise U(-eps, eps) with a probability that is drawn
      for the sample from U(0.1, 0.5).
    - From the start FGSM takes a step of eps. Above eps 8/255 the noise is twice as wide, and the result is clamped to
      [0, 1] but not projected into the ball.
    - The loss is cross-entropy with label smoothing 0.6, plus weight * (e + 1) / E times the Jensen-Shannon divergence
      of the predictions at the start and at the result, in epoch e of the stage's E epochs. Both sides have gradients.
    - Weights are averaged over the updates with a decay of 0.9995.

    This follows a summary of the paper's method and was not checked against the paper.
    """

    OPTIONS = ("penalty",)
    DEFAULTS: Mapping[str, float] = {"label_smoothing": 0.6, "ema_decay": 0.9995}
    WEIGHT = 100.0
    compares = True
    by_epochs = True

    def __init__(self, model: nn.Module, eps: float, **options: Any):
        super().__init__(model, eps, **options)
        self._signs: torch.Tensor | None = None  # (classes, ...), of the gradients
        self._due = True
        # The weight of the divergence: a tensor, because torch.compile would make a constant of a number.
        self._now = torch.zeros((), dtype=torch.float64)

    def begin(self, number: int, epoch: int, epochs: int) -> None:
        super().begin(number, epoch, epochs)
        self._due = number % EVERY == 0
        self._now.fill_(self.weight * (epoch + 1) / epochs)

    def attacked(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        seeds: torch.Tensor,
        rows: torch.Tensor | None = None,
        moves: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        signs = self._signs
        if self._due or signs is None:
            self._due = False
            self._signs = signs = self._looked(images)
        wide = 1 if self.eps <= SMALL else 2
        side = uniform_per_sample(images, seeds_for(seeds, images, 1)) - 0.5
        share = 0.1 + 0.4 * uniform_per_sample(images, seeds_for(seeds, images, 2))
        replaced = uniform(images, seeds_for(seeds, images, 3)) < per_sample(share, images)
        noise = wide * self.eps * (2 * uniform(images, seeds_for(seeds, images, 4)) - 1)
        ours = per_sample(side.sign(), images) * self.eps * signs[labels]
        start = (images + torch.where(replaced, noise, ours)).clamp(0, 1).to(images.dtype)  # noise is float32 at least
        gradient = self.gradient_at(start, labels)
        if wide == 1:
            return pgd_step(start, gradient, images, alpha=self.eps, eps=self.eps), start
        return fgsm_step(start, gradient, self.eps, project=False), start

    def _looked(self, images: torch.Tensor) -> torch.Tensor:
        """The signs of the classes' gradients at a grey picture, (classes, ...), from batches as large as `images`."""
        grey = torch.full_like(images, 0.5)
        with self.around_passes(), torch.no_grad(), frozen(self.model):
            count = find_logits(self.model(grey[:1].clone()), 1).shape[1]
        classes = torch.arange(count, device=images.device)
        parts = [self.gradient_at(grey[: len(c)], c) for c in classes.split(len(images))]
        return torch.cat(parts).sign().to(images.dtype)

    def distances(self, logits: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """The weighted Jensen-Shannon divergence of the predictions at the result and at the start, (N,)."""
        p, q = logits.log_softmax(1), start.log_softmax(1)
        middle = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, device=p.device, dtype=p.dtype))
        return self._now.to(p) * ((p.exp() * (p - middle) + q.exp() * (q - middle)) / 2).sum(1)

    def state(self) -> dict[str, torch.Tensor]:
        return {} if self._signs is None else {"signs": self._signs}

    def load(self, state: Mapping[str, torch.Tensor], device: torch.device) -> None:
        self._signs = state["signs"].to(device) if state else None
