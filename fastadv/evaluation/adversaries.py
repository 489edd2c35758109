"""What a model is evaluated against: attacks by name, of this package, or of any other."""

from collections.abc import Callable, Iterable, Sequence
from numbers import Real

import torch

from fastadv.attacks import ENSEMBLES, PRESETS, Attack, Ensemble, create_attack
from fastadv.attacks.checks import BOX, box_of
from fastadv.attacks.ensembles import PARTS
from fastadv.attacks.samplewise import has_rows

EPS = 8 / 255  # of attacks by name, where nothing else is said


class Adversary:
    """One attack at one eps, under a name; `ours` where it can run on the queue's slots."""

    def __init__(self, name: str, attack: Callable, model: Callable):
        self.name, self.attack = name, attack
        self.eps = _number(getattr(attack, "eps", getattr(attack, "epsilon", None)))  # AutoAttack's is called epsilon
        self.norm = _norm(getattr(attack, "norm", None))
        self.ours = isinstance(attack, Attack) and attack.model is model
        if self.ours and (attack.targeted is True or callable(attack.targeted)):
            raise ValueError(f"{attack!r} takes its targets for labels: choose targeted='random' or 'least_likely'")
        if self.ours and has_rows(getattr(attack, "alpha", None)):
            raise ValueError(f"{attack!r} has a step size for each image of one batch: give one number")
        if isinstance(attack, Attack) and attack.images_normalized is not None:
            raise ValueError(
                f"{attack!r} takes normalised images, and what is judged are images in [0, 1]: leave images_normalized "
                "out, and give evaluate images_normalized, or images in [0, 1] and Normalized(model, mean, std)"
            )
        if isinstance(attack, Attack) and box_of(attack.clip) != BOX:
            raise ValueError(
                f"{attack!r} is made for clip={attack.clip}, and what is judged are images in [0, 1]: scale them, and "
                "give the model's own range to Normalized(model, mean, std)"
            )
        if self.ours and attack.training_mode != "eval":
            raise ValueError(f"{attack!r} attacks the model in another mode than the eval mode that is evaluated")

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> object:
        """What the attack returns for floats (N, ...) and int64 (N,), of which it may do with its own as it likes."""
        call = self.attack if callable(self.attack) else self.attack.run_standard_evaluation
        return call(images.clone(), labels.clone())

    @property
    def has_budget(self) -> bool:
        """Whether it keeps to a ball of a known norm and radius; N-FGSM is not projected on one."""
        return None not in (self.eps, self.norm) and getattr(self.attack, "project", True)

    @property
    def title(self) -> str:
        return self.name if self.eps is None else f"{self.name} at {self.budget}{'/255' if self.is_linf else ''}"

    @property
    def budget(self) -> str:
        """Its eps as a number: of 1/255 in L-inf, else of whatever its unit is."""
        return f"{255 * self.eps:.4g}" if self.is_linf else f"{self.eps:.4g}"

    @property
    def is_linf(self) -> bool:
        return self.norm == "Linf"

    def facts(self) -> dict:
        """Its name and public settings, as far as they are values that can be written down."""
        public = {key: value for key, value in getattr(self.attack, "__dict__", {}).items() if not key.startswith("_")}
        shown = {key: _shown(value) for key, value in public.items() if key != "model"}
        kept = {key: value for key, value in shown.items() if value is not None}
        return {"attack": self.name, "type": type(self.attack).__qualname__, **kept}


def adversaries(
    model: Callable, attacks: str | Callable | Sequence[str | Callable], eps: float | Sequence[float], **options
) -> list[Adversary]:
    """The attacks to evaluate `model` under, names at each of `eps` and with these options of `Attack`.

    Raises:
        TypeError: an attack is neither a name nor anything that can be called, or a class; or eps is no number.
        ValueError: an unknown name, a wrong eps or one that no attack asks for, or an attack that the verdict has no
            meaning for.
    """
    budgets = budgets_of(eps)
    against = []
    given = [attacks] if _is_attack(attacks) or not isinstance(attacks, Iterable) else list(attacks)
    for attack in given:
        if isinstance(attack, str):
            named = [_named(attack, model, each, options) for each in budgets]
            against += [Adversary(*each, model) for part in zip(*named, strict=True) for each in part]
        elif isinstance(attack, Ensemble):
            parts = attack.attacks()
            if not parts:
                raise ValueError(f"there is nothing to run: give attacks_to_run, some of {', '.join(PARTS)}")
            against += [Adversary(*each, model) for each in parts]
        elif isinstance(attack, type):
            raise TypeError(f"attacks are names or callables, got the class {attack.__name__}: call it with the model")
        elif _is_attack(attack):
            against.append(Adversary(getattr(attack, "__name__", type(attack).__name__), attack, model))
        else:
            raise TypeError(f"attacks are names or callables, got {type(attack).__name__}")
    unasked = set(budgets) - {EPS} - {adversary.eps for adversary in against}
    if against and unasked and not any(isinstance(attack, str) for attack in given):
        raise ValueError(
            f"eps is for attacks by name, and none of {', '.join(adversary.title for adversary in against)} asks for "
            f"{', '.join(f'{each:.6g}' for each in sorted(unasked))}: give an attack for each eps, or names"
        )
    return against


def _named(name: str, model: Callable, eps: float, options: dict) -> list[tuple[str, Attack]]:
    """The attacks that a name stands for, with names of their own."""
    if name in ENSEMBLES:
        return Ensemble(model, eps=eps, **ENSEMBLES[name], **options).attacks()
    if name not in PRESETS:
        raise ValueError(f"unknown attack {name!r}; there are {', '.join((*PRESETS, *ENSEMBLES))}")
    return [(name, create_attack(name, model, eps, **options))]


def check_they_take(against: Iterable[Adversary], images: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse attacks that are not made for such images, or whose loss compares with one class where the labels (N, C)
    are several a sample.

    All of them before the first one runs, or hours of work are lost to the last.
    """
    for adversary in against:
        if isinstance(adversary.attack, Attack):
            adversary.attack.check_shape(images)
        if labels.ndim == 2 and adversary.ours and adversary.attack.compares not in ("signs", "anything"):
            raise ValueError(
                f"the labels {tuple(labels.shape)} are several a sample, and {adversary.title} compares with one "
                "class: give attacks with loss='bce', such as PGD(model, loss='bce'), or labels.argmax(1) where each "
                "row stands for one class"
            )


def _is_attack(value) -> bool:
    return isinstance(value, str) or callable(value) or hasattr(value, "run_standard_evaluation")


def is_several(eps: object) -> bool:
    return isinstance(eps, (tuple, list)) or getattr(eps, "ndim", 0) == 1


def budgets_of(eps: float | Sequence[float]) -> list[float]:
    """One or several, as a list."""
    budgets = [_number(each) for each in (eps if is_several(eps) else [eps])]
    if None in budgets or not budgets:
        raise TypeError(f"eps must be a number in pixels of [0, 1], such as 8/255, or several of them, got {eps!r}")
    return budgets


def _number(value) -> float | None:
    """A number, as Python's, NumPy's or a tensor's; None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def _norm(said) -> str | None:
    """The norm that an attack names as its own, in whatever spelling; None where it is not known."""
    return {"linf": "Linf", "inf": "Linf", "l2": "L2", "2": "L2"}.get(str(said).lower())


def _shown(value):
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return str(value)
    return getattr(value, "__qualname__", None)  # a loss of one's own
