"""Studies without training: cells in the stored format with random verdicts and records."""

import json

import numpy as np
import pytest

from fastadv.study.grid import Cell

JUDGES = {"clean": 0.9, "fgsm": 0.62, "pgd-10": 0.55, "pma": 0.52}
SECONDS = {"none": 10.0, "fgsm": 17.0, "fgsm-rs": 17.5, "nfgsm": 17.5, "pgd": 58.0}
UNITS = {"none": 3.0, "fgsm": 5.0, "fgsm-rs": 5.0, "nfgsm": 5.0, "pgd": 17.0}


@pytest.fixture
def rng():
    """A generator with a new seed at every run; pytest shows the seed where a test fails."""
    seed = int(np.random.SeedSequence().entropy % 2**32)
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def epochs_of(count, collapse=None, attack=0.6, rng=None):
    """Records of a run that collapses at the epoch `collapse`; the alignment falls one epoch before."""
    noise = (lambda: float(rng.normal() * 0.01)) if rng is not None else (lambda: 0.0)
    found = []
    for epoch in range(count):
        fell = collapse is not None and epoch >= collapse
        near = collapse is not None and epoch >= collapse - 1
        pgd, under = (0.03 if fell else attack - 0.05 + noise()), (0.85 if fell else attack + 0.02 * epoch + noise())
        found.append(
            {
                "epoch": epoch,
                "loss": 1.0,
                "train_accuracy": under,
                "train_s": 1.0,
                "probe_pgd": pgd,
                "probe_attack": under,
                "gap": under - pgd,
                "alignment": 0.1 if near else 0.8,
                "abnormal": 0.4 if fell else 0.02,
                "alarm": "catastrophic overfitting: as it is" if fell else None,
                "clean_accuracy": 0.9,
                "robust_accuracy": 0.02 if fell else attack - 0.08 + noise(),
            }
        )
    return found


def record_of(rng, collapse=None, labels="images", judges=JUDGES, images=64, shift=0.0, epochs=5, **cell):
    """The record of a cell; `cell` has the differences from full fine-tuning with FGSM at eps 8."""
    default = {"data": "eurosat", "classes": None, "model": "robust-resnet", "method": "full", "attack": "fgsm"}
    cell = {**default, "eps": 8.0, "seed": 0, **cell}
    hard = np.random.default_rng(list(map(ord, cell["data"]))).random(images)
    level = 0.3 * rng.random(images) + 0.7 * hard
    verdicts = {judge: level < 0.15 + 0.7 * (share + shift) for judge, share in judges.items()}
    return {
        "format": 1,
        "cell": cell,
        "settings": {
            "epochs": epochs,
            "lr": 0.001,
            "contents": f"{labels} of {cell['data']} {cell['classes']}",
            "weights": "w",
        },
        "machine": {"device": "cpu", "cpu": "a CPU", "threads": 1, "fastadv": "1", "torch": "2", "python": "3"},
        "images": {"train": 3000, "val": 300, "test": images},
        "labels": labels,
        "records": [
            {"stage": 0, "method": cell["method"]},
            *epochs_of(epochs, collapse, rng=rng),
            {"final": True, "best_epoch": 1, "train_s": 5.0},
        ],
        "verdicts": {judge: "".join("01"[int(v)] for v in right) for judge, right in verdicts.items()},
        "train_s": SECONDS[cell["attack"]],
        "train_cpu_s": SECONDS[cell["attack"]] * (1 + 0.02 * rng.random()),
        "cost": {"forward": 2, "input_backward": 1, "backward": 1, "units": UNITS[cell["attack"]]},
        "judge_s": 1.0,
        "warnings": [],
    }


def write(folder, record):
    path = folder / "cells" / Cell(**record["cell"]).id
    path.mkdir(parents=True, exist_ok=True)
    (path / "cell.json").write_text(json.dumps(record) + "\n")
    return path


def write_grid(folder, grid):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.yaml").write_text(json.dumps({"format": 1, **grid}))  # JSON is YAML
