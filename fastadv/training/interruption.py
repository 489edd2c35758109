"""Delays SIGTERM and Ctrl-C until the training loop is between two steps."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

Handler = Callable[[int, FrameType | None], object] | int | signal.Handlers | None  # as `signal.signal` takes it


class Interruption:
    """A context manager that delays the first SIGTERM or SIGINT to its end. A second one acts at once.

    A signal that the process ignores, as under nohup, stays ignored. Outside the main thread Python can set no
    handlers: there signals act as usual.

    Attributes:
        noted: the number of the signal that came; None where none came.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.noted: int | None = None
        self._before: dict[int, Handler] = {}

    def __enter__(self) -> "Interruption":
        self.noted = None
        if threading.current_thread() is threading.main_thread():
            heeded = [number for number in self.SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        if self.noted is not None and error is None:
            signal.raise_signal(self.noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.noted = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
