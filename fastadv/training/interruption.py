"""SIGTERM and Ctrl-C as a request that the training loop answers between two steps."""

import signal
import threading
from types import TracebackType


class Interruption:
    """Inside, the first SIGTERM or SIGINT is only noted in `signal`; a second one acts as it did before.

    A signal that nobody has acted on is acted on at the end.

    Outside the main thread Python can set no handlers, and signals act as before.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._restore()
        if kind is None and self.signal is not None:
            self.act()

    def _note(self, number: int, frame: object) -> None:
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def act(self) -> None:
        """Do what the signal asks for: KeyboardInterrupt, or an exit with 128 + its number.

        A process that was asked by another one of the same run, and got no signal of its own, exits as after SIGTERM.
        """
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.signal or signal.SIGTERM))
