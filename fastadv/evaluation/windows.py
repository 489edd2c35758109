"""Runs an evaluation window by window: only the images of one window are on the device."""

from collections.abc import Callable, Iterator

import torch

from fastadv.evaluation.queue import Queue, Verdicts


class Windows:
    """Runs one queue after the other, each on a window of `pool` samples at most.

    A queue runs one restart of its samples. The next restart begins after every sample has had its turn. As soon as all
    samples that are left fit into one window, a single queue runs all their restarts. With 5 samples, none of which
    falls, a pool of 3 and 2 restarts:

        queue      1        2        3        4
        samples    0 1 2    3 4      0 1 2    3 4
        restart    0        0        1        1

    Args:
        verdicts: the verdicts on all samples, which are updated.
        pool: the number of samples in a window; None means all.
        queue: makes the queue of a window from the numbers (n,) of its samples and the verdicts on these alone.
    """

    def __init__(self, verdicts: Verdicts, pool: int | None, queue: Callable[[torch.Tensor, Verdicts], Queue]):
        self.verdicts, self._pool, self._make = verdicts, pool, queue
        self._queue: Queue | None = None

    def run(self) -> Iterator[tuple[int, int]]:
        """Run all windows; yields (forward passes of this queue so far, the most that are left) in every iteration."""
        while self.verdicts.unsettled.any():
            self._rows, restarts = self._window()
            self._part = self.verdicts.part(self._rows, restarts)
            self._queue = None  # frees its images before the next ones come
            self._queue = self._make(self._rows, self._part)
            outside = (self.verdicts.restarts_left - self._part.restarts_left) * (self._queue.attack.steps + 1)
            for passes, left in self._queue.run():
                yield passes, left + outside
            self.update()

    def _window(self) -> tuple[torch.Tensor, int]:
        """(numbers of the samples in the next window, the restart before which their queue ends)."""
        waiting, whole = self.verdicts.unsettled, self.verdicts.restarts
        rows = waiting.nonzero()[:, 0]
        if self._pool is None or len(rows) <= self._pool:
            return rows, whole
        restart = self.verdicts.restart[rows]
        first = int(restart.min())
        return rows[restart == first][: self._pool], first + 1

    def update(self) -> None:
        """Bring `verdicts` up to date. A run that is resumed from them begins the restarts in the slots again."""
        if self._queue is not None:
            self._queue.update()
            self.verdicts.take(self._rows, self._part)
