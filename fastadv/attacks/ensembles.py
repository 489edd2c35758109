"""AutoAttack's attacks and versions: Croce and Hein 2020 (arXiv 2003.01690, sections 3 and 4)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastadv.attacks.apgd import APGD, APGDL2
from fastadv.attacks.base import Attack
from fastadv.attacks.fab import FAB, FABL2
from fastadv.attacks.square import Square
from fastadv.attacks.square_l2 import SquareL2

VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "custom": (),
}
PARTS = VERSIONS["plus"]  # all that there are
KINDS = {"Linf": (APGD, FAB, Square), "L2": (APGDL2, FABL2, SquareL2)}
RESTARTS = {"plus": 5}  # of APGD and FAB without targets
DRAWS = {"rand": 20}  # of a model that answers at random
OPTIONS = ("autocast", "memory_format", "compile", "graph")  # of every part


# Their attributes have the names of the authors' program; another name is refused.


@dataclass(slots=True)
class ForAPGD:
    """eps in pixels of [0, 1]; n_iter: steps; rho as APGD's; eot_iter: draws whose mean is the gradient."""

    eps: float
    n_restarts: int = 1
    n_iter: int = 100
    rho: float = 0.75
    eot_iter: int = 1


@dataclass(slots=True)
class ForTargetedAPGD(ForAPGD):
    """n_target_classes: of the clean image's best other classes, so many are gone for, all where there are fewer."""

    n_target_classes: int = 9


@dataclass(slots=True)
class ForFAB:
    """n_restarts: of "fab"; "fab-t" has one for each of its n_target_classes. The others are FAB's."""

    eps: float
    n_restarts: int = 1
    n_iter: int = 100
    n_target_classes: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9


@dataclass(slots=True)
class ForSquare:
    """n_queries: so many images of a sample the model sees in a run; p_init as Square's."""

    eps: float
    n_restarts: int = 1
    n_queries: int = 5000
    p_init: float = 0.8


class Ensemble:
    """AutoAttack's attacks on a model, with the settings of its versions, which can be changed one by one.

    Args:
        model: any callable from images to logits (N, C).
        norm: "Linf" or "L2".
        eps: budget, in pixels of [0, 1].
        version: "standard", "plus", "rand" for models that answer at random, or "custom".
        attacks_to_run: of a custom version, some of PARTS.
        options: of every attack, see `Attack`: autocast, memory_format, compile, graph.

    Attributes:
        apgd, apgd_targeted, fab, square: what can be set of them: `ForAPGD`, `ForTargetedAPGD`, `ForFAB`, `ForSquare`.
        attacks_to_run: names in the order in which they run; may be assigned.

    Raises:
        TypeError: the options have another one.
    """

    # eps and version act once: to assign them later is refused, as any name that is not here.
    __slots__ = ("apgd", "apgd_targeted", "attacks_to_run", "fab", "model", "norm", "options", "square")

    def __init__(
        self,
        model: Callable,
        norm: str = "Linf",
        eps: float = 8 / 255,
        *,
        version: str = "standard",
        attacks_to_run: Sequence[str] = (),
        **options,
    ):
        if norm not in KINDS:
            raise ValueError(f"norm must be 'Linf' or 'L2', got {norm!r}: AutoAttack in another norm is not built here")
        if version not in VERSIONS:
            raise ValueError(f"unknown version {version!r}: choose one of {', '.join(VERSIONS)}")
        if attacks_to_run and version != "custom":
            raise ValueError(f"version {version!r} has attacks of its own: to choose them give version='custom'")
        for name in set(options) - set(OPTIONS):
            raise TypeError(
                f"AutoAttack has no option {name!r}, but {', '.join(OPTIONS)}: what its parts do is set by attributes, "
                "such as apgd.n_restarts, and images are in [0, 1], with Normalized(model, mean, std) for their model"
            )
        self.model, self.norm, self.options = model, norm, options
        self.attacks_to_run = list(attacks_to_run or VERSIONS[version])
        restarts, draws = RESTARTS.get(version, 1), DRAWS.get(version, 1)
        self.apgd = ForAPGD(eps, restarts, eot_iter=draws)
        self.apgd_targeted = ForTargetedAPGD(eps)
        self.fab = ForFAB(eps, restarts)
        self.square = ForSquare(eps)
        self.attacks()

    def attacks(self) -> list[tuple[str, Attack]]:
        """(name, attack) as they run.

        Raises:
            TypeError, ValueError: a setting or a name is wrong.
        """
        chosen = self.attacks_to_run
        if not isinstance(chosen, (list, tuple)) or any(name not in PARTS for name in chosen):
            raise ValueError(f"attacks_to_run must be a list of {', '.join(PARTS)}, got {chosen!r}")
        return [(name, self._attack(name)) for name in chosen]

    def _attack(self, name):
        apgd, fab, square = KINDS[self.norm]
        if name == "square":
            mine = self.square
            return square(self.model, mine.eps, mine.n_queries, mine.p_init, restarts=mine.n_restarts, **self.options)
        if name.startswith("fab"):
            mine = self.fab
            settings = {key: getattr(mine, key) for key in ("alpha_max", "eta", "beta")}
            if name == "fab":
                settings |= {"loss": "margin", "restarts": mine.n_restarts}
            else:
                settings |= {"loss": "targeted_margin", "target_classes": mine.n_target_classes}
            return fab(self.model, mine.eps, mine.n_iter, **settings, **self.options)
        mine = self.apgd_targeted if name == "apgd-t" else self.apgd
        loss = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "targeted_dlr"}[name]
        settings = {"loss": loss, "rho": mine.rho, "eot": mine.eot_iter, "restarts": mine.n_restarts}
        if name == "apgd-t":
            settings["target_classes"] = mine.n_target_classes
        return apgd(self.model, mine.eps, mine.n_iter, **settings, **self.options)


ENSEMBLES = {
    "autoattack": {},
    "autoattack-plus": {"version": "plus"},
    "autoattack-rand": {"version": "rand"},
    "autoattack-l2": {"norm": "L2"},
}
"""Ensembles by name: the arguments of `Ensemble`."""
