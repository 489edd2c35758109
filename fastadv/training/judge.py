"""The evaluations of a run: those by which weights are chosen, and that of the weights that were."""

from typing import Any

import torch
from torch import nn

from fastadv._warnings import warn
from fastadv.attacks import Attack, create_attack
from fastadv.data.share import Batch
from fastadv.evaluation.adversaries import eps_of
from fastadv.evaluation.confusion import confusions
from fastadv.evaluation.robustness import evaluate, robust_accuracy
from fastadv.training.factors import MergedWeights
from fastadv.training.foreign import TrainAttack
from fastadv.training.passes import Passes
from fastadv.training.progress import Record

EXACT = 1e-5  # distances of images in float32 and in [0, 1] are known to this


class Judge:
    """Evaluates the model that trains.

    Args:
        model: the model.
        attack: of the evaluations, `eval_attack` of the trainer; None means PGD-10 with steps of eps / 4.
        eps: the radius of the ball of the training.
        seed: of the random starts.
        device: where the model is.
        passes: how the model is called.
    """

    def __init__(
        self,
        model: nn.Module,
        attack: TrainAttack | None,
        eps: float,
        *,
        seed: int,
        device: torch.device,
        passes: Passes,
    ):
        self.model, self.eps, self.passes = model, eps, passes
        self.attack = attack or self._named("pgd-10")
        self._merged = MergedWeights(model)
        self._options: dict[str, Any] = {"seed": seed, "device": device, **passes.evaluation}

    @property
    def name(self) -> str:
        """The attack in words."""
        return repr(self.attack) if isinstance(self.attack, Attack) else type(self.attack).__qualname__

    def choosing(self, val: Batch) -> Record:
        """The accuracies on `val` by which weights are chosen: clean, and under the attack.

        Raises:
            ValueError: the attack leaves its budget.
        """
        with self._merged():
            found = robust_accuracy(self.model, val, self.attack, **self._options)
        return self._within_budget(found)

    def final(self, test: Batch) -> Record:
        """The accuracies on `test`: clean, under the attack, and under PMA after it; and the confusions.

        Raises:
            ValueError: the attack leaves its budget.
        """
        report = evaluate(self.model, test, [self.attack, self._named("pma")], progress=False, **self._options)
        shares, far = [result["robust_accuracy"] for result in report["attacks"]], report["attacks"][0]["largest_linf"]
        if far is not None and eps_of(self.attack) is None and far > self.eps + EXACT:
            warn(
                f"eval_attack goes up to {far:.6g} in L-inf from the clean images, beyond the eps of the training, "
                f"{self.eps:.6g}: its accuracies, by which weights are chosen, are of that budget"
            )
        found = {"clean_accuracy": report["clean_accuracy"], "robust_accuracy": shares[0], "pma_accuracy": shares[1]}
        return self._within_budget(found) | {"confusion": confusions(test[1], report)}

    def _named(self, name: str) -> Attack:
        return create_attack(name, self.model, self.eps, **self.passes.attack)

    def _within_budget(self, found: Record) -> Record:
        if found["robust_accuracy"] is None:  # its warning says how far it went
            raise ValueError(f"eval_attack {self.name} leaves its eps or [0, 1]: no weights can be judged by it")
        return found
