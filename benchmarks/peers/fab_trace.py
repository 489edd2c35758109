"""Compares FAB with its authors' code (Croce & Hein 2020, github.com/fra31/auto-attack): distances, and its own time.

    OMP_NUM_THREADS=1 python benchmarks/peers/fab_trace.py CHECKOUT

CHECKOUT is a clone of that repository. Both attack a small network, which is trained here on random patterns: towards
target classes (FAB-T), and towards the nearest of all planes (FAB). Compared are, for each image, the distances of the
nearest points that the two attacks find. Steps are timed on a model that takes hardly any time, the mean of the pixels
and a linear layer: so the time is that of everything but the model.
"""

import argparse
import sys
import time

import torch
from torch import nn

from fastadv.attacks import FAB, FABL2

CLASSES, BATCH = 10, 64
EVERYWHERE = {"Linf": (FAB, 1.0), "L2": (FABL2, 100.0)}  # an eps that is larger than every distance


def trained(steps=150):
    """(a network, images that it classifies correctly, their labels)."""
    torch.manual_seed(0)
    patterns = torch.rand(CLASSES, 3, 16, 16)

    def batch(n):
        labels = torch.arange(n) % CLASSES
        return (0.7 * patterns[labels] + 0.3 * torch.rand(n, 3, 16, 16) + 0.2 * torch.randn(n, 3, 16, 16)).clamp(
            0, 1
        ), labels

    model = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(512, CLASSES)),
    )
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(steps):
        images, labels = batch(100)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    images, labels = batch(2 * BATCH)
    right = model(images).argmax(1) == labels
    return model, images[right][:BATCH], labels[right][:BATCH]


def distances(adv, images, norm):
    delta = (adv - images).flatten(1)
    return delta.norm(dim=1) if norm == "L2" else delta.abs().amax(1)


def theirs_towards(model, norm, steps, rank):
    """The authors' attack towards the class of rank `rank`: 1 is the best other class, 0 the nearest of all classes."""
    from autoattack.fab_pt import FABAttack_PT

    attack = FABAttack_PT(model, norm=norm, n_iter=steps, eps=1.0, device="cpu")
    attack.target_class = rank + 1
    return lambda images, labels: attack.attack_single_run(images, labels, is_targeted=rank > 0)


def compare(norm, loss, steps, targets):
    model, images, labels = trained()
    cls, eps = EVERYWHERE[norm]
    adv = cls(model, eps, steps, loss=loss, target_classes=targets)(images, labels)
    assert (model(adv).argmax(1) != labels).all()
    ours = distances(adv, images, norm)
    ranks = [0] if loss == "margin" else range(1, targets + 1)
    found = [theirs_towards(model, norm, steps, rank)(images, labels) for rank in ranks]
    theirs = torch.stack([distances(a, images, norm).where(model(a).argmax(1) != labels, torch.inf) for a in found])
    theirs = theirs.amin(0)
    ratio = ours / theirs
    towards = "the nearest plane" if loss == "margin" else f"{targets} classes"
    print(f"{norm}, {steps} steps towards {towards}, {len(images)} images: our distance over theirs")
    print(f"  median {ratio.median():.5f}, from {ratio.min():.4f} to {ratio.max():.4f}")
    for share in (0.25, 0.5, 0.75):
        eps = theirs.quantile(share).item()
        print(f"  within eps {eps:.5f}: ours {int((ours <= eps).sum())}, theirs {int((theirs <= eps).sum())}")


class MeanAndLinear(nn.Module):
    """A model of 3 x 32 x 32 pixels that takes hardly any time."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.head(x.mean((2, 3)))


def timed(call):
    """The processor time of a call in seconds, which other work on the machine hardly changes."""
    start = time.process_time()
    call()
    return time.process_time() - start


def own_time(norm, steps, repeats):
    torch.manual_seed(0)
    model, images = MeanAndLinear().eval().requires_grad_(False), torch.rand(BATCH, 3, 32, 32)
    labels = model(images).argmax(1)
    cls, eps = EVERYWHERE[norm]
    ours, theirs = cls(model, eps, steps, target_classes=1), theirs_towards(model, norm, steps, 1)
    pairs = [(timed(lambda: ours(images, labels)), timed(lambda: theirs(images, labels))) for _ in range(repeats)]
    own, their = (min(times) * 1000 / steps for times in zip(*pairs, strict=True))
    print(f"{norm}, {BATCH} images of 3 x 32 x 32, ms a step: ours {own:.2f}, theirs {their:.2f}, {own / their:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", help="a clone of github.com/fra31/auto-attack")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--targets", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    sys.path.insert(0, args.checkout)
    for norm in EVERYWHERE:
        own_time(norm, args.steps, args.repeats)
        for loss in ("targeted_margin", "margin"):
            compare(norm, loss, args.steps, args.targets)


if __name__ == "__main__":
    main()
