"""The copies of the weights that a training run keeps: the averaged, the last good and the best weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fastadv.training.ema import EMA
from fastadv.training.methods import Tuning

Tensors = Mapping[str, torch.Tensor]


class Weights:
    """The averaged weights, the best ones, and the last good ones.

    Args:
        tuning: the weights that train.
        decay: the decay of the average; None or 0 means no average.

    Attributes:
        good: a copy of the last weights before an alarm of the monitor; after an alarm the run may go back to them.
        best: a copy of the weights with the best evaluation; None before the first evaluation.
        average: the average of the weights over the updates; None without a decay.
    """

    def __init__(self, tuning: Tuning, decay: float | None):
        self.tuning, self._decay = tuning, decay
        self._begin_average()
        self.good: Tensors = tuning.state()
        self.best: Tensors | None = None
        self._changed = {"good"}  # those of "good" and "best" that are not on the disk yet
        self._moved = True  # whether the training weights differ from those on the disk

    def _begin_average(self) -> None:
        self.average: EMA | None = EMA(self.tuning.tensors, self._decay) if self._decay else None

    def stepped(self, step: int) -> None:
        """Update the average after the update numbered `step`."""
        self._moved = True
        if self.average is not None:
            self.average.update(self.tuning.tensors, step)

    def keep(self, name: str) -> None:
        """Keep the weights in the model as "good" or "best"."""
        setattr(self, name, self.tuning.state())
        self._changed.add(name)

    def go_back(self) -> None:
        """Put the good weights into the model; the average begins again with them."""
        self.tuning.load(self.good)
        self._moved = True
        self._begin_average()

    def rescue(self) -> str:
        """Put the best weights, or else the last good ones, into the model after a step whose result is not finite.

        Returns:
            A sentence that says so.
        """
        self.tuning.load(self.best or self.good)
        return ". The step before had left weights that are not finite: the model has the last ones that were kept"

    def choose(self) -> None:
        """Put the result of the run into the model: the best weights, else the averaged ones, else the present ones."""
        chosen = self.best or (self.average and self.average.state)
        if chosen:
            self.tuning.load(chosen)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged weights, if there are any, into the model until the end."""
        if self.average is None:
            yield
            return
        current = self.tuning.state()
        self.tuning.load(self.average.state)
        yield
        self.tuning.load(current)

    def groups(self, others: Mapping[str, Tensors]) -> dict[str, Tensors | None]:
        """The groups of tensors for a checkpoint. A group that is on the disk already is None.

        Args:
            others: more groups that change with every step, such as the optimizer's state.
        """
        groups: dict[str, Tensors | None] = {"weights": self.tuning.tensors, **others}
        if self.average is not None:
            groups["average"] = self.average.state
        groups = groups if self._moved else dict.fromkeys(groups)
        for name, part in (("good", self.good), ("best", self.best)):
            if part is not None:
                groups[name] = part if name in self._changed else None
        return groups

    def written(self) -> None:
        """Note that a checkpoint with all groups was written."""
        self._changed, self._moved = set(), False

    def load(self, groups: Mapping[str, Tensors], device: torch.device) -> None:
        """Continue from the groups of a checkpoint."""
        self.tuning.load(groups["weights"])
        self.good, self.best, self._changed = groups["good"], groups.get("best"), set()
        if self.average is not None:
            self.average.state |= {name: t.to(device) for name, t in groups["average"].items()}
