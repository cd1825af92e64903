"""The tests of this directory start clusters of their own on this machine, and run only on request."""

import os

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this directory unless VIX_ENGINES is set: some have not passed yet (docs/sweeps.md)."""
    if not os.environ.get("VIX_ENGINES"):
        skip = pytest.mark.skip(reason="starts Slurm, Ray or network namespaces on this machine: set VIX_ENGINES=1")
        for item in items:
            if "tests/engines/" in item.nodeid:
                item.add_marker(skip)
