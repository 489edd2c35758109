"""Stores the verdicts of the authors' AutoAttack (Croce & Hein 2020, github.com/fra31/auto-attack) on the models.

    python benchmarks/peers/autoattack.py CHECKOUT --models pgd clean --seeds 0 1

CHECKOUT is a clone of that repository. AutoAttack's standard version for L-inf is run: each part attacks the images
that no part before it has fooled. The verdicts are stored in benchmarks/results/autoattack after each part;
`tests/benchmarks/test_peers.py` reads them.
"""

import argparse
import json
import sys
from pathlib import Path

import judged
import torch
from standard import PARTS, parts_for, run_of, run_part

sys.path.append(str(Path(__file__).resolve().parent.parent))

import environment

from fastadv.files import write_atomically

RESULTS = environment.ROOT / "benchmarks/results/autoattack"


def facts_of(name, checkout):
    """The model, its images and its budget, as a file of verdicts describes them."""
    model, images, labels, eps = judged.judged(name)
    logits = model(images)
    classes, right = logits.shape[1], logits.argmax(1) == labels
    result = {
        "part": "autoattack",
        "name": name,
        "eps": eps,
        "classes": classes,
        "targets": min(9, classes - 1),
        "weights": judged.digest(model.state_dict().values()),
        "images": judged.digest((images, labels)),
        "clean": int(right.sum()),
        "autoattack": environment.output("git", "-C", checkout, "rev-parse", "HEAD"),
        "torch": torch.__version__,
        "cpu": environment.cpu_name(),
        "threads": torch.get_num_threads(),
    }
    return model, images, labels, right, result


def save(result, runs):
    """Write a file with a line for each fact and each run."""
    lines = [f'"{key}": {json.dumps(value)}' for key, value in result.items()]
    lines.append('"runs": [\n' + ",\n".join(map(json.dumps, runs)) + "\n]")
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    RESULTS.mkdir(exist_ok=True)
    write_atomically(RESULTS / f"{result['name']}.json", text.encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="a clone of github.com/fra31/auto-attack")
    parser.add_argument("--models", nargs="+", choices=judged.NAMES, default=judged.NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="only these parts, in the usual order")
    args = parser.parse_args()
    sys.path.insert(0, str(args.checkout.resolve()))  # before this folder, which has a module of that name
    for name in args.models:
        model, images, labels, right, result = facts_of(name, args.checkout.resolve())
        runs = [run_of(right, seed) for seed in args.seeds]
        for part in parts_for(result["classes"]):
            for run in runs if part in args.parts else ():
                run_part(model, images, labels, result["eps"], result["classes"], run, part)
                save(result, runs)
                print(f"{name}, seed {run['seed']}, {part}: {run['robust']} of {len(labels)} left", flush=True)


if __name__ == "__main__":
    main()
