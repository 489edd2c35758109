"""The cost of a cell: forward passes by the cost model, and the seconds of a pass from finished cells."""

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch import nn

from fastadv.attacks import create_attack
from fastadv.study.files import Record
from fastadv.study.grid import ALWAYS, IN_A_ROW, Task
from fastadv.training.cost import fresh_share, passes
from fastadv.training.fast import fast_method, is_fast
from fastadv.training.fast.cached import Cached
from fastadv.training.monitor import STEPS


def cost_of(task: Task) -> dict[str, float]:
    """The passes that training takes for one image in an epoch of average cost, by `fastadv.training.cost`.

    Args:
        task: the cell.

    Returns:
        The numbers of passes "forward", "input_backward" and "backward"; and "units", their cost in forward passes.

    Raises:
        ValueError: the cost of the attack is not known.
    """
    training, total = task.training, defaultdict[str, float](float)
    steps = training.steps if task.attack == "pgd" else None
    for stage in training.stages:
        found = passes(task.attack, stage.method, steps=steps, fresh=_fresh(task), clean=0 < training.clean_weight < 1)
        names = ("forward", "input_backward", "backward", "units")
        for name, each in zip(names, (*found, found.total), strict=True):
            total[name] += stage.epochs * each
    epochs = sum(stage.epochs for stage in training.stages)
    return {name: each / epochs for name, each in total.items()}


def _fresh(task: Task) -> float:
    """The share of images, over all epochs, for which the attacks stale and cached take a fresh FGSM."""
    training = task.training
    if training.price is not None:
        return fresh_share(training.price, training.method, clean=training.clean_weight > 0)
    refresh = Cached.REFRESH if task.attack == "cached" and training.refresh is None else training.refresh
    return 0.0 if refresh is None else (1 + (training.epochs - 1) / refresh) / training.epochs


def units_of(task: Task, images: Mapping[str, int], classes: int) -> float:
    """The most forward passes of one image that a whole cell takes: those of a model that no attack fools.

    Args:
        task: the cell.
        images: the numbers of "train", "val" and "test" images.
        classes: the number of classes.

    Returns:
        Training, with the monitor's readings, evaluations and judging together.

    Raises:
        ValueError: the cost of the attack is not known.
    """
    epochs = sum(stage.epochs for stage in task.training.stages)
    every = task.training.eval_every
    evaluations = epochs // every if every else 1
    chosen = _judging(["pgd-10"], task, classes)
    final = _judging(["pgd-10", "pma"], task, classes)
    parts = dict.fromkeys(part for name in (*ALWAYS, *task.judges) for part in IN_A_ROW.get(name, [name]))
    judged = _judging(parts, task, classes)
    training = epochs * images["train"] * cost_of(task)["units"]
    training += epochs * min(task.training.probe, images["train"]) * watching(task)
    return training + images["val"] * (evaluations * chosen + final) + images["test"] * judged


def watching(task: Task) -> float:
    """The forward passes that the monitor takes at each reading for an image of its batch."""
    name, model, eps = task.attack, nn.Identity(), task.cell.eps / 255
    if name == "none":
        return 0.0
    changes = task.training.attack
    attack = (
        fast_method(name, model, eps, changes).attack if is_fast(name) else create_attack(name, model, eps, **changes)
    )
    return 1 + 2 * (STEPS + 2 + attack.steps)  # a gradient is a forward pass, and one backward


def _judging(names: Iterable[str], task: Task, classes: int) -> float:
    """The forward passes that these attacks take on an image that none of them fools."""
    total = 0.0
    for name in names:
        attack = create_attack(name, nn.Identity(), task.cell.eps / 255)
        gradients, beside = attack.cost(classes)
        total += attack.runs(classes) * (attack.steps * (1 + gradients + beside) + 1)
    return total


def seconds_a_unit(record: Record) -> float:
    """The seconds that a forward pass of one image took in the training of a finished cell."""
    epochs = sum("epoch" in each for each in record["records"])
    seconds: float = record["train_s"] / (epochs * record["images"]["train"] * record["cost"]["units"])
    return seconds
