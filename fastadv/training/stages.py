"""A stage of a training run: its epochs, the monitor and evaluation after each, and the checkpoints."""

import logging
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from fastadv._warnings import warn
from fastadv.attacks import create_attack
from fastadv.data.share import Batch
from fastadv.training.checkpoints import Groups
from fastadv.training.choice import criteria
from fastadv.training.fast import fast_method, is_fast
from fastadv.training.fast.base import Epoch, FastMethod
from fastadv.training.finite import nonfinite_groups
from fastadv.training.foreign import TrainAttack
from fastadv.training.methods import Tuning
from fastadv.training.monitor import Monitor
from fastadv.training.optimizers import load_state, optimizer_of, state_of
from fastadv.training.progress import Record
from fastadv.training.replicas import replicated
from fastadv.training.resume import frozen_sums, unsaved, warn_of_unsaved
from fastadv.training.settings import Stage
from fastadv.training.step import TrainStep
from fastadv.training.updates import Updates
from fastadv.training.weights import Weights
from fastadv.training.words import epoch_line

if TYPE_CHECKING:
    from fastadv.training.run import Run

logger = logging.getLogger("fastadv")

LOOKS = 2  # updates that are looked at: a teacher that is a copy of its student changes in the second one alone
PROBE = 2**31  # the number of an epoch that never comes: its order of the images chooses those of the monitor


class StageRun:
    """A stage in progress.

    Args:
        run: the run that it belongs to, whose `at` it brings up to date.
        number: the number of the stage, from 0.
        stage: the stage.
        tuning: what trains in it.
        groups: the tensors of the checkpoint from which the stage goes on; None where it begins.
    """

    def __init__(self, run: "Run", number: int, stage: Stage, tuning: Tuning, groups: Groups | None):
        self.run, self.stage, self.tuning, self.settings = run, stage, tuning, run.settings
        self.optimizer = optimizer_of(run.model, tuning.parameters, run.settings)
        self.through = run.model if run.team.alone else replicated(run.model, run.example, run.team)
        if groups is None:
            self._begin(number)
        self.weights = Weights(tuning, run.settings.ema_decay)
        self._use(run.settings.switch_to if run.at.switched else run.attack)
        self.monitor = self._new_monitor()
        self.judge = run.judge()
        if groups is None:
            self._save()
        else:
            self._load(groups)

    def _begin(self, number: int) -> None:
        self.run.at = self.run.at.next_stage(number)
        counts = {"trainable": self.tuning.trainable, "total": self.tuning.total}
        self.run.record({"stage": number, "method": self.stage.method, **counts})
        logger.info("%s: %s of %s parameters train", self.stage.method, *(f"{count:,}" for count in counts.values()))

    def _use(self, attack: str | TrainAttack | None) -> None:
        """Train with this attack from now on."""
        run, s, switched = self.run, self.settings, self.run.at.switched
        changes = {} if switched else s.attack
        chosen: TrainAttack | FastMethod | None
        if is_fast(attack):
            chosen = fast_method(attack, run.model, run.trainer.eps, changes, **run.passes.attack)
        elif isinstance(attack, str):
            chosen = create_attack(attack, run.model, run.trainer.eps, **changes, **run.passes.attack)
        else:
            chosen = attack
        self.step = TrainStep(
            run.model,
            chosen,
            self.optimizer,
            through=self.through,
            clean_weight=s.clean_weight,
            label_smoothing=(run.trainer.given if switched else s).label_smoothing or 0.0,
            max_grad_norm=s.max_grad_norm,
            autocast=run.autocast,
            compile=s.compile,
            highest=run.highest,
        )
        self.updates = Updates(run, self.stage, self.tuning, self.weights, self.step)

    def _new_monitor(self) -> Monitor | None:
        run, attack = self.run, self.updates.budget.attack
        if not self.settings.probe or attack is None:
            return None
        chosen = run.batches.order(PROBE)[: self.settings.probe]
        images, labels = run.images.to_all(chosen, run.device), run.labels[chosen].to(run.device)
        options = {"seed": self.settings.seed, **asdict(run.passes)}
        monitor = Monitor(run.model, images, labels, None, run.trainer.eps, **options)
        monitor.attack = attack  # the step has warned already where it is of another model
        return monitor

    # ------------------------------------------------------------------ an epoch

    def train(self) -> None:
        """Train until the last epoch, or until the monitor stops it, and put the chosen weights into the model."""
        while self.run.at.epoch < self.run.at.first_epoch + self.stage.epochs and not self.run.at.stopped:
            self._epoch()
        self._save()
        self.weights.choose()

    def _epoch(self) -> None:
        run = self.run
        if self.step.method is not None:
            shape, dtype = run.images.shape[1:], run.images.dtype
            epoch = Epoch(run.at.epoch, self.settings, shape, dtype, run.augment, run.memory)
            self.step.method.begin_epoch(epoch)
        with run.interruption if run.checkpoints else nullcontext():
            asked = self._steps()
            # Before the evaluation, which may take so long that SIGKILL follows SIGTERM.
            self._save()
            if asked:
                logger.info("interrupted: the state is in %s", run.trainer.folder)
        if asked:  # by a signal to another process of this run
            raise SystemExit(128 + signal.SIGTERM)
        self._finish_epoch()

    def _steps(self) -> bool:
        """Take the remaining updates of an epoch; return whether a signal interrupted them."""
        run, at = self.run, self.run.at
        start, before = time.perf_counter(), at.train_s
        cpu_start, cpu_before = time.process_time(), at.train_cpu_s
        saved = start
        kept = self._unsaved() if run.looked < LOOKS else None
        for index in run.batches.of_epoch(at, self.step.repeats)[at.batch :]:
            due, asked = self.updates.take(index, time.perf_counter() - saved >= self.settings.checkpoint_s)
            run.bar.update()
            if kept is not None:
                told = warn_of_unsaved(kept, self._unsaved())
                run.looked = LOOKS if told else run.looked + 1
                kept = kept if run.looked < LOOKS else None
            now = time.perf_counter()
            at.train_s = before + now - start
            at.train_cpu_s = cpu_before + time.process_time() - cpu_start
            if asked:
                return True
            if due:
                self._save()
                run.say(f"epoch {at.epoch + 1}: batch {at.batch} of {run.steps}")
                saved = now
        return False

    def _unsaved(self) -> dict[str, tuple[object, object]]:
        """What a step may change and nothing puts back. Without checkpoints that are the choice's weights alone."""
        run = self.run
        return frozen_sums(run.model) | ({} if run.checkpoints is None else unsaved(run.model, run.attack))

    def _finish_epoch(self) -> None:
        self.step.tell()
        self.updates.warn_of_idle()
        run, at = self.run, self.run.at
        images = sum(map(len, run.batches.of_epoch(at, self.step.repeats)))
        record: Record = {
            "epoch": at.epoch,
            "loss": at.loss_sum / images,
            "train_accuracy": at.right / images,
            "lr": at.lr,
        }
        record |= {"train_s": at.train_s, "train_cpu_s": at.train_cpu_s}
        free = {"abnormal": at.abnormal / at.looked} if at.looked else {}
        free |= {} if self.step.method is None else run.agreed(self.step.method.facts())
        at.epoch, at.batch, at.train_s, at.train_cpu_s = at.epoch + 1, 0, 0.0, 0.0
        at.loss_sum = at.right = at.abnormal = at.looked = 0.0
        done, every = at.epoch - at.first_epoch, self.settings.eval_every
        with self.weights.averaged():
            record |= self._watch() | free
            if run.val is not None and (done == self.stage.epochs or (every and done % every == 0)):
                record |= self._validate(run.val)
        action = record.get("action")
        if action in ("stop", "rollback", "switch"):
            self._go_back(action)
        at.stopped = action == "stop"
        run.record(record)
        run.say(epoch_line(at.records, run.epochs))
        self._save()  # without it a resumed run would evaluate this epoch again
        run.bar.set_postfix({key: f"{record[key]:.3f}" for key in record if key.endswith(("loss", "accuracy"))})

    # ------------------------------------------------------------------ between epochs

    def _watch(self) -> Record:
        """The monitor's reading, and the action where it has an alarm."""
        if self.monitor is None:
            return {}
        at = self.run.at
        start = time.perf_counter()
        reading, state = self.run.agreed((asdict(self.monitor.check()), self.monitor.state()))
        self.monitor.load(state)
        at.monitor = state
        reading["monitor_s"] = time.perf_counter() - start
        if reading["alarm"] is None:
            # Weights are good only where no earlier reading was better: a collapse begins some epochs before the alarm.
            if reading["probe_pgd"] >= state["best"]:
                self.weights.keep("good")
            return reading
        action = self.settings.on_catastrophic_overfitting
        if action == "switch" and at.switched:
            action = "warn"
        warn(f"epoch {at.epoch}: {reading['alarm']} ({action})")
        return reading | {"action": action}

    def _go_back(self, action: str) -> None:
        at = self.run.at
        if not any("epoch" in r and r["epoch"] >= at.first_epoch and not r["alarm"] for r in at.records):
            warn(
                f"epoch {at.epoch}: no earlier reading of this stage was without an alarm, so that the model is as "
                "before the stage: take a lower lr or eps, or another attack"
            )
        self.weights.go_back()
        at.average_epoch = at.epoch
        self.optimizer.state.clear()
        if action == "rollback":
            at.lr_scale /= 2
        elif action == "switch":
            at.switched, at.schedule_epoch = True, at.epoch
            self.run.memories.clear()
            self._use(self.settings.switch_to)
            if self.monitor is not None:
                self.monitor.attack = self.updates.budget.attack

    def _validate(self, val: Batch) -> Record:
        at = self.run.at
        start = time.perf_counter()
        result = self.run.agreed(self.judge.choosing(val))
        found = [result[name] for name in criteria(self.run.trainer.attack)]
        if at.best is None or found >= at.best:
            at.best, at.best_epoch = found, at.epoch - 1
            self.weights.keep("best")
        return result | {"eval_s": time.perf_counter() - start}

    # ------------------------------------------------------------------ the disk

    def _save(self) -> None:
        """Write a checkpoint."""
        method = {} if self.step.method is None else {"method": self.step.method.state()}
        groups = self.weights.groups({"optimizer": state_of(self.optimizer), **method})
        self._check_finite(groups)
        self.run.save(groups)
        self.weights.written()

    def _check_finite(self, groups: Mapping[str, Mapping[str, torch.Tensor] | None]) -> None:
        """Refuse to save tensors that are not finite. A finite step that was too large may have made them so."""
        found = self.run.agreed(nonfinite_groups(groups, self.run.masks))
        if found:
            back = self.weights.rescue()
            named = ", ".join(found[:3]) + (" ..." if found[3:] else "")
            raise FloatingPointError(
                f"{named} is not finite before {self.run.at.place}: no checkpoint is written{back}. Try a lower lr "
                f"than {self.settings.lr}, max_grad_norm=1 or a warmup"
            )

    def _load(self, groups: Groups) -> None:
        self.weights.load(groups, self.run.device)
        load_state(self.optimizer, groups["optimizer"])
        if self.step.method is not None:
            self.step.method.load(groups["method"], self.run.device)
        if self.monitor is not None and self.run.at.monitor is not None:
            self.monitor.load(self.run.at.monitor)
