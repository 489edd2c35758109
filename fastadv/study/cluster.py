"""Runs the cells of a study on a cluster, with Ray: each cell is a task of Ray's."""

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

RETRIES = 5  # a cell is tried so often again after its worker was lost


def by_ray(tasks: Sequence[Task], site: Site, address: str) -> Iterator[Outcome]:
    """Run the cells on the machines of a cluster, as many at a time as the CPUs and GPUs allow.

    Each cell takes `site.threads` CPUs, and a GPU where `site.device` is one. Where a worker is lost, another one
    resumes its cell from the checkpoint. So all machines must see the study's folder at the same path, as on a network
    disk.

    Args:
        tasks: the cells.
        site: where and how they are run.
        address: the cluster, as `ray.init` takes it: "auto" for the cluster that this machine is in, "local" for a new
            one on this machine alone, or HOST:PORT.

    Yields:
        What became of each cell, in the order in which they end.

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
            except ray.exceptions.RayError as error:  # all retries failed too
                yield Outcome(ids[ready], "failed", f"{type(error).__name__}: {error}")
    finally:
        ray.shutdown()


def _run(task: Task, site: Site, working: Path) -> Outcome:
    """Run a cell in the working folder of the process that began the study.

    Relative paths, and the module of a model of the user's, are looked up from there.
    """
    if working.is_dir():
        os.chdir(working)
    if "" not in sys.path:
        sys.path.append("")
    return cells.run(task, site)


def _check_machines(ray: ModuleType, folder: Path) -> None:
    """Refuse machines that do not see this folder, or have another version of fastadv."""
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
    """What a machine reads in the file `token`, or None, and its version of fastadv."""
    try:
        return token.read_text(), __version__
    except OSError:
        return None, __version__
