"""A study that is killed again and again. test_study.py runs it as a program, which forks its runs.

    python killed_study.py FOLDER KILLS SEED

FOLDER has grid.yaml and its data. Each run is a fork, and SIGKILL ends all but the last at a random moment. deaths.json
says for each death how many cells were finished, and whether a cell was begun.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from fastadv import cli

torch.set_num_threads(1)


def fork(folder):
    number = os.fork()
    if number:
        return number
    try:
        words = ["-q", "study", folder / "grid.yaml", "--data-folder", folder, "--out", folder / "out"]
        cli.main([*map(str, words), "--device", "cpu"])
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr)
        os._exit(1)


def finished(folder):
    return len(list(folder.glob("out/cells/*/cell.json")))


def main(folder, kills, seed):
    chance, deaths = random.Random(seed), []
    while len(deaths) < kills:
        before, number = finished(folder), fork(folder)
        # The study of eight cells does not end before the last kill, because a run finishes one or two cells at most.
        while finished(folder) == before and not list(folder.glob("out/cells/*/train/state/*.json")):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.3))
        os.kill(number, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(number, 0)[1])
        begun = bool(list(folder.glob("out/cells/*/train/state/*.json")))
        deaths.append({"finished": finished(folder), "begun": begun})
    assert os.waitpid(fork(folder), 0)[1] == 0
    (folder / "deaths.json").write_text(json.dumps(deaths))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
