"""What a cell costs: passes an image by the cost model, and seconds by what passes have cost."""

from collections.abc import Iterable, Mapping

from torch import nn

from fastadv.attacks import create_attack
from fastadv.study.files import Record
from fastadv.study.grid import ALWAYS, IN_A_ROW, Task
from fastadv.training.cost import fresh_share, passes
from fastadv.training.fast.cached import Cached


def cost_of(task: Task) -> dict[str, float]:
    """Passes an image and epoch by the cost model of `fastadv.training.cost`, and their sum in forward passes.

    Returns:
        {"forward", "input_backward", "backward", "units"}.

    Raises:
        ValueError: an attack whose cost is not known.
    """
    training = task.training
    steps = training.steps if task.attack == "pgd" else None
    found = passes(task.attack, training.method, steps=steps, fresh=_fresh(task), clean=0 < training.clean_weight < 1)
    names = ("forward", "input_backward", "backward")
    return dict(zip(names, found, strict=True)) | {"units": found.total}


def _fresh(task: Task) -> float:
    """The share of images that the attacks stale and cached give a fresh FGSM, over all epochs."""
    training = task.training
    if training.price is not None:
        return fresh_share(training.price, training.method, clean=training.clean_weight > 0)
    refresh = Cached.REFRESH if task.attack == "cached" and training.refresh is None else training.refresh
    return 0.0 if refresh is None else (1 + (training.epochs - 1) / refresh) / training.epochs


def units_of(task: Task, images: Mapping[str, int], classes: int) -> float:
    """Forward passes of a whole cell at most, as if each image withstood all that is asked of it.

    Args:
        task: the cell.
        images: how many "train", "val" and "test" images there are.
        classes: how many there are.
    """
    epochs = sum(stage.epochs for stage in task.training.stages)
    every = task.training.eval_every
    evaluations = epochs // every if every else 1
    chosen = _judging(["pgd-10"], task, classes)
    final = _judging(["pgd-10", "pma"], task, classes)
    parts = dict.fromkeys(part for name in (*ALWAYS, *task.judges) for part in IN_A_ROW.get(name, [name]))
    judged = _judging(parts, task, classes)
    training = epochs * images["train"] * cost_of(task)["units"]
    return training + images["val"] * (evaluations * chosen + final) + images["test"] * judged


def _judging(names: Iterable[str], task: Task, classes: int) -> float:
    """Forward passes of an image that withstands these attacks."""
    total = 0.0
    for name in names:
        attack = create_attack(name, nn.Identity(), task.cell.eps / 255)
        gradients, beside = attack.cost(classes)
        total += attack.runs(classes) * (attack.steps * (1 + gradients + beside) + 1)
    return total


def seconds_a_unit(record: Record) -> float:
    """The seconds of a forward pass of one image in the training of a finished cell."""
    epochs = sum("epoch" in each for each in record["records"])
    seconds: float = record["train_s"] / (epochs * record["images"]["train"] * record["cost"]["units"])
    return seconds
