"""SIGINT and SIGTERM during training."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Self

from vix.system.distributed import all_reduce_max, world_size


class SignalHandler:
    """Notes SIGINT and SIGTERM in its context, so that a run can stop between two steps with everything saved.

    In a thread other than the main one, where a program may keep its runs, Python hears no signals and none are noted.
    """

    signal: int | None = None
    raise_immediately = False

    def __enter__(self) -> Self:
        heard = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM) if threading.current_thread() is threading.main_thread() else ()
        self.before = {number: signal.signal(number, self.handle) for number in heard}
        return self

    def handle(self, number: int, _: object) -> None:
        if number != signal.SIGALRM:
            self.signal = number
        if self.raise_immediately and self.signal:
            # Python drops what is raised where it frees an object or is called from C: again in a second, until it does not.
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            raise SystemExit(128 + self.signal)

    @contextmanager
    def interruptible(self, save_and_exit: Callable[[], None]) -> Iterator[None]:
        """Context of what takes long and can be broken off: a signal does so, and ``save_and_exit`` is called."""
        self.raise_immediately = True
        try:
            yield
        except SystemExit:
            self.raise_immediately = False  # a second signal does not break off the saving
            save_and_exit()
            raise
        finally:
            self.raise_immediately = False
            if self.signal:
                signal.setitimer(signal.ITIMER_REAL, 0.0)

    def received(self, sync_now: bool) -> int | None:
        """The signal that any process of this run was sent; None where that is not the moment to ``ask`` the others."""
        if world_size() > 1:  # they stop together or not at all
            if not sync_now:
                return None
            self.signal = all_reduce_max(self.signal or 0) or None
        return self.signal

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
