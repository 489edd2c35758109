"""Compares fastadv's robust accuracy, and its number of gradients, with AutoAttack's stored verdicts.

    python benchmarks/peers/verdicts.py [--models pgd clean] [--seeds 0 1] [--attacks autoattack] --out verdicts.json

The attacks are the default attacks of `evaluate`, or others that are named. The backbone's images are read from the
folder in FASTADV_CIFAR10.
"""

import argparse
import json
import sys
import warnings
from pathlib import Path

import judged
import torch

from fastadv.evaluation import evaluate
from fastadv.evaluation.robustness import ATTACKS

sys.path.append(str(Path(__file__).resolve().parent.parent))

import environment

STORED = environment.ROOT / "benchmarks/results/autoattack"
APGD = ("apgd-ce", "apgd-t")


def beside(name, seeds, attacks):
    """The row of one model; "only_theirs" are samples that the package fooled with both seeds and we did not."""
    model, images, labels, eps = judged.judged(name)
    stored = json.loads((STORED / f"{name}.json").read_text())["runs"]
    theirs = [torch.tensor(run["verdicts"]) >= 0 for run in stored]
    rows = []
    for seed in seeds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report = evaluate(model, (images, labels), attacks, eps=eps, seed=seed, progress=False)
        robust = torch.tensor(report["budgets"][0]["robust"])
        rows.append(
            {
                "seed": seed,
                "robust": int(robust.sum()),
                "gradients": {each["attack"]: each["passes"] for each in report["attacks"]},
                "forwards": {each["attack"]: each["forwards"] for each in report["attacks"]},
                "runs": {each["attack"]: each["runs"] for each in report["attacks"]},
                "only_theirs": (robust & torch.stack(theirs).all(0)).nonzero()[:, 0].tolist(),
                "warnings": report["warnings"],
            }
        )
    return {
        "model": name,
        "eps": eps,
        "images": len(labels),
        "clean": sum(report["clean_correct"]),
        "autoattack": [run["robust"] for run in stored],
        "gradients of autoattack's apgd": [sum(run["gradients"].get(part, 0) for part in APGD) for run in stored],
        "fastadv": rows,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=judged.NAMES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--attacks", nargs="+", default=ATTACKS)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.models:
        rows.append(beside(name, arguments.seeds, arguments.attacks))
        found = [(row["robust"], sum(row["gradients"].values())) for row in rows[-1]["fastadv"]]
        print(name, "AutoAttack leaves", rows[-1]["autoattack"], "fastadv (robust, gradients)", *found, flush=True)
        report = {"part": "verdicts", **environment.facts(), "models": rows}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
