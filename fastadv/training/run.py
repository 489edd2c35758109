"""The run of a Trainer: the steps of its stages and epochs, with the monitor, evaluations and checkpoints."""

import hashlib
import json
import logging
import math
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fastadv._extras import require
from fastadv._warnings import warn
from fastadv.attacks import Attack, create_attack
from fastadv.data.share import Batch
from fastadv.files import write_atomically
from fastadv.functional import sample_seeds, to_float
from fastadv.nn.autocast import own_autocast
from fastadv.ops.generator import reseed, seeded
from fastadv.training import log
from fastadv.training.augment import Augment
from fastadv.training.backbone import FIT, JUDGE, backbone_robustness
from fastadv.training.batches import Batches
from fastadv.training.budget import Budget
from fastadv.training.checkpoints import Checkpoints, Facts, Groups
from fastadv.training.checks import check_run, check_same
from fastadv.training.choice import choice, criteria
from fastadv.training.fast import FAST, fast_method, is_fast
from fastadv.training.fast.base import Epoch, FastMethod
from fastadv.training.finite import fault, largest, nonfinite, nonfinite_groups
from fastadv.training.foreign import TrainAttack, as_attack
from fastadv.training.interruption import Interruption
from fastadv.training.judge import Judge
from fastadv.training.memory import SampleMemory
from fastadv.training.methods import trainable
from fastadv.training.monitor import Monitor
from fastadv.training.optimizers import load_state, optimizer_of, state_of
from fastadv.training.parts import Parts
from fastadv.training.passes import Passes
from fastadv.training.processes import one_run, precision, processes, team_of
from fastadv.training.progress import Progress, Record
from fastadv.training.replicas import replicated, share_weights
from fastadv.training.resume import check_epochs, run_fingerprint, unsaved, warn_of_unsaved
from fastadv.training.schedule import lr_factor
from fastadv.training.settings import Settings, Stage
from fastadv.training.step import TrainStep
from fastadv.training.weights import Tensors, Weights
from fastadv.training.words import epoch_line

if TYPE_CHECKING:
    from tqdm import tqdm

    from fastadv.training.trainer import Trainer

logger = logging.getLogger("fastadv")

T = TypeVar("T")

# Numbers of epochs that never come. Their orders of the images choose some of them:
PROBE = 2**31  # those of the monitor
MEASURED = 2**31 + 1  # those on which the backbone is measured


class Run:
    """A call of `Trainer.fit`."""

    def __init__(self, trainer: "Trainer", train: Batch, val: Batch | None, test: Batch | None):
        self.trainer, self.settings = trainer, trainer.settings
        self.here = processes()
        self.team = team_of(self.here)
        alone = self.team.alone
        self.device = torch.device(trainer.device if alone and trainer.device is not None else self.here.device)
        if trainer.device is not None and trainer.device.type != self.device.type:
            raise ValueError(
                f"several processes train where accelerate puts them, on {self.device.type}, and device is "
                f"{trainer.device}: leave it out, or set ACCELERATE_USE_CPU=true for the CPU"
            )
        self.precision = self.settings.precision or precision()
        parts = self.team.by_all(lambda: self._taken(train, val, test))
        layout = torch.channels_last if self.settings.channels_last else torch.preserve_format
        target: dict[str, Any] = {"device": self.device, "memory_format": layout}  # PyTorch's stubs lack both together
        self.model = trainer.model.to(**target)
        given = trainer.attack
        self.attack = given if isinstance(given, str) else as_attack(given, self.model, trainer.eps)
        self.layout = torch.channels_last if self.settings.channels_last else None
        self.autocast = torch.bfloat16 if self.precision == "bf16" else None
        self.augment = Augment(crop=parts.train[0].shape[2] // 8) if self.settings.augment else None
        self.at = Progress()
        self.interruption = Interruption()
        calls = self.steps * self.here.num_processes * self.settings.grad_accum_steps  # of the model in an epoch
        part = math.ceil(len(parts.train[1]) / calls)
        self.passes = Passes(part, self.autocast, self.layout, self.settings.compile)
        self.memories: dict[str, SampleMemory] = {}
        self.checkpoints: Checkpoints | None = None
        self.looked = False  # whether a step was looked at for state that no checkpoint has
        self.groups: dict[str, Tensors | None] = {}  # {group of tensors in the last checkpoint: None}
        share_weights(self.model, self.team)
        held = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.masks = set(nonfinite(held))  # tensors that are infinite or NaN from the start, such as a mask of logits
        self.data = {} if alone and trainer.folder is None else parts.facts(self.team, self.device)
        check_same(trainer, self.data, self.team)
        for sentence in parts.in_common(self.device):
            if self.here.is_main_process:
                warn(sentence)
        self.images, self.val, self.test = parts.shares(self.team)
        self.labels = parts.train[1]
        self.batches = Batches(
            self.images,
            self.labels,
            self.steps,
            seed=self.settings.seed,
            augment=self.augment,
            memory_format=self.layout,
            device=self.device,
        )

    def _taken(self, train: Batch, val: Batch | None, test: Batch | None) -> Parts:
        parts = Parts.of(self.trainer.model, train, val, test)
        self.steps = math.ceil(len(parts.train[1]) / self.settings.batch_size)
        with own_autocast(self.device, None):
            self.highest = check_run(
                self.trainer, parts, self.steps, self.team, device=self.device, precision=self.precision
            )
        return parts

    @property
    def _epochs(self) -> int:
        """How many epochs all stages have together."""
        return sum(stage.epochs for stage in self.settings.stages)

    # ------------------------------------------------------------------ the whole run

    def run(self) -> list[Record]:
        """Train, and return the records as of `Trainer.fit`."""
        folder = self.trainer.folder
        with own_autocast(self.device, None), nullcontext() if folder is None else one_run(folder, self.team):
            records = self._run()
        self.team.wait()
        return records

    def _run(self) -> list[Record]:
        groups = self._open()
        with seeded(self.settings.seed), self._bar() as self.bar:
            if not self.at.records:
                self._measure_backbone()
            for number, stage in list(enumerate(self.settings.stages))[self.at.stage :]:
                self._stage(number, stage, groups)
                groups = None
            if not self.at.records[-1].get("final"):
                self._record(self._final())
                self._save(self.groups)
        return self.at.records

    def _bar(self) -> "tqdm":
        done = self.at.epoch * self.steps + self.at.batch
        hidden = None if self.trainer.progress and self.here.is_main_process else True  # None: shown on a terminal only
        return require("tqdm").tqdm(total=self._epochs * self.steps, initial=done, unit="batch", disable=hidden)

    def _open(self) -> Groups | None:
        """The tensors of the checkpoint to resume from, or None. `self.at` becomes the checkpoint's progress."""
        folder = self.trainer.folder
        if folder is None:
            return None
        defaults = asdict(Settings().settled({}))
        run = run_fingerprint(self.trainer, self.model, self.data)
        self.checkpoints = Checkpoints(folder / "state", run, defaults, self.masks)
        groups, facts = self._found(self.checkpoints)
        if facts is not None:
            self.at = Progress.of(facts["place"], folder)
            by_epochs = is_fast(self.attack) and FAST[self.attack].by_epochs
            check_epochs(self.at, self.settings, self.steps, facts["epochs"], folder, by_epochs=by_epochs)
            if facts["machine"] != {name: value for name, value in self._machine().items() if name in facts["machine"]}:
                warn(
                    f"the run began with {facts['machine']} and goes on with {self._machine()}: the bits of its result "
                    "will be others than without the interruption"
                )
            logger.info("going on in epoch %d after batch %d", self.at.epoch + 1, self.at.batch)
        self.team.from_first(lambda: log.begin(folder / log.NAME, self.at.records, new=facts is None))
        return groups

    def _found(self, checkpoints: Checkpoints) -> tuple[Groups | None, Facts | None]:
        """The newest checkpoint of the first process, in all processes: the others may have other disks."""
        groups: Groups | None = None

        def load() -> Facts | None:
            nonlocal groups
            if checkpoints.exist() and not self.trainer.resume:
                raise FileExistsError(
                    f"{self.trainer.folder} has the state of a run: resume it, or choose another folder"
                )
            groups, facts = checkpoints.load() or (None, None)
            return facts

        facts = self.team.from_first(load)
        if facts is not None and not self.team.alone:
            groups = self.team.tensors_of_first(groups, self.device)
        return groups, facts

    def _machine(self) -> dict[str, int | str]:
        return {
            "threads": torch.get_num_threads(),
            "processes": self.here.num_processes,
            "device": self.device.type,
            "precision": self.precision,
        }

    def _measure_backbone(self) -> None:
        wanted = self.trainer.measure_backbone
        if wanted is None:
            wanted = self.settings.stages[0].method != "full"
        if wanted:
            s = self.settings
            rows = self.batches.order(MEASURED)[: FIT + JUDGE].sort()[0]
            images, labels = self.images.to_all(rows, self.device), self.labels[rows]
            options = {"head": s.head, "seed": s.seed, **asdict(self.passes)}
            found = self._agreed(backbone_robustness(self.model, images, labels, self.trainer.eps, **options))
            self._record({"backbone": found})
            if found["clean_accuracy"] is not None:
                shares = f"{found['clean_accuracy']:.1%} clean, {found['robust_accuracy']:.1%} under PGD-10"
                words = "the backbone, with a linear head fitted to it: %s at eps %g/255"
                logger.info(words, shares, 255 * self.trainer.eps)
            if found["warning"]:
                warn(found["warning"])

    def _final(self) -> Record:
        epochs = [record for record in self.at.records if "epoch" in record]
        seconds = {name: sum(record.get(name, 0.0) for record in epochs) for name in ("train_s", "train_cpu_s")}
        judge = self._judge()
        result = {} if self.test is None else self._agreed(judge.final(self.test))
        chosen = {}
        if self.at.best_epoch is not None and self.val is not None:
            chosen = choice(self.at, criteria(self.trainer.attack)[0], len(self.val[1]))
        final = {
            "final": True,
            "format": log.FORMAT,
            "epochs": self.at.epoch,
            "best_epoch": self.at.best_epoch,
            **chosen,
            **result,
        }
        return final | {"eval_attack": judge.name, **seconds}

    def _judge(self) -> Judge:
        given, s = self.trainer.eval_attack, self.settings
        return Judge(self.model, given, self.trainer.eps, seed=s.seed, device=self.device, passes=self.passes)

    # ------------------------------------------------------------------ a stage

    def _stage(self, number: int, stage: Stage, groups: Groups | None) -> None:
        s = self.settings
        torch.manual_seed(s.seed)  # low-rank factors begin at random
        example = to_float(self.images.to_all(torch.arange(2), self.device))
        with trainable(
            self.model,
            stage.method,
            s.head,
            rank=s.rank,
            alpha=s.lora_alpha,
            lora_targets=s.lora_targets,
            example=example[:1],
            adapter_reduction=s.adapter_reduction,
            prompt_tokens=s.prompt_tokens,
        ) as self.tuning:
            self.optimizer = optimizer_of(self.model, self.tuning.parameters, s)
            self.through = self.model if self.team.alone else replicated(self.model, example, self.team)
            if groups is None:
                self._begin(number, stage)
            self._use(s.switch_to if self.at.switched else self.attack)
            self.weights = Weights(self.tuning, s.ema_decay)
            self.monitor = self._new_monitor()
            self.before = [buffer.clone() for buffer in self.tuning.buffers.values()]
            self.judge = self._judge()
            if groups is None:
                self._save()
            else:
                self._load(groups)
            while self.at.epoch < self.at.first_epoch + stage.epochs and not self.at.stopped:
                self._epoch(stage)
            self._save()
            self.weights.choose()

    def _begin(self, number: int, stage: Stage) -> None:
        now, since = self.at.epoch, self.at.epoch if self.at.switched else self.at.memory_since
        self.at = Progress(
            number,
            epoch=now,
            first_epoch=now,
            schedule_epoch=now,
            average_epoch=now,
            memory_since=since,
            records=self.at.records,
        )
        counts = {"trainable": self.tuning.trainable, "total": self.tuning.total}
        self._record({"stage": number, "method": stage.method, **counts})
        logger.info("%s: %s of %s parameters train", stage.method, *(f"{count:,}" for count in counts.values()))

    def _use(self, attack: str | TrainAttack | None) -> None:
        """Train with this attack from now on."""
        s = self.settings
        changes = {} if self.at.switched else s.attack
        chosen: TrainAttack | FastMethod | None
        if is_fast(attack):
            chosen = fast_method(attack, self.model, self.trainer.eps, changes, **self.passes.attack)
        elif isinstance(attack, str):
            chosen = self._named(attack, **changes)
        else:
            chosen = attack
        self.step = TrainStep(
            self.model,
            chosen,
            self.optimizer,
            through=self.through,
            clean_weight=s.clean_weight,
            label_smoothing=(self.trainer.given if self.at.switched else s).label_smoothing or 0.0,
            max_grad_norm=s.max_grad_norm,
            autocast=self.autocast,
            compile=s.compile,
            highest=self.highest,
        )
        self.budget = Budget(self.step.attack, s.eps_schedule)

    def _named(self, name: str, **changes: float | None) -> Attack:
        return create_attack(name, self.model, self.trainer.eps, **changes, **self.passes.attack)

    def _new_monitor(self) -> Monitor | None:
        if not self.settings.probe or self.budget.attack is None:
            return None
        chosen = self.batches.order(PROBE)[: self.settings.probe]
        images, labels = self.images.to_all(chosen, self.device), self.labels[chosen].to(self.device)
        options = {"seed": self.settings.seed, **asdict(self.passes)}
        monitor = Monitor(self.model, images, labels, None, self.trainer.eps, **options)
        monitor.attack = self.budget.attack  # the step has warned already where it is of another model
        return monitor

    # ------------------------------------------------------------------ an epoch

    def _epoch(self, stage: Stage) -> None:
        if self.step.method is not None:
            shape, dtype = self.images.shape[1:], self.images.dtype
            epoch = Epoch(self.at.epoch, self.settings, shape, dtype, self.augment, self._memory)
            self.step.method.begin_epoch(epoch)
        with self.interruption if self.checkpoints else nullcontext():
            asked = self._steps(stage)
            # Before the evaluation, which may take so long that SIGKILL follows SIGTERM.
            self._save()
            if asked:
                logger.info("interrupted: the state is in %s", self.trainer.folder)
        if asked:  # by a signal to another process of this run
            raise SystemExit(128 + signal.SIGTERM)
        self._finish_epoch(stage)

    def _memory(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> SampleMemory:
        """The rows that are kept under a name for each training image, ready for this epoch. They outlast a stage."""
        if name not in self.memories:
            if self.augment is not None and not all(hasattr(self.augment, way) for way in ("sources", "targets")):
                raise ValueError(
                    f"{self.augment} does not say where each pixel goes (sources, targets), and the attack "
                    f"{self.trainer.attack} keeps numbers of each: take another attack, or leave the augmentation out"
                )
            at, first = self.at, self.at.memory_since
            folder = self.trainer.folder and self.trainer.folder / "memory"
            going_on = at.epoch > first or at.batch > 0
            self.memories[name] = SampleMemory(
                folder, name, len(self.labels), shape, dtype, resume=going_on, first=first, team=self.team
            )
        self.memories[name].begin(self.at.epoch)
        return self.memories[name]

    def _steps(self, stage: Stage) -> bool:
        """Take the remaining steps of an epoch; return whether a signal interrupted them."""
        start, before = time.perf_counter(), self.at.train_s
        cpu_start, cpu_before = time.process_time(), self.at.train_cpu_s
        saved = start
        kept = None if self.checkpoints is None or self.looked else unsaved(self.model, self.attack)
        for index in self.batches.of_epoch(self.at, self.step.repeats)[self.at.batch :]:
            due, asked = self._batch(stage, index, time.perf_counter() - saved >= self.settings.checkpoint_s)
            if kept is not None:
                warn_of_unsaved(kept, unsaved(self.model, self.attack))
                kept, self.looked = None, True
            now = time.perf_counter()
            self.at.train_s = before + now - start
            self.at.train_cpu_s = cpu_before + time.process_time() - cpu_start
            if asked:
                return True
            if due:
                self._save()
                self._say(f"epoch {self.at.epoch + 1}: batch {self.at.batch} of {self.steps}")
                saved = now
        return False

    def _finish_epoch(self, stage: Stage) -> None:
        self.step.tell()
        at, images = self.at, sum(map(len, self.batches.of_epoch(self.at, self.step.repeats)))
        record: Record = {
            "epoch": at.epoch,
            "loss": at.loss_sum / images,
            "train_accuracy": at.right / images,
            "lr": at.lr,
        }
        record |= {"train_s": at.train_s, "train_cpu_s": at.train_cpu_s}
        free = {"abnormal": at.abnormal / at.looked} if at.looked else {}
        free |= {} if self.step.method is None else self._agreed(self.step.method.facts())
        at.epoch, at.batch, at.train_s, at.train_cpu_s = at.epoch + 1, 0, 0.0, 0.0
        at.loss_sum = at.right = at.abnormal = at.looked = 0.0
        done, every = at.epoch - at.first_epoch, self.settings.eval_every
        with self.weights.averaged():
            record |= self._watch() | free
            if self.val is not None and (done == stage.epochs or (every and done % every == 0)):
                record |= self._validate(self.val)
        action = record.get("action")
        if action in ("stop", "rollback", "switch"):
            self._go_back(action)
        at.stopped = action == "stop"
        self._record(record)
        self._say(epoch_line(at.records, self._epochs))
        self._save()  # without it a resumed run would evaluate this epoch again
        self.bar.set_postfix({key: f"{record[key]:.3f}" for key in record if key.endswith(("loss", "accuracy"))})

    def _batch(self, stage: Stage, index: torch.Tensor, due: bool) -> tuple[bool, bool]:
        """Take the step of one batch.

        Args:
            stage: the stage of the run.
            index: int64, the numbers of the images.
            due: whether a checkpoint is due in this process.

        Returns:
            Whether a checkpoint is due in any process, and whether a signal has asked any process to end.
        """
        at, world = self.at, self.here.num_processes
        done = (at.epoch - at.schedule_epoch) * self.steps + at.batch
        total = (at.first_epoch + stage.epochs - at.schedule_epoch) * self.steps
        at.lr = stage.lr * at.lr_scale * lr_factor(done, self.settings.warmup, total)
        attacker = self.step.method or self.step
        attacker.attack = self.budget.at(at.epoch * self.steps + at.batch, self._epochs * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = at.lr
        # The model's random numbers depend on the epoch and the batch alone: no generator's state has to be saved.
        reseed(_mixed(self.settings.seed, at.epoch, at.batch, self.here.process_index))
        if self.before:
            torch._foreach_copy_(self.before, list(self.tuning.buffers.values()))
        parts = index.tensor_split(world)
        self.images.bring(parts, self.device)
        mine = parts[self.here.process_index].tensor_split(self.settings.grad_accum_steps)
        scale = world / len(index)  # DistributedDataParallel takes the mean over the processes
        if self.step.method is not None:
            epoch = at.epoch - at.first_epoch
            self.step.method.begin(epoch * self.steps + at.batch, epoch, stage.epochs)
        try:
            found = [self._gradients(part, scale=scale, more=i + 1 < len(mine)) for i, part in enumerate(mine)]
        except BaseException:
            with suppress(Exception):  # a second error would hide the first one
                self._undo()
            raise
        wishes = torch.tensor([due, self.interruption.noted or 0], dtype=torch.float64, device=self.device)
        norms = torch.stack([norm.to(self.device, torch.float64) for norm in (self.step.norm(), self._statistics())])
        summed = self.team.summed(torch.cat((reduce(torch.add, found), wishes, norms)))
        loss, right, abnormal, looked, anywhere_due, asked, norm, statistics = summed.tolist()
        loss /= world
        # The sums are the same in all processes: all of them refuse the step together.
        if not all(map(math.isfinite, (loss, norm, statistics))):
            self._refuse(loss, norm, statistics, index)
        self.step.apply()
        self.weights.stepped((at.epoch - at.average_epoch) * self.steps + at.batch)
        at.loss_sum += loss * len(index)
        at.right, at.abnormal, at.looked = at.right + right, at.abnormal + abnormal, at.looked + looked
        at.batch += 1
        self.bar.update()
        return anywhere_due > 0, asked > 0

    def _gradients(self, part: torch.Tensor, *, scale: float, more: bool) -> torch.Tensor:
        images, labels = self.batches.load(part, self.at, self.step.repeats)
        seeds = sample_seeds(self.settings.seed, part.to(self.device), self.at.epoch)
        moves = self.batches.moves(part, self.at, self.step.repeats)
        return self.step.gradients(images, labels, seeds, rows=part, moves=moves, scale=scale, more=more)

    def _statistics(self) -> torch.Tensor:
        """The largest magnitude in the buffers that a forward pass writes, such as batch-norm's statistics."""
        buffers = self.tuning.buffers.items() if self.before else ()
        return largest((buffer for name, buffer in buffers if name not in self.masks), self.device)

    def _undo(self) -> None:
        """Undo the changes of the batch: drop the gradients, restore the buffers."""
        self.step.forget()
        for buffer, before in zip(self.tuning.buffers.values(), self.before, strict=True):
            buffer.copy_(before)

    def _refuse(self, loss: float, norm: float, statistics: float, index: torch.Tensor) -> None:
        """End the run at the batch `index`, before its step, with an error that says what is not finite."""
        self._undo()
        back = self._rescued() if nonfinite(self.tuning.tensors, self.masks) else ""
        what, todo = fault(loss, norm, statistics)
        if came := [name for name, _ in self.tuning.parameters if name in self.masks]:
            todo += f". The model came with numbers that are not finite in {', '.join(came[:3])}"
        todo += self.step.of_nonfinite()
        # All images of the batch to the first process, which writes them.
        self.images.bring([index, *[index[:0]] * (self.team.size - 1)], self.device)
        where = self._kept_batch(index)
        self.team.wait()
        raise FloatingPointError(
            f"{what} at {self._here()}{where}; its step was not taken{back}. Try a lower lr than {self.settings.lr}, "
            f"max_grad_norm=1 or a warmup{todo}"
        )

    def _kept_batch(self, index: torch.Tensor) -> str:
        """Write the batch `index` to the folder; return where it is, in words."""
        if self.trainer.folder is None or not self.here.is_main_process:
            return ""
        path = self.trainer.folder / "nonfinite.safetensors"
        images, labels = self.batches.load(index, self.at, self.step.repeats)
        batch = {"images": images.contiguous(), "labels": labels, "index": index}
        try:
            write_atomically(path, require("safetensors.torch").save(batch, {"fastadv": json.dumps({"format": 1})}))
        except OSError as error:
            return f" (the batch could not be written: {error})"
        return f"; the batch is in {path}"

    def _rescued(self) -> str:
        """Go back to the last weights that were kept; return a sentence that says so."""
        self.weights.rescue()
        return ". The step before had left weights that are not finite: the model has the last ones that were kept"

    def _check_finite(self, groups: Mapping[str, Mapping[str, torch.Tensor] | None]) -> None:
        """Refuse to save tensors that are not finite. A finite step that was too large may have made them so."""
        found = self._agreed(nonfinite_groups(groups, self.masks))
        if found:
            back = self._rescued()
            named = ", ".join(found[:3]) + (" ..." if found[3:] else "")
            raise FloatingPointError(
                f"{named} is not finite before {self._here()}: no checkpoint is written{back}. Try a lower lr than "
                f"{self.settings.lr}, max_grad_norm=1 or a warmup"
            )

    def _here(self) -> str:
        """Where the run is, in words. They count from 1."""
        return f"epoch {self.at.epoch + 1}, batch {self.at.batch + 1}"

    # ------------------------------------------------------------------ between epochs

    def _watch(self) -> Record:
        """The monitor's reading, and the action where it has an alarm."""
        if self.monitor is None:
            return {}
        start = time.perf_counter()
        reading, state = self._agreed((asdict(self.monitor.check()), self.monitor.state()))
        self.monitor.load(state)
        self.at.monitor = state
        reading["monitor_s"] = time.perf_counter() - start
        if reading["alarm"] is None:
            # Weights are good only where no earlier reading was better: a collapse begins some epochs before the alarm.
            if reading["probe_pgd"] >= state["best"]:
                self.weights.keep("good")
            return reading
        action = self.settings.on_catastrophic_overfitting
        if action == "switch" and self.at.switched:
            action = "warn"
        warn(f"epoch {self.at.epoch}: {reading['alarm']} ({action})")
        return reading | {"action": action}

    def _go_back(self, action: str) -> None:
        self.weights.go_back()
        self.at.average_epoch = self.at.epoch
        self.optimizer.state.clear()
        if action == "rollback":
            self.at.lr_scale /= 2
        elif action == "switch":
            self.at.switched, self.at.schedule_epoch = True, self.at.epoch
            self.memories.clear()
            self._use(self.settings.switch_to)
            if self.monitor is not None:
                self.monitor.attack = self.budget.attack

    def _validate(self, val: Batch) -> Record:
        start = time.perf_counter()
        result = self._agreed(self.judge.choosing(val))
        found = [result[name] for name in criteria(self.trainer.attack)]
        if self.at.best is None or found >= self.at.best:
            self.at.best, self.at.best_epoch = found, self.at.epoch - 1
            self.weights.keep("best")
        return result | {"eval_s": time.perf_counter() - start}

    def _agreed(self, found: T) -> T:
        """The first process's result, in all processes. Theirs may differ by rounding or batch-norm's statistics."""
        return self.team.from_first(lambda: found)

    def _say(self, text: str) -> None:
        """Log a line where there is no progress bar."""
        if self.here.is_main_process:
            logger.log(logging.INFO if self.bar.disable else logging.DEBUG, text)

    # ------------------------------------------------------------------ the disk

    def _record(self, record: Record) -> None:
        self.at.records.append(record)
        folder = self.trainer.folder
        if folder is not None:
            self.team.from_first(lambda: log.append(folder / log.NAME, record))

    def _save(self, before: Mapping[str, Tensors | None] | None = None) -> None:
        """Write a checkpoint.

        Args:
            before: {group of the last checkpoint: None}, where no tensor has changed since then; None means the
                present groups.
        """
        groups = self.weights.groups(self._of_steps()) if before is None else before
        self._check_finite(groups)
        checkpoints = self.checkpoints
        if checkpoints is None:
            return

        def save() -> None:
            for memory in self.memories.values():  # before the checkpoint, which relies on them
                memory.flush()
            facts = {"place": asdict(self.at), "epochs": self.settings.epochs, "machine": self._machine()}
            checkpoints.save(groups, facts)
            self.groups = dict.fromkeys(groups)

        self.team.from_first(save)
        self.weights.written()

    def _of_steps(self) -> Groups:
        """The groups of tensors beside the weights that change with every step."""
        method = {} if self.step.method is None else {"method": self.step.method.state()}
        return {"optimizer": state_of(self.optimizer), **method}

    def _load(self, groups: Groups) -> None:
        self.weights.load(groups, self.device)
        load_state(self.optimizer, groups["optimizer"])
        if self.step.method is not None:
            self.step.method.load(groups["method"], self.device)
        if self.monitor is not None and self.at.monitor is not None:
            self.monitor.load(self.at.monitor)


def _mixed(*numbers: int) -> int:
    """A seed of 32 bits from several numbers; torch's generator on the CPU uses no more bits."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=4).digest(), "little")
