"""What each part of AutoAttack costs outside the model: ours over the authors' (Croce & Hein 2020).

    OMP_NUM_THREADS=1 python benchmarks/peers/own_time.py CHECKOUT [--out own-time.json]

CHECKOUT is a clone of github.com/fra31/auto-attack. The model is the mean of each channel and a linear layer; no attack
fools it. It times its own forward and backward passes, and this time is subtracted for every contender. In each round
their attack, our call and our evaluation run in turns. A figure is the median of the rounds' ratios. The windows of
Square have the size that they have in the middle of its 5000 queries.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

from fastadv.attacks import APGD, APGDL2, FAB, FABL2, Square, SquareL2
from fastadv.evaluation import evaluate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from environment import facts

STEPS, QUERIES, MIDDLE = 100, 300, 0.8 / 32
BUDGETS = {"Linf": 8 / 255, "L2": 0.5}
OURS = {
    "apgd-ce": ((APGD, APGDL2), {"steps": STEPS}),
    "apgd-t": ((APGD, APGDL2), {"steps": STEPS, "loss": "targeted_dlr", "target_classes": 1}),
    "fab-t": ((FAB, FABL2), {"steps": STEPS, "target_classes": 1}),
    "square": ((Square, SquareL2), {"n_queries": QUERIES, "p_init": MIDDLE}),
}


class MeanAndLinear:
    """A model of 3 x 32 x 32 pixels and 10 classes; `seconds` is the time of its passes."""

    def __init__(self):
        torch.manual_seed(0)
        self.weight, self.bias, self.seconds = 0.01 * torch.randn(3, 10), torch.eye(10)[0] * 5, 0.0

    def __call__(self, images):
        self.start()
        logits = images.mean((2, 3)) @ self.weight + self.bias
        self.stop()
        if logits.requires_grad:
            logits.register_hook(self.start)
            images.register_hook(self.stop)
        return logits

    def start(self, *_):
        self.began = time.process_time()

    def stop(self, *_):
        self.seconds += time.process_time() - self.began


def theirs(part, norm, model):
    from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from autoattack.fab_pt import FABAttack_PT
    from autoattack.square import SquareAttack

    options = {"norm": norm, "eps": BUDGETS[norm], "device": "cpu"}
    if part == "apgd-ce":
        return APGDAttack(model, n_iter=STEPS, **options).perturb
    if part == "apgd-t":
        return APGDAttack_targeted(model, n_iter=STEPS, n_target_classes=1, **options).perturb
    if part == "fab-t":
        return FABAttack_PT(model, n_iter=STEPS, targeted=True, n_target_classes=1, **options).perturb
    # Their number of queries does not include the start.
    return SquareAttack(model, n_queries=QUERIES - 1, p_init=MIDDLE, resc_schedule=False, **options).perturb


def ours(part, norm, model):
    classes, options = OURS[part]
    return classes[norm == "L2"](model, BUDGETS[norm], **options)


def evaluation(part, norm, model):
    def run(images, labels):
        attack = ours(part, norm, model)
        return evaluate(model, (images, labels), [attack], batch_size=len(images), progress=False)

    return run


CONTENDERS = {"theirs": theirs, "call": ours, "evaluation": evaluation}


def milliseconds(made, part, norm, images, labels):
    """The time of a step or a query outside the model."""
    model = MeanAndLinear()
    run = made(part, norm, model)
    start = time.process_time()
    run(images, labels)
    return 1000 * (time.process_time() - start - model.seconds) / (QUERIES if part == "square" else STEPS)


def measured(part, norm, batch, rounds):
    images, labels = torch.rand(batch, 3, 32, 32), torch.zeros(batch, dtype=torch.int64)
    times = {name: [] for name in CONTENDERS}
    for name in [*CONTENDERS] * rounds:
        times[name].append(milliseconds(CONTENDERS[name], part, norm, images, labels))
    ratios = {
        name: statistics.median(a / b for a, b in zip(times[name], times["theirs"], strict=True))
        for name in ("call", "evaluation")
    }
    return {
        **{"part": part, "norm": norm, "batch": batch},
        "milliseconds": {name: round(statistics.median(t), 4) for name, t in times.items()},
        **{name: round(ratio, 3) for name, ratio in ratios.items()},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="a clone of github.com/fra31/auto-attack")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", choices=OURS, default=OURS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.checkout.resolve()))
    warnings.simplefilter("ignore")
    rows = []
    for part in arguments.parts:
        for norm in BUDGETS:
            for batch in (64, 250):  # 250 is the package's batch size
                rows.append(measured(part, norm, batch, arguments.rounds))
                print(*(f"{name} {value}" for name, value in rows[-1].items()), sep=", ", flush=True)
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"part": "own time", "environment": facts(), "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
