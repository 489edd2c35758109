"""fastadv study: methods, attacks and budgets compared, over data sets and seeds."""

import argparse
import logging
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastadv.commands.arguments import add_device, adder, check_folder, check_outside, model_source
from fastadv.commands.speech import say
from fastadv.commands.values import Listed, budgets_255, names
from fastadv.study.cells import WEIGHTS, Outcome, Site
from fastadv.study.cluster import by_ray
from fastadv.study.estimate import estimates
from fastadv.study.files import ERROR, cell_folder, finished, read_grid, write_grid
from fastadv.study.grid import Task, expanded, name_of
from fastadv.study.images import NAMED
from fastadv.study.retiming import again, chosen
from fastadv.study.run import check_data, check_possible, here, pending, side_by_side
from fastadv.study.writing import check_out, check_packages, write_study

logger = logging.getLogger("fastadv")

# Options that the file of a grid replaces.
GRID = (
    *("data", "classes", "model", "methods", "attacks", "eps", "seeds", "judges", "epochs", "batch_size"),
    *("train_limit", "val_limit", "test_limit"),
)
REPORT_S = 600  # between two reports while cells are run


def add(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.set_defaults(run=run)
    add = adder(parser)
    parser.add_argument("grid", nargs="?", type=Path, help="a YAML file, instead of the options down to --test-limit")
    add(
        "--data",
        names,
        action=Listed,
        help="digits, cifar10, folders of pictures or of parquet files, .npz files: a b or a,b (in double "
        "quotes one with a comma)",
    )
    add("--classes", str, action=Listed, help="labels or names to keep, of a single data set (all if not given)")
    add("--model", help="as for fastadv finetune (default: robust-resnet)")
    add(
        "--methods",
        names,
        action=Listed,
        help="as for fastadv finetune, and scratch: all, from random weights (default: linear full)",
    )
    add("--attacks", names, action=Listed, help="as for fastadv finetune (default: fgsm pgd)")
    add("--eps", budgets_255, action=Listed, help="budgets in units of 1/255: 4 8, 4,8 or 4/255 8/255 (default: 8)")
    add("--seeds", int, help="how many, from 0 (default: 3)")
    add("--judges", names, action=Listed, help="beside clean, fgsm, pgd-10 and pma: pgd-50-10, apgd, autoattack")
    add("--epochs", int, help="passes over the training images, of each cell (default: 20)")
    add("--batch-size", int, help="images of an update (default: 64)")
    for part in ("train", "val", "test"):
        add(f"--{part}-limit", int, help="so many images, the first of an order that is always the same")
    add("--data-folder", Path, help="where the data sets are whose paths are relative")
    add_device(add)
    add("--threads", int, 1, help="of each cell")
    add("--processes", int, 1, help="cells at a time, on this machine")
    add("--ray", metavar="ADDRESS", help="run the cells on a cluster: auto, local or HOST:PORT (needs the extra ray)")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what is done and what is left, and how long it takes"
    )
    add(
        "--times",
        int,
        metavar="N",
        help="run no cell, and train a finished one of each method and attack N times again, one after another, for "
        "the times of the report: let nothing else run meanwhile",
    )
    parser.add_argument("--keep-weights", action="store_true", help="keep a model.safetensors of each cell")
    add("--out", Path, required=True, help="folder for the cells and the report; a study that was cut goes on there")


def run(arguments: argparse.Namespace) -> None:
    _check_environment()
    grid = _grid(arguments)
    _check_places(arguments)
    check_out(arguments.out)
    tasks = expanded(grid)
    for model in dict.fromkeys(task.cell.model for task in tasks):
        model_source(model, trust_code=False)  # a module:function may lie in the working folder
    check_possible(tasks)
    left = pending(tasks, arguments.out)
    check_data(tasks, left, arguments.out)
    data_folder = arguments.data_folder and arguments.data_folder.absolute()
    _check_outside(arguments.out, tasks, data_folder)
    device = str(arguments.device)
    site = Site(arguments.out.absolute(), data_folder, device, arguments.threads, arguments.keep_weights)
    if arguments.dry_run:
        _say_plan(tasks, left, site)
        return
    check_folder(arguments.out)
    check_packages()
    if arguments.times is not None:
        _take_times(arguments, tasks, site)
        return
    if site.keep_weights:
        _say_no_weights(tasks, left, site.folder)
    write_grid(arguments.out, grid)
    if not left:
        say("all cells are finished: the report is written from their files, and no images are read")
    try:
        outcomes = _run(left, site, arguments)
    except KeyboardInterrupt:
        _report(arguments.out)
        raise
    _finish(arguments, tasks, outcomes)


def _check_environment() -> None:
    """Refuse what torchrun and `accelerate launch` set: a record would not say it, or processes would share a cell.

    Raises:
        ValueError: the environment has it.
    """
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision.lower() != "no":
        raise ValueError(
            f"ACCELERATE_MIXED_PRECISION is {precision}, and a study's precision is in the grid, such as precision: "
            "bf16: write it there, and unset the variable"
        )
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("a study runs its cells with --processes or --ray, not under torchrun: leave that out")


def _grid(arguments: argparse.Namespace) -> dict[str, Any]:
    """The grid of the file, or that of the options.

    Raises:
        ValueError: neither, or both.
    """
    given = {name: getattr(arguments, name) for name in GRID if getattr(arguments, name) is not None}
    if arguments.grid is None:
        if "data" not in given:
            raise ValueError("a study needs --data, or the YAML file of a grid")
        classes = given.pop("classes", None)
        if classes is not None:
            if len(given["data"]) > 1:
                raise ValueError("--classes are those of a single data set: write a YAML file, where each has its own")
            (path,) = given["data"]
            given["data"] = [{"name": name_of(Path(path)), "path": path, "classes": classes}]
        return given
    if given:
        options = ", ".join("--" + name.replace("_", "-") for name in given)
        raise ValueError(f"{arguments.grid} says what the cells are: leave out {options}, or write it there")
    return read_grid(arguments.grid)


def _check_places(arguments: argparse.Namespace) -> None:
    for name in ("threads", "processes"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.times is not None:
        if arguments.times < 1:
            raise ValueError(f"--times must be at least 1, got {arguments.times}")
        if arguments.processes > 1 or arguments.ray or arguments.dry_run or arguments.keep_weights:
            raise ValueError("--times trains one cell after another, alone: leave out the other ways to run a study")
    if arguments.ray and arguments.processes > 1:
        raise ValueError("--processes are those of one machine, and --ray has as many as its cluster: leave out one")


def _say_no_weights(tasks: Sequence[Task], left: Sequence[Task], folder: Path) -> None:
    """Warn of finished cells whose weights were not kept."""
    to_run = {task.cell.id for task in left}
    done = [task.cell.id for task in tasks if task.cell.id not in to_run]
    without = [id for id in done if not (cell_folder(folder, id) / WEIGHTS).exists()]
    if without:
        logger.warning(
            "--keep-weights comes too late for %s of the cells, such as %s: move their folders out of cells to train "
            "them again",
            len(without),
            without[0],
        )


def _check_outside(out: Path, tasks: Sequence[Task], data_folder: Path | None) -> None:
    """Refuse a folder within a data set: the study's own folders would become its classes."""
    for path in dict.fromkeys(task.data.path for task in tasks if task.data.path not in NAMED):
        check_outside(out, Path(data_folder or "", path))


def _take_times(arguments: argparse.Namespace, tasks: Sequence[Task], site: Site) -> None:
    """Train cells again for their times, and write the report with them.

    Raises:
        ValueError: no cell is finished.
    """
    cells = chosen(tasks, site.folder)
    if not cells:
        raise ValueError(f"{site.folder} has no finished cell of this grid to take the time of: run the study first")
    for id, seconds in again(cells, site, arguments.times):
        say(f"{id}: trained again in {seconds:.1f} s")
    _report(arguments.out)


def _say_plan(tasks: Sequence[Task], left: Sequence[Task], site: Site) -> None:
    found = estimates(left, site)
    for task in tasks:
        id = task.cell.id
        state, before = "done", ""
        if id in found:
            each = found[id]
            fails = isinstance(each, Exception)
            state = f"would fail, {type(each).__name__}: {each}" if fails else f"{each:.0f} s at most"
            before = " (it failed before)" if (cell_folder(site.folder, id) / ERROR).exists() else ""
        print(f"{id}  {state}{before}")
    seconds = [each for each in found.values() if not isinstance(each, Exception)]
    print(
        f"{len(tasks)} cells, {len(tasks) - len(left)} done; {len(left)} are left, {sum(seconds) / 3600:.2f} "
        "hours at most, one after another"
    )
    if len(seconds) < len(left):
        raise SystemExit(f"fastadv: error: {len(left) - len(seconds)} of {len(tasks)} cells would fail, see above")


def _run(left: Sequence[Task], site: Site, arguments: argparse.Namespace) -> list[Outcome]:
    """Run the cells; print a line for each, and write a report of the finished ones every REPORT_S seconds."""
    outcomes, reported = [], time.monotonic()
    for outcome in _outcomes(left, site, arguments):
        outcomes.append(outcome)
        result = "" if outcome.status == "done" else f"{outcome.status}, "
        say(f"{len(outcomes)}/{len(left)} {outcome.id}: {result}{outcome.words}")
        if time.monotonic() - reported >= REPORT_S and len(outcomes) < len(left):
            try:
                _report(arguments.out)
            except Exception as error:  # the cells go on: the report is written again from their files
                logger.warning("the report could not be written: %s: %s", type(error).__name__, error)
            reported = time.monotonic()
    return outcomes


def _outcomes(left: Sequence[Task], site: Site, arguments: argparse.Namespace) -> Iterator[Outcome]:
    if arguments.ray and left:
        return by_ray(left, site, arguments.ray)
    if arguments.processes > 1:
        return side_by_side(left, site, arguments.processes)
    return here(left, site)


def _report(folder: Path) -> None:
    if next(finished(folder), None):
        write_study(folder)
        say(f"the report is in {folder}")


def _finish(arguments: argparse.Namespace, tasks: Sequence[Task], outcomes: Sequence[Outcome]) -> None:
    """Write the report on the finished cells, and say which are not finished."""
    _report(arguments.out)
    if elsewhere := sum(outcome.status == "elsewhere" for outcome in outcomes):
        say(f"run by other processes: {elsewhere} of the cells; the same command writes the report again with them")
    if failed := [outcome for outcome in outcomes if outcome.status == "failed"]:
        error = cell_folder(arguments.out, failed[0].id) / ERROR
        raise SystemExit(
            f"fastadv: error: {len(failed)} of {len(tasks)} cells failed, such as {failed[0].id} ({failed[0].words}): "
            f"see {error}. The same command tries them again"
        )
