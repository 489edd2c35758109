"""Decides whether a run may be resumed from a checkpoint: by its fingerprint and its number of epochs."""

import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from fastadv.evaluation.identity import fingerprint, unidentifiable
from fastadv.training.budget import CONSTANT
from fastadv.training.checkpoints import OtherRunError
from fastadv.training.progress import Progress
from fastadv.training.schedule import lr_factor
from fastadv.training.settings import Settings

if TYPE_CHECKING:
    from fastadv.training.trainer import Trainer

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
    weights = {"the model's weights": model.state_dict(), "the model": model}
    run = fingerprint({"eps": trainer.eps, **settings, **attacks, **data, **weights})
    for what in unidentifiable(run):
        warnings.warn(f"this run cannot be resumed: {what}", stacklevel=5)
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
        warnings.warn(
            f"the run was to have {before} epochs and goes on to {now}: the {' and the '.join(changed)} of its {taken} "
            f"steps so far followed {before}, and the result is not that of {now} in one run",
            stacklevel=5,
        )
