"""The finished cells of a study, to compute with."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fastadv.study.files import Record
from fastadv.study.grid import SCRATCH, Cell, with_defaults

PGD = "pgd"  # the training attack that the others are compared with
_SLOW = ("none", "pgd", "apgd", "bim", "mifgsm", "pma")  # beginnings of the names of attacks that are not fast

METHOD_WORDS = {"linear": "linear probing", "bias": "bias tuning", "lora": "LoRA", "full": "full fine-tuning"}
METHOD_WORDS |= {"adapter": "adapters", "prompt": "prompts", "ia3": "IA3", "norm": "norm tuning"}
METHOD_WORDS |= {SCRATCH: "from scratch"}
ATTACK_WORDS = {"none": "no attack", "fgsm-rs": "FGSM-RS", "nfgsm": "N-FGSM", "stale": "stored signs"}
ATTACK_WORDS |= {"cached": "kept features"}
JUDGE_WORDS = {"clean": "clean", "apgd": "APGD", "autoattack": "AutoAttack"}
JUDGE_ORDER = ("clean", "fgsm", "pgd-10", "pma", "pgd-50-10", "apgd", "autoattack")


@dataclass(frozen=True)
class Row:
    """What cells have in common that differ in the training attack and the seed alone."""

    data: str
    classes: str | None
    model: str
    method: str
    eps: float


@dataclass(frozen=True)
class Result:
    """A finished cell, and its record as `fastadv.study.files` reads it."""

    cell: Cell
    record: Record

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
        """Its settings, with the defaults of settings that did not exist when it was made."""
        return with_defaults(self.cell, self.record["settings"])

    @property
    def attack(self) -> str:
        """The attack in training; `cell.attack` is another name where the attack has settings of its own."""
        name: str = self.settings["trained_with"]
        return name

    @property
    def epochs(self) -> list[Record]:
        """The records of the epochs."""
        return [each for each in self.record["records"] if "epoch" in each]

    @property
    def constant(self) -> bool:
        """Whether its model says one class for all validation images: it is robust wherever that class is right."""
        said = self.record["records"][-1].get("confusion", {}).get("clean", ())
        return len({said_class for _, said_class, _ in said}) == 1

    @property
    def fast(self) -> bool:
        """Whether the attack in training is a fast one."""
        return not self.attack.startswith(_SLOW)

    @property
    def transfer(self) -> bool:
        """Whether training began with pretrained weights."""
        return self.cell.method != SCRATCH


def result_of(record: Record) -> Result:
    """The result in a cell's record.

    Raises:
        ValueError: its verdicts are not of the same images.
    """
    cell = Cell(**record["cell"])
    if len({len(said) for _, said in _said(record)}) != 1:
        raise ValueError(f"the verdicts of the cell {cell.id} are not all of the same images: run it again")
    return Result(cell, record)


def row_of(result: Result) -> Row:
    """What a cell has in common with those that differ in the training attack and the seed alone."""
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
    """(judge, verdicts), weak judges first."""
    known = {judge: place for place, judge in enumerate(JUDGE_ORDER)}
    return sorted(record["verdicts"].items(), key=lambda entry: known.get(entry[0], len(known)))


def method_words(method: str) -> str:
    """A method's name for people."""
    return METHOD_WORDS.get(method, method)


def attack_words(attack: str) -> str:
    """An attack's name for people."""
    return ATTACK_WORDS.get(attack, attack.upper())


def judge_words(judge: str) -> str:
    """A judge's name for people."""
    return JUDGE_WORDS.get(judge, judge.upper())
