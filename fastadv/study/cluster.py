"""The cells of a study on a cluster, by Ray: a cell is a task."""

import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from fastadv._extras import require
from fastadv.study import cells
from fastadv.study.cells import Outcome, Site
from fastadv.study.grid import Task
from fastadv.version import __version__

RETRIES = 5  # of a cell whose worker was lost


def by_ray(tasks: Sequence[Task], site: Site, address: str) -> Iterator[Outcome]:
    """Cells on the machines of a cluster, as many at a time as there are threads and GPUs for.

    Each takes `site.threads` CPUs, and a GPU where its device is one. The cell of a lost worker goes on from its
    checkpoint on another one, so that all machines must have the folder at the same path, as on a network's disk.

    Args:
        tasks: the cells.
        site: where and how they are run.
        address: as `ray.init` takes it: "auto" for the cluster of this machine, "local" for a new one on this machine
            alone, or HOST:PORT.

    Raises:
        ConnectionError: there is no such cluster.
        ImportError: Ray is not installed.
        OSError: a machine does not have the folder.
        ValueError: a machine has another version of fastadv.
    """
    ray = require("ray", "ray")
    ray.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        _check_machines(ray, site.folder)
        needs = {"num_cpus": site.threads, "num_gpus": int(site.device.startswith("cuda")), "max_retries": RETRIES}
        remote = ray.remote(**needs)(_run)
        waiting = [remote.remote(task, site, Path.cwd()) for task in tasks]
        ids = {reference: task.cell.id for reference, task in zip(waiting, tasks, strict=True)}
        while waiting:
            (ready,), waiting = ray.wait(waiting)
            try:
                yield ray.get(ready)
            except ray.exceptions.RayError as error:  # its workers were lost again and again
                yield Outcome(ids[ready], "failed", f"{type(error).__name__}: {error}")
    finally:
        ray.shutdown()


def _run(task: Task, site: Site, working: Path) -> Outcome:
    """Run a cell in the working folder of the process that began the study: relative paths and a model's module are
    found from there."""
    if working.is_dir():
        os.chdir(working)
    if "" not in sys.path:
        sys.path.append("")
    return cells.run(task, site)


def _check_machines(ray: ModuleType, folder: Path) -> None:
    """Refuse machines that do not see this folder, or have another fastadv."""
    token = folder / "shared.token"
    token.write_text(said := uuid.uuid4().hex)
    try:
        strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        machines = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        look = ray.remote(num_cpus=0)(_look)
        seen = [
            look.options(scheduling_strategy=strategy(node["NodeID"], soft=False)).remote(token) for node in machines
        ]
        for node, (found, version) in zip(machines, ray.get(seen), strict=True):
            name = node["NodeManagerHostname"]
            if found != said:
                raise FileNotFoundError(
                    f"the machine {name} of the cluster does not have the folder {folder} that this one has: choose an "
                    "--out on a disk that all share, at the same path"
                )
            if version != __version__:
                raise ValueError(f"the machine {name} of the cluster has fastadv {version}, this one {__version__}")
    finally:
        token.unlink(missing_ok=True)


def _look(token: Path) -> tuple[str | None, str]:
    """What a machine reads in the file `token`, and its version of fastadv."""
    try:
        return token.read_text(), __version__
    except OSError:
        return None, __version__
