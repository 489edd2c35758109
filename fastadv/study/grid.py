"""The cells of a study, from a grid: products of data sets, models, methods, attacks, budgets and seeds."""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastadv._renamed import by_new_names
from fastadv.attacks import ENSEMBLES, PRESETS
from fastadv.attacks.ensembles import VERSIONS
from fastadv.data.classes import class_list
from fastadv.data.splits import Split
from fastadv.names import instead
from fastadv.training import Settings, Trainer
from fastadv.training.fast import FAST
from fastadv.training.methods import METHODS
from fastadv.training.settings import RENAMED
from fastadv.units import in_255ths

SCRATCH = "scratch"  # everything, from random weights
ALWAYS = ("fgsm", "pgd-10", "pma")
# Judges of several attacks in a row: each attack gets the images that those before it leave.
IN_A_ROW = {"apgd": tuple(ENSEMBLES["apgd"]["attacks_to_run"]), "autoattack": VERSIONS["standard"]}
JUDGES = (*(name for name, (attack, _) in PRESETS.items() if attack.norm == "Linf"), *IN_A_ROW)

_AXES = {"model": "robust-resnet", "methods": ("linear", "full"), "attacks": ("fgsm", "pgd"), "eps": (8,), "seeds": 3}
# Settings that are a training attack's own: two attacks may differ in them, and be compared.
OF_THE_ATTACK = ("trained_with", "alpha", "noise", "steps", "refresh", "price", "quantile", "penalty", "repeats")
_AXES_OF = ("method", "seed")  # of Settings
_NOT_TRAINING = (*_AXES_OF, "checkpoint_s")  # and what changes no result


@dataclass(frozen=True)
class Cell:
    """One training run of a study.

    Attributes:
        data: name of the data set.
        classes: as `fastadv finetune --classes` takes them; None means all.
        model: as `fastadv finetune --model` takes it.
        method: what trains.
        attack: a name for the attack in training, with its settings.
        eps: budget, in units of 1/255.
        seed: of the run.
    """

    data: str
    classes: str | None
    model: str
    method: str
    attack: str
    eps: float
    seed: int

    @property
    def id(self) -> str:
        """A readable name, fit for a folder."""
        classes = () if self.classes is None else (self.classes,)
        names = (self.data, *classes, self.model, self.method, self.attack, f"eps{self.eps:g}", f"seed{self.seed}")
        return "-".join(map(_safe, names))


@dataclass(frozen=True)
class DataSet:
    """Where a data set is, and what is taken of it.

    Attributes:
        name: in the results.
        path: digits, cifar10, or a path; a relative one is that in the study's data folder.
        classes: to keep, such as "6-9"; None: all.
        size: pixels of a side, for a model that takes images of any size; None: they stay as they are.
        image_column: of parquet files.
        label_column: of parquet files.
    """

    name: str
    path: str
    classes: str | None = None
    size: int | None = None
    image_column: str | None = None
    label_column: str | None = None

    def __post_init__(self) -> None:
        for name in ("path", "image_column", "label_column"):
            said = getattr(self, name)
            if said is not None and not (isinstance(said, str) and said):
                raise ValueError(f"the {name} of the data set {self.name} is a text, got {said!r}: put it in quotes")
        if self.size is not None and (type(self.size) is not int or self.size < 1):
            raise ValueError(f"size is a whole number of pixels, got {self.size!r}")


@dataclass(frozen=True)
class Images:
    """Which images of a data set train, choose weights and judge.

    Attributes:
        validation: share of the training images to choose weights on, where the set sets none apart.
        split_seed: of the parts that the set does not have.
        train_limit: how many images train, the first of an order that is always the same; None: all.
        val_limit: how many images choose weights, likewise.
        test_limit: how many images judge, likewise.
    """

    validation: float = 0.1
    split_seed: int = 0
    train_limit: int | None = None
    val_limit: int | None = None
    test_limit: int | None = None

    def __post_init__(self) -> None:
        if type(self.split_seed) is not int:
            raise ValueError(f"split_seed is a whole number, got {self.split_seed!r}")
        if isinstance(self.validation, bool) or not isinstance(self.validation, int | float):
            raise ValueError(f"validation is a share in [0, 1), such as 0.1 (0: none), got {self.validation!r}")
        Split(self.split_seed, validation=self.validation)  # refuses a validation that is no share
        for name in ("train_limit", "val_limit", "test_limit"):
            limit = getattr(self, name)
            if limit is not None and type(limit) is not int:
                raise ValueError(f"{name} is a whole number, such as 1000, got {limit!r}")
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit!r}")


@dataclass(frozen=True)
class Task:
    """A cell and all that its result depends on.

    Attributes:
        cell: its name in the results.
        data: where its images are.
        images: which of them are taken.
        attack: name of the attack in training, as the trainer takes it.
        training: settings of the trainer.
        judges: those beside ALWAYS.
    """

    cell: Cell
    data: DataSet
    images: Images
    attack: str
    training: Settings
    judges: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that a finished cell must have been made with, as JSON has them."""
        training = {name: v for name, v in asdict(self.training).items() if name not in _NOT_TRAINING}
        settings: dict[str, Any] = json.loads(
            json.dumps({"trained_with": self.attack, **training, **asdict(self.images), "size": self.data.size})
        )
        return settings


def with_defaults(cell: Cell, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a record, with the defaults of settings that did not exist when it was made."""
    return {**Task(cell, DataSet(cell.data, "."), Images(), cell.attack, Settings()).settings, **settings}


def trainer(
    task: Task,
    model: nn.Module,
    device: torch.device | str | None = None,
    *,
    folder: Path | None = None,
    resume: bool = False,
) -> Trainer:
    """The trainer of a cell, which shows no progress bar.

    Args:
        task: the cell, its attack and its settings.
        model: from images in [0, 1] to logits.
        device: where to train, as in `Trainer`.
        folder: for the state of the run, as in `Trainer`.
        resume: go on from that state, as in `Trainer`.

    Raises:
        ValueError: an attack or a setting that cannot be.
    """
    attack = None if task.attack == "none" else task.attack
    settings = {each.name: getattr(task.training, each.name) for each in fields(Settings)}
    return Trainer(
        model,
        task.cell.eps / 255,
        attack=attack,
        folder=folder,
        resume=resume,
        measure_backbone=False,
        device=device,
        progress=False,
        **settings,
    )


# ---------------------------------------------------------------------- from a mapping


def expanded(grid: Mapping[str, Any]) -> list[Task]:
    """The cells that a grid asks for, each once, in the order in which they are run.

    The first seed of all blocks comes first, then the second: a study that is cut has something of everything.

    Args:
        grid: names of axes and settings with their values. Axes: "data" (names, or mappings with the fields of
            `DataSet` and `Images`; a name alone is a path too), "model", "methods", "attacks" (names, or mappings with
            a "name", the "attack" that it stands for, and settings of `fastadv.training.Settings`), "eps" (in units of
            1/255) and "seeds" (how many, from 0, or a list of them). Settings: "judges", those of `Images`, those of
            `fastadv.training.Settings`; "lr" may be a mapping from methods. "blocks" is a list of such mappings, each
            a product of its own; what a block does not say, the grid says for all. A cell that several blocks have is
            judged by all that they ask for.

    Raises:
        TypeError: a value of a wrong type.
        ValueError: an unknown name, a value out of range, nothing to do, or two blocks that want the same cell with
            different settings.
    """
    grid = by_new_names(grid, RENAMED)
    blocks = _several(grid.get("blocks", [{}]))
    common = {name: value for name, value in grid.items() if name != "blocks"}
    if not all(isinstance(block, Mapping) for block in blocks):
        raise ValueError(f"blocks must be a list of grids, got {grid['blocks']!r}")
    blocks = [{**common, **by_new_names(block, RENAMED)} for block in blocks]
    rounds = itertools.zip_longest(*map(_products, blocks), fillvalue=())
    found: dict[Cell, Task] = {}
    for task in itertools.chain.from_iterable(itertools.chain.from_iterable(rounds)):
        there = found.get(task.cell, task)
        if there.data.path != task.data.path:
            raise ValueError(
                f"two data sets are called {task.data.name}, {there.data.path} and {task.data.path}: give them names "
                f"in a YAML file, as {{name: other, path: {task.data.path}}}"
            )
        if (other := differences(there.settings, task.settings)) or there.data != task.data:
            raise ValueError(f"two blocks ask for {task.cell.id} with different {other or 'data'}: say it once")
        found[task.cell] = replace(there, judges=tuple(dict.fromkeys((*there.judges, *task.judges))))
    names = Counter(cell.id for cell in found)
    for cell in found:
        if names[cell.id] > 1:
            raise ValueError(
                f"two cells would be called {cell.id}: give the data sets other names, or budgets that are not so close"
            )
    return list(found.values())


def differences(one: Mapping[str, object], other: Mapping[str, object]) -> str:
    """In words, what differs between two mappings; empty where nothing does."""
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return ", ".join(f"{name} ({one.get(name)}, {other.get(name)})" for name in names)


def _products(block: Mapping[str, Any]) -> list[list[Task]]:
    """A block's cells, seed by seed."""
    known = [name for kind in (Images, Settings) for name in _names(kind) if name not in _AXES_OF]
    _check_names("the grid", block, ["data", *_AXES, "judges", *known])
    if "data" not in block:
        raise ValueError("the grid names no data")
    axes = {name: _several(block.get(name, default)) for name, default in _AXES.items() if name != "seeds"}
    for method in axes["methods"]:
        _check_name("method", method, (*METHODS, SCRATCH))
    judges = tuple(_several(block.get("judges", ())))
    for judge in judges:
        _check_name("judge", judge, JUDGES)
    judges = tuple(judge for judge in judges if judge not in ALWAYS)
    order = (_several(block["data"]), *(axes[name] for name in ("model", "eps", "methods", "attacks")))
    return [
        [_task(block, seed, judges, *chosen) for chosen in itertools.product(*order)]
        for seed in _seeds(block.get("seeds", _AXES["seeds"]))
    ]


def _task(
    block: Mapping[str, Any],
    seed: int,
    judges: tuple[str, ...],
    data_set: object,
    model: object,
    eps: object,
    method: str,
    attacked: object,
) -> Task:
    data, images = _data(data_set, block)
    name, attack, changes = _attack(attacked)
    cell = Cell(data.name, data.classes, str(model), method, name, _eps(eps), seed)
    training = _training(cell, {**block, **changes})
    if attack == "none" and (own := [name for name, value in training.attack.items() if value is not None]):
        raise ValueError(
            f"the attack none has no {' and no '.join(own)}: give it to the attacks that have it, as {{name: mine, "
            f"attack: pgd, {own[0]}: {training.attack[own[0]]}}}"
        )
    task = Task(cell, data, images, attack, training, judges)
    trainer(task, nn.Identity())  # refuses wrong settings before any cell runs
    return task


def _data(given: object, block: Mapping[str, Any]) -> tuple[DataSet, Images]:
    entry = {"name": name_of(Path(given)), "path": given} if isinstance(given, str) else given
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str) or not entry["name"]:
        raise ValueError(f"data are names, paths that end in a name, or mappings with a name, got {given!r}")
    _check_names(f"the data set {entry['name']}", entry, [*_names(DataSet), *_names(Images)])
    chosen = {name: entry[name] for name in _names(DataSet) if entry.get(name) is not None}
    chosen = {"path": entry["name"], **chosen}
    if "classes" in chosen:
        chosen["classes"] = _classes(entry["name"], chosen["classes"])
    images = {name: {**block, **entry}[name] for name in _names(Images) if name in {**block, **entry}}
    return DataSet(**chosen), Images(**images)


def _classes(data: str, given: object) -> str:
    """The classes of a data set as `class_list` takes them. A text is so already; an entry of a list is one class."""
    if isinstance(given, str):
        return given
    entries = _several(given)
    for entry in entries:
        if type(entry) is not int and not (isinstance(entry, str) and entry):
            raise ValueError(
                f"the classes of {data} are names or labels, got {entry!r}: put a name that YAML takes for something "
                "else in quotes"
            )
    return ",".join(map(_listed, entries))


def _listed(entry: int | str) -> str:
    """A class as a list in a text has it: in quotes where it would else be cut or stripped, or be several labels."""
    text = str(entry)
    as_it_is = not set(text) & set(',"') and text == text.strip() and not isinstance(class_list(text)[0], range)
    return text if as_it_is else '"' + text.replace('"', '""') + '"'


def name_of(path: Path) -> str:
    """The name of a data set by its path; empty where it has none, as . and .. have none."""
    return path.stem if path.suffix in (".npz", ".parquet") else path.name if path.name != ".." else ""


def _attack(given: object) -> tuple[str, str, dict[str, Any]]:
    """The name of an attack in the results, the trainer's, and changes to the settings of the grid."""
    if isinstance(given, str):
        return given, given, {}
    if not isinstance(given, Mapping) or not all(isinstance(given.get(name), str) for name in ("name", "attack")):
        raise ValueError(f"attacks are names, or mappings with a name and an attack, got {given!r}")
    _check_own_name(given["name"], given["attack"])
    changes = {name: value for name, value in given.items() if name not in ("name", "attack")}
    changes = by_new_names(changes, RENAMED)
    _check_names(f"the attack {given['name']}", changes, [name for name in _names(Settings) if name not in _AXES_OF])
    return given["name"], given["attack"], changes


def _check_own_name(name: str, attack: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 .+_-]{0,59}", name):
        raise ValueError(
            "the name of an attack has at most 60 letters, digits, blanks and . + _ -, and begins with a letter or a "
            f"digit, got {name!r}"
        )
    for other in ("none", *PRESETS, *FAST):
        if other != attack and _alike(name, other):
            raise ValueError(
                f"{name} reads as the name of the attack {other}, and stands for {attack}: give it another name in the "
                "grid"
            )


def _alike(one: str, other: str) -> bool:
    """Whether two names of attacks read the same, as N-FGSM and nfgsm do."""
    first, second = (re.sub(r"[^a-z0-9]", "", name.lower()) for name in (one, other))
    return first == second


def _training(cell: Cell, block: Mapping[str, Any]) -> Settings:
    chosen = {name: block[name] for name in _names(Settings) if name in block and name != "lr"}
    method = "full" if cell.method == SCRATCH else cell.method
    rate = block.get("lr")
    if isinstance(rate, Mapping):
        _check_names("lr", rate, (*METHODS, SCRATCH))
        rate = rate.get(cell.method)
    return Settings(**chosen, lr=rate, method=method, seed=cell.seed)


def _eps(given: object) -> float:
    if isinstance(given, str) and "_" not in given:  # Python reads 1_0 as 10
        given = in_255ths(given)  # "8/255"
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0.5 <= given <= 255:
        raise ValueError(f"eps is a number of 1/255, from 0.5 to 255, got {given!r}")
    return float(given)


def _seeds(given: object) -> list[int]:
    seeds = list(range(given)) if type(given) is int else _several(given)
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"seeds are how many there are, or a list of them, none below 0, got {given!r}")
    return seeds


def _several(given: object) -> list[Any]:
    found = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not found and given != ():
        raise ValueError("a grid has an empty list: nothing would be done")
    return found


def _names(kind: type) -> list[str]:
    return [each.name for each in fields(kind)]


def _check_names(where: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{where} has no setting {name!r}{instead(name, known)}")


def _check_name(kind: str, name: object, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown {kind} {name!r}{instead(name, known)}")


def _safe(text: str) -> str:
    """The text as a part of a file's name. A changed text gets a digest, so that two texts have two names."""
    safe = re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.")[:40]
    plain = re.fullmatch(r"[A-Za-z0-9._-]{1,40}", text) and text == safe
    return safe if plain else f"{safe}.{hashlib.sha256(text.encode('utf-8', 'backslashreplace')).hexdigest()[:6]}"
