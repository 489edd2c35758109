"""Runs one cell of a study: trains the model, judges it, and writes its record into its folder."""

import hashlib
import inspect
import json
import os
import platform
import shutil
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch

from fastadv import models
from fastadv._warnings import warn
from fastadv.data.trained import known
from fastadv.files import write_atomically
from fastadv.locks import InUseError, held
from fastadv.models.model import function_at
from fastadv.study.cost import cost_of
from fastadv.study.files import ERROR, Record, cell_folder, finished, read_cell, write_cell
from fastadv.study.grid import ALWAYS, SCRATCH, Cell, Task, differences, trainer
from fastadv.study.images import Parts, parts_of
from fastadv.study.together import check, check_together
from fastadv.study.verdicts import judged, predicted_classes, share
from fastadv.version import __version__

WEIGHTS = "model.safetensors"
MACHINES, BEGUN = "machines.json", "begun.json"
_WORK = ("train", "judged-*", MACHINES, BEGUN, ERROR)


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
            if found is not None:
                check(task, found)  # another process may have made it, of another grid
            if found is None or missing(task, found):
                (folder / ERROR).unlink(missing_ok=True)  # of a run before: this one may be ended without an error
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
            _check_weights(task, folder, found)
            model, record = models.load(folder / WEIGHTS), found
            check_together([found, found | {"settings": found["settings"] | found_here(task, parts)}])
            if parts.judged != found["labels"]:
                raise ValueError(
                    f"the finished cell {task.cell.id} was judged on other test images, or in another order, than "
                    f"{task.data.name} has now: judge it on those, or choose another --out"
                )
        began = time.perf_counter()
        judges = (*ALWAYS, *task.judges) if found is None else missing(task, found)
        network = model.on_pixels.to(site.device)
        verdicts = judged(network, parts.test, judges, task.cell.eps / 255, task.cell.seed, folder)
    record["verdicts"] = record.get("verdicts", {}) | verdicts
    record["judge_s"] = record.get("judge_s", 0.0) + time.perf_counter() - began
    before = record.get("warnings", [])
    of_images = [words for words in parts.warnings if words not in before]
    record["warnings"] = before + of_images + [str(each.message) for each in caught]
    write_cell(site.folder, task.cell.id, record)
    return record


def _trained(task: Task, site: Site, parts: Parts, folder: Path) -> tuple[models.Model, Record]:
    model = build(task.cell, parts)
    record: Record = {"cell": asdict(task.cell), "settings": task.settings | found_here(task, parts)}
    check_together([*finished(site.folder), record])
    if count := known(model.trained_on, parts.test_digests):
        warn(
            f"the model {task.cell.model} was trained on {count} of the {len(parts.test_digests)} test images (about "
            "one new image in 10,000 is taken for such a one)"
        )
    for name in ("train", "val", "test"):
        limit, count = getattr(task.images, f"{name}_limit"), len(getattr(parts, name)[1])
        if limit is not None and count < limit:
            warn(f"{name}_limit is {limit}, and {task.data.name} has {count} such images")
    _check_begun(task, folder)
    machines = _machines(site, folder)
    (folder / WEIGHTS).unlink(missing_ok=True)  # of a training before, whose record was removed
    fitting = trainer(task, model.on_pixels, site.device, folder=folder / "train", resume=True)
    records = fitting.fit(parts.train, parts.val)  # the test images are for the judges alone
    if site.keep_weights:
        model.trained_on += (parts.trained_on,)
        models.save(model, folder / WEIGHTS)
        record["weights_file"] = _digest(folder / WEIGHTS)
    record |= {
        "machine": machines[-1] | ({"before": machines[:-1]} if machines[1:] else {}),
        "images": {name: len(getattr(parts, name)[1]) for name in ("train", "val", "test")},
        "labels": parts.judged,
        "records": records,
        "train_s": records[-1]["train_s"],
        "train_cpu_s": records[-1]["train_cpu_s"],
        "cost": cost_of(task),
    }
    record["classes_predicted"] = len(predicted_classes(model.on_pixels.to(site.device), parts.test))
    if commit := os.environ.get("FASTADV_COMMIT"):  # for developers: their code changes within a version
        record["commit"] = commit
    return model, record


def _check_begun(task: Task, folder: Path) -> None:
    """Refuse to go on with a cut run under other settings, such as more epochs: what it has done would stay."""
    path = folder / BEGUN
    if path.exists() and any((folder / "train").glob("*")):
        other = differences(json.loads(path.read_text()), task.settings)
        if other:
            raise ValueError(
                f"the cell {task.cell.id} was begun with other settings, and differs in {other}: go on with those, or "
                f"remove {folder} to begin it again"
            )
    write_atomically(path, json.dumps(task.settings).encode())


def _check_weights(task: Task, folder: Path, record: Record) -> None:
    """Refuse kept weights that are not those of the record; older records do not say which they were."""
    if record.get("weights_file", found := _digest(folder / WEIGHTS)) != found:
        raise ValueError(
            f"{folder / WEIGHTS} has not the weights that the finished cell {task.cell.id} was judged with: put those "
            "back, or move its folder out of cells to train it again"
        )


def found_here(task: Task, parts: Parts) -> dict[str, str]:
    """The digests of FOUND on this machine."""
    name, shape = task.cell.model, tuple(parts.train[0].shape[1:])
    weights, architecture = _digests(name, parts.classes, shape)
    found = {"contents": parts.contents, "order": parts.order, "weights": weights, "architecture": architecture}
    return found | model_here(name)


def model_here(name: str) -> dict[str, str]:
    """The digest of the file that a model is read from, or of the source of the function that makes it, by FOUND.

    Empty for other models, and where the source is not in a file.
    """
    if Path(name).is_file():
        return {"file": _digest(Path(name))}
    kind, colon, _ = name.partition(":")
    if not colon or kind in ("hf", "timm"):
        return {}
    try:
        return {"source": _digest(Path(inspect.getsourcefile(inspect.unwrap(function_at(name))) or ""))}
    except (OSError, TypeError, ValueError):  # no file has it; or the name is no function's
        return {}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
def _digests(model: str, classes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, str]:
    """Digests of a model: (of its pretrained weights, of the names and shapes of all of its tensors).

    Weights that depend on the seed, as the head's do, are not in the first.
    """
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(models.source(model).build(classes, shape).network.state_dict())
    weights, architecture = hashlib.sha256(), hashlib.sha256()
    for name, tensor in states[0].items():
        words = f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
        architecture.update(words)
        if torch.equal(tensor, states[1][name]):
            weights.update(words)
            weights.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return weights.hexdigest(), architecture.hexdigest()


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
