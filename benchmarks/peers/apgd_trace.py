"""Compares the iterates of APGD, and how often it halves its step, with those of the authors' code.

    python benchmarks/peers/apgd_trace.py CHECKOUT

CHECKOUT is a clone of github.com/fra31/auto-attack (Croce & Hein 2020). Both start at the same images, in float64. The
trace of an attack is the sequence of its model's inputs.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from torch import nn

from fastadv.attacks import APGD, APGDL2

STEPS, COUNT = 100, 64
BUDGETS = {"Linf": (APGD, 0.03), "L2": (APGDL2, 0.5)}
OURS = {"ce": "ce", "dlr": "dlr", "dlr-targeted": "targeted_dlr"}


class Watched:
    """A model that keeps its inputs."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def __call__(self, images):
        self.seen.append(images.detach().clone())
        return self.model(images)


def network():
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(10)]
    model = nn.Sequential(*layers)
    model(torch.zeros(1, 3, 12, 12))
    return model.eval().requires_grad_(False)


def theirs(model, norm, eps, loss, images, labels, start, target):
    """The iterates x_0 ... x_STEPS of the authors' code."""
    from autoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    watched = Watched(model)
    options = {"n_iter": STEPS, "norm": norm, "eps": eps, "device": "cpu"}
    if loss == "dlr-targeted":
        attack = APGDAttack_targeted(watched, **options)
        attack.y_target = target
    else:
        attack = APGDAttack(watched, loss=loss, **options)
    attack.init_hyperparam(images)
    attack.attack_single_run(images, labels, x_init=start)
    return watched.seen


def ours(model, norm, eps, loss, images, labels, start, target):
    """Our iterates, and the step length before each step, in eps."""
    watched, lengths = Watched(model), []

    class Traced(BUDGETS[norm][0]):
        def targets(self, logits, labels, seeds=None, given=False):
            found = super().targets(logits, labels, seeds, given)
            return torch.stack((labels, target), 1) if self.compares == "pairs" else found

        def step(self, slots, grad):
            super().step(slots, grad)
            lengths.append(slots.memory["length"].clone())

    attack = Traced(watched, eps, STEPS, loss=OURS[loss], best_iterate=False)
    last = attack(images, labels, x_init=start)
    return [*watched.seen[-STEPS:], last], lengths


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path, help="a clone of github.com/fra31/auto-attack")
    torch.set_default_dtype(torch.float64)  # their code keeps step sizes and losses in the default dtype
    sys.path.insert(0, str(parser.parse_args().checkout.resolve()))
    for seed, (norm, (_, eps)) in enumerate(BUDGETS.items()):
        torch.manual_seed(seed)
        model = network()
        images = torch.rand(COUNT, 3, 12, 12)
        ranked = model(images).argsort(1, descending=True)
        labels, target = ranked[:, 0], ranked[:, 1 + seed]
        start = (images + eps / 30 * torch.randn_like(images)).clamp(0, 1)
        for loss in OURS:
            given = (model, norm, eps, loss, images, labels, start, target)
            their_trace, (our_trace, lengths) = theirs(*given), ours(*given)
            apart = torch.stack([(a - b).abs().amax() for a, b in zip(their_trace, our_trace, strict=True)])
            halvings = sum((a != b).sum() for a, b in itertools.pairwise(lengths))
            print(
                f"{norm}, {loss}: {apart.max():.1e} apart at most, {halvings} halvings of {COUNT} samples", flush=True
            )
            if not apart.max() <= 1e-9:
                first = int((apart > 1e-9).nonzero()[0])
                raise SystemExit(f"not the same from iterate {first} on")


if __name__ == "__main__":
    main()
