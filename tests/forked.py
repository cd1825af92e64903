"""Starts real ``train.py`` processes from one that has imported everything already: read by tests that need dozens.

Reads a JSON line [directory, arguments] from standard input; answers ``started PROCESS``, and when it has ended ``ended PROCESS
STATUS``. The process's output goes to the file ``out`` in its directory.
"""

import json
import os
import runpy
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[1] / "train.py"
sys.path.insert(0, str(PROGRAM.parent))

import sklearn.datasets  # noqa: E402
import sklearn.model_selection  # noqa: E402, F401
import torch._dynamo  # noqa: E402  (every optimizer imports it)
import torch.utils.tensorboard  # noqa: E402, F401

import vix.build  # noqa: E402
import vix.pictures  # noqa: E402, F401


def become_train(directory: str, arguments: list[str]) -> None:
    os.chdir(directory)
    with open("out", "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    sys.argv = [str(PROGRAM), *arguments]
    status = 0
    try:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        if not isinstance(stop.code, int):
            print(stop.code, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        become_train(*json.loads(line))
    print("started", child, flush=True)
    print("ended", child, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
