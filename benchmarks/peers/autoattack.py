"""What the authors' AutoAttack (Croce & Hein 2020, github.com/fra31/auto-attack) finds on the judged models.

    python benchmarks/peers/autoattack.py CHECKOUT --models pgd clean --seeds 0 1

CHECKOUT is a clone of theirs. Its standard version, L-inf: the parts follow each other, each on what is left.
Everything is stored in benchmarks/results/autoattack, after each part; `tests/test_peers.py` reads it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import judged
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))

import environment

from fastadv.files import write_atomically

RESULTS = environment.ROOT / "benchmarks/results/autoattack"
PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
ROBUST, MISCLASSIFIED = -1, 0  # in a verdict; else 1 + the index of the part that fooled it first


class Counted:
    """A model that counts the images it is shown: those of which a gradient is taken, and the others."""

    def __init__(self, model):
        self.model, self.gradients, self.forwards = model, 0, 0

    def __call__(self, images):
        if torch.is_grad_enabled():
            self.gradients += len(images)
        else:
            self.forwards += len(images)
        return self.model(images)


def parts_for(classes):
    """All but APGD-T, whose loss takes the four largest logits, where there are fewer."""
    return tuple(part for part in PARTS if part != "apgd-t" or classes >= 4)


def attack(model, eps, classes, seed, part):
    """Their ensemble of this part alone, and the model as its attacks see it."""
    from autoattack import AutoAttack

    counted = Counted(model)
    made = AutoAttack(counted, norm="Linf", eps=eps, seed=seed, version="standard", device="cpu", verbose=False)
    made.model = model  # its checks and verdicts do not count
    made.attacks_to_run = [part]
    made.apgd_targeted.n_target_classes = made.fab.n_target_classes = min(9, classes - 1)
    return made, counted


def run_part(model, images, labels, eps, classes, run, part):
    """One part on what is left of a run, which it updates."""
    left = (torch.tensor(run["verdicts"]) == ROBUST).nonzero()[:, 0]
    made, counted = attack(model, eps, classes, run["seed"], part)
    start = time.perf_counter()
    if len(left):
        _, found = made.run_standard_evaluation(images[left], labels[left], return_labels=True)
        for index in left[found != labels[left]].tolist():
            run["verdicts"][index] = 1 + PARTS.index(part)
    run["seconds"][part] = round(time.perf_counter() - start, 1)
    run["gradients"][part], run["forwards"][part] = counted.gradients, counted.forwards
    run["robust"] = run["verdicts"].count(ROBUST)


def facts_of(name, checkout):
    """The model, its images and budget, and what a file says of them."""
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
    """A line for each fact and run."""
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
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="these alone, in their order")
    args = parser.parse_args()
    sys.path.insert(0, str(args.checkout.resolve()))  # before this folder, which has a module of that name
    for name in args.models:
        model, images, labels, right, result = facts_of(name, args.checkout.resolve())
        start = [ROBUST if ok else MISCLASSIFIED for ok in right.tolist()]
        counts = ("gradients", "forwards", "seconds")
        runs = [{"seed": seed, "robust": 0, "verdicts": [*start], **{c: {} for c in counts}} for seed in args.seeds]
        for part in parts_for(result["classes"]):
            for run in runs if part in args.parts else ():
                run_part(model, images, labels, result["eps"], result["classes"], run, part)
                save(result, runs)
                print(f"{name}, seed {run['seed']}, {part}: {run['robust']} of {len(labels)} left", flush=True)


if __name__ == "__main__":
    main()
