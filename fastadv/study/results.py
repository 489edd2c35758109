"""The finished cells of a study, to compute with."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastadv.study.grid import SCRATCH, Cell, with_defaults

PGD = "pgd"  # the training attack that the others are compared with
_SLOW = ("none", "pgd", "apgd", "bim", "mifgsm", "pma")  # beginnings of what is no fast attack

METHOD_WORDS = {"linear": "linear probing", "bias": "bias tuning", "lora": "LoRA", "full": "full fine-tuning"}
METHOD_WORDS |= {"adapter": "adapters", "prompt": "prompts", "ia3": "IA3", "norm": "norm tuning"}
METHOD_WORDS |= {SCRATCH: "from scratch"}
ATTACK_WORDS = {"none": "no attack", "fgsm-rs": "FGSM-RS", "nfgsm": "N-FGSM", "stale": "stored signs"}
ATTACK_WORDS |= {"cached": "kept features"}
JUDGE_WORDS = {"clean": "clean", "apgd": "APGD", "autoattack": "AutoAttack"}
JUDGE_ORDER = ("clean", "fgsm", "pgd-10", "pma", "pgd-50-10", "apgd", "autoattack")


@dataclass(frozen=True)
class Row:
    """What two cells have in common that differ in the training attack, but for the seed."""

    data: str
    classes: str | None
    model: str
    method: str
    eps: float


@dataclass(frozen=True)
class Result:
    """A finished cell, and its record as `fastadv.study.files` has it."""

    cell: Cell
    record: Mapping

    @cached_property
    def verdicts(self) -> dict[str, np.ndarray]:
        """{judge: bool (N,)}, True where the image is classified correctly after that attack."""
        return {judge: np.frombuffer(said.encode(), np.uint8) == ord("1") for judge, said in _said(self.record)}

    @property
    def accuracies(self) -> dict[str, float]:
        return {judge: float(right.mean()) for judge, right in self.verdicts.items()}

    @cached_property
    def settings(self) -> dict:
        return with_defaults(self.cell, self.record["settings"])

    @property
    def attack(self) -> str:
        """What attacked in training; the cell's has a name of its own where it has settings of its own."""
        return self.settings["trained_with"]

    @property
    def epochs(self) -> list[Mapping]:
        return [each for each in self.record["records"] if "epoch" in each]

    @property
    def constant(self) -> bool:
        """Whether its model says one class of all validation images: it withstands everything where that is right."""
        said = self.record["records"][-1].get("confusion", {}).get("clean", ())
        return len({said_class for _, said_class, _ in said}) == 1

    @property
    def fast(self) -> bool:
        return not self.attack.startswith(_SLOW)

    @property
    def transfer(self) -> bool:
        return self.cell.method != SCRATCH


def result_of(record: Mapping) -> Result:
    """From a cell's record.

    Raises:
        ValueError: its verdicts are not of the same images.
    """
    cell = Cell(**record["cell"])
    if len({len(said) for _, said in _said(record)}) != 1:
        raise ValueError(f"the verdicts of the cell {cell.id} are not all of the same images: run it again")
    return Result(cell, record)


def row_of(result: Result) -> Row:
    cell = result.cell
    return Row(cell.data, cell.classes, cell.model, cell.method, cell.eps)


def place_of(result: Result) -> tuple:
    """Where it stands among others: by data, model, method, eps, attack and seed."""
    cell = result.cell
    return cell.data, cell.classes or "", cell.model, method_place(cell.method), cell.eps, cell.attack, cell.seed


def method_place(method: str) -> tuple[int, str]:
    order = list(METHOD_WORDS)
    return (order.index(method) if method in order else len(order)), method


def _said(record: Mapping) -> list[tuple[str, str]]:
    known = {judge: place for place, judge in enumerate(JUDGE_ORDER)}
    return sorted(record["verdicts"].items(), key=lambda entry: known.get(entry[0], len(known)))


def method_words(method: str) -> str:
    return METHOD_WORDS.get(method, method)


def attack_words(attack: str) -> str:
    return ATTACK_WORDS.get(attack, attack.upper())


def judge_words(judge: str) -> str:
    return JUDGE_WORDS.get(judge, judge.upper())
