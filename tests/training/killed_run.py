"""A training run that is killed again and again. test_resume.py runs it as a program, which forks its runs.

    python killed_run.py FOLDER KILLS SEED [SETTINGS]

SETTINGS are JSON and replace settings in `train`. The program writes result.json to FOLDER. Each run is a fork, so that
torch is imported once. SIGKILL ends a run at a random moment or inside a write: after a file is written and before it
is renamed, or after the tensors are on the disk and before their checkpoint is. A run takes a few steps at most and
then waits to be killed. So no run ends before that, even if the time that a run takes was measured too long.
"""

import itertools
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from fitted import colours, timeless
from torch import nn

from fastadv.training import Trainer
from fastadv.training.step import TrainStep

torch.set_num_threads(1)


def model():
    """A model with everything that a checkpoint must keep: batch-norm's statistics, dropout's random numbers."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*layers, nn.Linear(128, 3))


def train(folder, resume=True, checkpoint_s=0.0, **changes):
    network = model()
    settings = {"attack": "fgsm-rs", "epochs": 4, "batch_size": 16, "lr": 1e-2, "augment": True, "ema_decay": 0.9}
    settings |= {"lp_ft": 2, "probe": 32, "checkpoint_s": checkpoint_s, "progress": False, "warmup": 3, **changes}
    trainer = Trainer(network, 16 / 255, folder=folder, resume=resume, **settings)
    trainer.fit(colours(96, 1), colours(33, 2), colours(33, 3))
    return network


def fork(folder, changes, before=lambda: None, limit=None):
    """Start a run in a process, which counts its steps in a file and waits after `limit` steps; its id is returned."""
    number = os.fork()
    if number:
        return number
    try:
        apply, taken = TrainStep.apply, itertools.count()

        def counted(step):
            if next(taken) == limit:
                signal.pause()
            with open(folder / "steps", "ab") as file:
                file.write(b".")
            apply(step)

        TrainStep.apply = counted
        before()
        torch.save(train(folder / "run", **changes).state_dict(), folder / "weights.pt")
        os._exit(0)
    except BaseException as error:
        (folder / "error").write_text(repr(error))
        os._exit(1)


def die_inside_a_write(number):
    """Make this process kill itself in place of renaming file number `number`."""
    replace, files = Path.replace, itertools.count(1)

    def deadly(path, target):
        if next(files) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = deadly


def steps(folder):
    path = folder / "steps"
    return path.stat().st_size if path.exists() else 0


def checkpoints(folder):
    return len(list((folder / "run" / "state").glob("*.json")))


def main(folder, kills, seed, changes):
    chance = random.Random(seed)
    whole, cut = folder / "whole", folder / "cut"
    whole.mkdir(), cut.mkdir()
    began = time.perf_counter()
    assert os.waitpid(fork(whole, changes), 0)[1] == 0, (whole / "error").read_text()
    lasted = time.perf_counter() - began

    inside_kills = max(1, kills * 3 // 20)
    # A step writes at least two files, so the next four writes, one of which kills, need two steps.
    limit = (steps(whole) - 2 * inside_kills - 1) // kills
    deaths = []
    while len(deaths) < kills:
        inside = len(deaths) >= kills - inside_kills
        file = chance.randint(1, 4)
        if inside:
            number = fork(cut, changes, lambda file=file: die_inside_a_write(file))
        else:
            number = fork(cut, changes, limit=limit)
            while 2 * len(deaths) + 1 >= kills and not checkpoints(cut):
                time.sleep(0.01)
            time.sleep(lasted * chance.uniform(0.02, 1.6 / kills))
            os.kill(number, signal.SIGKILL)
        status = os.waitpid(number, 0)[1]
        if os.WIFEXITED(status):
            break  # the run ended by itself or failed
        deaths.append({"checkpoints": checkpoints(cut), "inside_a_write": inside, "steps": steps(cut)})
    finished = (cut / "weights.pt").exists() or os.waitpid(fork(cut, changes), 0)[1] == 0
    assert finished, (cut / "error").read_text()
    first, second = (torch.load(part / "weights.pt") for part in (whole, cut))
    logs = [[json.loads(line) for line in (part / "run" / "log.jsonl").open()] for part in (whole, cut)]
    result = {
        "deaths": deaths,
        "same_bits": all(torch.equal(first[name], second[name]) for name in first),
        "same_log": timeless(logs[0]) == timeless(logs[1]),
        "steps": [steps(whole), steps(cut)],
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4]) if sys.argv[4:] else {})
