"""Windows of an evaluation: the samples whose images are on the device at a time."""

from collections.abc import Callable, Iterator

import torch

from fastadv.evaluation.queue import Queue, Verdicts


class Windows:
    """Runs one queue after the other, each on `pool` samples at most, in the order (restart, sample).

    Once all samples that are left fit in, one queue takes all their restarts; until then each takes one restart, so
    that survivors come back when every sample has had its turn.

    Args:
        verdicts: of all samples; the verdicts on those that are still to be attacked are written there.
        pool: number of samples in a window; None means all.
        queue: makes the queue of a window, from the numbers (n,) of its samples and verdicts on these alone.
    """

    def __init__(self, verdicts: Verdicts, pool: int | None, queue: Callable[[torch.Tensor, Verdicts], Queue]):
        self.verdicts, self._pool, self._make = verdicts, pool, queue
        self._queue: Queue | None = None

    def run(self) -> Iterator[tuple[int, int]]:
        """Until all is done; yields (forward passes so far, those left at most) in every iteration."""
        while self.verdicts.unsettled.any():
            self._rows, restarts = self._window()
            self._part = self.verdicts.part(self._rows, restarts)
            self._queue = None  # its images go before the next ones come
            self._queue = self._make(self._rows, self._part)
            outside = (self.verdicts.restarts_left - self._part.restarts_left) * (self._queue.attack.steps + 1)
            for passes, left in self._queue.run():
                yield passes, left + outside
            self.update()

    def _window(self) -> tuple[torch.Tensor, int]:
        """(samples of the next window, the run that they are attacked until)."""
        waiting, whole = self.verdicts.unsettled, self.verdicts.restarts
        rows = waiting.nonzero()[:, 0]
        if self._pool is None or len(rows) <= self._pool:
            return rows, whole
        restart = self.verdicts.restart[rows]
        first = int(restart.min())
        return rows[restart == first][: self._pool], first + 1

    def update(self) -> None:
        """Bring `verdicts` up to date; the samples in the slots begin their restart again where a run goes on so."""
        if self._queue is not None:
            self._queue.update()
            self.verdicts.take(self._rows, self._part)
