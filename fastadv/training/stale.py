"""Adversarial training without the attack's passes: FGSM's step along signs that the last epoch's updates left."""

import math
from pathlib import Path

import torch

from fastadv.attacks import Attack
from fastadv.data import to_float
from fastadv.functional import fgsm_step, random_init, sample_seeds
from fastadv.team import Team
from fastadv.training.augment import Augment, moved
from fastadv.training.cost import fresh_share
from fastadv.training.memory import SampleMemory
from fastadv.training.settings import Settings
from fastadv.training.signs import pack_signs, unpack_signs

NAME = "stale"
FRESH = "fgsm"  # the attack of the images that get a fresh one
DTYPE = torch.bfloat16  # of signs that are not packed
RANDOM = 2**30  # in the place of an attack's epoch, for the seeds of random signs; and one more than the epoch


class Stale:
    """For each training image the sign of the loss's gradient at what it was attacked with in the last epoch.

    An update's backward pass goes through x_adv anyway: carried on to the input it gives the gradient there. Its sign,
    one bit a pixel, is kept, and the image's next x_adv is x + eps sign, in the box, as FGSM makes it of its own
    gradient. A gradient of zero counts as negative (`pack_signs`). Before an image was seen its signs are random, from
    the seed and its number. Signs lie in the frame of the stored picture: where an augmentation crops and flips they
    follow, pixels that were cropped off keep the sign that they had, and the border that was padded gets random ones.

    It costs what standard training does, where the update's backward pass goes through all layers anyway. Linear
    probing's ends at the head: there it costs a backward pass through the backbone, so that a step takes twice as long
    as a standard one, and FGSM's three times (`fastadv.training.cost`).

    Signs outlast the end of a stage and a rollback. After a switch to another attack they are given up, and a stage
    that comes then begins with chance again. The monitor watches FGSM, which this is to be like.

    The gradient is the update's: of the loss that is learnt from, with label smoothing, in the mode and the precision
    of the update, and where batch-norm mixes a batch, of the whole part of it.

    Args:
        settings: of the run. Which images get a fresh FGSM: none; with `refresh` K all of them in the first epoch, and
            image i where (i + epoch) mod K = 0; with `price` those whose signs agreed least with the ones before, so
            many that by the cost model a step takes `price` times as long as a standard one. Chance decides while
            nothing is known.
        shape: (N, C, H, W) of the training images.
        augment: what changes them; it must say where each pixel goes.
        folder, resume, first, team: as in `SampleMemory`.
        device: of the images.

    Raises:
        OSError, ValueError: as in `SampleMemory`; or the augmentation does not say where each pixel goes.
    """

    def __init__(
        self,
        settings: Settings,
        shape: tuple[int, ...],
        augment: Augment | None,
        folder: Path | None,
        resume: bool,
        first: int,
        team: Team,
        device: torch.device,
    ):
        if augment is not None and not (hasattr(augment, "sources") and hasattr(augment, "targets")):
            raise ValueError(
                f"{augment} does not say where each pixel goes (sources, targets), and the attack {NAME} keeps a sign "
                "for each: choose another attack, or leave the augmentation out"
            )
        self.settings, self.augment, self.device, self.first = settings, augment, device, first
        count, *self.shape = shape
        options = {"resume": resume, "first": first, "team": team}
        length = -(-math.prod(self.shape) // 8)
        self.signs = SampleMemory(folder, "signs", count, (length,), torch.uint8, **options)
        self.agreement = SampleMemory(folder, "agreement", count, (), torch.float32, **options)

    def begin(self, epoch: int) -> None:
        """Go on with the signs that the epoch before has left."""
        self.epoch = epoch
        self.signs.begin(epoch)
        self.agreement.begin(epoch)
        self.fresh = self._chosen()

    def flush(self) -> None:
        """As `SampleMemory`'s."""
        self.signs.flush()
        self.agreement.flush()

    def facts(self) -> dict[str, float]:
        """Of an epoch that is over: the share of images with a fresh attack, and of signs that are as they were."""
        kept = {"agreement": self.agreement.written.double().mean().item()} if self.learns else {}
        return {"fresh": self.fresh.double().mean().item(), **kept}

    @property
    def learns(self) -> bool:
        """Whether signs are asked for ever: not where all images are fresh in each epoch."""
        return self.settings.refresh != 1

    def part(self, rows: torch.Tensor, moves: torch.Tensor | None = None) -> "Part":
        """The images `rows`, int64 (n,) on the CPU, as they go through a step.

        Args:
            moves: the seeds that the augmentation got for them, int64 (n,) on the images' device.
        """
        return Part(self, rows, moves)

    def _chosen(self) -> torch.Tensor:
        """Which images get a fresh attack in this epoch: bool (N,)."""
        s, before = self.settings, self.agreement.before
        numbers = torch.arange(len(before))
        if s.refresh is not None:
            first = self.epoch == self.first
            return torch.ones_like(numbers, dtype=torch.bool) if first else (numbers + self.epoch) % s.refresh == 0
        fresh = torch.zeros_like(numbers, dtype=torch.bool)
        if s.price is not None:
            seed = int(sample_seeds(s.seed, torch.tensor([self.epoch]), RANDOM))
            order = torch.randperm(len(before), generator=torch.Generator().manual_seed(seed))
            order = order[before[order].argsort(stable=True)]
            share = fresh_share(s.price, s.method, clean=s.clean_weight > 0)
            fresh[order[: round(share * len(before))]] = True
        return fresh

    def random(self, rows: torch.Tensor, when: int) -> torch.Tensor:
        """Random signs for the images `rows`, of their numbers alone."""
        middle = torch.full((len(rows), *self.shape), 0.5, device=self.device)
        seeds = sample_seeds(self.settings.seed, rows.to(self.device), RANDOM + when)
        return torch.where(random_init(middle, 0.25, seed=seeds) > 0.5, 1.0, -1.0).to(DTYPE)

    def stored(self, rows: torch.Tensor) -> torch.Tensor:
        """Their signs before this epoch: 1 and -1 (n, C, H, W), in the frame of the stored pictures."""
        if self.epoch == self.first:
            return self.random(rows, 0)
        return unpack_signs(self.signs.read(rows).to(self.device), self.shape, DTYPE)


class Part:
    """A part of a batch in a step, which asks it for `attacked` images and then tells it the gradient there."""

    def __init__(self, stale: Stale, rows: torch.Tensor, moves: torch.Tensor | None):
        self.stale, self.rows, self.moves, self.learns = stale, rows, moves, stale.learns
        self.fresh = stale.fresh[rows].nonzero()[:, 0].to(stale.device)  # their places in the part
        self.before = stale.stored(rows) if self.learns else None

    def attacked(
        self, attack: Attack | None, images: torch.Tensor, labels: torch.Tensor, seeds: torch.Tensor | None
    ) -> torch.Tensor:
        """The images (n, C, H, W) after FGSM's step, along the gradient for those that are fresh, else the signs.

        They stay as they are without an attack, where a schedule leaves no budget.
        """
        if attack is None:
            return to_float(images)
        if len(self.fresh) == len(self.rows):
            return attack(images, labels, seed=seeds)
        x_adv = fgsm_step(images, self._directions(), attack.eps, alpha=attack.alpha)
        if len(self.fresh):
            own = None if seeds is None else seeds[self.fresh]
            x_adv[self.fresh] = attack(images[self.fresh], labels[self.fresh], seed=own)
        return x_adv

    def learn(self, gradient: torch.Tensor) -> None:
        """Keep the signs of the gradient (n, C, H, W) at what was attacked."""
        after = torch.where(gradient > 0, 1.0, -1.0).to(DTYPE)
        seen = torch.ones_like(self.before)
        if self.moves is not None:
            places = self.stale.augment.targets(self.moves, *after.shape[2:])
            seen = moved(seen, *places, torch.zeros_like(seen))
            after = moved(after, *places, self.before)
        same = ((after == self.before) & (seen > 0)).flatten(1).sum(1)
        self.stale.signs.write(self.rows, pack_signs(after))
        self.stale.agreement.write(self.rows, same / (seen > 0).flatten(1).sum(1))

    def _directions(self) -> torch.Tensor:
        """The signs in the frame of the images as they go through the step."""
        if self.moves is None:
            return self.before
        border = self.stale.random(self.rows, 1 + self.stale.epoch)
        return moved(self.before, *self.stale.augment.sources(self.moves, *border.shape[2:]), border)
