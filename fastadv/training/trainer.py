"""Adversarial training by one call."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastadv._renamed import by_new_names
from fastadv._warnings import warn
from fastadv.attacks import PRESETS, Attack, create_attack
from fastadv.attacks.checks import check_eps
from fastadv.data.share import Batch
from fastadv.devices import present
from fastadv.evaluation.adversaries import Adversary, eps_of, norm_of, strange
from fastadv.names import instead
from fastadv.training.budget import Budget
from fastadv.training.fast import FAST, fast_method, is_fast
from fastadv.training.foreign import TrainAttack, as_attack
from fastadv.training.progress import Record
from fastadv.training.run import Run
from fastadv.training.settings import RENAMED, Settings, of_kind
from fastadv.training.step import check_attack, check_linf


class Trainer:
    """Adversarial training of `model`: each batch is attacked, and then the model learns from it.

    Sources: Madry et al. 2018 (arXiv 1706.06083) with PGD; Wong et al. 2020 (arXiv 2001.03994) with a single step; from
    a robust backbone "Are Fast Methods Stable in Adversarially Robust Transfer Learning?" (2025).

    The result has the weights of the epoch with the best accuracy under `eval_attack` on the validation images, never
    under the attack in training. Of epochs with equal accuracy the one with the best clean accuracy is taken, and of
    equal ones again the latest. Training on clean images is judged by clean accuracy.

    The same seed gives the same weights on the CPU (with as many threads), also for a run that was cut and resumed.

    Under `accelerate launch` or `torchrun` each process holds a share of the images, learns from its part of each batch
    and evaluates its share. All processes call this with the same data and settings. The first process's weights and
    state are the run's, and it alone writes to its `folder`. Batch-norm in train mode sees a process's part alone;
    everything else is as in one process.

    Memory follows the batch. No pass of the model has more images than a part of a step, batch_size / (processes times
    grad_accum_steps). The monitor, the evaluations and the backbone's measurement have the step's precision, its memory
    layout and its compilation; an attack that is passed as an object or a callable has its own. Of the validation and
    test images 16 parts are on the device at a time. Copies of the weights (the last good ones, the best ones) are on
    the host. Only the average, which every step updates, is on the device.

    Args:
        model: from images (N, C, H, W) in [0, 1] to logits (N, classes), such as `Normalized(network, mean, std)`;
            trained in place.
        eps: radius of the ball, in the images' units, [0, 1], of an attack by name and of the default evaluation.
        attack: one of
            the name of an attack: "fgsm", "fgsm-rs", "nfgsm", "zerograd" or "pgd";
            the name of a training attack in `fastadv.training.fast`: "stale", FGSM's step along the signs that the last
            epoch's updates left, at about the price of standard training; or one that trains in one process only:
            "cached", linear probing on features of attacked images that are kept for some epochs, "fgsm-pgi",
            "gradalign", "free", "liet" or "sora";
            an attack of fastadv on `model`, which gets a seed for each image, from the run's seed, the image's number
            and the epoch;
            any other callable from (images, labels) to images; a warning says where they leave [0, 1] or eps;
            None for training on clean images.
        eval_attack: for the evaluations, on `model`; None means PGD-10 at eps with steps of eps / 4.
        folder: for log.jsonl, a line for each record, and the checkpoints; None means that nothing is written. One run
            at a time has it.
        resume: go on from the newest checkpoint in `folder` that is whole and finite, if there is one. A setting that
            did not exist when it was written had its default. `model` is as it was before training, made anew: one
            that fit() has changed is another. `checkpoint_s`, `eval_every` and `epochs` may now have
            other values. A warning says where the steps so far would have had other learning rates with the new
            `epochs`: after a warm-up the rate falls toward the last epoch.
        measure_backbone: measure the backbone's own robustness first; None means if the method is not "full".
        device: where to train; None means what accelerate chooses: a GPU if there is one.
        progress: show a progress bar on a terminal. Without a bar each epoch is a line in the log (logger "fastadv",
            level INFO).
        settings: the fields of `Settings`.

    Raises:
        ImportError: the `train` extra is not installed.
        TypeError: an argument or a setting is of a wrong type, or an attack cannot be called.
        ValueError: unknown attack, method or optimizer, a device that is not here, a number out of range, a setting
            that would have no effect, a folder that is a file, training with an L2 attack, for which weights cannot be
            chosen yet, an attack towards the labels (targeted=True), or an `eval_attack` on another model or that
            `evaluate` refuses.
    """

    # Without a dict of its own: a name that is no attribute, such as `epochs`, is refused when it is assigned.
    __slots__ = (
        *("model", "eps", "attack", "eval_attack", "folder", "resume", "measure_backbone", "device", "progress"),
        *("settings", "given", "__weakref__"),
    )

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        attack: str | TrainAttack | None = "fgsm",
        eval_attack: TrainAttack | None = None,
        folder: str | Path | None = None,
        resume: bool = False,
        measure_backbone: bool | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
        **settings: Any,
    ):
        settings = by_new_names(settings, RENAMED)
        known = [each.name for each in fields(Settings)]
        for name in settings.keys() - set(known):
            raise TypeError(f"there is no setting {name!r}{instead(name, known)}")
        self.settings = Settings(**settings)
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {model!r}")
        self.model, self.eps = model, of_kind("eps", eps, float)
        check_eps(self.eps, "Linf")
        self.attack, self.eval_attack = attack, eval_attack
        self._check_attacks()
        self.given = self.settings  # before the defaults of the attack, which a switch to another one leaves
        self.settings = self.settings.settled(FAST[attack].DEFAULTS if is_fast(attack) else {})
        self.folder = None if folder is None else Path(folder)
        self.resume, self.progress = of_kind("resume", resume, bool), of_kind("progress", progress, bool)
        if self.folder is not None and self.folder.is_file():
            raise ValueError(f"folder {folder} is a file: name a folder, which need not exist yet")
        if self.resume and self.folder is None:
            raise ValueError("resume=True goes on from the state in folder: give both")
        self.measure_backbone = (
            None if measure_backbone is None else of_kind("measure_backbone", measure_backbone, bool)
        )
        self.device = None if device is None else present(device)

    def _check_attacks(self) -> None:
        attack, changes = self.attack, {name: v for name, v in self.settings.attack.items() if v is not None}
        if is_fast(attack):
            method = fast_method(attack, self.model, self.eps, changes)
            method.check(attack, self.settings)
            attack = method.attack
        elif isinstance(attack, str):
            if attack not in PRESETS:
                raise ValueError(f"unknown attack {attack!r}{instead(attack, (*PRESETS, *FAST))}")
            attack = create_attack(attack, self.model, self.eps, **changes)  # refuses wrong settings now
        elif changes:
            raise ValueError(f"{', '.join(changes)} belong to an attack by name, got the attack {attack!r}")
        check_attack("attack", attack, also="a name, ")
        Budget(as_attack(attack, self.model), self.settings.eps_schedule)  # refuses an attack that it would not change
        self._check_eval_attack()
        check_linf(attack)
        if isinstance(attack, Attack) and attack.eps > self.eps * (1 + 1e-6):
            warn(
                f"the attack's eps, {attack.eps:.6g}, is larger than that of the training, {self.eps:.6g}, at which "
                "weights are chosen and overfitting is looked for: give both the same, unless that is meant"
            )
        if attack is None and self.settings.on_catastrophic_overfitting != "warn":
            raise ValueError(
                f"on_catastrophic_overfitting={self.settings.on_catastrophic_overfitting!r} answers an attack's "
                "overfitting, and training on clean images has no attack: leave it out"
            )
        if attack is None and self.settings.clean_weight:
            raise ValueError(
                f"clean_weight={self.settings.clean_weight:g} is the share of clean images beside attacked ones, and "
                "training without an attack has clean images alone: leave it out"
            )

    def _check_eval_attack(self) -> None:
        attack = self.eval_attack
        check_attack("eval_attack", attack)
        if attack is None:
            return
        if (elsewhere := strange(attack, self.model)) is not None:
            raise ValueError(
                f"eval_attack was made on {elsewhere}, not on the model that trains: weights would be chosen by images "
                "that are transferred. Make it on the model that is given to Trainer"
            )
        Adversary("eval_attack", attack, self.model)  # refuses what no evaluation takes
        eps, in_l2 = eps_of(attack), norm_of(attack) == "L2"
        if eps is not None and (in_l2 or abs(eps - self.eps) > 1e-6 * self.eps):
            warn(
                f"eval_attack has eps {eps:.6g} in {'L2' if in_l2 else 'L-inf'}, and the training has {self.eps:.6g} "
                "in L-inf: weights are chosen by robustness at another budget. Give both the same, unless that is "
                "meant"
            )
        if str(getattr(attack, "attack_mode", "")).startswith("targeted"):
            warn(
                f"eval_attack has one target for each image ({attack!r}): it is weaker than an attack without targets, "
                "and the weights that it chooses may be less robust. Leave targeted out"
            )

    def fit(self, train: Batch, val: Batch | None = None, test: Batch | None = None) -> list[Record]:
        """Train on `train`, choose weights on `val`, evaluate them on `test`.

        Args:
            train: a pair (images, labels), tensors or NumPy arrays: (N, C, H, W), floats in [0, 1] or uint8, and int64
                (N,).
            val: such a pair; without it, or without images in it, the last weights are taken.
            test: such a pair; without it, or without images in it, the final evaluation is on `val`, which is then no
                fair judge of the choice.

        Returns:
            The records, dicts for `json.dump`, which are the lines of log.jsonl too. Fields that end in _s are seconds;
            all others are the same in a resumed run.

            - First, where the backbone was measured, {"backbone": what `backbone_robustness` returns}.
            - For each stage "stage", "method", "trainable" and "total" (numbers that train, and all).
            - For each epoch "epoch", "loss" (of the updates, with all its terms) and "train_accuracy" (on the attacked
              training images), "lr" (of the last step), "train_s" (without evaluation), "train_cpu_s" (processor time
              of the first process), the monitor's reading, and "action" where the run acted on it; with the attacks
              stale and cached "fresh" (the share of images that got a fresh FGSM), with stale "agreement" (the share of
              an image's pixels with the sign of the epoch before, the mean over the images); and, when evaluated,
              "clean_accuracy" and "robust_accuracy" on `val`.
            - At last {"final": True}, with "format" (of these records: 1), "epochs", "best_epoch", "clean_accuracy",
              "robust_accuracy", "pma_accuracy" (of the images that neither `eval_attack` nor then PMA fools),
              "confusion" (lists of [label, the model's class, images], "clean" and "attacked" by `eval_attack`),
              "eval_attack", "train_s" and "train_cpu_s"; and where there was a choice of weights "chosen_by" (which
              accuracy on `val`), "noise" (two standard errors of it) and "within_noise" (other epochs that were worse
              by no more).

        Raises:
            FileExistsError: the folder has the state of a run, and `resume` was not asked for.
            FloatingPointError: the loss, its gradient, a buffer that a forward pass writes or the weights after a step
                are not finite. The model then has the weights before that step; where a finite step was too large, it
                has the weights that were kept last. With a folder the batch is in nonfinite.safetensors.
            InUseError: another process has a run in the folder, and the message says which. It is an OSError.
            KeyboardInterrupt: after Ctrl-C; with a folder there is a checkpoint first, as there is after SIGTERM.
            TypeError: no pair of images and labels, such as a DataLoader; images are neither floats nor uint8, or
                labels are not int64.
            ValueError: no training images, or all of one class; images beyond [0, 1] or not as many as labels; images
                of a shape or dtype that the model does not take; labels below 0; an `eval_attack` and neither `val` nor
                `test`; precision bf16 for a float64 model; a batch too small for its parts; a warm-up longer than a
                stage; no such head, nothing to train; a model that "cached" refuses; on a CPU a layer that PyTorch gets
                wrong in channels-last layout; the state is another run's, or of a newer fastadv, or the processes have
                different data, models or settings: the message names what differs, or what this one does not know;
                accelerate is set to FSDP, DeepSpeed or something else that a run does not support.
        """
        with torch.inference_mode(False), torch.enable_grad():
            return Run(self, train, val, test).run()
