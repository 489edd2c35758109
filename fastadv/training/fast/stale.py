"""Adversarial training without the attack's passes: FGSM's step along signs that the last epoch's updates left."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastadv.functional import fgsm_step, random_init, sample_seeds
from fastadv.training.augment import moved
from fastadv.training.cost import fresh_share, price
from fastadv.training.fast.base import Epoch, FastMethod, needed
from fastadv.training.settings import Settings
from fastadv.training.signs import pack_signs, unpack_signs

DTYPE = torch.bfloat16  # of signs that are not packed
RANDOM = 2**30  # in the place of an attack's epoch, for the seeds of random signs; and one more than the epoch
SHOWN = 0.005  # the last digit in which prices are shown


class Stale(FastMethod):
    """For each training image the sign of the loss's gradient at what it was attacked with in the last epoch.

    An update's backward pass starts at the loss of x_adv; carried on to the input, it gives the gradient there. The
    gradient's sign, one bit a pixel, is kept, and the image's next x_adv is x + eps sign, in the box, as FGSM makes it
    of its own gradient. A gradient of zero counts as negative (`pack_signs`). Before an image was seen its signs are
    random, from the seed and its number. Signs lie in the frame of the stored picture. An augmentation crops and flips
    them along: pixels that were cropped off keep their sign, and the padded border gets random signs.

    A step takes as long as a standard one where the update's backward pass goes through all layers anyway. The backward
    pass of linear probing ends at the head: there a step takes twice as long as a standard one, for a backward pass
    through the backbone, and a step of FGSM three times as long (`fastadv.training.cost`).

    Signs outlast the end of a stage and a rollback. A switch to another attack drops them, and a stage after it begins
    with random signs again. The monitor looks with FGSM, which this attack imitates.

    The gradient is the update's: of its loss, with label smoothing, in its mode and precision, and where batch-norm
    mixes a batch, of the whole part of it.

    Without `refresh` and `price` no image gets a fresh FGSM.

    Args:
        model: as of `FastMethod`.
        eps: as of `FastMethod`.
        refresh: K: all images get a fresh FGSM in the first epoch, and then image i where (i + epoch) mod K = 0.
        price: by the cost model, how many times as long as a standard step a step takes. So many images get a fresh
            FGSM: those whose signs agreed least with their signs of the epoch before, and at first random ones.
        options: as of `FastMethod`; `alpha` is the length of the step, None means eps.
    """

    OPTIONS = ("alpha", "refresh", "price")
    REFUSES: Mapping[str, str] = {}
    alone = False

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        refresh: int | None = None,
        price: float | None = None,
        **options: Any,
    ):
        super().__init__(model, eps, **options)
        self.refresh, self.price = refresh, price
        # Not where all images are fresh in each epoch.
        self.sees_gradient = refresh != 1

    def check(self, name: str, settings: Settings) -> None:
        super().check(name, settings)
        if self.price is not None:
            self._check_price(settings, self.price)
        own = [option for option in ("refresh", "price") if getattr(self, option) is not None]
        if settings.compile and own and self.refresh != 1:
            raise ValueError(
                f"{', '.join(own)} would save nothing with compile: FGSM attacks another number of images in each "
                "batch, which are then filled up to the compiled one. Leave one of them out"
            )

    def _check_price(self, settings: Settings, wanted: float) -> None:
        if self.refresh is not None:
            raise ValueError("refresh and price both say which images get a fresh FGSM: give one of them")
        if settings.lp_ft:
            raise ValueError("price is that of one method, and lp_ft trains with two: leave one of them out")
        clean = settings.clean_weight > 0
        least, most = (price(attack, settings.method, clean=clean) for attack in ("stale", "fgsm"))
        if not least - SHOWN <= wanted <= most + SHOWN:
            beside = " and clean images beside the attacked ones" if clean else ""
            raise ValueError(
                f"with the method {settings.method}{beside} a step takes {least:.2f} times as long as a standard one "
                f"where no image gets a fresh FGSM, and {most:.2f} times with the attack fgsm: price must be between "
                f"these, got {wanted:g}"
            )

    def begin_epoch(self, epoch: Epoch) -> None:
        """Go on with the signs that the epoch before has left."""
        self._epoch = epoch
        self._signs = epoch.memory("signs", (-(-math.prod(epoch.shape) // 8),), torch.uint8)
        self._agreement = epoch.memory("agreement", (), torch.float32)
        self._fresh = self._chosen()

    def facts(self) -> dict[str, float]:
        """The share of images with a fresh attack, and of signs that are as they were."""
        kept = {"agreement": self._agreement.written.double().mean().item()} if self.sees_gradient else {}
        return {"fresh": self._fresh.double().mean().item(), **kept}

    def attacked(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        seeds: torch.Tensor,
        rows: torch.Tensor | None = None,
        moves: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """FGSM's step, along the gradient for those that are fresh, else the signs.

        They stay as they are without an attack, where a schedule leaves no budget.
        """
        rows = needed(rows)
        self._rows, self._moves = rows, moves
        if self.sees_gradient:
            self._before = self._stored(rows, images)
        if self.attack is None:
            return (images,)
        fresh = self._fresh[rows].nonzero()[:, 0].to(images.device)  # their places in the part
        if len(fresh) == len(rows):
            return (self.attack(images, labels, seed=seeds),)
        x_adv = fgsm_step(images, self._directions(), self.attack.eps, alpha=self.attack.alpha)
        if len(fresh):
            x_adv[fresh] = self.attack(images[fresh], labels[fresh], seed=seeds[fresh])
        return (x_adv,)

    def seen(self, gradient: torch.Tensor) -> None:
        """Keep its signs."""
        after = torch.where(gradient > 0, 1.0, -1.0).to(DTYPE)
        seen = torch.ones_like(self._before)
        augment = self._epoch.augment
        if augment is not None and self._moves is not None:
            places = augment.targets(self._moves, *after.shape[2:])
            seen = moved(seen, *places, torch.zeros_like(seen))
            after = moved(after, *places, self._before)
        same = ((after == self._before) & (seen > 0)).flatten(1).sum(1)
        self._signs.write(self._rows, pack_signs(after))
        self._agreement.write(self._rows, same / (seen > 0).flatten(1).sum(1))

    def _chosen(self) -> torch.Tensor:
        """Which images get a fresh attack in this epoch: bool (N,)."""
        s, number, before = self._epoch.settings, self._epoch.number, self._agreement.before
        numbers = torch.arange(len(before))
        if self.refresh is not None:
            return (numbers + number) % self.refresh == 0 if not self._signs.empty else numbers >= 0
        fresh = torch.zeros_like(numbers, dtype=torch.bool)
        if self.price is not None:
            seed = int(sample_seeds(s.seed, torch.tensor([number]), RANDOM))
            order = torch.randperm(len(before), generator=torch.Generator().manual_seed(seed))
            order = order[before[order].argsort(stable=True)]
            share = fresh_share(self.price, s.method, clean=s.clean_weight > 0)
            fresh[order[: round(share * len(before))]] = True
        return fresh

    def _random(self, rows: torch.Tensor, when: int, images: torch.Tensor) -> torch.Tensor:
        """Random signs like `images`, those numbered `rows`, of their numbers alone."""
        middle = torch.full(images.shape, 0.5, device=images.device)
        seeds = sample_seeds(self._epoch.settings.seed, rows.to(images.device), RANDOM + when)
        return torch.where(random_init(middle, 0.25, seed=seeds) > 0.5, 1.0, -1.0).to(DTYPE)

    def _stored(self, rows: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """Their signs before this epoch: 1 and -1 (n, C, H, W), in the frame of the stored pictures."""
        if self._signs.empty:
            return self._random(rows, 0, images)
        return unpack_signs(self._signs.read(rows).to(images.device), images.shape[1:], DTYPE)

    def _directions(self) -> torch.Tensor:
        """The signs in the frame of the images as they go through the step."""
        augment = self._epoch.augment
        if augment is None or self._moves is None:
            return self._before
        border = self._random(self._rows, 1 + self._epoch.number, self._before)
        return moved(self._before, *augment.sources(self._moves, *border.shape[2:]), border)
