"""A progress bar on a terminal; elsewhere a line in the log each minute."""

import logging
import sys
import time
from types import TracebackType

from fastadv._extras import require

logger = logging.getLogger("fastadv")
PAUSE = 60.0  # seconds between two lines


class ProgressBar:
    """A context manager that shows how many steps are done.

    Args:
        title: what is running, such as "pgd-10 at 8/255".
        unit: the name of the steps, such as "batches".
        shown: whether anything is shown.

    Raises:
        ImportError: tqdm is not installed.
    """

    def __init__(self, title: str, unit: str, shown: bool):
        self.title, self.unit = title, unit
        self._lines = shown and not sys.stderr.isatty()
        self._bar = require("tqdm").tqdm(desc=title, unit=unit) if shown and not self._lines else None
        self._begun = self._said = time.perf_counter()
        self._done = 0

    def __enter__(self) -> "ProgressBar":
        return self

    def update(self, done: int, left: int) -> None:
        """Show how many steps are done.

        Args:
            done: the number of steps so far.
            left: the most steps that are still to come.
        """
        if self._bar is not None:
            self._bar.total = done + left
            self._bar.update(done - self._bar.n)
        self._done, now = done, time.perf_counter()
        if self._lines and now - self._said >= PAUSE:
            self._said = now
            logger.info("%s: %d of at most %d %s", self.title, done, done + left, self.unit)

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._lines and error is None:
            logger.info("%s: done in %.1f s", self.title, time.perf_counter() - self._begun)
