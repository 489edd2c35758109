"""A study by Ray on two workers, one of which is killed, has the verdicts and records of a study without Ray.

    python tests/study/ray_study.py

It needs the extra ray, and is a step of CI, not of `make test`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray

sys.path += [str(Path(__file__).resolve().parents[1] / name) for name in ("study", "training")]

from fitted import timeless
from test_study import SMALL, records, write_set

from fastadv import cli

GRID = SMALL + "checkpoint_s: 0\n"
WORDS = [sys.executable, "-m", "fastadv", "study", "grid.yaml", "--device", "cpu", "--out"]


def kill_a_worker(folder):
    """Kill the process that has a cell, as soon as its training has a state."""
    while True:
        for owner in folder.glob("cells/*/cell.owner"):
            try:
                if any(owner.with_name("train").glob("state/*.json")):
                    os.kill(json.loads(owner.read_text())["pid"], signal.SIGKILL)
                    return owner.parent.name
            except (OSError, ValueError):  # the cell has just ended
                pass
        time.sleep(0.002)


def main(folder):
    os.chdir(folder)
    write_set(folder / "colours.npz", 1)
    (folder / "grid.yaml").write_text(GRID)
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    address = ray.get_runtime_context().gcs_address
    with subprocess.Popen([*WORDS, "by-ray", "--ray", address], stdout=subprocess.PIPE, text=True) as study:
        killed = kill_a_worker(folder / "by-ray")
        said, _ = study.communicate(timeout=300)
    assert study.returncode == 0, said
    assert said.count(": clean ") == 8, said
    ray.shutdown()
    cli.main(["-q", *WORDS[3:], "alone"])
    assert timeless(records(folder / "by-ray")) == timeless(records(folder / "alone"))
    print(f"eight cells by two workers of Ray are those of one process, the killed one too: {killed}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder).resolve())
