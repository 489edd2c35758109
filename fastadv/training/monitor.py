"""A probe for catastrophic overfitting: does single-step training still train? For any training loop."""

import copy
from dataclasses import dataclass
from typing import cast

import torch

from fastadv.attacks import PGD
from fastadv.attacks.checks import check_eps, check_number, check_whole, highest
from fastadv.attacks.engine import Engine
from fastadv.attacks.objective import Objective
from fastadv.attacks.samplewise import cosines_of
from fastadv.attacks.verdicts import predicted
from fastadv.evaluation.samples import collected
from fastadv.functional import sample_seeds
from fastadv.nn.frozen import frozen
from fastadv.nn.logits import AnyModel
from fastadv.nn.parallel import one_process
from fastadv.ops.generator import seeded
from fastadv.training.foreign import AnyAttack, TrainAttack, as_attack
from fastadv.training.passes import Passes
from fastadv.training.step import check_attack

COLLAPSED = 0.5  # of the accuracy under the training attack; in sound training PGD leaves nearly all of it


@dataclass(frozen=True)
class Reading:
    """What a `Monitor` saw: shares of the probe batch in [0, 1], of the model in eval mode.

    Attributes:
        probe_pgd: accuracy under PGD from a random start.
        probe_attack: accuracy under the training attack; on the clean images if there is none.
        gap: probe_attack - probe_pgd; grows toward 1 under catastrophic overfitting.
        alignment: mean cosine of the loss gradients at x and at x + U(-eps, eps); falls toward 0 under catastrophic
            overfitting (Andriushchenko and Flammarion 2020, arXiv 2007.02617). Samples with a zero gradient do not
            count; None if no sample is left.
        abnormal: share of samples with a larger loss at x + U(-eps, eps), in the box, than at the training attack's
            result; rises under catastrophic overfitting. None without an attack.
        alarm: None, or what has happened, with the numbers.
        cosine: mean cosine of the loss gradients at the training attack's start, which is x + U(-eps, eps) or x, and at
            its result: how well the linear model holds that a single step trusts (SORA's detector). Samples with a zero
            gradient do not count; None if no sample is left, or without an attack.
    """

    probe_pgd: float
    probe_attack: float
    gap: float
    alignment: float | None
    abnormal: float | None
    alarm: str | None
    cosine: float | None = None


class Monitor:
    """Watches a fixed batch for catastrophic overfitting: `reading = monitor.check()`, once an epoch, say.

    Under catastrophic overfitting (Wong et al. 2020, arXiv 2001.03994) the accuracy under a single-step training attack
    rises, and the accuracy under PGD falls toward zero. There is an alarm in two cases:

    - The accuracy under PGD is more than `drop` below its best so far, and the gap between both accuracies has widened
      since then by more than `drop`. After an unlucky step both accuracies fall, and the gap stays about as wide.
    - The gap is wider than `drop`, and PGD leaves less than half of the accuracy under the training attack. So a model
      is seen that collapsed before the first reading, or was never robust.

    Training on clean images has no catastrophic overfitting, and no alarm.

    A check costs `steps` + 2 gradients with respect to the images, a forward pass and the training attack. The
    model and torch's generators are left as they were found. The same weights always give the same reading.

    Args:
        model: any callable from images (N, ...) to logits, as in `Attack`.
        images: of the probe batch, (N, ...) in [0, 1] or uint8. A hundred images tell a collapse from noise; held-out
            ones tell it from ordinary overfitting too. The images stay where they are.
        labels: int64 (N,).
        attack: the training attack; one of fastadv, any callable from (images, labels) to images, or None for
            training on clean images. May be set to another one later.
        eps: budget of PGD and of the noise, in pixels of [0, 1]; PGD's steps are eps / 4.
        steps: number of PGD's steps.
        drop: how far the accuracy under PGD may fall below its best, or below that under the training attack.
        seed: of the random starts, each image's own, and of torch's generators for other libraries' attacks.
        part: images that go to the device and through the model at a time; None means all. In eval mode a reading does
            not depend on it, but for what other libraries' attacks draw.
        autocast: dtype of torch.autocast in the monitor's own passes, as in `Attack`; the training attack has its own.
        memory_format: of the images in these passes, as in `Attack`.
        compile: run these passes under torch.compile, as in `Attack`.

    Attributes:
        best: the best accuracy under PGD so far; None before the first reading.

    Raises:
        TypeError: images are neither floats nor uint8, labels are not int64, or an option is of a wrong type.
        ValueError: no images, images beyond [0, 1], or an option is out of range.
    """

    def __init__(
        self,
        model: AnyModel,
        images: torch.Tensor,
        labels: torch.Tensor,
        attack: TrainAttack | None,
        eps: float,
        *,
        steps: int = 5,
        drop: float = 0.20,
        seed: int = 0,
        part: int | None = None,
        autocast: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        compile: bool = False,
    ):
        check_eps(eps, "Linf")
        check_whole("steps", steps)
        if part is not None:
            check_whole("part", part)
        check_number("drop", drop)
        if not 0 < drop < 1:
            raise ValueError(f"drop is a share in (0, 1), got {drop}")
        check_attack("attack", attack)
        # One process may check alone: the wrapper would wait for the others.
        self.model = one_process(model)
        self.images, self.labels = collected((images, labels), model, None)
        self.attack = as_attack(attack, self.model)
        self.eps, self.steps, self.drop, self.seed = eps, steps, drop, seed
        self.best: float | None = None  # accuracy under PGD
        self._best_gap: float | None = None
        count = len(self.labels)
        self._passes = Passes(min(part or count, count), autocast, memory_format, compile)
        self._pgd = PGD(self.model, eps, eps / 4, steps, **self._passes.attack)
        self._judge = Objective(self.model, "ce", autocast=autocast)
        # A label beyond the classes is refused before anything is compiled.
        (self._judge if compile else self._pgd.objective).check_classes(highest(self.labels))

    def check(self) -> Reading:
        """Look at the model as it is now.

        Raises:
            TypeError: the model returns no logits.
            ValueError: a label is beyond its classes.
        """
        # A copy: else a compiled attack would fill up all its later batches to the size of a part.
        attack = copy.copy(self.attack)
        with torch.inference_mode(False), torch.no_grad(), seeded(self.seed), frozen(self.model):
            rows = torch.arange(len(self.labels), device=self.labels.device).split(self._passes.part)
            seen = [self._look(part, attack) for part in rows]
        right, right_attacked, *cosines, noise, after = (torch.cat(values) for values in zip(*seen, strict=True))
        probe_pgd, probe_attack = (int(each.sum()) / len(self.labels) for each in (right, right_attacked))
        alignment, cosine = map(_mean, cosines)
        gap = probe_attack - probe_pgd
        alarm = None if self.attack is None else self._alarm(probe_pgd, probe_attack)
        if alarm is None and (self.best is None or probe_pgd > self.best):
            self.best, self._best_gap = probe_pgd, gap
        abnormal = None if self.attack is None else abnormal_share(noise, after).item()
        return Reading(probe_pgd, probe_attack, gap, alignment, abnormal, alarm, cosine)

    def state(self) -> dict[str, float | None]:
        """What readings depend on besides the weights, for JSON; `load` takes it back exactly."""
        return {"best": self.best, "best_gap": self._best_gap}

    def load(self, state: dict[str, float | None]) -> None:
        """Go on from `state()` of another monitor.

        Raises:
            ValueError: it is no such state.
        """
        if state.keys() != self.state().keys():
            raise ValueError(f"a monitor's state has the keys best and best_gap, got {', '.join(state)}")
        self.best, self._best_gap = state["best"], state["best_gap"]

    def _look(self, rows: torch.Tensor, attack: AnyAttack | None) -> tuple[torch.Tensor, ...]:
        """What the monitor sees of the images numbered `rows` (n,).

        Returns:
            (n,) each: right under PGD; right under the attack; the cosine of the gradients at x and at the random
            start; the cosine of the gradients at the attack's start and at its result; the loss at the random start;
            the loss under the attack.
        """
        count, pgd, objective = len(rows), self._pgd, self._pgd.objective
        if pgd.compile:
            rows = torch.cat((rows, rows[-1:].expand(self._passes.part - count)))  # one shape: one compilation
        x, labels = self._passes.staged(self.images, rows, self.labels.device), self.labels[rows]
        seeds = sample_seeds(self.seed, rows)
        clean, noisy = (pgd.slots(x, labels, pgd.eps, seeds, start) for start in (x, None))
        if pgd.compile and self._judge.classes is None:
            self._judge.logits(x)
        at_clean, losses, logits = objective.gradient(clean.input, labels)
        engine = Engine(pgd, noisy)
        engine.start()
        at_noise, noise_losses, _ = objective.gradient(noisy.input, labels)
        at_clean, in_noise = pgd.in_pixels(at_clean), pgd.in_pixels(at_noise)
        alignment = cosines_of(at_clean, in_noise)
        pgd.step(noisy, at_noise)
        for _ in range(self.steps - 1):
            engine.iterate()
        right = predicted(objective.logits(noisy.input)) == labels
        cosines = torch.full_like(alignment, torch.nan)
        if attack is not None:
            x, labels = x[:count], labels[:count]
            after, losses, logits = self._judge.gradient(attack(x, labels, seed=seeds[:count]), labels)
            cosines = cosines_of((in_noise if attack.draws else at_clean)[:count], after)
        attacked = predicted(cast(torch.Tensor, logits)) == labels  # cross-entropy's are never None
        return tuple(each[:count] for each in (right, attacked, alignment, cosines, noise_losses, losses))

    def _alarm(self, pgd: float, attack: float) -> str | None:
        gap, fell, then = attack - pgd, False, ""
        if self.best is not None and self._best_gap is not None:
            # A gap below zero, of an attack beyond the budget such as N-FGSM, may close.
            fell = min(self.best - pgd, gap - max(self._best_gap, 0)) > self.drop
            then = f"; at its best it was {self.best:.1%} and {self.best + self._best_gap:.1%}"
        collapsed = gap > self.drop and pgd < COLLAPSED * attack
        if not (fell or collapsed):
            return None
        return (
            f"catastrophic overfitting: accuracy on the probe batch is {pgd:.1%} under PGD-{self.steps} and "
            f"{attack:.1%} under the training attack{then}"
        )


def abnormal_share(losses_noise: torch.Tensor, losses_adv: torch.Tensor) -> torch.Tensor:
    """The share of samples whose loss is larger at the random start than at the attack's result: a 0-dim float tensor.

    Near 0 in sound single-step training, it rises with catastrophic overfitting (Lin et al. 2023, "Eliminating
    catastrophic overfitting via abnormal adversarial examples regularization", NeurIPS). FGSM-RS and N-FGSM
    have both losses at hand; the model must have been in the same mode for both.

    Args:
        losses_noise: the loss of each sample at the random start: floats (N,).
        losses_adv: the loss of each sample at the attack's result: floats (N,).

    Raises:
        ValueError: their shapes differ, or are not (N,).
    """
    if losses_noise.ndim != 1 or losses_noise.shape != losses_adv.shape:
        raise ValueError(
            "losses are one for each sample, of the same samples: "
            f"got the shapes {tuple(losses_noise.shape)} and {tuple(losses_adv.shape)}"
        )
    return (losses_noise > losses_adv).float().mean()


def _mean(cosines: torch.Tensor) -> float | None:
    """The mean of the cosines that are not NaN, as those of a zero gradient are; None where all are."""
    cosines = cosines[~cosines.isnan()]
    return cosines.mean().item() if len(cosines) else None
