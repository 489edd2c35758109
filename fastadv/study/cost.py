"""What a cell costs: passes an image by the cost model, and seconds by what passes have cost."""

from collections.abc import Iterable, Mapping

from torch import nn

from fastadv.attacks import by_name
from fastadv.attacks.base import Attack
from fastadv.study.grid import ALWAYS, IN_A_ROW, SCRATCH, Task

FROM_END_TO_END = ("full", SCRATCH)


def cost_of(task: Task) -> dict[str, float]:
    """Passes an image and epoch, and their sum in forward passes.

    An attack of K gradients costs K (F + Bx), an update F + B; twice where the loss is on clean images too. A backward
    pass to the input costs a forward pass, one to the weights two. A linear probe needs none through the backbone, and
    what trains a small part of the weights has the gradients of the activations alone: one.

    Returns:
        {"forward", "input_backward", "backward", "units"}.
    """
    gradients = _gradients(task)
    updates = 2 if 0 < task.training.clean_weight < 1 else 1
    backward = {"linear": 0.0, **dict.fromkeys(FROM_END_TO_END, 2.0)}.get(task.cell.method, 1.0)
    return {
        "forward": gradients + updates,
        "input_backward": gradients,
        "backward": updates if backward else 0,
        "units": 2.0 * gradients + updates * (1 + backward),
    }


def _gradients(task: Task) -> int:
    """Of the training attack, of an image."""
    if task.cell.attack == "none":
        return 0
    changes = {name: value for name, value in task.training.attack.items() if value is not None}
    return _passes(by_name(task.cell.attack, nn.Identity(), task.cell.eps / 255, **changes), classes=2)[0]


def _passes(attack: Attack, classes: int) -> tuple[int, int]:
    """Gradients and forward passes of an image that withstands it."""
    gradients, forwards = attack.cost(classes)
    steps = attack.runs(classes) * attack.steps
    return gradients * steps, forwards * steps


def units_of(task: Task, images: Mapping[str, int], classes: int) -> float:
    """Forward passes of a whole cell at most, as if each image withstood all that is asked of it.

    Args:
        images: how many "train", "val" and "test" images there are.
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
    attacks = [by_name(name, nn.Identity(), task.cell.eps / 255) for name in names]
    found = [_passes(attack, classes) for attack in attacks]
    return sum(2.0 * gradients + forwards for gradients, forwards in found)


def seconds_a_unit(record: Mapping) -> float:
    """Of a forward pass of one image, as a finished cell's training had it."""
    epochs = sum("epoch" in each for each in record["records"])
    return record["train_s"] / (epochs * record["images"]["train"] * record["cost"]["units"])
