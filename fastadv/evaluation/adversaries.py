"""The attacks of an evaluation: by name, of this package, or of another library."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from numbers import Real
from typing import Any, Protocol, TypeGuard

import torch
from numpy import float32
from torch import nn

from fastadv.attacks import ENSEMBLES, PRESETS, Attack, Ensemble, create_attack
from fastadv.attacks.checks import BOX, box_of
from fastadv.attacks.engine import is_of_package
from fastadv.attacks.ensembles import PARTS
from fastadv.attacks.samplewise import has_rows
from fastadv.evaluation.identity import are_equal
from fastadv.names import instead
from fastadv.nn.kinship import bare, is_another, is_part
from fastadv.nn.logits import AnyModel

EPS = {"Linf": 8 / 255, "L2": 0.5}  # the default of attacks by name, by their norm


class StandardEvaluation(Protocol):
    """An attack that is called as AutoAttack's authors' program is."""

    @property
    def run_standard_evaluation(self) -> Callable[..., Any]: ...


Attacker = Callable[..., Any] | StandardEvaluation  # from (images, labels) to images, or a pair that begins with them
AnyAttack = str | Attacker | Ensemble  # a string is a name


class Adversary:
    """One attack at one eps, under a name.

    Args:
        name: the name in the report.
        attack: an attack of this package or of another library.
        model: the model that is evaluated.

    Attributes:
        eps: the attack's budget, in its own unit; None where it has none.
        norm: "Linf" or "L2"; None where the attack names neither.
        ours: the attack on `model`, if it is one of this package, on this model however wrapped, or on an equal copy,
            and can run in the queue's slots; else None, and the images that its call returns are judged.
        elsewhere: what it attacks in place of `model`, in words; None where that is `model`, an equal copy or unknown.

    Raises:
        ValueError: an attack of this package has a setting that allows no verdict.
    """

    def __init__(self, name: str, attack: Attacker, model: AnyModel):
        self.name, self.attack = name, attack
        self.eps, self.norm = eps_of(attack), norm_of(attack)
        what = strange(attack, model)
        same = _is_on(model, attack, what)
        self.elsewhere = None if same else what
        self.ours = _moved(attack, model) if isinstance(attack, Attack) and same and not is_called(attack) else None
        if goes_to_labels(attack) or (self.ours is not None and callable(self.ours.targeted)):
            raise ValueError(
                f"{attack!r} takes its targets for labels: choose targeted='random' or 'least_likely', or the default "
                "mode (set_mode_default)"
            )
        if self.ours is not None and has_rows(self.ours.alpha):
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
        if self.ours is not None and self.ours.training_mode != "eval":
            raise ValueError(f"{attack!r} attacks the model in another mode than the eval mode that is evaluated")

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> object:
        """The attack's result for copies of images, floats (N, ...), and labels, int64 (N,)."""
        call = self.attack if callable(self.attack) else self.attack.run_standard_evaluation
        return call(images.clone(), labels.clone())

    @property
    def ball(self) -> tuple[str, float] | None:
        """(norm, eps) of the attack's ball; None where it is not known, or the attack leaves it, as N-FGSM does."""
        if self.norm is None or self.eps is None or not getattr(self.attack, "project", True):
            return None
        return self.norm, self.eps

    @property
    def title(self) -> str:
        """Its name and budget, for people: "pgd-10 at 8/255"."""
        return self.name if self.eps is None else f"{self.name} at {self.budget}{'/255' if self.is_linf else ''}"

    @property
    def budget(self) -> str:
        """Its eps as a number: in 1/255 in L-inf, else in its own unit; "" where it has none."""
        if self.eps is None:
            return ""
        return f"{255 * self.eps:.4g}" if self.is_linf else f"{self.eps:.4g}"

    @property
    def is_linf(self) -> bool:
        return self.norm == "Linf"

    def facts(self) -> dict[str, Any]:
        """Its name, type and public settings, as far as JSON can hold them."""
        public = {key: value for key, value in getattr(self.attack, "__dict__", {}).items() if not key.startswith("_")}
        shown = {key: _shown(value) for key, value in public.items() if key != "model"}
        kept = {key: value for key, value in shown.items() if value is not None}
        return {"attack": self.name, "type": type(self.attack).__qualname__, **kept}


def _is_on(model: AnyModel, attack: Attacker, what: str | None) -> bool:
    """Whether an attack is known to be on `model`, on a wrapper that changes no output, or on an equal copy.

    Args:
        model: the model that is evaluated.
        attack: of this package or another library.
        what: what `strange` says of it; of other libraries' attacks of which it says nothing, weights are not compared.
    """
    attacked = attack.model if isinstance(attack, Attack) else model_of(attack)
    if attacked is None or (what is None and not isinstance(attack, Attack)):
        return False
    return bare(attacked) is bare(model) or are_equal(attacked, model)


def _moved(attack: Attack, model: AnyModel) -> Attack:
    """The attack on `model`: itself, or a copy."""
    if attack.model is model:
        return attack
    mine = copy.copy(attack)
    mine.model = model
    return mine


def is_called(attack: Attack) -> bool:
    """Whether a call of the attack returns what a method of the user's made of the last iterate, not the iterate."""
    return not is_of_package(attack, "__call__", "result")


def adversaries(
    model: AnyModel,
    attacks: AnyAttack | Sequence[AnyAttack],
    eps: float | Sequence[float] | None = None,
    **options: Any,
) -> list[Adversary]:
    """The attacks to evaluate `model` under.

    Args:
        model: the model that is evaluated.
        attacks: one attack or several, as of `evaluate`.
        eps: one budget or several; an attack by name stands for an attack at each of them. None: 8/255 for attacks in
            L-inf, 0.5 for those in L2.
        options: options of attacks by name, see `Attack`.

    Raises:
        TypeError: an attack is neither a name nor a callable, or is a class; or eps is no number.
        ValueError: a name is unknown; eps is wrong, or no attack needs it; or an attack has a setting that allows no
            verdict.
    """
    budgets = [] if eps is None else budgets_of(eps)
    wanted: Sequence[float | None] = budgets or [None]
    against: list[Adversary] = []
    given = listed(attacks)
    for attack in given:
        if isinstance(attack, str):
            named = [_named(attack, model, each, options) for each in wanted]
            against += [Adversary(name, each, model) for part in zip(*named, strict=True) for name, each in part]
        elif isinstance(attack, Ensemble):
            parts = attack.attacks()
            if not parts:
                raise ValueError(f"there is nothing to run: give attacks_to_run, some of {', '.join(PARTS)}")
            against += [Adversary(name, each, model) for name, each in parts]
        elif isinstance(attack, type):
            raise TypeError(f"attacks are names or callables, got the class {attack.__name__}: call it with the model")
        elif _is_attack(attack):
            against.append(Adversary(getattr(attack, "__name__", type(attack).__name__), attack, model))
        else:
            raise TypeError(f"attacks are names or callables, got {type(attack).__name__}")
    known = {float32(each): each for each in budgets}
    for adversary in against:
        if adversary.eps is not None:  # the steps have it in float32: two that are equal there are one budget
            adversary.eps = known.setdefault(float32(adversary.eps), adversary.eps)
    unasked = set(budgets) - {adversary.eps for adversary in against}
    if against and unasked and not any(isinstance(attack, str) for attack in given):
        raise ValueError(
            f"eps is for attacks by name, and none of {', '.join(adversary.title for adversary in against)} asks for "
            f"{', '.join(f'{each:.6g}' for each in sorted(unasked))}: give an attack for each eps, or names"
        )
    return against


def listed(attacks: AnyAttack | Sequence[AnyAttack]) -> list[Any]:
    """One or several attacks as a list.

    Raises:
        TypeError: they are a dict, of which the keys would be taken for names, or a set, which has no order.
    """
    if isinstance(attacks, (Mapping, Set)):
        them = "attacks.values()" if isinstance(attacks, Mapping) else "attacks"
        raise TypeError(f"attacks run in their order, got a {type(attacks).__name__}: give a list, list({them})")
    return [attacks] if _is_attack(attacks) or not isinstance(attacks, Iterable) else list(attacks)


def _named(name: str, model: AnyModel, eps: float | None, options: dict[str, Any]) -> list[tuple[str, Attack]]:
    """The attacks that a name stands for, each with its own name; None for eps is the default of the norm."""
    if name not in (*PRESETS, *ENSEMBLES):
        raise ValueError(f"unknown attack {name!r}{instead(name, (*PRESETS, *ENSEMBLES))}")
    if eps is None:
        eps = EPS[ENSEMBLES[name].get("norm", "Linf") if name in ENSEMBLES else PRESETS[name][0].norm]
    if name in ENSEMBLES:
        return Ensemble(model, eps=eps, **ENSEMBLES[name], **options).attacks()
    return [(name, create_attack(name, model, eps, **options))]


def check_they_take(against: Iterable[Adversary], images: torch.Tensor, labels: torch.Tensor) -> None:
    """Refuse attacks that cannot take the images or labels, before the first attack runs for hours.

    Args:
        against: the attacks.
        images: (N, ...).
        labels: int64 (N,), or (N, C) where a sample has several.

    Raises:
        ValueError: an attack is not made for images of this shape; or a sample has several labels, and an attack's loss
            compares with one class.
    """
    for adversary in against:
        if isinstance(adversary.attack, Attack):
            adversary.attack.check_shape(images)
        if labels.ndim == 2 and adversary.ours is not None and adversary.ours.compares not in ("signs", "anything"):
            raise ValueError(
                f"the labels {tuple(labels.shape)} are several a sample, and {adversary.title} compares with one "
                "class: give attacks with loss='bce', such as PGD(model, loss='bce'), or labels.argmax(1) where each "
                "row stands for one class"
            )


def _is_attack(value: object) -> bool:
    return isinstance(value, str) or callable(value) or hasattr(value, "run_standard_evaluation")


def is_several(eps: object) -> TypeGuard[Sequence[float]]:
    """Whether `eps` are several budgets: a list, a tuple, or an array or tensor of one dimension."""
    return isinstance(eps, (tuple, list)) or getattr(eps, "ndim", 0) == 1


def budgets_of(eps: float | Sequence[float]) -> list[float]:
    """The budgets as a list, also where there is just one.

    Raises:
        TypeError: a budget is no number; or there is none.
        ValueError: one is there twice, and the robust accuracies, one for each, would be fewer than the budgets given.
    """
    given: list[object] = list(eps) if is_several(eps) else [eps]
    budgets = [number for number in map(_number, given) if number is not None]
    if len(budgets) < len(given) or not budgets:
        raise TypeError(f"eps must be a number on the images' scale [0, 1], such as 8/255, or several, got {eps!r}")
    twice = [each for i, each in enumerate(budgets) if each in budgets[:i]]
    if twice:
        raise ValueError(f"eps has {twice[0]:.6g} ({255 * twice[0]:.4g}/255) more than once: give each budget once")
    return budgets


def _number(value: object) -> float | None:
    """The value of a number of Python, of NumPy or in a tensor; None for anything else."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else None


def eps_of(attack: object) -> float | None:
    """The budget that an attack names, in its own unit; None where it names none."""
    return _number(getattr(attack, "eps", getattr(attack, "epsilon", None)))  # AutoAttack calls it epsilon


def norm_of(attack: object) -> str | None:
    """The norm that an attack names, in any spelling, as "Linf" or "L2"; None where it is not known."""
    said = str(getattr(attack, "norm", None)).lower()
    return {"linf": "Linf", "inf": "Linf", "l2": "L2", "2": "L2"}.get(said)


def goes_to_labels(attack: object) -> bool:
    """Whether an attack, of this package or torchattacks, goes towards the labels that it is given."""
    return getattr(attack, "attack_mode", None) == "targeted(label)"


def model_of(attack: object) -> nn.Module | None:
    """The module that an attack attacks; None where that is not known."""
    # "predict" is advertorch's name; the others say "model".
    named = (getattr(attack, name, None) for name in ("model", "predict"))
    return next((model for model in named if isinstance(model, nn.Module)), None)


def strange(attack: object, model: AnyModel) -> str | None:
    """What an attack attacks in place of `model`, in words; None where that is `model`, or not known."""
    attacked = model_of(attack)
    if attacked is None or attacked is model:
        return None
    if is_another(attacked, model):
        return "another model"
    return "a part of the model, or one around it" if not _may_normalise(attack) and is_part(attacked, model) else None


def _may_normalise(attack: object) -> bool:
    """Whether an attack may normalise its images by itself: torchattacks' say whether, AutoAttack's and ours do not."""
    if isinstance(attack, Attack) or hasattr(attack, "run_standard_evaluation"):
        return False
    return getattr(attack, "normalization_used", True) is not None


def _shown(value: object) -> bool | int | float | str | None:
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (torch.dtype, torch.memory_format)):
        return str(value)
    return getattr(value, "__qualname__", None)  # a loss of the user's
