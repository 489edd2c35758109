"""The training loop."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from fastadv._extras import require
from fastadv.attacks import PGD, by_name
from fastadv.data import to_float
from fastadv.evaluation.robustness import Batch, robust_accuracy, seeded
from fastadv.training.methods import METHODS, trainable
from fastadv.training.schedule import lr_factor

OPTIMIZERS = {
    "adamw": torch.optim.AdamW,
    "sgd": lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
}


class Trainer:
    """Adversarial training of `model`: each batch is attacked, then learnt from.

    Madry et al. 2018 (arXiv 1706.06083) with PGD, Wong et al. 2020 (arXiv 2001.03994) with a single step.
    The same seed gives the same weights on the CPU (with as many threads).

    Args:
        model: from images (N, C, H, W) to logits (N, classes); trained in place.
        eps: budget in pixels of [0, 1], of an attack given by name and of the default evaluation.
        attack: a name ("fgsm", "fgsm-rs", "nfgsm", "pgd"), any callable from (images, labels) to images, or
            None for training on clean images.
        method: "full", or "linear": only the head trains, the rest of the model keeps its bits.
        head: name of the head module for "linear"; None means the last nn.Linear.
        epochs, batch_size: an epoch is cut into batches of nearly equal size, at most batch_size.
        lr: peak learning rate.
        optimizer: "adamw", or "sgd" (momentum 0.9).
        warmup: steps (not epochs) of linear warm-up; a cosine to 0 follows.
        seed: of the data order, the attack and the model's own random layers; torch's generators are put
            back after the run.
        eval_attack: for the evaluations; None means PGD-10 at eps with steps of eps / 4.
        eval_every: evaluate after every so many epochs too; 0 means at the end only.
        log: path of a JSON-lines file: one line an epoch, then one with the final evaluation.
        device: where to train; None leaves the model and the data where they are.
        progress: show a progress bar (on a terminal only).

    Raises:
        ValueError: unknown attack, method or optimizer, or a number out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        *,
        attack: str | Callable | None = "fgsm",
        method: str = "full",
        head: str | None = None,
        epochs: int = 20,
        batch_size: int = 64,
        lr: float = 1e-3,
        optimizer: str = "adamw",
        warmup: int = 0,
        seed: int = 0,
        eval_attack: Callable | None = None,
        eval_every: int = 0,
        log: str | Path | None = None,
        device: torch.device | str | None = None,
        progress: bool = True,
    ):
        if method not in METHODS:
            raise ValueError(f"unknown method {method!r}; there are {', '.join(METHODS)}")
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {optimizer!r}; there are {', '.join(OPTIMIZERS)}")
        for name, value, least in (
            ("epochs", epochs, 1),
            ("batch_size", batch_size, 1),
            ("warmup", warmup, 0),
            ("eval_every", eval_every, 0),
            ("lr", lr, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.model = model if device is None else model.to(device)
        self.attack = by_name(attack, model, eps) if isinstance(attack, str) else attack
        self.eval_attack = eval_attack or PGD(model, eps, eps / 4, 10)
        self.method, self.head = method, head
        self.epochs, self.batch_size = epochs, batch_size
        self.lr, self.optimizer, self.warmup = lr, optimizer, warmup
        self.seed = seed
        self.eval_every = eval_every
        self.log = log
        self.device = device
        self.progress = progress

    def fit(self, train: Batch, test: Batch) -> list[dict]:
        """Train on `train`, evaluate on `test`.

        Args:
            train, test: (images, labels): (N, C, H, W), floats in [0, 1] or uint8, and int64 (N,).

        Returns:
            The records of the log: for each epoch "epoch", "loss" and "train_accuracy" (both on the attacked
            training images), "lr" (of the last step), "train_s" (seconds without evaluation), and, when
            evaluated, "clean_accuracy" and "robust_accuracy"; at last {"final": True, "epochs",
            "clean_accuracy", "robust_accuracy", "eval_attack", "train_s" (of all epochs)}.

        Raises:
            FloatingPointError: the loss is not finite; the weights are those before that step.
            ImportError: the `train` extra is not installed.
            ValueError: no training images, no such head, nothing to train.
        """
        steps = math.ceil(len(train[0]) / self.batch_size)
        if steps == 0:
            raise ValueError("there are no images to train on")
        self.records = []
        if self.log is not None:
            Path(self.log).write_text("")
        with (
            seeded(self.seed),
            trainable(self.model, self.method, self.head) as parameters,
            self._bar(steps) as bar,
        ):
            optimizer = OPTIMIZERS[self.optimizer](parameters, lr=self.lr)
            order = torch.Generator().manual_seed(self.seed)
            for epoch in range(self.epochs):
                # tensor_split leaves no tail of one image, on which batch-norm fails.
                batches = torch.randperm(len(train[0]), generator=order).tensor_split(steps)
                record = self._epoch(epoch, batches, train, optimizer, bar)
                if self.eval_every and (epoch + 1) % self.eval_every == 0:
                    record |= self._evaluate(test)
                self._write(record)
                bar.set_postfix({key: f"{record[key]:.3f}" for key in record if key.endswith(("loss", "accuracy"))})
            optimizer.zero_grad()
        seconds = sum(record["train_s"] for record in self.records)
        final = {"final": True, "epochs": self.epochs, **self._evaluate(test)}
        self._write(final | {"eval_attack": repr(self.eval_attack), "train_s": seconds})
        return self.records

    def _epoch(self, epoch, batches, train, optimizer, bar) -> dict:
        images, labels = train
        start = time.perf_counter()
        loss_sum = correct = 0
        for i, index in enumerate(batches):
            step = epoch * len(batches) + i
            lr = self.lr * lr_factor(step, self.warmup, self.epochs * len(batches))
            for group in optimizer.param_groups:
                group["lr"] = lr
            x, y = images[index].to(self.device), labels[index].to(self.device)
            x = to_float(x) if self.attack is None else self.attack(x, y)
            logits = self.model(x)
            loss = F.cross_entropy(logits.float(), y)
            value = loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"the loss is {value} at epoch {epoch}, step {step}: try a lower lr than {self.lr}"
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += value * len(y)
            correct += (logits.argmax(dim=1) == y).sum()
            bar.update()
        return {
            "epoch": epoch,
            "loss": loss_sum / len(labels),
            "train_accuracy": float(correct) / len(labels),
            "lr": lr,
            "train_s": time.perf_counter() - start,
        }

    def _evaluate(self, test: Batch) -> dict[str, float]:
        return robust_accuracy(self.model, test, self.eval_attack, seed=self.seed, device=self.device)

    def _write(self, record: dict) -> None:
        self.records.append(record)
        if self.log is not None:
            with open(self.log, "a") as file:
                file.write(json.dumps(record) + "\n")

    def _bar(self, steps: int):
        disable = None if self.progress else True  # None: shown on a terminal only
        return require("tqdm").tqdm(total=self.epochs * steps, unit="batch", disable=disable)
