"""Refuses data and settings that no run can have, before anything is changed."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastadv._warnings import warn
from fastadv.attacks.checks import check_samples, device_of, highest, too_dark
from fastadv.data.share import Share
from fastadv.evaluation.identity import differences, fingerprint
from fastadv.functional import to_float
from fastadv.nn.autocast import own_autocast
from fastadv.nn.frozen import frozen
from fastadv.nn.inside import as_module
from fastadv.nn.logits import AnyModel
from fastadv.ops.generator import seeded
from fastadv.team import Team
from fastadv.training.budget import span
from fastadv.training.convolutions import check_convolutions
from fastadv.training.factors import HALVES
from fastadv.training.fast import FAST, fast_method, is_fast
from fastadv.training.parts import Parts
from fastadv.training.step import check_autocast

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
        TypeError: images are neither floats nor uint8.
        ValueError: no training images, or all of one class; images that the model does not take; a precision, a
            warm-up, a schedule of eps or a batch that the run cannot have; an `eval_attack` that has nothing to do; a
            model or several processes that the attack refuses.
    """
    settings, attack = trainer.settings, trainer.attack
    labels = parts.train[1]
    if precision not in ("no", "bf16"):
        raise ValueError(f"precision must be no or bf16, got {precision} from accelerate")
    autocast = torch.bfloat16 if precision == "bf16" else None
    check_autocast(trainer.model, autocast)
    _check_weights(trainer.model)
    if device.type == "cpu":
        check_convolutions(trainer.model, settings)
    if not team.alone and is_fast(attack) and FAST[attack].alone:
        raise ValueError(
            f"the attack {attack} keeps what one process has seen, and trains in one only: start one, or take another "
            "attack"
        )
    if steps == 0:
        raise ValueError("there are no images to train on")
    if trainer.eval_attack is not None and parts.test is None:
        raise ValueError("eval_attack is for the evaluations on val and test: give one of them, or leave it out")
    for images, named in parts.present:
        mine, theirs = (images.mine, named[images.rows]) if isinstance(images, Share) else (images, named)
        if len(theirs):
            check_samples(mine, theirs)
            # Evaluations come after an epoch of training, and more.
            check_taken(trainer.model, mine, parts.train[0].shape[1:], autocast)
    images = parts.train[0]
    if dark := too_dark(images.mine if isinstance(images, Share) else images):
        warn(dark)
    if labels.min() == labels.max():
        raise ValueError(f"the training images are all of class {labels[0]}: there is nothing to tell apart")
    for stage in settings.stages:
        if settings.warmup > stage.epochs * steps:
            raise ValueError(
                f"a warmup of {settings.warmup} steps is longer than the {stage.epochs * steps} steps of the "
                f"{stage.epochs} epochs of {stage.method}: the learning rate would never reach its peak"
            )
    grows, updates = span(settings.eps_schedule), steps * sum(stage.epochs for stage in settings.stages)
    if grows is not None and (updates - 1) / updates <= grows[0]:
        raise ValueError(
            f"eps_schedule={settings.eps_schedule!r} leaves all {updates} updates of this run without a budget, and no "
            "image would be attacked: let it begin earlier, or train longer"
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


def _check_weights(model: nn.Module) -> None:
    """Refuse weights that cannot be changed, and warn of those in which small changes are lost."""
    if any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            "the model was made under torch.inference_mode, and such weights cannot train: make it outside, or give "
            "copy.deepcopy(model), made outside"
        )
    registered = set(model.modules())
    beside = [m for m in as_module(model).modules() if m not in registered and type(m) is not nn.ModuleList]
    hidden = next((m for m in beside if any(p.requires_grad for p in m.parameters())), None)
    if hidden is not None:
        raise ValueError(
            f"the model uses a {type(hidden).__name__} that is not registered in it, such as one in a plain list or a "
            "global: its weights would not train, and no file would have them. Use nn.ModuleList or nn.ModuleDict, or "
            "where it is to stay as it is hidden.requires_grad_(False)"
        )
    half = next((p.dtype for p in model.parameters() if p.requires_grad and p.dtype in HALVES), None)
    if half is not None:
        lost = f"1/{4 / torch.finfo(half).eps:.0f}"
        warn(
            f"the model has weights of {half}: a step that changes one by less than {lost} of it is lost. Train "
            "model.float(), with precision='bf16' for passes that are as fast"
        )


def check_taken(
    model: AnyModel, images: torch.Tensor, shape: Sequence[int], autocast: torch.dtype | None = None
) -> None:
    """Refuse images that the model does not take. It is called only where that is in doubt, in eval mode.

    Args:
        model: from images to outputs.
        images: (N, ...), floats or uint8.
        shape: of an image that the model is known to take, (...).
        autocast: dtype of torch.autocast in the model's passes.

    Raises:
        ValueError: the model fails with these images.
    """
    some, device = to_float(images[:2]), device_of(model)
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    own = next((p.dtype for p in parameters if p.is_floating_point()), some.dtype)
    if some.shape[1:] == torch.Size(shape) and some.dtype == own:
        return
    try:
        with torch.no_grad(), seeded(0), frozen(model), own_autocast(device or some.device, autocast):
            model(some.to(device or some.device))
    except Exception as error:  # whatever the model's layers raise
        raise ValueError(
            f"the model, with weights of {own}, does not take images {tuple(some.shape[1:])} of {some.dtype}: give all "
            f"images the shape and the dtype that it takes ({error})"
        ) from error


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
