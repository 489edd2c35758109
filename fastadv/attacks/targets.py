"""What an attack's loss compares the outputs with: labels, classes to reach, or the outputs on the clean images."""

import torch

from fastadv.attacks.attributes import Attributes
from fastadv.attacks.checks import CHOSEN
from fastadv.attacks.engine import Slots
from fastadv.attacks.losses import LOSSES
from fastadv.attacks.samplewise import seeds_for
from fastadv.attacks.verdicts import predicted
from fastadv.nn.frozen import as_normal

IGNORED = -100  # the label that cross-entropy passes over


class Targets(Attributes):
    """The part of an attack that chooses its targets."""

    @property
    def compares(self) -> str:
        """What the loss compares the outputs with, as in `Loss`; "anything" for a loss of the user's."""
        return "anything" if callable(self.loss) else LOSSES[self.loss].compares

    def aim(self, slots: Slots) -> torch.Tensor:
        """The targets that the loss compares these slots' outputs with."""
        if self.compares != "pairs":
            return slots.targets
        return torch.stack((slots.targets[:, 0], self.target_class(slots.targets, slots.restart)), 1)

    def target_class(self, targets: torch.Tensor, run: torch.Tensor) -> torch.Tensor:
        """The class that each sample's run goes towards.

        Args:
            targets: int64 (N, 1 + K): the label, then the other classes, the best first.
            run: number of each sample's run, int64 (N,).

        Returns:
            int64 (N,).
        """
        return targets.gather(1, (1 + run // self.restarts).clamp(max=targets.shape[1] - 1)[:, None])[:, 0]

    def _targets(
        self, x: torch.Tensor, labels: torch.Tensor | None, seed: int | torch.Tensor | None, given: bool
    ) -> torch.Tensor:
        looked_up = self.compares in ("labels", "soft", "pairs")
        if labels is not None and labels.dtype == torch.int64 and not self._watch.first and looked_up:
            labels = self._sound(as_normal(labels))
        if labels is not None and (labels.is_floating_point() or not self.needs_clean):
            return as_normal(labels)
        if self.targeted == "random" and seed is not None:
            seed = seeds_for(seed, x, 2**32 - 1)
        return self.targets(self._clean_logits(x), labels, seed, given)

    def _sound(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels of a later batch; a label that names no class is counted and replaced, for it ends a CUDA context."""
        if self.objective.classes is None:
            return labels
        wrong = (labels < 0) | (labels >= self.objective.classes)
        self._watch.tally("labels", ~wrong)
        return labels.masked_fill(wrong, IGNORED if self.loss == "ce" else 0)

    @property
    def needs_clean(self) -> bool:
        """Whether its targets depend on the model's outputs on the clean images."""
        return self.compares in ("clean", "pairs") or self.targeted in CHOSEN

    def targets(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor | None,
        seeds: int | torch.Tensor | None = None,
        given: bool = False,
    ) -> torch.Tensor:
        """Choose what the loss compares the outputs with.

        Args:
            logits: the clean images', (N, C).
            labels: int64 (N,), or 0 and 1 (N, C) for several labels a sample; None: the model's own predictions.
            seeds: int64 (N,), from which targeted="random" draws.
            given: whether the attack starts from images that were passed.

        Returns:
            Labels, pairs or probabilities, as the loss asks for; see `Loss`.

        Raises:
            TypeError: seeds are missing.
            ValueError: the loss is 0 at the attack's start, and its gradient too; none was `given` to start from.
        """
        if self.compares == "clean":
            if not (self.draws or given):
                raise ValueError(
                    "the loss kl compares with the clean images, and is 0 there with its gradient: start at random "
                    "(random_start=True, noise above 0, TPGD), pass x_init, or soft labels to compare with"
                )
            return logits.softmax(1)
        if labels is None:
            labels = (logits > 0).long() if self.compares == "signs" else predicted(logits).clamp(min=0)
        if self.targeted == "least_likely":
            if self.kth_min >= logits.shape[1]:
                raise ValueError(f"kth_min is {self.kth_min}, of {logits.shape[1]} classes with the label left out")
            ranked = logits.scatter(1, labels[:, None], torch.inf).argsort(dim=1, stable=True)
            labels = ranked[:, self.kth_min - 1]
        if self.targeted == "random":
            if seeds is None:
                raise TypeError("targeted='random' draws its targets: pass seeds, int64 (N,)")
            classes = logits.shape[1]
            labels = (labels + 1 + (seeds & 0xFFFFFFFF) % (classes - 1)) % classes
        if self.compares == "pairs":
            others = logits.float().scatter(1, labels[:, None], -torch.inf)
            ranked = others.argsort(dim=1, descending=True, stable=True)
            # The label's own by its number, for other logits may be -inf too.
            ranked = ranked[ranked != labels[:, None]].reshape(len(labels), logits.shape[1] - 1)
            return torch.cat((labels[:, None], ranked[:, : self.target_classes]), 1)
        return labels
