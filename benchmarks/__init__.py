"""Benchmarks: cost of this program compared with other packages, and of the mixers over the number of tokens.

``python -m benchmarks`` compares training steps with other packages (``pip install -r requirements-benchmarks.txt``).
``benchmarks.scaling`` varies the number of tokens, ``rows`` measures the published rows, ``compact`` the compact benchmark,
``overhead`` the time outside of training steps, and ``waiting`` the wait policies of OpenMP threads; ``python -m benchmarks
everything`` runs all but the last. Each writes a JSON file with the device, the versions and the commit to
``benchmarks/results/``. ``accuracy`` and ``scaling_picture`` draw pictures of kept results.
"""

import os

# Set before PyTorch is loaded: its profiler, which measures memory on a CPU, would log every start and a missing GPU.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import vix  # noqa: F401  (sets the same OpenMP wait policy as train.py)
