"""A monitor for catastrophic overfitting, for any training loop."""

import copy
from dataclasses import dataclass
from operator import attrgetter
from typing import cast

import torch

from fastadv._warnings import warn
from fastadv.attacks import PGD
from fastadv.attacks.checks import check_eps, check_number, check_whole, highest
from fastadv.attacks.engine import Engine
from fastadv.attacks.objective import Objective
from fastadv.attacks.samplewise import cosines_of
from fastadv.attacks.verdicts import predicted
from fastadv.evaluation.adversaries import eps_of
from fastadv.evaluation.samples import collected
from fastadv.functional import sample_seeds
from fastadv.nn.frozen import frozen
from fastadv.nn.inside import as_module
from fastadv.nn.logits import AnyModel
from fastadv.nn.parallel import one_process
from fastadv.ops.generator import seeded
from fastadv.training.checks import check_taken
from fastadv.training.factors import MergedWeights
from fastadv.training.foreign import AnyAttack, TrainAttack, as_attack
from fastadv.training.passes import Passes
from fastadv.training.step import check_attack, check_linf, warn_of_strange

STEPS = 5  # of PGD
COLLAPSED = 0.5  # alarm where PGD leaves less than half of the accuracy under the training attack; else it leaves most


@dataclass(frozen=True)
class Reading:
    """A reading of a `Monitor`: shares of the probe batch in [0, 1], with the model in eval mode.

    Attributes:
        probe_pgd: the accuracy under PGD from a random start.
        probe_attack: the accuracy under the training attack; on the clean images where there is no attack.
        gap: probe_attack - probe_pgd. It grows toward 1 under catastrophic overfitting.
        alignment: the mean cosine of the loss gradients at x and at x + U(-eps, eps). It falls toward 0 under
            catastrophic overfitting (Andriushchenko and Flammarion 2020, arXiv 2007.02617). Samples with a zero
            gradient do not count; None where no sample is left.
        abnormal: the share of samples whose loss is larger at x + U(-eps, eps), clamped to [0, 1], than at the training
            attack's result. It rises under catastrophic overfitting. None without an attack.
        alarm: a sentence with the numbers where there is an alarm, else None.
        cosine: the mean cosine of the loss gradients at the training attack's start, which is x + U(-eps, eps) or x,
            and at its result (SORA's detector). A single step trusts the loss to be linear, which means a cosine of 1.
            Samples with a zero gradient do not count; None where no sample is left, or without an attack.
    """

    probe_pgd: float
    probe_attack: float
    gap: float
    alignment: float | None
    abnormal: float | None
    alarm: str | None
    cosine: float | None = None


class Monitor:
    """Watches a fixed batch for catastrophic overfitting. Call `reading = monitor.check()`, for example once an epoch.

    Under catastrophic overfitting (Wong et al. 2020, arXiv 2001.03994) the accuracy under a single-step training attack
    rises, and the accuracy under PGD falls toward zero. There is an alarm in two cases:

    - The accuracy under PGD is more than `drop` below its best so far, and the gap between both accuracies has grown by
      more than `drop` since then. (After an unlucky step both accuracies fall, and the gap stays about as wide.)
    - The gap is wider than `drop`, and PGD leaves less than half of the accuracy under the training attack. This finds
      a model that collapsed before the first reading, or was never robust.

    Example with drop 0.2: the best reading was 40 % under PGD and 45 % under FGSM. A reading of 15 % and 60 % is an
    alarm; 15 % and 20 % is none.

    Training on clean images has no catastrophic overfitting, and no alarm.

    A check costs `steps` + 2 gradients with respect to the images, a forward pass, and the training attack. It does not
    change the model or torch's generators. The same weights always give the same reading. That is so where the attack
    keeps nothing from call to call. A callable with a counter or a generator of its own goes on with it in a check.

    Args:
        model: any callable from images (N, ...) to logits, as in `Attack`.
        images: the probe batch, (N, ...) in [0, 1] or uint8. A hundred images are enough to tell a collapse from noise.
            Held-out images also tell it from ordinary overfitting. The images stay on their device.
        labels: int64 (N,).
        attack: the training attack: one of fastadv, any callable from (images, labels) to images, or None for training
            on clean images. The attribute may be set to another attack later; `model`, `eps` and `steps`
            are fixed.
        eps: the budget of PGD and of the noise, in the images' units, [0, 1]; PGD's steps are eps / 4.
        steps: the number of PGD's steps.
        drop: how far the accuracy under PGD may fall below its best, or below the accuracy under the training attack; a
            share in (0, 1).
        seed: the seed of the random starts, of which each image has its own, and of torch's generators for attacks of
            other libraries.
        part: the number of images that go to the device and through the model at a time; None means all. Readings do
            not depend on it, except where an attack of another library draws random numbers.
        autocast: the dtype of torch.autocast in the monitor's own passes, as in `Attack`; the training attack has its
            own.
        memory_format: the memory format of the images in these passes, as in `Attack`.
        compile: whether these passes run under torch.compile, as in `Attack`.

    Attributes:
        best: the best accuracy under PGD so far; None before the first reading.

    Raises:
        TypeError: images are neither floats nor uint8; labels are not int64; or an option is of a wrong type.
        ValueError: there are no images, images beyond [0, 1], or of a dtype that the model does not take; or an option
            is out of range.
    """

    # Without a dict of its own: a name that is no attribute is refused when it is assigned.
    __slots__ = (
        *("images", "labels", "drop", "seed", "best", "_best_gap", "_attack", "_passes", "_pgd", "_judge"),
        "__weakref__",
    )

    def __init__(
        self,
        model: AnyModel,
        images: torch.Tensor,
        labels: torch.Tensor,
        attack: TrainAttack | None,
        eps: float,
        *,
        steps: int = STEPS,
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
        # One process may check while others do not: DistributedDataParallel would wait for them.
        inner = one_process(model)
        # Copies, which stay as they are whatever the caller does with the tensors.
        self.images, self.labels = (each.clone() for each in collected((images, labels), model, None))
        check_taken(inner, self.images, self.images.shape[1:], autocast)
        count = len(self.labels)
        self._passes = Passes(min(part or count, count), autocast, memory_format, compile)
        self._pgd = PGD(inner, eps, eps / 4, steps, **self._passes.attack)
        self._judge = Objective(inner, "ce", autocast=autocast)
        self.drop, self.seed = drop, seed
        self.attack = attack
        self._warn_of_attack(attack, model)
        self.best: float | None = None  # accuracy under PGD
        self._best_gap: float | None = None
        # Refuses a label beyond the classes before anything is compiled.
        (self._judge if compile else self._pgd.objective).check_classes(highest(self.labels))

    # What the parts of a monitor were made of stays as it is.
    model = property(attrgetter("_pgd.model"))
    eps = property(attrgetter("_pgd.eps"))
    steps = property(attrgetter("_pgd.steps"))

    @property
    def attack(self) -> AnyAttack | None:
        return self._attack

    @attack.setter
    def attack(self, attack: TrainAttack | None) -> None:
        check_attack("attack", attack)
        check_linf(attack)
        self._attack = as_attack(attack, self.model, self.eps)

    def _warn_of_attack(self, attack: TrainAttack | None, model: AnyModel) -> None:
        """Warn where the attack is of another model or budget, which would be taken for overfitting or hide it."""
        warn_of_strange(attack, model)
        theirs = eps_of(attack)
        if theirs is not None and abs(theirs - self.eps) > 1e-6 * self.eps:
            warn(
                f"the attack has eps {theirs:.6g}, and the monitor's PGD {self.eps:.6g}: the gap between their "
                "accuracies is that of two budgets, not a sign of overfitting. Give both the same"
            )

    def check(self) -> Reading:
        """Take a reading of the model.

        Raises:
            TypeError: the model returns no logits.
            ValueError: a label is beyond the model's classes.
        """
        # A copy of the attack: a compiled one would fill up all its later batches to the size of a part.
        attack = copy.copy(self.attack)
        merged = MergedWeights(as_module(self.model))()
        with torch.inference_mode(False), torch.no_grad(), seeded(self.seed), frozen(self.model), merged:
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
        """The state, for JSON and `load`. Readings depend on it and on the weights alone."""
        return {"best": self.best, "best_gap": self._best_gap}

    def load(self, state: dict[str, float | None]) -> None:
        """Continue from the `state()` of another monitor.

        Raises:
            ValueError: `state` has other keys.
        """
        if state.keys() != self.state().keys():
            raise ValueError(f"a monitor's state has the keys best and best_gap, got {', '.join(state)}")
        self.best, self._best_gap = state["best"], state["best_gap"]

    def _look(self, rows: torch.Tensor, attack: AnyAttack | None) -> tuple[torch.Tensor, ...]:
        """The measurements on some of the images.

        Args:
            rows: int64 (n,), the numbers of the images.
            attack: the training attack.

        Returns:
            Tensors (n,): whether the model is right under PGD; whether it is right under the attack; the cosine of the
            gradients at x and at the random start; the cosine of the gradients at the attack's start and at its result;
            the loss at the random start; the loss under the attack.
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
        attacked = predicted(cast(torch.Tensor, logits)) == labels  # with cross-entropy they are never None
        return tuple(each[:count] for each in (right, attacked, alignment, cosines, noise_losses, losses))

    def _alarm(self, pgd: float, attack: float) -> str | None:
        gap, fell, then = attack - pgd, False, ""
        if self.best is not None and self._best_gap is not None:
            # The gap may be below zero, for an attack that leaves the budget, such as N-FGSM. It may then grow to zero.
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
    """The share of samples whose loss is larger at the random start than at the attack's result.

    It is near 0 in sound single-step training, and rises with catastrophic overfitting. FGSM-RS and N-FGSM compute both
    losses anyway. The model must be in the same mode for both.

    Source: Lin et al. 2023, "Eliminating catastrophic overfitting via abnormal adversarial examples regularization",
    NeurIPS.

    Args:
        losses_noise: floats (N,), the loss of each sample at the random start.
        losses_adv: floats (N,), the loss of each sample at the attack's result.

    Returns:
        A 0-dim float tensor in [0, 1].

    Raises:
        ValueError: the shapes differ, or are not (N,).
    """
    if losses_noise.ndim != 1 or losses_noise.shape != losses_adv.shape:
        raise ValueError(
            "losses are one for each sample, of the same samples: "
            f"got the shapes {tuple(losses_noise.shape)} and {tuple(losses_adv.shape)}"
        )
    return (losses_noise > losses_adv).float().mean()


def _mean(cosines: torch.Tensor) -> float | None:
    """The mean of the cosines without NaN, which a zero gradient gives; None where all are NaN."""
    cosines = cosines[~cosines.isnan()]
    return cosines.mean().item() if len(cosines) else None
