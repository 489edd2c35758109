"""A call of Trainer.fit: what its stages share, the checkpoints and the records."""

import copy
import logging
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from fastadv._extras import require
from fastadv._warnings import warn
from fastadv.data.share import Batch
from fastadv.functional import to_float
from fastadv.nn.autocast import own_autocast
from fastadv.ops.generator import seeded
from fastadv.training import log
from fastadv.training.augment import Augment
from fastadv.training.backbone import FIT, JUDGE, backbone_robustness
from fastadv.training.batches import Batches
from fastadv.training.checkpoints import Checkpoints, Facts, Groups
from fastadv.training.checks import check_run, check_same
from fastadv.training.choice import choice, criteria
from fastadv.training.fast import FAST, is_fast
from fastadv.training.finite import nonfinite
from fastadv.training.foreign import ForeignAttack, as_attack
from fastadv.training.interruption import Interruption
from fastadv.training.judge import Judge
from fastadv.training.memory import SampleMemory
from fastadv.training.methods import Tuning, trainable
from fastadv.training.parts import Parts
from fastadv.training.passes import Passes
from fastadv.training.processes import one_run, precision, processes, team_of
from fastadv.training.progress import Progress, Record
from fastadv.training.replicas import share_weights
from fastadv.training.resume import check_epochs, run_fingerprint
from fastadv.training.settings import Settings, Stage
from fastadv.training.stages import StageRun
from fastadv.training.weights import Tensors

if TYPE_CHECKING:
    from tqdm import tqdm

    from fastadv.training.trainer import Trainer

logger = logging.getLogger("fastadv")

T = TypeVar("T")

MEASURED = 2**31 + 1  # the number of an epoch that never comes: its order chooses images to measure the backbone on


class Run:
    """A run in progress.

    Attributes:
        at: where it is.
        attack: the training attack, or its name.
        batches: the training images of each epoch, in batches.
        bar: the progress bar.
        checkpoints: where they are written; None without a folder.
        epochs: how many epochs all stages have together.
        example: two training images, (2, C, H, W), floats in [0, 1], the same in all processes.
        here: accelerate's view of this process.
        highest: the model takes labels up to this one; None where that is not known.
        images, labels: the training set, of which each process has a share of the images.
        looked: how many updates were looked at for state that no checkpoint has.
        masks: the names of tensors that are infinite or NaN from the start, such as a mask of logits.
        memories: rows that are kept of each training image, by name; they outlast a stage.
        passes: how the model is called.
        steps: the number of updates in an epoch.
        team: the processes of the run.
    """

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
        self.passes: Passes = Passes(part, self.autocast, self.layout, self.settings.compile)
        self.memories: dict[str, SampleMemory] = {}
        self.checkpoints: Checkpoints | None = None
        self.looked = 0
        self._groups: dict[str, None] = {}  # the groups of tensors in the last checkpoint
        share_weights(self.model, self.team)
        held = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        self.masks = set(nonfinite(held))
        self.data = {} if alone and trainer.folder is None else parts.facts(self.team, self.device)
        check_same(trainer, self.data, self.team)
        for sentence in (*parts.in_common(self.device), *parts.unlearnt()):
            if self.here.is_main_process:
                warn(sentence)
        self.images, self.val, self.test = parts.shares(self.team)
        self.labels = parts.train[1]
        self.example: torch.Tensor = to_float(self.images.to_all(torch.arange(2), self.device))
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
        self.epochs = sum(stage.epochs for stage in self.settings.stages)
        self.steps = math.ceil(len(parts.train[1]) / self.settings.batch_size)
        with own_autocast(self.device, None):
            self.highest = check_run(
                self.trainer, parts, self.steps, self.team, device=self.device, precision=self.precision
            )
        return parts

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
                self._try_methods()
                self._try_eval_attack()
                self._measure_backbone()
            for number, stage in list(enumerate(self.settings.stages))[self.at.stage :]:
                with self._trainable(stage) as tuning:
                    StageRun(self, number, stage, tuning, groups).train()
                groups = None
            if not self.at.records[-1].get("final"):
                self.record(self._final())
                self.save(self._groups)
        return self.at.records

    def _try_methods(self) -> None:
        """Refuse a method that the model does not take before the stages in front of it have trained."""
        for stage in self.settings.stages[1:]:
            with self._trainable(stage, copy.deepcopy(self.model)):
                pass

    def _try_eval_attack(self) -> None:
        """Refuse an `eval_attack` that leaves its budget before there is a model that it cannot judge."""
        if self.trainer.eval_attack is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # two images tell nothing else
                self.judge().choosing((self.example, self.labels[:2].to(self.device)))

    def _trainable(self, stage: Stage, model: nn.Module | None = None) -> AbstractContextManager[Tuning]:
        """Set the model, or the one given, up for the stage."""
        s = self.settings
        torch.manual_seed(s.seed)  # low-rank factors begin at random
        return trainable(
            self.model if model is None else model,
            stage.method,
            s.head,
            rank=s.rank,
            alpha=s.lora_alpha,
            lora_targets=s.lora_targets,
            example=self.example[:1],
            adapter_reduction=s.adapter_reduction,
            prompt_tokens=s.prompt_tokens,
        )

    def _bar(self) -> "tqdm":
        done = self.at.epoch * self.steps + self.at.batch
        hidden = None if self.trainer.progress and self.here.is_main_process else True  # None: shown on a terminal only
        return require("tqdm").tqdm(total=self.epochs * self.steps, initial=done, unit="batch", disable=hidden)

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
        """What the bits of the result depend on beside the run itself: hardware, precision and versions."""
        attack = self.attack.attack if isinstance(self.attack, ForeignAttack) else self.attack
        classes = {type(module) for module in self.model.modules()} | {type(attack)}
        packages = {"torch", "fastadv", *(each.__module__.partition(".")[0] for each in classes)}
        return {
            **{name: sys.modules[name].__version__ for name in sorted(packages) if _has_version(name)},
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
            found = self.agreed(backbone_robustness(self.model, images, labels, self.trainer.eps, **options))
            self.record({"backbone": found})
            if found["clean_accuracy"] is not None:
                shares = f"{found['clean_accuracy']:.1%} clean, {found['robust_accuracy']:.1%} under PGD-10"
                words = "the backbone, with a linear head fitted to it: %s at eps %g/255"
                logger.info(words, shares, 255 * self.trainer.eps)
            if found["warning"]:
                warn(found["warning"])

    def _final(self) -> Record:
        epochs = [record for record in self.at.records if "epoch" in record]
        seconds = {name: sum(record.get(name, 0.0) for record in epochs) for name in ("train_s", "train_cpu_s")}
        judge = self.judge()
        result = {} if self.test is None else self.agreed(judge.final(self.test))
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

    def judge(self) -> Judge:
        """The judge of the evaluations."""
        given, s = self.trainer.eval_attack, self.settings
        return Judge(self.model, given, self.trainer.eps, seed=s.seed, device=self.device, passes=self.passes)

    # ------------------------------------------------------------------ what stages ask for

    def memory(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> SampleMemory:
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

    def agreed(self, found: T) -> T:
        """The first process's result, in all processes. Theirs may differ by rounding or batch-norm's statistics."""
        return self.team.from_first(lambda: found)

    def say(self, text: str) -> None:
        """Log a line where there is no progress bar."""
        if self.here.is_main_process:
            logger.log(logging.INFO if self.bar.disable else logging.DEBUG, text)

    def record(self, record: Record) -> None:
        """Add a record to those of the run, and to the log."""
        self.at.records.append(record)
        folder = self.trainer.folder
        if folder is not None:
            self.team.from_first(lambda: log.append(folder / log.NAME, record))

    def save(self, groups: Mapping[str, Tensors | None]) -> None:
        """Write a checkpoint, if the run has a folder.

        Args:
            groups: {group: its tensors}; None for a group that has not changed since the last checkpoint.
        """
        checkpoints = self.checkpoints
        if checkpoints is None:
            return

        def save() -> None:
            for memory in self.memories.values():  # before the checkpoint, which relies on them
                memory.flush()
            facts = {"place": asdict(self.at), "epochs": self.settings.epochs, "machine": self._machine()}
            checkpoints.save(groups, facts)
            self._groups = dict.fromkeys(groups)

        self.team.from_first(save)


def _has_version(module: str) -> bool:
    return isinstance(getattr(sys.modules.get(module), "__version__", None), str)
