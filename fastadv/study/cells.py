"""Runs one cell of a study: trains the model, judges it, and writes its record into its folder."""

import hashlib
import json
import os
import platform
import shutil
import time
import traceback
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from fastadv import models
from fastadv.data.trained import known
from fastadv.files import write_atomically
from fastadv.locks import InUseError, held
from fastadv.study.cost import cost_of
from fastadv.study.files import ERROR, Record, cell_folder, finished, read_cell, write_cell
from fastadv.study.grid import ALWAYS, SCRATCH, Cell, Task, differences, trainer, with_defaults
from fastadv.study.images import Parts, parts_of
from fastadv.study.verdicts import judged, share
from fastadv.version import __version__

WEIGHTS = "model.safetensors"
# A record's settings have two entries that no grid has: digests of the images and of the weights that were read.
FOUND = {"contents": "images", "weights": "pretrained weights"}
MACHINES = "machines.json"
_WORK = ("train", "judged-*", MACHINES, ERROR)


@dataclass(frozen=True)
class Site:
    """Where and how cells are run.

    Attributes:
        folder: the study's folder.
        data_folder: where relative paths of data sets begin; None means the working folder, and for cifar10 the default
            folder of `fastadv.data.load`.
        device: the name of a device of PyTorch, such as "cuda".
        threads: the number of CPU threads of a cell; the last bits of its result depend on it.
        keep_weights: whether each cell keeps its model.safetensors.
        sharing: the number of cells that run on the device at a time.
    """

    folder: Path
    data_folder: Path | None = None
    device: str = "cpu"
    threads: int = 1
    keep_weights: bool = False
    sharing: int = 1


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        id: the id of the cell.
        status: "done", "failed", or "elsewhere": another process runs it.
        words: more about it, for people.
    """

    id: str
    status: str
    words: str


def run(task: Task, site: Site) -> Outcome:
    """Run a cell that is not finished, from its last checkpoint if there is one.

    An error ends the cell, not the study: the traceback is written to error.txt in the cell's folder.

    Args:
        task: the cell, and everything that its result depends on.
        site: where and how it is run.

    Raises:
        KeyboardInterrupt: Ctrl-C; the state of the cell is on the disk.
        SystemExit: SIGTERM; likewise.
    """
    id, folder = task.cell.id, cell_folder(site.folder, task.cell.id)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(site.threads)
        with held(folder / "cell", f"the cell {id}"):
            found = read_cell(site.folder, id)
            if found is None or missing(task, found):
                found = _run(task, site, found)
    except InUseError as error:
        return Outcome(id, "elsewhere", str(error))
    except Exception as error:
        write_atomically(folder / ERROR, traceback.format_exc().encode())
        return Outcome(id, "failed", f"{type(error).__name__}: {error}")
    finally:
        torch.set_num_threads(before)
    clean(site.folder, id)
    return Outcome(id, "done", _said(found))


def clean(folder: Path, id: str) -> None:
    """Remove the files that a finished cell needs no more, such as its checkpoints."""
    for path in [path for pattern in _WORK for path in cell_folder(folder, id).glob(pattern)]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def missing(task: Task, record: Record) -> list[str]:
    """The judges of the grid that have not judged a finished cell."""
    return [judge for judge in task.judges if judge not in record["verdicts"]]


def _run(task: Task, site: Site, found: Record | None) -> Record:
    """Train the model, unless `found` has that already; judge it; write and return the record."""
    folder = cell_folder(site.folder, task.cell.id)
    parts = parts_of(task, site.data_folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if found is None:
            model, record = _trained(task, site, parts, folder)
        else:
            model, record = models.load(folder / WEIGHTS), found
            check_together([found, found | {"settings": found["settings"] | found_here(task, parts)}])
        began = time.perf_counter()
        judges = (*ALWAYS, *task.judges) if found is None else missing(task, found)
        network = model.on_pixels.to(site.device)
        verdicts = judged(network, parts.test, judges, task.cell.eps / 255, task.cell.seed, folder)
    record["verdicts"] = record.get("verdicts", {}) | verdicts
    record["judge_s"] = record.get("judge_s", 0.0) + time.perf_counter() - began
    record["warnings"] = record.get("warnings", []) + [str(each.message) for each in caught]
    write_cell(site.folder, task.cell.id, record)
    return record


def _trained(task: Task, site: Site, parts: Parts, folder: Path) -> tuple[models.Model, Record]:
    model = build(task.cell, parts)
    record: Record = {"cell": asdict(task.cell), "settings": task.settings | found_here(task, parts)}
    check_together([*finished(site.folder), record])
    if count := known(model.trained_on, parts.test_digests):
        warnings.warn(
            f"the model {task.cell.model} was trained on {count} of the {len(parts.test_digests)} test images (about "
            "one new image in 10,000 is taken for such a one)",
            stacklevel=2,
        )
    machines = _machines(site, folder)
    fitting = trainer(task, model.on_pixels, site.device, folder=folder / "train", resume=True)
    records = fitting.fit(parts.train, parts.val)  # the test images are for the judges alone
    if site.keep_weights:
        model.trained_on += (parts.trained_on,)
        models.save(model, folder / WEIGHTS)
    record |= {
        "machine": machines[-1] | ({"before": machines[:-1]} if machines[1:] else {}),
        "images": {name: len(getattr(parts, name)[1]) for name in ("train", "val", "test")},
        "labels": parts.judged,
        "records": records,
        "train_s": records[-1]["train_s"],
        "train_cpu_s": records[-1]["train_cpu_s"],
        "cost": cost_of(task),
    }
    if commit := os.environ.get("FASTADV_COMMIT"):  # for developers: their code changes within a version
        record["commit"] = commit
    return model, record


def found_here(task: Task, parts: Parts) -> dict[str, str]:
    """The digests of FOUND, of the images and the weights on this machine."""
    shape = tuple(parts.train[0].shape[1:])
    return {"contents": parts.contents, "weights": _pretrained(task.cell.model, parts.classes, shape)}


def build(cell: Cell, parts: Parts) -> models.Model:
    """The model that a cell starts from. The cell's seed draws the weights of the head; from scratch, all weights."""
    torch.manual_seed(cell.seed)
    shape = tuple(parts.train[0].shape[1:])
    model = models.source(cell.model).build(parts.classes, shape)
    if cell.method != SCRATCH:
        return model
    torch.manual_seed(cell.seed)
    # The function that makes the network is trusted: the user gave the model's name.
    network = models.construct(model.architecture, len(parts.classes), trust_code=True)
    return models.Model(network, model.preprocessing, model.architecture, model.classes, pretrained=False)


@lru_cache(maxsize=8)
def _pretrained(model: str, classes: tuple[str, ...], shape: tuple[int, ...]) -> str:
    """A digest of a model's pretrained weights. Weights that depend on the seed, as the head's do, are left out."""
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(models.source(model).build(classes, shape).network.state_dict())
    digest = hashlib.sha256()
    for name, tensor in states[0].items():
        if torch.equal(tensor, states[1][name]):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------------- what belongs together


def check(task: Task, record: Record) -> None:
    """Refuse a finished cell that is not what the grid asks for.

    A setting that the record lacks did not exist yet when the cell was made, and had its default.

    Raises:
        ValueError: a setting differs; the message says which.
    """
    settings = {name: value for name, value in record["settings"].items() if name not in FOUND}
    there = {**with_defaults(task.cell, settings), **record["cell"]}
    if other := differences(there, {**task.settings, **asdict(task.cell)}):
        raise ValueError(
            f"the finished cell {task.cell.id} was made with other settings than the grid asks for, and differs in "
            f"{other}: choose another --out, or move its folder out of cells"
        )


def check_together(records: Iterable[Record]) -> None:
    """Refuse cells that use one name for different images, or for different pretrained weights.

    Args:
        records: the cells' records, of which "cell" and "settings" are compared.

    Raises:
        ValueError: two cells do not belong in one study.
    """
    seen: dict[tuple[str | None, ...], tuple[str, str]] = {}
    for record in records:
        cell = Cell(**record["cell"])
        names = {"contents": (cell.data, cell.classes), "weights": (cell.model, cell.data, cell.classes)}
        for what, name in names.items():
            value, other = seen.setdefault((what, *name), (record["settings"][what], cell.id))
            if value != record["settings"][what]:
                raise ValueError(
                    f"the cells {other} and {cell.id} have different {FOUND[what]} under the name {name[0]}: they do "
                    "not belong in one study. Rename one, or choose another --out"
                )


def _said(record: Record) -> str:
    shares = ", ".join(f"{judge} {share(said):.1%}" for judge, said in record["verdicts"].items())
    count = len(record["warnings"])
    noted = f", {count} warning{'s' * (count > 1)} (see its cell.json)" if count else ""
    return f"{shares}; trained in {record['train_s']:.1f} s{noted}"


def machine(site: Site) -> dict[str, str | int]:
    """The facts about this machine on which the times, and the last bits of results, depend."""
    device = torch.device(site.device)
    named: dict[str, str | int] = {"device": device.type}
    if device.type == "cuda":  # of a CPU the processor time counts, which other cells lengthen little
        named = {"device": torch.cuda.get_device_name(device), "sharing": site.sharing}
    return named | {
        "cpu": _cpu(),
        "threads": site.threads,
        "fastadv": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _machines(site: Site, folder: Path) -> list[dict[str, str | int]]:
    """The machines that a cell was trained on, this one last: a cut run may go on at another machine."""
    path = folder / MACHINES
    before, here = json.loads(path.read_text()) if path.exists() else [], machine(site)
    found = [each for each in before if each != here] + [here]
    write_atomically(path, json.dumps(found).encode())
    return found


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
