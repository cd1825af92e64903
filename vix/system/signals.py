"""Handling of the signals that end a run: SIGINT, SIGTERM, and SIGUSR1 and SIGUSR2, by which schedulers announce an end."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from vix.system.distributed import all_reduce_max, world_size

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class SignalHandler:
    """Context manager that records these signals, so that a run can stop between two steps and save a checkpoint.

    In a thread other than the main one, Python receives no signals, and none are recorded.
    """

    signal: int | None = None
    raise_immediately = False

    def __enter__(self) -> Self:
        in_main_thread = threading.current_thread() is threading.main_thread()
        handled = (*SIGNALS, signal.SIGALRM) if in_main_thread else ()
        self.before = {number: signal.signal(number, self.handle) for number in handled}
        return self

    def handle(self, number: int, _: object) -> None:
        """The handler: record the signal, and inside ``interruptible`` raise SystemExit."""
        if number != signal.SIGALRM:
            self.signal = number
        if self.raise_immediately and self.signal:
            # Python drops an exception raised in a destructor or in a callback from C, so SIGALRM repeats it every second.
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            raise SystemExit(128 + self.signal)

    @contextmanager
    def interruptible(self, leave: Callable[[], None]) -> Iterator[None]:
        """Context manager for a long operation that may be interrupted: a signal raises SystemExit in it immediately.

        leave: called after a signal, before SystemExit propagates. The state that the operation changes may be incomplete.
        """
        self.raise_immediately = True
        try:
            if self.signal and world_size() == 1:  # received before; several processes communicate it at the first step
                raise SystemExit(128 + self.signal)
            yield
        except SystemExit:
            self.raise_immediately = False  # a second signal does not interrupt what follows
            leave()
            raise
        finally:
            self.raise_immediately = False
            if self.signal:
                signal.setitimer(signal.ITIMER_REAL, 0.0)

    def received(self, communicate: bool) -> int | None:
        """The signal that any process of this run has received, or None.

        communicate: whether to communicate with the other processes; with several processes, None is returned otherwise.
        """
        if world_size() > 1:  # all processes must stop at the same step
            if not communicate:
                return None
            agreed = all_reduce_max(self.signal or 0)
            if not agreed:
                return None  # a signal that this process received meanwhile is communicated at the next call
            self.signal = agreed
        return self.signal

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
