"""Stored signs: adversarial training without passes for an attack. FGSM's step follows last epoch's gradient signs."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastadv.functional import fgsm_step, random_init, sample_seeds
from fastadv.training.augment import moved
from fastadv.training.cost import fresh_share, price
from fastadv.training.fast.base import Epoch, FastMethod, needed
from fastadv.training.settings import Settings, in_limits
from fastadv.training.signs import pack_signs, unpack_signs

DTYPE = torch.bfloat16  # the dtype of unpacked signs
# The rounds of `sample_seeds` for random signs: this for signs at the start, this + 1 + epoch for an epoch's border.
RANDOM = 2**30
SHOWN = 0.005  # prices are shown with two digits after the point, so a price may be wrong by this


class Stale(FastMethod):
    """FGSM's step along the signs of the gradient that the image had in the last epoch.

    An update computes the gradient of the loss at x_adv with respect to the weights. Its backward pass also gives the
    gradient with respect to the pixels of x_adv. Its signs are kept, one bit for each number. In the next epoch the
    image is attacked with x_adv = P(x + eps sign), where P clamps to [0, 1]: FGSM's step with an older gradient.

        epoch 1    x_adv = P(x + eps s0), s0 random    the update's gradient there has the signs s1
        epoch 2    x_adv = P(x + eps s1)               the update's gradient there has the signs s2

    A gradient of zero counts as negative (`pack_signs`). Random signs depend on the seed and the image's number alone.
    Signs belong to the pixels of the stored picture, so a crop or a flip moves them with the pixels. Pixels that were
    cropped off keep their signs, and the padding gets random signs.

    Where the update's backward pass goes through all layers anyway, a step takes as long as a standard one. In linear
    probing the standard backward pass ends at the head. There a step takes twice as long as a standard one, because the
    backward pass goes on through the backbone; a step of FGSM takes three times as long (`fastadv.training.cost`).

    Signs outlast the end of a stage and a rollback. A switch to another attack drops them, and a stage after the switch
    begins with random signs again. The monitor uses FGSM, which this attack imitates.

    The gradient is that of the update, in its mode and precision. Label smoothing is refused: it turns the gradient
    towards the label wherever the model is sure of it. Where batch-norm mixes the images of a batch, the gradient is
    that of the loss of the whole part of the batch.

    Without `refresh` and `price` no image gets a fresh FGSM.

    Args:
        model: as of `FastMethod`.
        eps: as of `FastMethod`.
        refresh: K: all images get a fresh FGSM in the first epoch, and later image i where (i + epoch) mod K = 0.
        price: how many times as long as a standard step a step may take, by the cost model. As many images get a fresh
            FGSM as that allows: those whose signs agreed least with their signs of the epoch before; at first random
            images.
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
        self.refresh: int | None = None if refresh is None else in_limits("refresh", refresh)
        self.price: float | None = None if price is None else in_limits("price", price)
        # With refresh 1 all images get a fresh FGSM in each epoch, and no sign is used.
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
        """Get the signs of the epoch before, and choose the images that get a fresh FGSM."""
        super().begin_epoch(epoch)
        self._epoch = epoch
        self._signs = epoch.memory("signs", (-(-math.prod(epoch.shape) // 8),), torch.uint8)
        self._agreement = epoch.memory("agreement", (), torch.float32)
        self._fresh = self._chosen()

    def facts(self) -> dict[str, float]:
        """The share of images with a fresh FGSM, and the share of signs that are the same as in the epoch before."""
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
        """FGSM's step, along a new gradient for the images that get a fresh FGSM, else along the stored signs.

        Where the schedule leaves no budget, the images are not changed.
        """
        rows = needed(rows)
        self._rows, self._moves = rows, moves
        if self.sees_gradient:
            self._before = self._stored(rows, images)
        if self.attack is None:
            return (images,)
        fresh = self._fresh[rows].nonzero()[:, 0].to(images.device)  # positions in this part of the batch
        if len(fresh) == len(rows):
            return (self.fresh(images, labels, seeds),)
        x_adv = fgsm_step(images, self._directions(), self.attack.eps, alpha=self.attack.alpha)
        if len(fresh):
            x_adv[fresh] = self.fresh(images[fresh], labels[fresh], seeds[fresh])
        return (x_adv,)

    def seen(self, gradient: torch.Tensor) -> None:
        """Keep the signs of the update's gradient."""
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
        """Which images get a fresh FGSM in this epoch: bool (N,)."""
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
        """Random signs of the shape of `images`, which depend on the numbers `rows`, `when` and the seed alone."""
        middle = torch.full(images.shape, 0.5, device=images.device)
        seeds = sample_seeds(self._epoch.settings.seed, rows.to(images.device), RANDOM + when)
        return torch.where(random_init(middle, 0.25, seed=seeds) > 0.5, 1.0, -1.0).to(DTYPE)

    def _stored(self, rows: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """The signs of the epoch before: 1 and -1, (n, C, H, W), for the pixels of the stored pictures."""
        if self._signs.empty:
            return self._random(rows, 0, images)
        return unpack_signs(self._signs.read(rows).to(images.device), images.shape[1:], DTYPE)

    def _directions(self) -> torch.Tensor:
        """The signs for the pixels of the augmented images."""
        augment = self._epoch.augment
        if augment is None or self._moves is None:
            return self._before
        border = self._random(self._rows, 1 + self._epoch.number, self._before)
        return moved(self._before, *augment.sources(self._moves, *border.shape[2:]), border)
