"""The weights that a training run keeps beside those that train."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fastadv.training.ema import EMA
from fastadv.training.methods import Tuning

Tensors = Mapping[str, torch.Tensor]


class Weights:
    """Averaged ones, the best ones, and the last good ones, to which a run goes back that overfits.

    Args:
        tuning: what trains.
        decay: of the average; None for none.

    Attributes:
        good, best: copies; `best` is None where nothing was judged yet.
    """

    def __init__(self, tuning: Tuning, decay: float | None):
        self.tuning, self._decay = tuning, decay
        self._begin_average()
        self.good: Tensors = tuning.state()
        self.best: Tensors | None = None
        self._changed = {"good"}  # of these, what is not on the disk yet
        self._moved = True  # whether the weights that train are others than on the disk

    def _begin_average(self) -> None:
        self.average = EMA(self.tuning.tensors, self._decay) if self._decay else None

    def stepped(self, step: int) -> None:
        """After the update numbered `step`."""
        self._moved = True
        if self.average is not None:
            self.average.update(self.tuning.tensors, step)

    def keep(self, name: str) -> None:
        """Keep what is in the model as "good" or "best"."""
        setattr(self, name, self.tuning.state())
        self._changed.add(name)

    def go_back(self) -> None:
        """To the good ones, with which the average begins again."""
        self.tuning.load(self.good)
        self._moved = True
        self._begin_average()

    def rescue(self) -> None:
        """Put the last ones that were kept into the model, where a step has left some that are not finite."""
        self.tuning.load(self.best or self.good)

    def choose(self) -> None:
        """Put what the run is to return into the model: the best ones, else the averaged ones, else what is there."""
        chosen = self.best or (self.average and self.average.state)
        if chosen:
            self.tuning.load(chosen)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """With the averaged weights in the model, where there are any."""
        if self.average is None:
            yield
            return
        current = self.tuning.state()
        self.tuning.load(self.average.state)
        yield
        self.tuning.load(current)

    def groups(self, others: Mapping[str, Tensors]) -> dict[str, Tensors | None]:
        """Of a checkpoint, with `others` that change with every step; None for a group that is on the disk already."""
        groups = {"weights": self.tuning.tensors, **others}
        if self.average is not None:
            groups["average"] = self.average.state
        groups = groups if self._moved else dict.fromkeys(groups)
        kept = {"good": self.good, "best": self.best}
        return groups | {
            name: part if name in self._changed else None for name, part in kept.items() if part is not None
        }

    def written(self) -> None:
        """After a checkpoint."""
        self._changed, self._moved = set(), False

    def load(self, groups: Mapping[str, Tensors], device: torch.device) -> None:
        """Go on from a checkpoint's `groups`."""
        self.tuning.load(groups["weights"])
        self.good, self.best, self._changed = groups["good"], groups.get("best"), set()
        if self.average is not None:
            self.average.state = {name: t.to(device) for name, t in groups["average"].items()}
