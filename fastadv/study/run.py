"""Runs the cells of a study on one machine: one after another, or several at a time."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from fastadv.files import write_atomically
from fastadv.study import cells
from fastadv.study.cells import Outcome, Site
from fastadv.study.cost import cost_of
from fastadv.study.files import ERROR, GRID, Record, cell_folder, finished, read_grid
from fastadv.study.grid import Cell, DataSet, Task, differences, expanded
from fastadv.study.images import NAMED, preprocessing_of
from fastadv.study.together import FOUND, check, check_together

logger = logging.getLogger("fastadv")


def pending(tasks: Sequence[Task], folder: Path) -> list[Task]:
    """The cells that must still be run, or judged by more judges, in their order.

    Args:
        tasks: the cells of the grid.
        folder: the study's folder.

    Raises:
        FormatError: another version of fastadv wrote a file in the folder.
        ValueError: a cell in the folder was made with other settings, images, weights or functions, or is damaged; or a
            judge is missing, and the weights of the cell were not kept.
    """
    records = {Cell(**record["cell"]).id: record for record in finished(folder)}
    done = [task for task in tasks if task.cell.id in records]
    models_here = {model: cells.model_here(model) for model in dict.fromkeys(task.cell.model for task in done)}
    for task in done:
        check(task, records[task.cell.id])
        _check_model(task, records[task.cell.id], models_here[task.cell.model])
    check_together([*records.values(), *({"cell": asdict(task.cell), "settings": task.settings} for task in tasks)])
    left = []
    for task in tasks:
        record = records.get(task.cell.id)
        if record is None:
            left.append(task)
            continue
        absent = cells.missing(task, record)
        if absent and not (cell_folder(folder, task.cell.id) / cells.WEIGHTS).exists():
            raise ValueError(
                f"the finished cell {task.cell.id} has no verdicts of {', '.join(absent)}, which the grid asks for, "
                "and its weights were not kept: move its folder out of cells to run it again, or choose another --out"
            )
        if absent:
            left.append(task)
        else:
            cells.clean(folder, task.cell.id)  # a process that was killed right at its end has left its work
    return left


def _check_model(task: Task, record: Record, here: Mapping[str, str]) -> None:
    """Refuse a model whose file, or whose function's source, is not what a finished cell was made from."""
    for name, digest in here.items():
        if record["settings"].get(name, digest) != digest:  # an older record does not have all of them
            raise ValueError(
                f"the finished cell {task.cell.id} and this machine have different {FOUND[name]} under the name "
                f"{task.cell.model}: put back what the cell was made from, give the new one another name, or choose "
                "another --out"
            )


def check_data(tasks: Sequence[Task], left: Sequence[Task], folder: Path) -> None:
    """Refuse other data under the name of a set whose cells are all finished.

    Where a cell of the set is left, the images are compared when it runs: the set may have moved to another folder.

    Args:
        tasks: the cells of the grid.
        left: those that must still be run.
        folder: the study's folder, with the grid that the study had before.

    Raises:
        ValueError: the grid of the folder has another path or other columns for a set.
    """
    try:
        before = {task.cell: task.data for task in expanded(read_grid(folder / GRID))}
    except (FileNotFoundError, TypeError, ValueError):  # none yet, or one of another version
        return
    loaded = {(task.cell.data, task.cell.classes) for task in left}
    for task in tasks:
        set_, made = (task.cell.data, task.cell.classes), before.get(task.cell, task.data)
        if set_ not in loaded and (other := differences(_place(made), _place(task.data))):
            count = sum((each.cell.data, each.cell.classes) == set_ for each in tasks)
            raise ValueError(
                f"{task.data.name} was other data when its {count} finished cells were made, and differs in {other}: "
                "give the new data another name, or choose another --out"
            )


def _place(data: DataSet) -> dict[str, object]:
    path = data.path if data.path in NAMED else Path(data.path)  # a is ./a, but digits is not ./digits
    return {"path": path, "image_column": data.image_column, "label_column": data.label_column}


def check_possible(tasks: Sequence[Task]) -> None:
    """Refuse cells that cannot run, before the first one does.

    Raises:
        FileNotFoundError: a model is not there; as `fastadv.models.source`.
        ImportError: as `fastadv.models.source`.
        ValueError: as `fastadv.models.source`; or the model takes images of another size; or the attack is not one to
            train with.
    """
    for given, model in dict.fromkeys((task.data, task.cell.model) for task in tasks):
        preprocessing_of(given, model)
    for task in tasks:
        cost_of(task)


def here(tasks: Sequence[Task], site: Site) -> Iterator[Outcome]:
    """Run the cells one after another, in this process."""
    for task in tasks:
        logger.info("%s:", task.cell.id)
        yield cells.run(task, site)


# ---------------------------------------------------------------------- several processes


@dataclass
class _Worker:
    process: BaseProcess
    pipe: "connection.Connection[Task, Outcome]"
    task: Task | None = None


def side_by_side(tasks: Sequence[Task], site: Site, processes: int) -> Iterator[Outcome]:
    """Run `processes` cells at a time, each in a process of its own.

    With the device "cuda" the processes take turns with the GPUs: on two GPUs process 2 gets GPU 0 again. Where a
    process dies, for example for lack of memory, its cell has failed and a new process takes its place. Where this
    process dies, the others die too, and the next run of the study resumes their cells.

    Args:
        tasks: the cells.
        site: where and how they are run.
        processes: how many cells run at a time.

    Yields:
        What became of each cell, in the order in which they end.
    """
    left = list(reversed(tasks))
    sites = shared_out(site, min(processes, len(tasks)))
    workers = [_started(each) for each in sites]
    try:
        for worker in workers:
            _give(worker, left)
        while busy := [worker for worker in workers if worker.task]:
            connection.wait([each for worker in busy for each in (worker.pipe, worker.process.sentinel)])
            for i, worker in enumerate(workers):
                if not worker.task:
                    continue
                outcome = _outcome(worker, worker.task, site.folder)
                if outcome is None:
                    continue
                if left and not worker.process.is_alive():
                    workers[i] = worker = _started(sites[i])
                yield outcome
                _give(worker, left)
    finally:
        for worker in workers:
            worker.pipe.close()  # a process that waits for a cell ends
        for worker in workers:
            if worker.task:
                worker.process.terminate()  # it ends after its step, with a checkpoint
            worker.process.join()


def shared_out(site: Site, processes: int) -> list[Site]:
    """The site of each process, with its GPU where the device is "cuda", and how many have the same device."""
    count = torch.cuda.device_count() if site.device == "cuda" else 0
    devices = [f"cuda:{i % count}" if count else site.device for i in range(processes)]
    return [replace(site, device=device, sharing=devices.count(device)) for device in devices]


def _started(site: Site) -> _Worker:
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=_serve, args=(its, site), daemon=True)
    process.start()
    its.close()
    return _Worker(process, mine)


def _give(worker: _Worker, left: list[Task]) -> None:
    worker.task = left.pop() if left else None
    if worker.task:
        worker.pipe.send(worker.task)


def _outcome(worker: _Worker, task: Task, folder: Path) -> Outcome | None:
    """What became of a worker's cell; None while the cell is running."""
    try:
        if worker.pipe.poll():
            return worker.pipe.recv()
    except (EOFError, OSError):
        pass
    if worker.process.is_alive():
        return None
    worker.process.join()
    id, words = task.cell.id, f"its process died (exit code {worker.process.exitcode})"
    write_atomically(cell_folder(folder, id) / ERROR, f"{words}\n".encode())
    return Outcome(id, "failed", words)


def _serve(pipe: "connection.Connection[Outcome, Task]", site: Site) -> None:
    """Run the cells that come through the pipe until it is closed. Ctrl-C ends the parent, which then sends SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        pipe.send(cells.run(task, site))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
