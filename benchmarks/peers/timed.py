"""Times fastadv and the authors' AutoAttack on the judged models, on one device, and stores their verdicts.

    python benchmarks/peers/timed.py --device cuda --autoattack CHECKOUT --out timed.json

CHECKOUT is a clone of github.com/fra31/auto-attack; without it only fastadv is measured. Every row is written as soon
as it is measured, and a row that is already in the file is not measured again. A row has the seconds from images on the
device to verdicts on the host, the number of robust images, the gradients and forward passes of single images, and a
verdict for each image: -1 robust, 0 misclassified without an attack, else 1 + the index of the attack that fooled it.

Before it is timed, every contender runs once with attacks of two steps, so that kernels, libraries and compiled models
are loaded. CUDA graphs are captured within the time. The backbone needs FASTADV_CIFAR10; without it, it is left out.
"""

import argparse
import json
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import judged
import standard
import torch

from fastadv.attacks import Ensemble, create_attack
from fastadv.evaluation import evaluate
from fastadv.evaluation.robustness import ATTACKS
from fastadv.files import write_atomically

SLOTS = 256  # near the package's batch size of 250
FAST = {"autocast": torch.bfloat16, "compile": True, "memory_format": torch.channels_last}
LENGTHS = ("steps", "n_queries")
COUNTS = {"gradients": "passes", "forwards": "forwards"}
IN_ROW = ("attack", "seconds", "given", "passes", "forwards", "waste", "latest", "nonfinite_losses")


class Rows:
    """The rows of measurements in a file."""

    def __init__(self, path):
        self._path = path
        self.rows = json.loads(path.read_text())["rows"] if path.exists() else []

    def __contains__(self, key):
        return any((row["model"], row["contender"]) == key and row["done"] for row in self.rows)

    def put(self, row):
        """Add a row, in place of an earlier one with the same names."""
        key = row["model"], row["contender"]
        self.rows = [r for r in self.rows if (r["model"], r["contender"]) != key] + [row]
        lines = ",\n".join(map(json.dumps, self.rows))
        write_atomically(self._path, f'{{"rows": [\n{lines}\n]}}\n'.encode())


def now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def shortened(attacks, steps=2):
    """Limit attacks to this number of steps or queries; return a function that undoes it."""
    lengths = [(a, name, getattr(a, name)) for a in attacks for name in LENGTHS if name in vars(a)]
    for attack, name, _ in lengths:
        setattr(attack, name, steps)
    return lambda: [setattr(*each) for each in lengths]


def attacks_of(names, model, eps, options):
    if names == "autoattack":
        return [attack for _, attack in Ensemble(model, eps=eps, **options).attacks()]
    return [create_attack(name, model, eps, **options) for name in names]


def ours(names, options, slots, model, images, labels, eps, quick):
    """The row of fastadv's evaluation with these attacks."""
    layout = options.get("memory_format", torch.contiguous_format)
    model.to(memory_format=layout)
    attacks = attacks_of(names, model, eps, options)

    def run():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return evaluate(model, (images, labels), attacks, batch_size=slots, progress=False)

    back = shortened(attacks)
    run()
    if not quick:
        back()
    start = now(images.device)
    report = run()
    seconds = now(images.device) - start
    model.to(memory_format=torch.contiguous_format)
    verdicts = [standard.ROBUST if right else standard.MISCLASSIFIED for right in report["clean_correct"]]
    for number, found in enumerate(report["attacks"], 1):
        for sample, fooled in enumerate(found["fooled"]):
            verdicts[sample] = number if fooled else verdicts[sample]
    yield {
        "seconds": seconds,
        "slots": report["settings"]["slots"],
        "robust": verdicts.count(standard.ROBUST),
        **{what: sum(found[key] for found in report["attacks"]) for what, key in COUNTS.items()},
        "attacks": [{key: found[key] for key in IN_ROW} for found in report["attacks"]],
        "masking": report["masking"],
        "verdicts": verdicts,
        "done": True,
    }


def package(batch, model, images, labels, eps, quick):
    """The row of AutoAttack's own package, after each of its parts."""
    with torch.no_grad():
        logits = model(images)
    run = standard.run_of(logits.argmax(1) == labels, seed=0)
    classes = logits.shape[1]
    warm, _ = standard.attack(model, eps, classes, 0, "apgd-ce", images.device)
    warm.run_standard_evaluation(images[:32], labels[:32])
    parts = ("apgd-ce",) if quick else standard.parts_for(classes)
    for part in parts:
        standard.run_part(model, images, labels, eps, classes, run, part, **batch)
        sums = {what: sum(run[what].values()) for what in ("seconds", *COUNTS)}
        yield {**sums, "robust": run["robust"], "parts": run, "verdicts": run["verdicts"], "done": part == parts[-1]}


# The most important contenders come first. The compiled ones take as long as all others.
CONTENDERS = {
    "default": partial(ours, ATTACKS, {}, 128),
    "default, graph": partial(ours, ATTACKS, {"graph": True}, SLOTS),
    "autoattack, graph": partial(ours, "autoattack", {"graph": True}, SLOTS),
    "package, 250 a batch": partial(package, {}),
    "autoattack": partial(ours, "autoattack", {}, SLOTS),
    "pma, graph": partial(ours, ("pma",), {"graph": True}, SLOTS),
    "package, 512 a batch": partial(package, {"bs": 512}),
    "pma": partial(ours, ("pma",), {}, SLOTS),
    "pma, bfloat16 compiled channels_last": partial(ours, ("pma",), FAST, SLOTS),
    "autoattack, bfloat16 compiled channels_last": partial(ours, "autoattack", FAST, SLOTS),
}


def run_here(contender, device, checkout):
    """Whether a contender can run here: graphs and compilation need a GPU."""
    of_a_gpu = "graph" in contender or "compiled" in contender
    return device.type == "cuda" if of_a_gpu else checkout is not None or "package" not in contender


def measured(name, arguments):
    """Yield (contender, row) after each measurement of a model that the file does not have."""
    device = torch.device(arguments.device)
    model, images, labels, eps = judged.judged(name)
    model, images, labels = (t.to(device) for t in (model, images[: arguments.images], labels[: arguments.images]))
    model.requires_grad_(True)  # as its user has it; the package's FAB then computes the weights' gradients too
    for contender, run in CONTENDERS.items():
        if (name, contender) not in arguments.rows and run_here(contender, device, arguments.autoattack):
            for row in run(model, images, labels, eps, arguments.quick):
                yield contender, row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autoattack", type=Path, metavar="CHECKOUT", help="a clone of github.com/fra31/auto-attack")
    parser.add_argument("--models", nargs="+", choices=judged.NAMES, default=("backbone", *judged.TRAINED))
    parser.add_argument("--images", type=int, help="number of images of each model (all)")
    parser.add_argument("--quick", action="store_true", help="attacks of two steps: no figure counts")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.autoattack:
        sys.path.insert(0, str(arguments.autoattack.resolve()))  # this folder has a module of that name
    arguments.rows = Rows(arguments.out)
    for name in arguments.models:
        if name == "backbone" and not os.environ.get("FASTADV_CIFAR10"):
            print("the backbone is left out: FASTADV_CIFAR10 names no folder with CIFAR-10", flush=True)
            continue
        for contender, row in measured(name, arguments):
            arguments.rows.put({"model": name, "contender": contender, "images": len(row["verdicts"]), **row})
            told = f"{row['robust']} left, {row['seconds']:.2f} s, {row['gradients']} gradients"
            print(f"{name}, {contender}: {told}", flush=True)


if __name__ == "__main__":
    main()
