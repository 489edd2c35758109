"""The updates of a training run: one for each batch, and the end of the run where one is not finite."""

import hashlib
import json
import math
from collections.abc import Iterable
from contextlib import suppress
from functools import reduce
from typing import TYPE_CHECKING

import torch

from fastadv._extras import require
from fastadv._warnings import warn
from fastadv.files import write_atomically
from fastadv.functional import sample_seeds
from fastadv.ops.generator import reseed
from fastadv.training.budget import Budget
from fastadv.training.finite import fault, largest, nonfinite
from fastadv.training.methods import Tuning
from fastadv.training.replicas import SKIPPED
from fastadv.training.schedule import lr_factor
from fastadv.training.settings import Stage
from fastadv.training.step import TrainStep
from fastadv.training.weights import Weights

if TYPE_CHECKING:
    from fastadv.training.run import Run

IDLE = 0.01  # the share of what trains that may get no gradient without a word


class Updates:
    """Takes the updates of a stage, batch by batch, together with the other processes.

    Args:
        run: the run, whose `at` each update brings up to date.
        stage: the stage.
        tuning: what trains.
        weights: the copies of it that are kept.
        step: the step with the training attack.

    Attributes:
        budget: the training attack over the steps.
        idle: (name, parameter) for each parameter that trains and got no gradient in any update so far; None before
            the first one.
    """

    def __init__(self, run: "Run", stage: Stage, tuning: Tuning, weights: Weights, step: TrainStep):
        self.run, self.stage, self.tuning, self.weights, self.step = run, stage, tuning, weights, step
        self.budget = Budget(step.attack, run.settings.eps_schedule)
        self.idle: list[tuple[str, torch.nn.Parameter]] | None = None
        self._before = [buffer.clone() for buffer in tuning.buffers.values()]

    def take(self, index: torch.Tensor, due: bool) -> tuple[bool, bool]:
        """Take the update of one batch.

        Args:
            index: int64, the numbers of the images.
            due: whether a checkpoint is due in this process.

        Returns:
            Whether a checkpoint is due in any process, and whether a signal has asked any process to end.

        Raises:
            FloatingPointError: the loss, its gradient or a buffer is not finite; the update was not taken.
        """
        at, world = self.run.at, self.run.here.num_processes
        self._prepare()
        parts = index.tensor_split(world)
        self.run.images.bring(parts, self.run.device)
        mine = parts[self.run.here.process_index].tensor_split(self.run.settings.grad_accum_steps)
        scale = world / len(index)  # DistributedDataParallel takes the mean over the processes
        try:
            found = [self._gradients(part, scale=scale, more=i + 1 < len(mine)) for i, part in enumerate(mine)]
        except BaseException as error:
            with suppress(Exception):  # a second error would hide the first one
                self._undo()
            if SKIPPED in str(error):
                raise RuntimeError(
                    "an update used other parameters than the passes before training did, as where layers are skipped "
                    "at random and rarely: several processes cannot add up such gradients. Let the model use all of "
                    "them in each pass, such as by adding 0 times a skipped layer's output, or train in one process"
                ) from error
            raise
        device = self.run.device
        wishes = torch.tensor([due, self.run.interruption.noted or 0], dtype=torch.float64, device=device)
        norms = torch.stack([norm.to(device, torch.float64) for norm in (self.step.norm(), self._statistics())])
        summed = self.run.team.summed(torch.cat((reduce(torch.add, found), wishes, norms)))
        loss, right, abnormal, looked, anywhere_due, asked, norm, statistics = summed.tolist()
        loss /= world
        # The sums are the same in all processes: all of them refuse the step together.
        if not all(map(math.isfinite, (loss, norm, statistics))):
            self._refuse(loss, norm, statistics, index)
        so_far = self.tuning.parameters if self.idle is None else self.idle
        self.idle = [(name, parameter) for name, parameter in so_far if parameter.grad is None]
        self.step.apply()
        self.weights.stepped((at.epoch - at.average_epoch) * self.run.steps + at.batch)
        at.loss_sum += loss * len(index)
        at.right, at.abnormal, at.looked = at.right + right, at.abnormal + abnormal, at.looked + looked
        at.batch += 1
        return anywhere_due > 0, asked > 0

    def warn_of_idle(self) -> None:
        """Warn of much that was to train and got no gradient in any update so far, such as an auxiliary classifier.

        Some numbers are idle in many a network, such as a token for masked patches.
        """
        idle = self.idle or []
        count = sum(parameter.numel() for _, parameter in idle)
        if count > IDLE * self.tuning.trainable:
            some = f"{idle[0][0]}{', ...' * (len(idle) > 1)}"
            warn(
                f"{count:,} of the {self.tuning.trainable:,} numbers that train got no gradient, and stay as they are "
                f"({some}): the logits do not depend on them. An auxiliary classifier, or another head, does not train"
            )
        self.idle = []

    def _prepare(self) -> None:
        """Set what depends on the number of the update: learning rate, budget and random numbers."""
        run, at = self.run, self.run.at
        done = (at.epoch - at.schedule_epoch) * run.steps + at.batch
        total = (at.first_epoch + self.stage.epochs - at.schedule_epoch) * run.steps
        at.lr = self.stage.lr * at.lr_scale * lr_factor(done, run.settings.warmup, total)
        for group in self.step.optimizer.param_groups:
            group["lr"] = at.lr
        attacker = self.step.method or self.step
        attacker.attack = self.budget.at(at.epoch * run.steps + at.batch, run.epochs * run.steps)
        # The model's random numbers depend on the epoch and the batch alone: no generator's state has to be saved.
        reseed(_mixed(run.settings.seed, at.epoch, at.batch, run.here.process_index))
        self._before = copies(self.tuning.buffers.values(), self._before)
        if self.step.method is not None:
            epoch = at.epoch - at.first_epoch
            self.step.method.begin(epoch * run.steps + at.batch, epoch, self.stage.epochs)

    def _gradients(self, part: torch.Tensor, *, scale: float, more: bool) -> torch.Tensor:
        at, batches = self.run.at, self.run.batches
        images, labels = batches.load(part, at, self.step.repeats)
        seeds = sample_seeds(self.run.settings.seed, part.to(self.run.device), at.epoch)
        moves = batches.moves(part, at, self.step.repeats)
        return self.step.gradients(images, labels, seeds, rows=part, moves=moves, scale=scale, more=more)

    def _statistics(self) -> torch.Tensor:
        """The largest magnitude in the buffers that a forward pass writes, such as batch-norm's statistics."""
        buffers = self.tuning.buffers.items() if self._before else ()
        return largest((buffer for name, buffer in buffers if name not in self.run.masks), self.run.device)

    def _undo(self) -> None:
        """Undo the changes of the batch: drop the gradients, restore the buffers."""
        self.step.forget()
        self.tuning.put_buffers(dict(zip(self.tuning.buffers, self._before, strict=True)))

    def _refuse(self, loss: float, norm: float, statistics: float, index: torch.Tensor) -> None:
        """End the run at the batch `index`, before its step, with an error that says what is not finite."""
        self._undo()
        back = self.weights.rescue() if nonfinite(self.tuning.tensors, self.run.masks) else ""
        what, todo = fault(loss, norm, statistics)
        if came := [name for name, _ in self.tuning.parameters if name in self.run.masks]:
            todo += f". The model came with numbers that are not finite in {', '.join(came[:3])}"
        todo += self.step.of_nonfinite()
        # All images of the batch to the first process, which writes them.
        self.run.images.bring([index, *[index[:0]] * (self.run.team.size - 1)], self.run.device)
        where = self._kept_batch(index)
        self.run.team.wait()
        raise FloatingPointError(
            f"{what} at {self.run.at.place}{where}; its step was not taken{back}. Try a lower lr than "
            f"{self.run.settings.lr}, max_grad_norm=1 or a warmup{todo}"
        )

    def _kept_batch(self, index: torch.Tensor) -> str:
        """Write the batch `index` to the folder; return where it is, in words."""
        if self.run.trainer.folder is None or not self.run.here.is_main_process:
            return ""
        path = self.run.trainer.folder / "nonfinite.safetensors"
        images, labels = self.run.batches.load(index, self.run.at, self.step.repeats)
        batch = {"images": images.contiguous(), "labels": labels, "index": index}
        try:
            write_atomically(path, require("safetensors.torch").save(batch, {"fastadv": json.dumps({"format": 1})}))
        except OSError as error:
            return f" (the batch could not be written: {error})"
        return f"; the batch is in {path}"


def _mixed(*numbers: int) -> int:
    """A seed of 32 bits from several numbers; torch's generator on the CPU uses no more bits."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "little")


def copies(tensors: Iterable[torch.Tensor], into: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of tensors, in the memory of earlier ones where no shape has changed, as of a buffer that grows."""
    now = list(tensors)
    if [t.shape for t in now] != [t.shape for t in into]:
        return [t.clone() for t in now]
    if now:
        torch._foreach_copy_(into, now)
    return into
