"""How long the cells of a study will take, before they are run."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from statistics import mean

import torch

from fastadv.study.cells import Site, build, machine
from fastadv.study.cost import cost_of, seconds_a_unit, units_of
from fastadv.study.files import finished
from fastadv.study.grid import Cell, Task, trainer
from fastadv.study.images import Parts, parts_of
from fastadv.training import Settings

logger = logging.getLogger("fastadv")

_Kind = tuple[str, str | None, str, str]  # data, classes, model and method: the time of a pass depends on these

# The time of a step of standard training depends on these settings.
_OF_A_STEP = (
    *("method", "head", "rank", "lora_targets", "lr", "batch_size", "grad_accum_steps", "optimizer"),
    *("precision", "compile", "channels_last"),
)


def estimates(tasks: Iterable[Task], site: Site) -> dict[str, float | Exception]:
    """The most seconds that each cell takes: those of a model that no attack fools.

    The cost model gives the number of passes. The time of a pass comes from finished cells with the same data set,
    model and method on such a machine. Where there are none, a step of standard training is timed here.

    Args:
        tasks: the cells.
        site: where and how they are run.

    Returns:
        {id of a cell: seconds, or the error that it would fail with}. Such an error is that images or a model are not
        there, cannot be read, or do not go together with the method.
    """
    timed: dict[_Kind, list[float]] = {}
    failed: dict[_Kind, Exception] = {}
    here = machine(site)
    for record in finished(site.folder):
        made = record["machine"]
        same = all(made.get(name) == here.get(name) for name in ("device", "cpu", "threads", "sharing"))
        if same and "before" not in made:
            timed.setdefault(_kind(Cell(**record["cell"])), []).append(seconds_a_unit(record))
    found: dict[str, float | Exception] = {}
    for task in tasks:
        kind = _kind(task.cell)
        try:
            if kind not in failed:
                parts = parts_of(task, site.data_folder)
                if kind not in timed:
                    timed[kind] = [_measured(task, site, parts)]
        except Exception as error:  # the other cells can run
            failed[kind] = error
        if kind in failed:
            found[task.cell.id] = failed[kind]
            continue
        images = {name: len(getattr(parts, name)[1]) for name in ("train", "val", "test")}
        found[task.cell.id] = mean(timed[kind]) * units_of(task, images, len(parts.classes))
    return found


def _kind(cell: Cell) -> _Kind:
    return cell.data, cell.classes, cell.model, cell.method


def _measured(task: Task, site: Site, parts: Parts) -> float:
    """The seconds of a forward pass of one image: two steps on clean images are taken, and the second one is timed."""
    training = Settings(epochs=2, probe=0, eval_every=0, **{name: getattr(task.training, name) for name in _OF_A_STEP})
    standard = replace(task, attack="none", training=training)
    images = parts.train[0][: training.batch_size]
    labels = torch.arange(len(images)) % len(parts.classes)
    before, level = torch.get_num_threads(), logger.level
    try:
        logger.setLevel(logging.WARNING)  # the two epochs here are not the study's
        torch.set_num_threads(site.threads)
        model = build(task.cell, parts)
        records = trainer(standard, model.on_pixels, site.device).fit((images, labels))
    finally:
        logger.setLevel(level)
        torch.set_num_threads(before)
    seconds: list[float] = [record["train_s"] for record in records if "epoch" in record]
    return seconds[-1] / (len(images) * cost_of(standard)["units"])
