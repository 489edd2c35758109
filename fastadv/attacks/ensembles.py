"""AutoAttack's attacks and versions: Croce and Hein 2020 (arXiv 2003.01690, sections 3 and 4)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastadv.attacks.apgd import APGD, APGDL2
from fastadv.attacks.base import Attack
from fastadv.attacks.fab import FAB, FABL2
from fastadv.attacks.square import RandomSearch, Square
from fastadv.attacks.square_l2 import SquareL2
from fastadv.names import instead
from fastadv.nn.logits import AnyModel

VERSIONS: dict[str, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
    "custom": (),
}
PARTS = VERSIONS["plus"]  # all that there are
KINDS: dict[str, tuple[type[APGD], type[FAB], type[RandomSearch]]] = {
    "Linf": (APGD, FAB, Square),
    "L2": (APGDL2, FABL2, SquareL2),
}
RESTARTS = {"plus": 5}  # of APGD and FAB without targets
DRAWS = {"rand": 20}  # of a model that answers at random
OPTIONS = ("autocast", "memory_format", "compile", "graph")  # of every part


# Their attributes have the names of the authors' program; another name is refused.


@dataclass(slots=True)
class ForAPGD:
    """The settings of APGD.

    Attributes:
        eps: radius of the ball, in the images' units, [0, 1].
        n_restarts: runs.
        n_iter: steps of a run.
        rho: as APGD's.
        eot_iter: draws whose mean is the gradient.
    """

    eps: float
    n_restarts: int = 1
    n_iter: int = 100
    rho: float = 0.75
    eot_iter: int = 1


@dataclass(slots=True)
class ForTargetedAPGD(ForAPGD):
    """The settings of APGD with target classes, beside those of `ForAPGD`.

    Attributes:
        n_target_classes: how many of the clean image's best other classes are targets; all where there are fewer.
    """

    n_target_classes: int = 9


@dataclass(slots=True)
class ForFAB:
    """The settings of FAB.

    Attributes:
        eps: radius of the ball, in the images' units, [0, 1].
        n_restarts: runs of "fab"; "fab-t" has one for each of its target classes.
        n_iter: steps of a run.
        n_target_classes: of "fab-t", as `ForTargetedAPGD`'s.
        alpha_max: as FAB's.
        eta: as FAB's.
        beta: as FAB's.
    """

    eps: float
    n_restarts: int = 1
    n_iter: int = 100
    n_target_classes: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9


@dataclass(slots=True)
class ForSquare:
    """The settings of Square.

    Attributes:
        eps: radius of the ball, in the images' units, [0, 1].
        n_restarts: runs.
        n_queries: how many images of a sample the model sees in a run.
        p_init: as Square's.
    """

    eps: float
    n_restarts: int = 1
    n_queries: int = 5000
    p_init: float = 0.8


class Ensemble:
    """AutoAttack's attacks on a model, with the settings of its versions, which can be changed one by one.

    Args:
        model: any callable from images to logits (N, C).
        norm: "Linf" or "L2".
        eps: radius of the ball, in the images' units, [0, 1].
        version: "standard", "plus", "rand" for models that answer at random, or "custom".
        attacks_to_run: of a custom version, some of PARTS.
        options: of every attack, see `Attack`: autocast, memory_format, compile, graph.

    Attributes:
        apgd: settings of "apgd-ce" and "apgd-dlr".
        apgd_targeted: settings of "apgd-t".
        fab: settings of "fab" and "fab-t".
        square: settings of "square".
        attacks_to_run: names in the order in which they run; may be assigned.

    Raises:
        TypeError: the options have another one.
        ValueError: norm, version, attacks_to_run or a setting is another.
    """

    # eps and version act once: to assign them later is refused, as any name that is not here.
    __slots__ = ("apgd", "apgd_targeted", "attacks_to_run", "fab", "model", "norm", "options", "square")

    def __init__(
        self,
        model: AnyModel,
        norm: str = "Linf",
        eps: float = 8 / 255,
        *,
        version: str = "standard",
        attacks_to_run: Sequence[str] = (),
        **options: Any,
    ) -> None:
        if norm not in KINDS:
            raise ValueError(f"norm must be 'Linf' or 'L2', got {norm!r}: AutoAttack in another norm is not built here")
        if version not in VERSIONS:
            raise ValueError(f"unknown version {version!r}{instead(version, VERSIONS)}")
        if isinstance(attacks_to_run, str):
            raise ValueError(f"attacks_to_run must be a list such as [{attacks_to_run!r}], got {attacks_to_run!r}")
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
        if not isinstance(chosen, (list, tuple)):
            raise ValueError(f"attacks_to_run must be a list of {', '.join(PARTS)}, got {chosen!r}")
        for name in chosen:
            if name not in PARTS:
                raise ValueError(f"unknown part {name!r} in attacks_to_run{instead(name, PARTS)}")
        return [(name, self._attack(name)) for name in chosen]

    def _attack(self, name: str) -> Attack:
        apgd, fab, square = KINDS[self.norm]
        settings: dict[str, Any]
        if name == "square":
            mine = self.square
            return square(self.model, mine.eps, mine.n_queries, mine.p_init, restarts=mine.n_restarts, **self.options)
        if name.startswith("fab"):
            of_fab = self.fab
            settings = {key: getattr(of_fab, key) for key in ("alpha_max", "eta", "beta")}
            if name == "fab":
                settings |= {"loss": "margin", "restarts": of_fab.n_restarts}
            else:
                settings |= {"loss": "targeted_margin", "target_classes": of_fab.n_target_classes}
            return fab(self.model, of_fab.eps, of_fab.n_iter, **settings, **self.options)
        of_apgd = self.apgd_targeted if name == "apgd-t" else self.apgd
        loss = {"apgd-ce": "ce", "apgd-dlr": "dlr", "apgd-t": "targeted_dlr"}[name]
        settings = {"loss": loss, "rho": of_apgd.rho, "eot": of_apgd.eot_iter, "restarts": of_apgd.n_restarts}
        if name == "apgd-t":
            settings["target_classes"] = self.apgd_targeted.n_target_classes
        return apgd(self.model, of_apgd.eps, of_apgd.n_iter, **settings, **self.options)


ENSEMBLES: dict[str, dict[str, Any]] = {
    "apgd": {"version": "custom", "attacks_to_run": VERSIONS["standard"][:2]},  # without FAB and Square
    "autoattack": {},
    "autoattack-plus": {"version": "plus"},
    "autoattack-rand": {"version": "rand"},
    "autoattack-l2": {"norm": "L2"},
}
"""Ensembles by name: the arguments of `Ensemble`."""
