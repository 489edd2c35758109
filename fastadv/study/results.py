"""The finished cells of a study, to compute with."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fastadv.attacks import PRESETS
from fastadv.study.files import Record
from fastadv.study.grid import SCRATCH, Cell, with_defaults
from fastadv.training.fast import FAST

Item = TypeVar("Item")
Key = TypeVar("Key")

HEADLINE_JUDGE = "pma"
LEAST = 0.05  # a share of the images that may be chance
PGD = "pgd"  # the other training attacks are compared with this one
_SLOW = ("none", "pgd", "apgd", "bim", "mifgsm", "pma")  # an attack whose name begins like this is not fast

METHOD_WORDS = {"linear": "linear probing", "bias": "bias tuning", "lora": "LoRA", "full": "full fine-tuning"}
METHOD_WORDS |= {"adapter": "adapters", "prompt": "prompts", "ia3": "IA3", "norm": "norm tuning"}
METHOD_WORDS |= {SCRATCH: "from scratch"}
ATTACK_WORDS = {"none": "no attack", "fgsm-rs": "FGSM-RS", "nfgsm": "N-FGSM", "stale": "stored signs"}
ATTACK_WORDS |= {"cached": "kept features", "zerograd": "ZeroGrad", "gradalign": "GradAlign", "free": "Free"}
JUDGE_WORDS = {"clean": "clean", "apgd": "APGD", "autoattack": "AutoAttack"}
JUDGE_ORDER = ("clean", "fgsm", "pgd-10", "pma", "pgd-50-10", "apgd", "autoattack")


@dataclass(frozen=True)
class Row:
    """What two cells have in common if they differ in nothing but the training attack and the seed."""

    data: str
    classes: str | None
    model: str
    method: str
    eps: float


@dataclass(frozen=True)
class Result:
    """A finished cell, and its record as `fastadv.study.files` reads it.

    Attributes:
        cell: the cell.
        record: the record.
        retimed: its times when it was trained again, alone, as `read_retimed` has them; None where it was not.
    """

    cell: Cell
    record: Record
    retimed: Record | None = None

    @cached_property
    def verdicts(self) -> dict[str, npt.NDArray[np.bool_]]:
        """{judge: bool (N,)}, True where the image is classified correctly after that attack."""
        return {judge: np.frombuffer(said.encode(), np.uint8) == ord("1") for judge, said in _said(self.record)}

    @property
    def accuracies(self) -> dict[str, float]:
        """{judge: the share of images that are classified correctly}."""
        return {judge: float(right.mean()) for judge, right in self.verdicts.items()}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings. One that did not exist yet when the cell was made has its default."""
        return with_defaults(self.cell, self.record["settings"])

    @property
    def attack(self) -> str:
        """The training attack, such as "pgd". `cell.attack` may be the grid's own name of an attack with settings."""
        name: str = self.settings["trained_with"]
        return name

    @property
    def epochs(self) -> list[Record]:
        """The records of the epochs."""
        return [each for each in self.record["records"] if "epoch" in each]

    @property
    def constant(self) -> bool:
        """Whether the model predicts one class for all images. No attack changes that: its robustness means nothing.

        Where all test images are known to have one class, that is no fault of the model, and not said.
        """
        if self._of_one_class:
            return False
        if "classes_predicted" in self.record:
            return bool(self.record["classes_predicted"] == 1)
        said = self.record["records"][-1].get("confusion", {}).get("clean", ())  # of the images to choose weights on
        return len({said_class for _, said_class, _ in said}) == 1

    @property
    def _of_one_class(self) -> bool:
        """Whether the test images are known to have one class: one image, or one that is predicted, rightly, for all.

        The record has no labels of them.
        """
        right = self.verdicts["clean"]
        return len(right) == 1 or (self.record.get("classes_predicted") == 1 and bool(right.all()))

    @property
    def chance(self) -> float:
        """The share of images for which a guess is right: one of as many as there are classes; 0 where not known.

        The classes are those of the final confusion matrices, of the images to choose weights on.
        """
        matrices = self.record["records"][-1].get("confusion", {}).values()
        highest = max((max(true, said) for matrix in matrices for true, said, _ in matrix), default=-1)
        return 1 / (highest + 1) if highest > 0 else 0.0

    @property
    def robust(self) -> bool:
        """Whether a comparison with the model means something: it is robust on more images than may be chance."""
        return self.accuracies.get(HEADLINE_JUDGE, 1.0) >= LEAST and not self.constant

    @property
    def above_chance(self) -> bool:
        """Whether the model is robust, and on more images than a guess among the classes is right for."""
        return self.robust and self.accuracies.get(HEADLINE_JUDGE, 1.0) > self.chance

    @property
    def time_counts(self) -> bool:
        """Whether the time of its training counts: made on one machine, and where on a GPU, that it had alone."""
        machine = self.record["machine"]
        alone: bool = machine["device"] == "cpu" or machine.get("sharing") == 1
        return alone and "before" not in machine

    @property
    def fast(self) -> bool:
        """Whether the training attack is a fast one."""
        return not self.attack.startswith(_SLOW)

    @property
    def transfer(self) -> bool:
        """Whether training began with pretrained weights."""
        return self.cell.method != SCRATCH


def result_of(record: Record, retimed: Record | None = None) -> Result:
    """The result in the record of a cell, with the times that it took alone.

    Raises:
        ValueError: the judges' verdicts are not on the same images.
    """
    cell = Cell(**record["cell"])
    if len({len(said) for _, said in _said(record)}) != 1:
        raise ValueError(f"the verdicts of the cell {cell.id} are not all of the same images: run it again")
    return Result(cell, record, retimed)


def set_words(of: Cell | Row) -> str:
    """The data set, and its classes where some are chosen."""
    return " ".join(filter(None, (of.data, of.classes)))


def row_of(result: Result) -> Row:
    """The row of a cell."""
    cell = result.cell
    return Row(cell.data, cell.classes, cell.model, cell.method, cell.eps)


def place_of(result: Result) -> tuple[str, str, str, tuple[int, str], float, str, int]:
    """A key to sort results by: data, classes, model, method, eps, attack and seed."""
    cell = result.cell
    return cell.data, cell.classes or "", cell.model, method_place(cell.method), cell.eps, cell.attack, cell.seed


def method_place(method: str) -> tuple[int, str]:
    """A key to sort methods by."""
    order = list(METHOD_WORDS)
    return (order.index(method) if method in order else len(order)), method


def _said(record: Record) -> list[tuple[str, str]]:
    """(judge, verdicts) for each judge, weak judges first."""
    known = {judge: place for place, judge in enumerate(JUDGE_ORDER)}
    return sorted(record["verdicts"].items(), key=lambda entry: known.get(entry[0], len(known)))


def method_words(method: str) -> str:
    """A method's name for people."""
    return METHOD_WORDS.get(method, method)


def attack_words(attack: str) -> str:
    """An attack's name for people; a name that only the grid has stays as it is."""
    return ATTACK_WORDS.get(attack, attack.upper() if attack in (*PRESETS, *FAST) else attack)


def judge_words(judge: str) -> str:
    """A judge's name for people."""
    return JUDGE_WORDS.get(judge, judge.upper())


def grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> list[tuple[Key, list[Item]]]:
    """The items by their keys: (key, items), in the order in which the keys first occur."""
    found: dict[Key, list[Item]] = {}
    for each in items:
        found.setdefault(key(each), []).append(each)
    return list(found.items())
