"""Imported at the start of every Python process whose PYTHONPATH has this folder: lets a test stop a run at an epoch.

With VIX_TEST_PAUSE="1,3" in the environment, a run waits before its results.json says for the first time that 1 epoch, and 3
epochs, are done. Then there is a file ``paused-1`` in its directory. It goes on when a signal arrives that the program handles,
or when there is a file ``go-on-1``. So nothing depends on the speed of the machine.
"""

import json
import os
import select
import signal
import sys
import threading
from typing import Any


def pause(directory: str, epoch: int) -> None:
    """Wait for a signal or for the file go-on-EPOCH, the first time that the run in this directory is here."""
    try:
        os.close(os.open(f"{directory}/paused-{epoch}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    in_main_thread = threading.current_thread() is threading.main_thread()
    arrived, wakeup = os.pipe()
    os.set_blocking(wakeup, False)
    before = signal.set_wakeup_fd(wakeup) if in_main_thread else -1
    while not os.path.exists(f"{directory}/go-on-{epoch}") and not select.select([arrived], [], [], 0.05)[0]:
        pass
    if in_main_thread:
        signal.set_wakeup_fd(before)


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook that pauses before results.json is put in place."""
    if event != "os.rename" or not str(arguments[1]).endswith("/results.json"):
        return
    with open(arguments[0]) as file:
        epoch = json.load(file).get("epochs")
    if epoch in epochs:
        pause(os.path.dirname(os.path.abspath(arguments[1])), epoch)


epochs = [int(epoch) for epoch in os.environ.get("VIX_TEST_PAUSE", "").split(",") if epoch]
if epochs:
    sys.addaudithook(hook)
