"""What a model is evaluated against: attacks by name, of this package, or of any other."""

from collections.abc import Callable, Iterator, Sequence

import torch

from fastadv.attacks import Attack, by_name


class Opponent:
    """One attack at one eps, under a name; `ours` where it can run on the queue's slots."""

    def __init__(self, name: str, attack: Callable, model: Callable):
        self.name, self.attack = name, attack
        self.eps = getattr(attack, "eps", getattr(attack, "epsilon", None))  # AutoAttack's is called epsilon
        self.ours = isinstance(attack, Attack) and attack.model is model
        if self.ours and attack.targeted is True:
            raise ValueError(f"{attack!r} takes its targets for labels: choose targeted='random' or 'least_likely'")
        if self.ours and attack.training_mode != "eval":
            raise ValueError(f"{attack!r} attacks the model in another mode than the eval mode that is evaluated")

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        call = self.attack if callable(self.attack) else self.attack.run_standard_evaluation
        return call(images, labels)

    @property
    def restarts(self) -> int:
        return self.attack.restarts if self.ours else 1

    @property
    def title(self) -> str:
        if self.eps is None:
            return self.name
        return f"{self.name} at " + (f"{255 * self.eps:.4g}/255" if self.is_linf else f"{self.eps:.4g}")

    @property
    def is_linf(self) -> bool:
        return not isinstance(self.attack, Attack) or self.attack.norm == "Linf"

    def facts(self) -> dict:
        """Its name and public settings, as far as they are values that can be written down."""
        public = {key: value for key, value in getattr(self.attack, "__dict__", {}).items() if not key.startswith("_")}
        shown = {key: _shown(value) for key, value in public.items() if key != "model"}
        kept = {key: value for key, value in shown.items() if value is not None}
        return {"attack": self.name, "type": type(self.attack).__qualname__, **kept}


def opponents(model: Callable, attacks: Sequence[str | Callable], budgets: Sequence[float]) -> Iterator[Opponent]:
    """The attacks to evaluate `model` under, names at each of `budgets`.

    Raises:
        TypeError: an attack is neither a name nor anything that can be called.
        ValueError: an unknown name, a wrong eps, or an attack that the verdict has no meaning for.
    """
    for attack in [attacks] if isinstance(attacks, str) else attacks:
        if isinstance(attack, str):
            for eps in budgets:
                yield Opponent(attack, by_name(attack, model, eps), model)
        elif callable(attack) or hasattr(attack, "run_standard_evaluation"):
            yield Opponent(getattr(attack, "__name__", type(attack).__name__), attack, model)
        else:
            raise TypeError(f"attacks are names or callables, got {type(attack).__name__}")


def _shown(value):
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return str(value)
    return getattr(value, "__qualname__", None)  # a loss of one's own
