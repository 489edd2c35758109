"""Two processes that meet errors and have different disks. test_distributed.py runs it as a program.

    python -m torch.distributed.run --nproc_per_node 2 distributed_faults.py FOLDER

FOLDER/RANK stands for the disk of a process and has its photos. Each process writes its outcomes to FOLDER/RANK.json.
"""

import gc
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
from distributed_run import RANK, layer_norm, network
from fitted import colours
from torch import nn

from fastadv import cli, data
from fastadv.data.pictures import Picture
from fastadv.data.share import Share
from fastadv.team import Team
from fastadv.training import Trainer, processes
from fastadv.training.run import Run

torch.set_num_threads(1)
FINETUNE = ("--model", "mlp", "--eps", "8", "--batch-size", "8", "--epochs", "2", "--device", "cpu", "--probe", "0")


images = partial(colours, dtype=torch.float64)


def outcome(action):
    """The result of a call, or its error, as text."""
    try:
        return str(action())
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"


def fit(folder=None, seed=1, norm=layer_norm, mask=None, owners=None, **settings):
    settings = {"epochs": 2, "batch_size": 8, "probe": 0, "measure_backbone": False, **settings}
    model = network(norm)
    model[1].register_buffer("mask", mask)
    trainer = Trainer(model, 16 / 255, folder=folder, progress=False, **settings)
    train, labels = images(40, seed)
    if owners is not None:
        train = Share(train[owners == RANK], owners, Team(RANK, 2))
    records = trainer.fit((train, labels), images(12, 2))
    return [record["epoch"] for record in records if "epoch" in record]


class Skipping(nn.Module):
    """Leaves a layer out: each second time, at random, or for the first time after some updates."""

    def __init__(self, late):
        super().__init__()
        self.layers, self.extra, self.late, self.calls = network(layer_norm), nn.Linear(3, 3).double(), late, 0

    def forward(self, x):
        self.calls += self.training
        left_out = self.calls > 40 if self.late else torch.rand(()) < 0.5
        logits = self.layers(x)
        return logits if self.training and left_out else logits + self.extra(logits)


def fit_skipping(late):
    settings = {"epochs": 10, "batch_size": 8, "probe": 0, "measure_backbone": False, "progress": False}
    records = Trainer(Skipping(late), 16 / 255, attack=None, **settings).fit(images(40, 1))
    return records[-1]["epochs"]


def contents(folder):
    return sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*.*") if path.suffix != ".lock")


def main(top):
    disk, team, told = top / str(RANK), Team(RANK, 2), {}
    told["first"] = outcome(lambda: fit(disk / "run"))
    # Now only the first process has the state, and it cannot read the state.
    state = disk / "run" / "state"
    assert state.exists() == (RANK == 0)
    read, before = Path.read_bytes, contents(disk)
    Path.read_bytes = lambda path: exec('raise OSError("the disk is gone")') if state in path.parents else read(path)
    told["unreadable"] = outcome(lambda: fit(disk / "run", resume=True))
    Path.read_bytes = read
    told["untouched"] = contents(disk) == before
    told["resumed"] = outcome(lambda: fit(disk / "run", epochs=3, resume=True))
    told["in use"] = outcome(lambda: fit(top / "locked"))
    told["other data"] = outcome(lambda: fit(seed=1 + RANK))
    told["other settings"] = outcome(lambda: fit(lr=1e-3 * (1 + RANK)))
    told["other model"] = outcome(lambda: fit(norm=layer_norm if RANK else nn.Identity))
    told["other attack"] = outcome(lambda: fit(attack=None if RANK else "fgsm", probe=8))
    told["other measurement"] = outcome(lambda: fit(measure_backbone=RANK == 0))
    told["other folder"] = outcome(lambda: fit(top / "one" if RANK == 0 else None))
    shared = (Share.of(images(40, 1)[0], team), images(40, 1)[1])
    told["parts"] = [
        Run(Trainer(network(layer_norm), 0.1, batch_size=8), x, None, None).passes.part for x in (shared, images(40, 1))
    ]
    told["skipped layers"] = outcome(lambda: fit_skipping(late=False))
    told["mask"] = outcome(lambda: fit(mask=torch.tensor([1.0 if RANK else -float("inf")])))
    told["all in one"] = outcome(lambda: fit(owners=torch.zeros(40, dtype=torch.int64), method="linear", probe=8))
    told["other pictures"] = outcome(lambda: data.load(disk / "differ", team=team))
    told["damaged picture"] = outcome(lambda: data.load(disk / "damaged", team=team))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = data.load(disk / "damaged", team=team, skip_corrupt=True)
    told["left out"] = [len(loaded.y_train), *(str(each.message) for each in caught)]
    whole = loaded.x_train.whole(torch.device("cpu"))
    torch.save((whole, loaded.y_train), top / f"left-out-{RANK}.pt")
    read, decoded = Picture.read, []
    Picture.read = lambda picture: decoded.append(picture.name) or read(picture)
    arguments = ("finetune", "--data", disk / "photos", *FINETUNE, "--out", disk / "tuned")
    arguments += ("--init", top / "0" / "init.safetensors" if RANK == 0 else "nowhere.safetensors")
    told["finetune"] = outcome(lambda: cli.main([*map(str, arguments)]))
    told["decoded"] = len(set(decoded))
    told["layers skipped late"] = outcome(lambda: fit_skipping(late=True))
    gc.disable()
    fit()
    processes._end()  # what the end of the process calls: threads that are left may abort a finished run
    told["kept"] = sum(isinstance(each, nn.parallel.DistributedDataParallel) for each in gc.get_objects())
    (top / f"{RANK}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    assert os.environ["WORLD_SIZE"] == "2"
    main(Path(sys.argv[1]))
