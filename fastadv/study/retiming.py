"""Trains finished cells again, one after another, for times that no other work lengthened."""

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastadv.study.cells import Site, build, machine
from fastadv.study.files import CELL, Record, cell_folder, read_retimed, write_retimed
from fastadv.study.grid import Cell, Task, trainer
from fastadv.study.images import parts_of
from fastadv.study.results import grouped

logger = logging.getLogger("fastadv")


def chosen(tasks: Iterable[Task], folder: Path) -> list[Task]:
    """The finished cells to train again: of each model and method those of the row and seed with the most attacks.

    They differ in the attack alone, so that the ratios of their times are those of the attacks. A time depends little
    on the data set and eps.

    Args:
        tasks: the cells of the grid, of which the first row of several with as many attacks is taken.
        folder: the study's folder.
    """
    done = [task for task in tasks if (cell_folder(folder, task.cell.id) / CELL).exists()]
    found: list[Task] = []
    for _, group in grouped(done, lambda task: (task.cell.model, task.cell.method)):
        rows = grouped(group, _row_and_seed)
        found += max(rows, key=lambda row: len(row[1]))[1]
    return found


def again(tasks: Sequence[Task], site: Site, times: int) -> Iterator[tuple[str, float]]:
    """Train the cells, each once before the next round, until each has as many times of this machine and code.

    Each training is stored when it ends: a run that was cut goes on with the one that it was at.

    Args:
        tasks: the cells.
        site: where and how they are trained.
        times: how many trainings each is to have.

    Yields:
        (id of a cell, the seconds of a training).
    """
    for count in range(times):
        for task in tasks:
            found = read_retimed(site.folder, task.cell.id)
            here = {"machine": machine(site), "commit": os.environ.get("FASTADV_COMMIT")}
            if found is None or any(found[name] != value for name, value in here.items()):
                found = {**here, "train_s": [], "train_cpu_s": []}  # another machine's or code's are no repetitions
            if len(found["train_s"]) <= count:
                record = _trained(task, site)
                found = found | {name: [*found[name], record[name]] for name in ("train_s", "train_cpu_s")}
                write_retimed(site.folder, task.cell.id, found)
                yield task.cell.id, record["train_s"]


def _row_and_seed(task: Task) -> tuple[str, str | None, float, int]:
    cell: Cell = task.cell
    return cell.data, cell.classes, cell.eps, cell.seed


def _trained(task: Task, site: Site) -> Record:
    """The last record of the training, without the readings and evaluations, whose time does not count.

    The run writes its files as the cell's did, and they are removed.
    """
    task = replace(task, training=replace(task.training, probe=0, eval_every=0))
    folder = cell_folder(site.folder, task.cell.id) / "again"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    before, level = torch.get_num_threads(), logger.level
    try:
        logger.setLevel(logging.ERROR)  # what there is to tell was told at the first training
        torch.set_num_threads(site.threads)
        parts = parts_of(task, site.data_folder)
        model = build(task.cell, parts)
        fitting = trainer(task, model.on_pixels, site.device, folder=folder)
        record: Record = fitting.fit(parts.train)[-1]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        logger.setLevel(level)
        torch.set_num_threads(before)
    return record
