"""Decides whether a run may be resumed from a checkpoint: by its fingerprint and its number of epochs."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastadv._warnings import warn
from fastadv.evaluation.identity import Contents, fingerprint, unidentifiable
from fastadv.training.budget import CONSTANT
from fastadv.training.checkpoints import OF_THE_MODEL, OtherRunError
from fastadv.training.foreign import ForeignAttack
from fastadv.training.progress import Progress
from fastadv.training.schedule import lr_factor
from fastadv.training.settings import Settings

if TYPE_CHECKING:
    from fastadv.training.trainer import Trainer

OF_ALL = vars(nn.Module()).keys()  # attributes of every module, among them its parameters and buffers
FREE = ("epochs", "eval_every", "checkpoint_s")  # settings that change no past step; for epochs see `check_epochs`


def run_fingerprint(trainer: "Trainer", model: nn.Module, data: dict[str, object]) -> str:
    """The fingerprint of everything on which the steps so far, and the choice among their weights, depend.

    A warning says where a part cannot be identified: the run cannot be resumed then.

    Args:
        trainer: the trainer of the run.
        model: the model before training, on its device.
        data: the facts about the run's data, as `Parts.facts` returns them.
    """
    settings = {name: v for name, v in asdict(trainer.settings).items() if name not in FREE}
    attacks = {"attack": trainer.attack, "eval_attack": trainer.eval_attack}
    weights = dict(zip(OF_THE_MODEL, (model.state_dict(), model), strict=True))
    run = fingerprint({"eps": trainer.eps, **settings, **attacks, **data, **weights})
    for what in unidentifiable(run):
        warn(f"this run cannot be resumed: {what}")
    return run


def check_epochs(
    at: Progress, settings: Settings, steps: int, before: int, folder: Path, *, by_epochs: bool = False
) -> None:
    """Check the number of epochs of a resumed run, which may differ from the number before.

    A warning says where the steps so far would have had another learning rate, budget or loss with the new number.

    Args:
        at: the progress of the run.
        settings: the settings of the resumed run.
        steps: how many batches an epoch has.
        before: the number of epochs before.
        folder: the folder of the run.
        by_epochs: whether the loss of the attack depends on the number of epochs of the stage.

    Raises:
        OtherRunError: the run has taken more epochs already.
    """
    now, changed = settings.epochs, []
    if before == now:
        return
    done = (at.epoch - at.first_epoch) * steps + at.batch
    if at.stage == len(settings.stages) - 1:  # the number is that of the last stage
        if done > now * steps:
            raise OtherRunError(
                f"the run in {folder} has {math.ceil(done / steps)} epochs behind it, more than the {now} that it is "
                "to have now: choose another folder"
            )
        rates, then = (
            [lr_factor(step, settings.warmup, epochs * steps) for step in range(done)] for epochs in (before, now)
        )
        changed += ["learning rate"] if at.switched or rates != then else []
        changed += ["attack's loss"] if done and by_epochs else []
    taken = at.epoch * steps + at.batch
    changed += ["budget"] if taken and settings.eps_schedule != CONSTANT else []  # which grows over all stages
    if changed:
        warn(
            f"the run was to have {before} epochs and goes on to {now}: the {' and the '.join(changed)} of its {taken} "
            f"steps so far followed {before}, and the result is not that of {now} in one run"
        )


def unsaved(model: nn.Module, attack: object) -> dict[str, tuple[object, object]]:
    """What a model and a callable of the user's keep beside parameters and buffers, which no checkpoint has.

    Args:
        model: the model that trains.
        attack: the training attack; one of fastadv keeps nothing from step to step.

    Returns:
        {name in words: (an object, what shows a change of its contents)}; two of them are compared.
    """
    owners = {f"{name or type(module).__name__} of the model": module for name, module in model.named_modules()}
    contents = Contents((model, *model.modules(), *model.parameters(), *model.buffers()))
    found: dict[str, tuple[object, object]] = {}
    for owner, module in owners.items():
        found |= {f"the buffer {name} of {owner}": (None, b is None) for name, b in module._buffers.items()}
    if isinstance(attack, ForeignAttack):
        owners["the attack"] = getattr(attack.attack, "__self__", attack.attack)
    for owner, held in owners.items():
        # weight_norm and pruning compute an attribute weight from weight_v and weight_orig.
        own = held.named_parameters(recurse=False) if isinstance(held, nn.Module) else ()
        computed = {name.rpartition("_")[0] for name, _ in own}
        for name, value in getattr(held, "__dict__", {}).items():
            if name not in OF_ALL and name not in computed:
                found[f"{name} of {owner}"] = contents.of(value)
    return found


def frozen_sums(model: nn.Module) -> dict[str, tuple[object, object]]:
    """The sums of the parameters that do not train, in the form of `unsaved`: no step of the optimizer changes them."""
    still = ((name, p) for name, p in model.named_parameters() if not (p.requires_grad or is_lazy(p)))
    return {
        f"{name}, which does not train and is no buffer": (None, repr(float(p.detach().sum(dtype=torch.float64))))
        for name, p in still
        if p.is_floating_point() and p.layout == torch.strided and not p.is_meta
    }


def warn_of_unsaved(before: dict[str, tuple[object, object]], after: dict[str, tuple[object, object]]) -> bool:
    """Warn of what a step changed and no checkpoint has, and say whether there is any.

    Args:
        before: what `unsaved` and `frozen_sums` returned.
        after: likewise, after the step.
    """
    old = {name: before.get(name, (None, None)) for name in after}
    changed = [name for name, (kept, sign) in after.items() if kept is not old[name][0] or sign != old[name][1]]
    if changed:
        warn(
            f"a step changed {', '.join(changed[:3])}: no checkpoint has it, and the choice of the best weights leaves "
            "it as it is. A resumed run begins with it anew, and may have another result. Kept are the tensors that "
            "the model has as buffers from the start"
        )
    return bool(changed)
