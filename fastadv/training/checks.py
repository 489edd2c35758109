"""Refuses data and settings that no run can have, before anything is changed."""

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from fastadv.attacks.checks import check_one_class, check_samples, device_of, highest
from fastadv.data.share import Share
from fastadv.evaluation.identity import differences, fingerprint
from fastadv.functional import to_float
from fastadv.team import Team
from fastadv.training.convolutions import check_convolutions
from fastadv.training.fast import FAST, fast_method, is_fast
from fastadv.training.parts import Parts

if TYPE_CHECKING:
    from fastadv.training.trainer import Trainer


def check_run(trainer: "Trainer", parts: Parts, steps: int, team: Team, *, device: torch.device, precision: str) -> int:
    """Refuse data and settings that no run can have.

    Args:
        trainer: the trainer, which has the settings of the run.
        parts: the images of the run.
        steps: how many batches an epoch has.
        team: the processes of the run.
        device: where the run trains.
        precision: "no" for float32, or "bf16".

    Returns:
        The highest label.

    Raises:
        TypeError: labels are not int64, or images are neither floats nor uint8.
        ValueError: no training images, or all of one class; a precision, a warm-up or a batch that the run cannot have;
            a model or several processes that the attack refuses.
    """
    settings, attack = trainer.settings, trainer.attack
    labels = parts.train[1]
    if precision not in ("no", "bf16"):
        raise ValueError(f"precision must be no or bf16, got {precision} from accelerate")
    if device.type == "cpu":
        check_convolutions(trainer.model, settings)
    if not team.alone and is_fast(attack) and FAST[attack].alone:
        raise ValueError(
            f"the attack {attack} keeps what one process has seen, and trains in one only: start one, or take another "
            "attack"
        )
    if steps == 0:
        raise ValueError("there are no images to train on")
    for images, named in parts.present:
        check_one_class(named)
        mine, theirs = (images.mine, named[images.rows]) if isinstance(images, Share) else (images, named)
        if len(theirs):
            check_samples(mine, theirs)
    if labels.min() == labels.max():
        raise ValueError(f"the training images are all of class {labels[0]}: there is nothing to tell apart")
    for stage in settings.stages:
        if settings.warmup > stage.epochs * steps:
            raise ValueError(
                f"a warmup of {settings.warmup} steps is longer than the {stage.epochs * steps} steps of the "
                f"{stage.epochs} epochs of {stage.method}: the learning rate would never reach its peak"
            )
    least = team.size * settings.grad_accum_steps
    if len(labels) // steps < least:
        raise ValueError(
            f"a batch of {len(labels) // steps} images cannot be cut into {least} parts "
            "(processes times grad_accum_steps): take a larger batch_size"
        )
    top = max(highest(named) for _, named in parts.present)  # refuses negative ones too, which a loss skips
    if is_fast(attack):
        images, _ = parts.train
        mine = images.mine if isinstance(images, Share) else images
        some = to_float(mine[:2].to(device_of(trainer.model)))
        fast_method(attack, trainer.model, trainer.eps, settings.attack).check_model(attack, settings, some)
    return top


def check_same(trainer: "Trainer", data: dict[str, object], team: Team) -> None:
    """Refuse processes with different data or settings; all processes call this together.

    Args:
        trainer: this process's trainer.
        data: the facts about this process's data, as `Parts.facts` returns them.
        team: the processes of the run.

    Raises:
        ValueError: a process differs from the first one; the message says in what.
    """
    if team.alone:
        return
    same: dict[str, object] = {n: value for n, value in asdict(trainer.settings).items() if n != "checkpoint_s"}
    for name in ("attack", "eval_attack"):
        attack = getattr(trainer, name)
        same[name] = attack if attack is None or isinstance(attack, str) else type(attack).__qualname__
    # A process that has a folder, or measures, waits for the others, who would never answer if they do not.
    same |= {"having a folder": trainer.folder is not None, "measure_backbone": trainer.measure_backbone}
    all_of_them = team.gathered(fingerprint({"eps": trainer.eps, **same, **data}))
    for rank, there in enumerate(all_of_them):
        if there != all_of_them[0]:
            raise ValueError(
                f"process {rank} differs from process 0 in {differences(all_of_them[0], there)}: all processes of a "
                "run need the same"
            )
