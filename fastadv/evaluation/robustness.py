"""Clean and robust accuracy of a model under several attacks, with everything that is needed to believe them."""

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastadv._warnings import warn
from fastadv.attacks.checks import check_switch
from fastadv.attacks.normalized import normalization_of
from fastadv.data.share import Share
from fastadv.evaluation.adversaries import (
    Adversary,
    AnyAttack,
    adversaries,
    budgets_of,
    check_they_take,
    is_several,
    listed,
)
from fastadv.evaluation.ensemble import Trial, in_turn
from fastadv.evaluation.foreign import Reach
from fastadv.evaluation.identity import fingerprint, unidentifiable
from fastadv.evaluation.images import FooledImages, Gallery
from fastadv.evaluation.queue import Verdicts
from fastadv.evaluation.run import Report, Run
from fastadv.evaluation.samples import AnyData, collected, oddities
from fastadv.evaluation.saved import StateFile
from fastadv.locks import held
from fastadv.names import instead
from fastadv.nn import Normalized
from fastadv.nn.frozen import frozen, on
from fastadv.nn.logits import AnyModel
from fastadv.nn.parallel import alone
from fastadv.version import __version__

ITERATES = ("any", "last")
ATTACKS = ("fgsm", "pgd-10", "pma")

PerChannel = float | Sequence[float]  # one number for all channels, or one for each


def evaluate(
    model: AnyModel,
    data: AnyData,
    attacks: AnyAttack | Sequence[AnyAttack] = ATTACKS,
    *,
    eps: float | Sequence[float] | None = None,
    ensemble: bool = True,
    images_normalized: tuple[PerChannel, PerChannel] | None = None,
    iterate: str = "any",
    batch_size: int = 128,
    pool: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
    state: str | Path | None = None,
    save_images: str | Path | None = None,
    progress: bool = True,
    slots: int | None = None,
) -> Report:
    """Robust accuracy of `model` in eval mode, left as found.

    A sample that is misclassified as it is counts as not robust and is not attacked. Any other is fooled by an attack
    when it is misclassified, as whatever class, at an iterate of any restart. Where a logit is NaN, or all are equal,
    the model gives no prediction: that is misclassified whatever the label, and counted apart. Labels (N, C), 0 or 1
    for each logit, are several a sample, which is right where the sign of every logit is that of its label; as for a
    model of one logit, attacks then take loss="bce".

    The attacks run one after the other, and each gets the samples that are left: robust are those that none of
    them fools within a budget. A sample that is fooled within some eps is fooled within any larger one of the same
    norm.

    An attack of fastadv runs on a fixed number of slots; a slot whose sample is fooled or finished takes the next one,
    in the order (restart, sample). On a GPU, and with compile or graph, slots for which no sample is left take further
    restarts and targets of samples that are under attack; the verdict is that of the first of these, in their order,
    that fools. Its options autocast, compile, graph and memory_format hold, and the verdicts are those of the model
    under them; chunk does not. Any other attack, and one of fastadv on another model, is called batch by batch, and
    what it returns is judged.

    Args:
        model: any callable from images to logits (N, C), as in `Attack`.
        data: a pair (images, labels) of tensors or NumPy arrays, or a loader or Dataset of such pairs, or of dicts;
            images (N, ...) in [0, 1] or uint8, labels int64 (N,), or 0 or 1 (N, C). What is attacked is moved to the
            device; uint8 stays uint8 there. With a `Share` of images and all labels each process of its team attacks
            its own images, and all get the report on the whole.
        attacks: one or several: names (keys of PRESETS, or of ENSEMBLES for several that follow each other), each at
            every eps; objects of fastadv, `AutoAttack` too; or callables from (images, labels) to images (a tensor, a
            NumPy array, or a pair that begins with one), such as those of torchattacks or the `run_standard_evaluation`
            of AutoAttack's authors. These two have an eps of their own; where they have no attribute `norm`, "Linf" or
            "L2", they are independent of the others and count for no budget.
        eps: one or several, in the images' units, [0, 1], for attacks by name; None: 8/255 for those in L-inf, 0.5 for
            those in L2, whose eps is the length of a whole perturbation.
        ensemble: whether each attack gets what those before it left; else all get all samples, for figures that do not
            depend on each other.
        images_normalized: (mean, std) of a loader that normalises already, for a model that takes such images; eps
            stays in pixels. Attacks are then names.
        iterate: "any": the start and every iterate are judged; "last": the last one of each restart only, the verdict
            of other libraries. "any" is never the weaker.
        batch_size: images under attack at a time, each in a slot, and of everything else; no more than there are
            images. Slots beyond the number of samples that survive, times their restarts and targets, stay empty in the
            end: on a GPU they cost their time, so with few images choose few.
        pool: images on the device at a time, None for all: for data sets that do not fit there. Take many times the
            batch_size, because slots run empty before the next images come.
        seed: of the random starts; that of sample i is `sample_seeds(seed, i, restart)`, whatever its batch. For other
            libraries' attacks the generators of torch, NumPy and Python are seeded from those of a batch's samples, and
            put back.
        device: where to evaluate; None means the model's, or where the images are if it has no parameters.
        autocast: dtype of torch.autocast, as in `Attack`, for the model on clean images and on those that other
            libraries' attacks return, and for attacks by name; an attack of fastadv that is passed as an object has its
            own.
        memory_format: likewise, of the images that the model sees.
        state: a file that keeps what is finished, written every few seconds; a run that was cut goes on from it. It
            belongs to the settings, the data, the model and the attacks, with all that these hold or close over; an
            attribute `fastadv_key`, a string, says instead what one of them is.
        save_images: a folder for the adversarial images as PNG, of the iterate that fooled or the last one. Each pixel
            is the nearest 8-bit code within the budget; they are classified again.
        progress: show a progress bar on a terminal, whose remaining time is what is needed if nothing more is fooled;
            elsewhere log a line a minute and at the end of each attack (logger "fastadv", level INFO).
        slots: what `batch_size` was called before.

    Returns:
        A dict for `json.dump`: "labels" (as they came; all lists with an entry per sample have their order);
        "clean_accuracy"; "robust_accuracy" (the share that no attack fools; a list where there are several budgets, in
        the order of "budgets", which is that of the attacks); "budgets", a list of {"norm", "eps", "robust_accuracy",
        "attacks" (those that count), "robust" (a bool per sample)}; "curves", what `curve` says of each norm with
        several budgets; "masking", what the Square attack and chance found after each PMA, see `Masking`;
        "clean_correct" (a bool per sample); "clean_said" (a class per sample, -1 where the model gives none; with
        labels (N, C) 1 where all are right and 0 where one is not); "no_prediction" (clean samples that get none);
        "attacks", a list of {"attack", "eps", "norm", "robust_accuracy" (the share that it attacked and did not fool),
        "given" (samples that it attacked), "largest_linf" and "largest_l2" (how far another library's attack, or a
        class of your own, went; null for those of fastadv, which stay in their ball), "no_prediction" (samples that are
        fooled because they get none), "passes" and "forwards" (gradients and forward passes of one image; null where
        not known), "waste" (those of the passes that were not needed: in a run after the one that fooled, begun because
        slots were free; of the forward passes, where an attack takes no gradients; 0 on the CPU without compile and
        graph; null likewise), "seconds", "nonfinite_losses", "zero_gradients" (share of the first samples to be
        attacked whose gradient is exactly 0, NaN or too short for an attack in L2 at the attack's start),
        "shattered_gradients" (share of them whose margin hardly rises along its gradient; null where there are several
        labels a sample or a single logit, the loss is a callable, or no rise above rounding is foretold), "fooled" (a
        bool per sample), "said" (the class that it is then taken for, as in "clean_said"; null for the others),
        "restart" and "step" (of the first iterate that fooled; where an attack goes towards one class after the other
        its runs are counted through; null where there is none or it is not known), "target" (of such an attack, the
        class that this run went to), "runs" (of a sample that is not fooled), "latest" (restart and step of the sample
        that was fooled last), "settings", with save_images also "robust_accuracy_8bit"}; "warnings" (also given by
        `warnings.warn`); "settings"; "versions". Where another library's attack left [0, 1] or its eps by more than
        rounding, its robust accuracy is null, it counts for no budget, and a warning says how far it went.

    Raises:
        InUseError: another process has the `state`; an OSError.
        TypeError: data, an option or the model's output are of a wrong type; or with `state` the model or an attack
            hold something that cannot be told apart from another one, such as an open file.
        ValueError: there are no images; `device` is not here; an option, a shape or a label is wrong; or `state`
            belongs to another run.

    Source: Madry et al. 2018 (arXiv 1706.06083, section 5) for robust accuracy under PGD with restarts.
    """
    for name, value in (("ensemble", ensemble), ("progress", progress)):
        check_switch(name, value)
    if iterate not in ITERATES:
        raise ValueError(f"unknown iterate {iterate!r}{instead(iterate, ITERATES)}")
    if slots is not None:
        warn("slots is now batch_size", FutureWarning)
        batch_size = slots
    check_counts(batch_size=batch_size, pool=pool, seed=seed)
    batch_size, pool, seed = int(batch_size), None if pool is None else int(pool), int(seed)  # they may be NumPy's
    normalization = None
    if images_normalized is not None:
        normalization = normalization_of(images_normalized, model)
        attacks = listed(attacks)
        if not all(isinstance(attack, str) for attack in attacks):
            raise ValueError(
                "with images_normalized attacks are names: for others evaluate Normalized(model, mean, std) on images "
                "in [0, 1]"
            )
        model = Normalized(model, *images_normalized)
    against = adversaries(model, attacks, eps, autocast=autocast, memory_format=memory_format)
    images, labels = collected(data, model, device, normalization)
    notes = oddities(data, images)
    for note in notes:
        warn(note)
    most = images.most if isinstance(images, Share) else len(images)
    if isinstance(images, Share) and not images.alone and (state, save_images, normalization) != (None, None, None):
        raise ValueError(
            "images that several processes share are evaluated without state, save_images and normalization"
        )
    settings: dict[str, Any] = {
        "iterate": iterate,
        "ensemble": ensemble,
        "slots": min(batch_size, most),
        "seed": seed,
        "save_images": save_images is not None,
    }
    passes = {"autocast": autocast, "memory_format": memory_format}
    settings |= {name: str(value) for name, value in passes.items() if value is not None}
    mine = images.mine if isinstance(images, Share) else images

    def gallery(number: int, adversary: Adversary) -> Gallery | None:
        if save_images is None:
            return None
        name = "-".join([f"{number}", adversary.name, *([] if adversary.eps is None else [adversary.budget])])
        eps = adversary.eps if adversary.is_linf else None
        return Gallery(Path(save_images) / name, mine, eps, labels.device)

    report, _, _ = judged(
        *(model, images, labels, against, settings, pool, state, gallery),
        progress=progress,
        autocast=autocast,
        memory_format=memory_format,
    )
    report["warnings"] = [*notes, *report["warnings"]]
    return report


def check_counts(**counts: int | None) -> None:
    """Refuse counts that are no int, or below 1; `pool` may be None, `seed` any int.

    Raises:
        TypeError: a count is no int.
        ValueError: a count is below 1.
    """
    for name, value in counts.items():
        if not isinstance(value, Integral) and (name, value) != ("pool", None):
            raise TypeError(f"{name} must be an int, got {value!r}")
        if name != "seed" and value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def judged(
    model: AnyModel,
    images: torch.Tensor | Share,
    labels: torch.Tensor,
    against: Sequence[Adversary],
    settings: Mapping[str, Any],
    pool: int | None,
    state: str | Path | None,
    gallery: Callable[[int, Adversary], Gallery | FooledImages | None],
    *,
    after_each: Callable[[Run, Sequence[Trial]], None] = lambda run, ended: None,
    progress: bool = False,
    autocast: torch.dtype | None = None,
    memory_format: torch.memory_format | None = None,
) -> tuple[Report, Run, list[Trial]]:
    """What `evaluate` does once its arguments are looked at.

    Args:
        model: that is evaluated.
        images: (N, ...), floats in [0, 1] or uint8, or this process's share of them.
        labels: int64 (N,), or (N, C) of several a sample, on the device.
        against: the attacks.
        settings: iterate, ensemble, slots, seed, and what else makes it another run.
        pool: number of images on the device at a time; None: all.
        state: file of the state; None: none is kept.
        gallery: from an adversary's number and the adversary to what keeps its images, or None.
        after_each: gets the run and the attacks that have ended, before the first one and after each.
        progress: whether to show how far it is.
        autocast: dtype in which the model runs; None: as it is.
        memory_format: of the images that the model sees; None: as they are.

    Returns:
        What `evaluate` returns, the run, and a trial for each attack.
    """
    share = images if isinstance(images, Share) else Share(images)
    check_they_take(against, share.mine, labels)
    settings = {**settings, "attacks": [each.facts() for each in against]}
    file = None if state is None else StateFile(state, _identity(settings, model, images, labels, against))
    kept = nullcontext() if state is None else held(state, f"the state {state} of an evaluation")
    ours = [each.ours for each in against if each.ours is not None]
    still = frozen(model, "eval", *(part for attack in ours for part in (attack.loss, attack.targeted)))
    with kept, torch.inference_mode(False), torch.no_grad(), alone(model), still, on(labels.device):
        run = Run(model, share, labels, against, settings, pool, autocast, memory_format)
        trials = [run.trial(adversary, gallery(number, adversary)) for number, adversary in enumerate(against)]
        begun = file is not None and _load(file, trials)
        for folder in {t.gallery.folder.parent for t in trials if isinstance(t.gallery, Gallery) and not begun}:
            Gallery.check_empty(folder)
        order = in_turn(trials)
        after_each(run, [])
        save = partial(_save, file, trials)
        save()  # where that cannot be written it is known now
        for i, trial in enumerate(order):
            if settings["ensemble"]:
                run.hand_on(order[:i], trial)
            run.attack(trial, save, progress)
            run.ask_square(trial, save)
            after_each(run, order[: i + 1])
        report = run.report(trials, order, settings["ensemble"])
    report |= {
        "settings": {
            **settings,
            "images": list(share.shape),
            "dtype": str(images.dtype),
            "device": str(labels.device),
        },
        "versions": {"fastadv": __version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    return report, run, trials


def _identity(
    settings: Mapping[str, Any],
    model: AnyModel,
    images: torch.Tensor | Share,
    labels: torch.Tensor,
    against: Sequence[Adversary],
) -> str:
    """The fingerprint of a run, for its state."""
    parts = {name: value for name, value in settings.items() if name != "attacks"}
    for number, (adversary, facts) in enumerate(zip(against, settings["attacks"], strict=True), 1):
        attack = f"attack {number}"
        parts |= {f"{name} of {attack}": value for name, value in facts.items()} | {attack: adversary.attack}
    weights = model.state_dict() if isinstance(model, nn.Module) else {}
    run = fingerprint({**parts, "images": images, "labels": labels, "the model's weights": weights, "the model": model})
    if unidentifiable(run):
        raise TypeError(f"there is no state for such a run: {', '.join(unidentifiable(run))}")
    return run


def _save(file: StateFile | None, trials: Sequence[Trial]) -> None:
    if file is None:
        return
    tensors: dict[str, torch.Tensor] = {}
    facts: list[dict[str, Any]] = []
    for i, trial in enumerate(trials):
        verdicts = trial.verdicts
        tensors |= {f"{i}.{name}": getattr(verdicts, name) for name in Verdicts.SAVED}
        if trial.by_square is not None:
            tensors[f"{i}.by_square"] = trial.by_square
        if trial.gallery is not None:
            tensors |= {f"{i}.images.{name}": t for name, t in trial.gallery.state().items()}
        known = {name: getattr(verdicts, name) for name in Verdicts.COUNTS}
        facts.append(known | {"seconds": trial.seconds, "reach": trial.reach and asdict(trial.reach)})
    file.save(tensors, {"attacks": facts})


def _load(file: StateFile, trials: Sequence[Trial]) -> bool:
    """Continue from the state in the file; False where there is none."""
    loaded = file.load()
    if loaded is None:
        return False
    tensors, facts = loaded
    for i, (trial, known) in enumerate(zip(trials, facts["attacks"], strict=True)):
        verdicts, device = trial.verdicts, trial.verdicts.todo.device
        for name in Verdicts.SAVED:
            setattr(verdicts, name, tensors[f"{i}.{name}"].to(device))
        for name in Verdicts.COUNTS:
            setattr(verdicts, name, known[name])
        verdicts.restarts = max(verdicts.restarts, int((verdicts.restart + verdicts.fooled.long()).max()))
        trial.seconds = known["seconds"]
        if f"{i}.by_square" in tensors:
            trial.by_square = tensors[f"{i}.by_square"].to(device)
        trial.reach = known["reach"] and Reach(**known["reach"])
        if trial.gallery is not None:
            prefix = f"{i}.images."
            trial.gallery.load({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    return True


def robust_accuracy(model: AnyModel, data: AnyData, attack: AnyAttack, **options: Any) -> dict[str, Any]:
    """`evaluate` in short: one attack, without a progress bar.

    Args:
        model: as of `evaluate`, as are the others.
        data: images and labels.
        attack: a name, an attack of fastadv or any other.
        options: of `evaluate`.

    Returns:
        {"clean_accuracy": ..., "robust_accuracy": ...}: the shares of images that are classified correctly, and that
        no part of the attack fools, nor Square where it follows one that masks gradients; None where the attack leaves
        its eps or [0, 1]. With several `eps` the robust accuracy is a list, one for each in their order.

    Raises:
        TypeError, ValueError: as `evaluate`.
    """
    report = evaluate(model, data, [attack], progress=False, **options)
    eps = options.get("eps")
    found = {each["eps"]: each["robust_accuracy"] for each in report["budgets"]}
    if is_several(eps):
        accuracy = [found.get(each) for each in budgets_of(eps)]
    else:  # an attack of another library may say nothing of its eps: then it is its own accuracy, which may be None
        accuracy = next(iter(found.values()), report["attacks"][0]["robust_accuracy"])
    return {"clean_accuracy": report["clean_accuracy"], "robust_accuracy": accuracy}
