"""Benchmarks: cost of this program compared with other packages, and of the mixers over the number of tokens.

``python -m benchmarks`` compares training steps, ``python -m benchmarks.scaling`` varies the number of tokens,
``python -m benchmarks.overhead`` times everything except the steps, and ``python -m benchmarks.waiting`` compares wait policies
of OpenMP threads. Each writes a JSON file with the device, the versions and the commit to ``benchmarks/results/``.
Additional requirements: ``pip install -r requirements-benchmarks.txt``.
"""

import os

# Set before PyTorch is loaded: its profiler, which measures memory on a CPU, would log every start and a missing GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import vix  # noqa: F401  (sets the same OpenMP wait policy as train.py)
