"""Where a training run is."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastadv.training.checkpoints import OtherRunError

Record = dict[str, Any]  # a line of log.jsonl: numbers, names and lists by name


@dataclass
class Progress:
    """Where a run is. JSON can hold these values; with the tensors of a checkpoint they are enough to resume the run.

    Attributes:
        stage: its number, from 0.
        epoch: the number of the epoch, counted over all stages.
        first_epoch: the epoch with which this stage began.
        schedule_epoch: the epoch with which the schedule of the learning rate began. It begins again after a switch of
            the attack.
        average_epoch: the epoch with which the average of the weights began. It begins again where the run goes back.
        batch: how many updates this epoch had.
        loss_sum: the sum of the loss over the images of this epoch.
        right: how many images of this epoch were classified correctly after the attack.
        abnormal: on how many images of this epoch noise raised the loss more than the attack did.
        looked: at how many images `abnormal` looked.
        train_s: seconds of this epoch's training.
        train_cpu_s: processor time of it, in seconds.
        lr: the learning rate of the last update.
        lr_scale: a factor of the learning rate, which each rollback halves.
        switched: whether the run has switched to another attack.
        memory_since: the epoch from which rows are kept of each image: 0, or the one after a switch.
        stopped: whether the monitor has ended the stage.
        best: the accuracies that the best weights were chosen by.
        best_epoch: the epoch of the best weights.
        monitor: the monitor's state.
        records: what was recorded so far.
    """

    stage: int = 0
    epoch: int = 0
    first_epoch: int = 0
    schedule_epoch: int = 0
    average_epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    right: float = 0.0
    abnormal: float = 0.0
    looked: float = 0.0
    train_s: float = 0.0
    train_cpu_s: float = 0.0
    lr: float = 0.0
    lr_scale: float = 1.0
    switched: bool = False
    memory_since: int = 0
    stopped: bool = False
    best: list[float] | None = None
    best_epoch: int | None = None
    monitor: dict[str, float | None] | None = None
    records: list[Record] = field(default_factory=list)

    @classmethod
    def of(cls, values: dict[str, Any], folder: Path) -> "Progress":
        """The progress in `values`, read from `folder`; what an older version did not write is as at the start.

        Raises:
            OtherRunError: a newer version wrote it, with names that this one does not know.
        """
        unknown = values.keys() - {each.name for each in fields(cls)}
        if unknown:
            raise OtherRunError(
                f"{folder} has the state of a newer fastadv, and this one does not know its "
                f"{', '.join(sorted(unknown))}: install that one, or choose another folder"
            )
        # Before there was `average_epoch` the average's steps were counted with those of the schedule.
        return cls(**{"average_epoch": values.get("schedule_epoch", 0), **values})

    def next_stage(self, number: int) -> "Progress":
        """The progress with which a stage begins, which has this number."""
        return Progress(
            number,
            epoch=self.epoch,
            first_epoch=self.epoch,
            schedule_epoch=self.epoch,
            average_epoch=self.epoch,
            memory_since=self.epoch if self.switched else self.memory_since,
            records=self.records,
        )

    @property
    def place(self) -> str:
        """The next update, in words. They count from 1."""
        return f"epoch {self.epoch + 1}, batch {self.batch + 1}"
