"""Runs the authors' AutoAttack (Croce & Hein 2020, github.com/fra31/auto-attack) part by part on one of the models.

Only `attack` needs their package, which must be importable as `autoattack`.
"""

import time

import torch

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
ROBUST, MISCLASSIFIED = -1, 0  # verdicts; the others are 1 + the index of the part that fooled the image


class Counted:
    """A model that counts the images it gets: with gradients, and without."""

    def __init__(self, model):
        self.model, self.gradients, self.forwards = model, 0, 0

    def __call__(self, images):
        if torch.is_grad_enabled():
            self.gradients += len(images)
        else:
            self.forwards += len(images)
        return self.model(images)


def parts_for(classes):
    """The parts of AutoAttack for a number of classes: APGD-T needs four logits."""
    return tuple(part for part in PARTS if part != "apgd-t" or classes >= 4)


def attack(model, eps, classes, seed, part, device="cpu"):
    """(the authors' ensemble with this part alone, the counted model that its attacks see)."""
    from autoattack import AutoAttack

    counted = Counted(model)
    made = AutoAttack(counted, norm="Linf", eps=eps, seed=seed, version="standard", device=device, verbose=False)
    made.model = model  # its checks and verdicts are not counted
    made.attacks_to_run = [part]
    made.apgd_targeted.n_target_classes = made.fab.n_target_classes = min(9, classes - 1)
    return made, counted


def run_of(right, seed):
    """A run before its first part; `right` (N,) bool says which images the model classifies correctly."""
    verdicts = [ROBUST if ok else MISCLASSIFIED for ok in right.tolist()]
    return {"seed": seed, "robust": 0, "verdicts": verdicts, "gradients": {}, "forwards": {}, "seconds": {}}


def run_part(model, images, labels, eps, classes, run, part, **batch):
    """Run one part on the images that are not fooled yet, and update the run; `batch`: another batch size than 250."""
    left = (torch.tensor(run["verdicts"], device=labels.device) == ROBUST).nonzero()[:, 0]
    made, counted = attack(model, eps, classes, run["seed"], part, labels.device)
    start = time.perf_counter()
    if len(left):
        _, found = made.run_standard_evaluation(images[left], labels[left], return_labels=True, **batch)
        for index in left[found != labels[left]].tolist():
            run["verdicts"][index] = 1 + PARTS.index(part)
    run["seconds"][part] = round(time.perf_counter() - start, 2)
    run["gradients"][part], run["forwards"][part] = counted.gradients, counted.forwards
    run["robust"] = run["verdicts"].count(ROBUST)
