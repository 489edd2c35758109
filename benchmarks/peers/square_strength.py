"""Compares the Square attack with the authors' (github.com/fra31/auto-attack): its strength, and its own time.

    OMP_NUM_THREADS=1 python benchmarks/peers/square_strength.py CHECKOUT

CHECKOUT is a clone of that repository. Strength is the share of scikit-learn's digits that are fooled with the same
number of queries, on a small network that is trained here, for several seeds. Time is in microseconds per query outside
the model, on images that no attack fools. The two attacks run in turns, and the best of three runs counts.
"""

import argparse
import sys
import time

import torch
from sklearn.datasets import load_digits
from torch import nn

from fastadv.attacks import Square, SquareL2

OURS = {"Linf": Square, "L2": SquareL2}
BUDGETS = {"Linf": 0.15, "L2": 1.0}


def theirs(model, norm, eps, queries, seed):
    from autoattack.square import SquareAttack

    # Their number of queries does not include the start.
    options = {"n_queries": queries - 1, "resc_schedule": False, "seed": seed, "device": "cpu"}
    return SquareAttack(model, norm=norm, eps=eps, **options).perturb


def ours(model, norm, eps, queries, seed):
    attack = OURS[norm](model, eps, queries)
    return lambda images, labels: attack(images, labels, seed=seed)


def trained():
    """(a small network, test digits that it classifies correctly, their labels)."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    images, labels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16, torch.from_numpy(labels).long()
    images = images.repeat_interleave(2, 2).repeat_interleave(2, 3)
    convolutions = nn.Conv2d(1, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU()
    model = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(288, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[:1400]), labels[:1400]).backward()
        optimizer.step()
    images, labels = images[1400:], labels[1400:]
    right = model(images).argmax(1) == labels
    return model, images[right], labels[right]


def strength(queries, seeds):
    model, images, labels = trained()
    for norm, eps in BUDGETS.items():
        for name, made in (("ours", ours), ("theirs", theirs)):
            adv = [made(model, norm, eps, queries, seed)(images, labels) for seed in range(seeds)]
            shares = torch.stack([(model(a).argmax(1) != labels).double().mean() for a in adv])
            print(f"{norm} {eps} {queries} queries, {name}: fooled {shares.mean():.4f} +- {shares.std():.4f} a seed")


class Linear:
    """A model that measures its own time: the mean of each channel, then a linear layer."""

    def __init__(self):
        self.weight, self.bias, self.seconds = 0.01 * torch.randn(3, 10), torch.eye(10)[0] * 5, 0.0

    def __call__(self, images):
        start = time.perf_counter()
        logits = images.mean((2, 3)) @ self.weight + self.bias
        self.seconds += time.perf_counter() - start
        return logits


def own_time():
    for norm, (n, size, queries) in ((norm, case) for norm in OURS for case in ((64, 32, 300), (16, 224, 40))):
        images, labels, best = torch.rand(n, 3, size, size), torch.zeros(n, dtype=torch.int64), {}
        for name, made in (("ours", ours), ("theirs", theirs)) * 3:
            model = Linear()
            attack = made(model, norm, BUDGETS[norm] / 5, queries, 0)
            start = time.perf_counter()
            attack(images, labels)
            spent = (time.perf_counter() - start - model.seconds) / queries
            best[name] = min(spent, best.get(name, spent))
        figures = ", ".join(f"{name} {1e6 * spent:.0f} us a query" for name, spent in best.items())
        print(f"{norm} {n} x 3 x {size} x {size}: {figures}, ratio {best['ours'] / best['theirs']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="a clone of github.com/fra31/auto-attack")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()
    sys.path.insert(0, args.checkout)
    strength(args.queries, args.seeds)
    own_time()
