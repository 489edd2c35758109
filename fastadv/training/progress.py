"""Where a training run is."""

from dataclasses import dataclass, field, fields
from pathlib import Path

from fastadv.training.checkpoints import OtherRunError


@dataclass
class Progress:
    """Numbers for JSON, from which, and the tensors, a run goes on.

    stage: its number; epoch: of all stages; first_epoch: of this stage.
    schedule_epoch: where the schedule of the learning rate began: a switch of the attack begins it again.
    batch: updates of this epoch. loss_sum, right, abnormal, looked, train_s, train_cpu_s: sums over this epoch.
    memory_since: the epoch before which nothing was kept of each image: 0, or after a switch.
    best: what the best weights were chosen by.
    """

    stage: int = 0
    epoch: int = 0
    first_epoch: int = 0
    schedule_epoch: int = 0
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
    monitor: dict | None = None
    records: list[dict] = field(default_factory=list)

    @classmethod
    def of(cls, values: dict, folder: Path) -> "Progress":
        """From the state in `folder`; what an older version had no name for is as at the start.

        Raises:
            OtherRunError: it is a newer version's, and has what this one does not know.
        """
        unknown = values.keys() - {each.name for each in fields(cls)}
        if unknown:
            raise OtherRunError(
                f"{folder} has the state of a newer fastadv, and this one does not know its "
                f"{', '.join(sorted(unknown))}: install that one, or choose another folder"
            )
        return cls(**values)
