"""Adversarial training by one call."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastadv._renamed import by_new_names
from fastadv.attacks import PRESETS, Attack, create_attack
from fastadv.attacks.checks import check_eps
from fastadv.data.share import Batch
from fastadv.training.budget import Budget, TrainAttack
from fastadv.training.fast import FAST, fast_method, is_fast
from fastadv.training.progress import Record
from fastadv.training.run import Run
from fastadv.training.settings import RENAMED, Settings, of_kind
from fastadv.training.step import check_attack


class Trainer:
    """Adversarial training of `model`: each batch is attacked, then learnt from.

    Madry et al. 2018 (arXiv 1706.06083) with PGD, Wong et al. 2020 (arXiv 2001.03994) with a single step; from a
    robust backbone "Are Fast Methods Stable in Adversarially Robust Transfer Learning?" (2025). The weights that are
    kept are those with the best accuracy under `eval_attack` on the validation images, never under the attack trained
    with; of equals those with the best clean accuracy, and of equals again the latest. Training on clean images is
    judged by clean accuracy. The same seed gives the same weights on the CPU (with as many threads), also for a run
    that was cut and resumed. Under `accelerate launch` or `torchrun` each process holds a share of the images, learns
    from its part of each batch and evaluates its share; all call this with the same data and settings. The model's
    weights and the state to go on from are the first process's, which alone writes to its `folder`. Batch-norm in
    train mode then sees a process's part alone, everything else is as in one process.

    Memory follows the batch: no pass of the model has more images than a part of a step, batch_size / (processes times
    grad_accum_steps), and the monitor, the evaluations and the backbone's measurement run in the step's precision,
    memory layout and compiled as it is, but for attacks that are given as objects or callables, which have their own.
    Of the validation and test images 16 parts are on the device at a time. Copies of the weights (the last good
    ones, the best ones) lie on the host, and only an average, which every step updates, is on the device.

    Args:
        model: from images (N, C, H, W) in [0, 1] to logits (N, classes), such as `Normalized(network, mean, std)`;
            trained in place.
        eps: budget in pixels of [0, 1], of an attack given by name and of the default evaluation.
        attack: a name: of an attack ("fgsm", "fgsm-rs", "nfgsm", "zerograd", "pgd"), or of a method in
            `fastadv.training.fast`: "stale", FGSM's step along the signs that the last epoch's updates left, at about
            the price of standard training, or one that trains in one process only ("cached", linear probing on
            attacked features that are kept for some epochs, "fgsm-pgi", "gradalign", "free", "liet", "sora"). Or an
            attack of fastadv on `model` (which then gets a seed per image, from the run's seed, its number and the
            epoch), any callable from (images, labels) to images, or None for training on clean images.
        eval_attack: for the evaluations; None means PGD-10 at eps with steps of eps / 4.
        folder: for log.jsonl, a line for each record, and the checkpoints; None means that nothing is written. One run
            at a time has it.
        resume: go on from the newest checkpoint in `folder` that is whole and finite, if there is one; a setting that
            the fastadv which wrote it did not have had its default. `checkpoint_s`, `eval_every` and `epochs` may then
            be others; a warning says where, with other epochs, the steps so far would have had other learning rates:
            after a warm-up these fall toward the last epoch.
        measure_backbone: measure the backbone's own robustness first; None means if a part of the model is frozen.
        device: where to train; None means what accelerate chooses: a GPU if there is one.
        progress: show a progress bar on a terminal. Where none is seen, each epoch is a line in the log (logger
            "fastadv", level INFO).
        settings: the fields of `Settings`.

    Raises:
        ImportError: the `train` extra is not installed.
        TypeError: an argument or a setting is of a wrong type, or an attack cannot be called.
        ValueError: unknown attack, method or optimizer, a number out of range, a setting that nothing would heed, or
            training with an L2 attack, for which weights cannot be chosen yet.
    """

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
        self.settings = Settings(**by_new_names(settings, RENAMED))
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {model!r}")
        self.model, self.eps = model, of_kind("eps", eps, float)
        check_eps(self.eps, "Linf")
        self.attack, self.eval_attack = attack, eval_attack
        self._check_attacks()
        self.settings = self.settings.settled(FAST[attack].DEFAULTS if is_fast(attack) else {})
        self.folder = None if folder is None else Path(folder)
        self.resume, self.progress = of_kind("resume", resume, bool), of_kind("progress", progress, bool)
        self.measure_backbone = (
            None if measure_backbone is None else of_kind("measure_backbone", measure_backbone, bool)
        )
        self.device = None if device is None else torch.device(device)

    def _check_attacks(self) -> None:
        attack, changes = self.attack, {name: v for name, v in self.settings.attack.items() if v is not None}
        if is_fast(attack):
            method = fast_method(attack, self.model, self.eps, changes)
            method.check(attack, self.settings)
            attack = method.attack
        elif isinstance(attack, str):
            if attack not in PRESETS:
                raise ValueError(f"unknown attack {attack!r}; there are {', '.join((*PRESETS, *FAST))}")
            attack = create_attack(attack, self.model, self.eps, **changes)  # refuses what is wrong, now
        elif changes:
            raise ValueError(f"{', '.join(changes)} belong to an attack given by name, got the attack {attack!r}")
        check_attack("attack", attack, also="a name, ")
        Budget(attack, self.settings.eps_schedule)  # refuses what it would not change
        check_attack("eval_attack", self.eval_attack)
        if isinstance(attack, Attack) and attack.norm != "Linf":
            raise ValueError(
                f"training with an {attack.norm} attack ({self.attack!r}) is not possible yet: its weights would be "
                "chosen, and its overfitting looked for, under L-inf PGD at the same eps. Train with an L-inf attack, "
                "such as fgsm or pgd; evaluation takes L2 attacks"
            )

    def fit(self, train: Batch, val: Batch | None = None, test: Batch | None = None) -> list[Record]:
        """Train on `train`, choose weights on `val`, evaluate them on `test`.

        Args:
            train: a pair (images, labels), tensors or NumPy arrays: (N, C, H, W), floats in [0, 1] or uint8, and int64
                (N,).
            val: such a pair; without it the last weights are taken.
            test: such a pair; without it the final evaluation is on `val`, which is then no fair judge of the choice.

        Returns:
            The records, dicts for `json.dump`. First, where measured, {"backbone": ...}. For each stage {"stage",
            "method", "trainable", "total"}; for each epoch "epoch", "loss" and "train_accuracy" (both on the attacked
            training images), "lr" (of the last step), "train_s" (seconds without evaluation), "train_cpu_s" (processor
            time of these, of the first process), what the monitor read, "action" where it acted, with the attacks stale
            and cached "fresh" (share of the images that got a fresh FGSM), with stale "agreement" (mean share of an
            image's pixels whose signs are those of the epoch before), and, when evaluated, "clean_accuracy" and
            "robust_accuracy" on `val`; at last {"final": True, "format" (of these records: 1), "epochs", "best_epoch",
            "clean_accuracy", "robust_accuracy", "pma_accuracy" (of those that withstand `eval_attack` and then PMA),
            "confusion" (lists of [label, what the model says, images], "clean" and "attacked" by `eval_attack`),
            "eval_attack", "train_s", "train_cpu_s"}, and where there was a choice "chosen_by" (which accuracy on
            `val`), "noise" (two standard errors of it) and "within_noise" (other epochs that were worse by no more).
            Fields that end in _s are seconds; all others are the same in a resumed run.

        Raises:
            FileExistsError: the folder has the state of a run, and `resume` was not asked for.
            FloatingPointError: the loss, its gradient, a buffer that a forward pass writes or the weights after a step
                are not finite; the model has the last finite weights (those before that step; where a step that was
                finite itself was too large, those kept last), and with a folder the batch is in nonfinite.safetensors.
            InUseError: another process has a run in the folder: the message says which; an OSError.
            KeyboardInterrupt: after Ctrl-C; with a folder there is a checkpoint first, as there is after SIGTERM.
            TypeError: no pair of images and labels, such as a DataLoader; images are neither floats nor uint8, or
                labels are not int64.
            ValueError: no training images, or all of one class; images beyond [0, 1] or not as many as labels; labels
                below 0; a batch too small for its parts; a warm-up longer than a stage; no such head, nothing to train;
                a model that "cached" refuses; on a CPU a layer that PyTorch gets wrong in channels-last layout; the
                state is another run's, or of a newer fastadv, or the processes have different data, models or settings:
                the message names what differs, or what this one does not know; accelerate is set to FSDP, DeepSpeed or
                something else that a run does not heed.
        """
        return Run(self, train, val, test).run()
