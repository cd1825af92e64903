"""What this program costs beside the packages that one would otherwise take, and where linear attention pays.

``python -m benchmarks`` compares training steps side by side, ``python -m benchmarks.scaling`` goes through numbers of tokens,
``python -m benchmarks.overhead`` times what is not a step, ``python -m benchmarks.waiting`` how threads wait. Each writes JSON
into ``benchmarks/results/`` that names the device, the versions and the commit.
What they need beyond the program: ``pip install -r requirements-benchmarks.txt``.
"""

import os

# Before PyTorch is loaded: its profiler, which measures memory on a CPU, would tell of every start, and that there is no GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import vix  # noqa: F401  (so that OpenMP's threads wait as they do in train.py)
