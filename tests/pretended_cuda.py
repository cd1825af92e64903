"""A machine with GPUs, pretended below the Python layer of torch.cuda: its C functions are replaced, nothing of its Python.

As strict as they are: each takes the numbers that the real one takes and refuses all else, such as a device in place of its
index. Tensors that a program asks for on a GPU are made on the CPU.

    python tests/pretended_cuda.py GPUS CAPABILITY ARGUMENTS…      train.py with these arguments on such a machine
"""

import json
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

PROGRAM = Path(__file__).parents[1] / "train.py"
GIGABYTES, ALLOCATED, RESERVED = 16, 3 * 10**9, 5 * 10**9
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nSearch for `cudaErrorNoKernelImageForDevice'"


class Driver:
    """What is behind the C functions: the current GPU, and every call that changes or asks for something."""

    def __init__(self, gpus: int, capability: tuple[int, int]) -> None:
        self.gpus, self.capability, self.current, self.calls = gpus, capability, 0, []
        self.fractions = [1.0] * gpus
        self.generators = tuple(torch.Generator() for _ in range(gpus))

    def note(self, name: str, *arguments: Any) -> None:
        self.calls.append([name, *arguments])

    def index(self, device: Any) -> int:
        """As THPUtils_checkLong, and the driver's own check."""
        if type(device) is not int:
            raise TypeError(f"expected an integer, not {type(device).__name__}")
        if not 0 <= device < self.gpus:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        return device

    def functions(self) -> dict[str, Any]:
        def init() -> None:
            torch.cuda._get_device_properties = lambda device: SimpleNamespace(
                name=f"Pretended GPU {self.index(device)}",
                total_memory=GIGABYTES * 10**9,
                major=self.capability[0],
                minor=self.capability[1],
            )
            torch.cuda.default_generators = self.generators

        def set_device(device: int) -> None:
            self.current = self.index(device)
            self.note("setDevice", device)

        def exchange(device: int) -> int:
            before = self.current
            if type(device) is not int:
                raise TypeError(f"expected an integer, not {type(device).__name__}")
            if device >= 0:
                self.current = self.index(device)
            return before

        def fraction(value: float, device: int) -> None:
            if type(value) is not float:
                raise TypeError("expected a float")
            self.fractions[self.index(device)] = value
            self.note("setMemoryFraction", value, device)

        def stats(device: int) -> dict[str, Any]:
            self.note("memoryStats", self.index(device))
            peaks = {"allocated_bytes": ALLOCATED, "reserved_bytes": RESERVED}
            return {name: {"all": {"current": peak // 2, "peak": peak}} for name, peak in peaks.items()}

        def stream(device: int) -> SimpleNamespace:
            return SimpleNamespace(is_capturing=lambda: False, device_index=self.index(device))

        return {
            "_cuda_init": init,
            "_cuda_getDeviceCount": lambda: self.gpus,
            "_cuda_getDevice": lambda: self.current,
            "_cuda_setDevice": set_device,
            "_cuda_exchangeDevice": exchange,
            "_cuda_maybeExchangeDevice": exchange,
            "_cuda_setMemoryFraction": fraction,
            "_cuda_getMemoryFraction": lambda device: self.fractions[self.index(device)],
            "_cuda_memoryStats": stats,
            "_cuda_resetPeakMemoryStats": lambda device: self.note("resetPeakMemoryStats", self.index(device)),
            "_cuda_emptyCache": lambda: self.note("emptyCache"),
            "_cuda_synchronize": lambda: self.note("synchronize", self.current),
            "_cuda_getCurrentStream": lambda device: (0, self.index(device), 1),
            "_cuda_isInBadFork": lambda: False,
            "_accelerator_getDeviceIndex": lambda: self.current,
            "_accelerator_getStream": stream,
        }


class OnTheCpu(TorchFunctionMode):
    """Makes on the CPU what is asked for on a GPU: the one thing that is not PyTorch's own Python here."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = False

        def to_cpu(value: Any) -> Any:
            nonlocal asked
            if isinstance(value, torch.device) and value.type == "cuda":
                asked = True
                self.driver.index(self.driver.current if value.index is None else value.index)
                return torch.device("cpu")
            return value

        args, kwargs = tree_map(to_cpu, (args, kwargs or {}))
        if asked and self.driver.capability < (7, 5):
            raise torch.AcceleratorError(NO_KERNEL)
        return function(*args, **kwargs)


class Event:
    """Two of them are a millisecond apart."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.recorded, self.timing = False, enable_timing

    def record(self, stream: Any = None) -> None:
        torch._C._cuda_getCurrentStream(torch.cuda.current_device())
        self.recorded = True

    def elapsed_time(self, end: "Event") -> float:
        if not (self.timing and end.timing and self.recorded and end.recorded):
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return 1.0


def nccl_by_gloo() -> type:
    """In place of ProcessGroupNCCL and its successor of PyTorch 2.15, whose C++ constructors use the GPUs themselves."""
    from torch.distributed import ProcessGroupGloo, ProcessGroupNCCL

    class ProcessGroup:
        Options = ProcessGroupNCCL.Options

        def __new__(cls, store: Any, rank: int, size: int, options: Any, device: Any = None) -> Any:
            if device is not None and device.index != torch.cuda.current_device():
                raise RuntimeError(f"Expected tensor on {device} but found tensor on cuda:{torch.cuda.current_device()}")
            return ProcessGroupGloo(store, rank, size, options._timeout)

    return ProcessGroup


@contextmanager
def pretended_gpus(gpus: int = 1, capability: tuple[int, int] = (8, 0)) -> Iterator[Driver]:
    """Context of a process on a machine with this many GPUs, none of which it has used yet."""
    import torch.distributed.distributed_c10d as c10d

    driver = Driver(gpus, capability)
    nccl = {name: nccl_by_gloo() for name in ("ProcessGroupNCCL", "ProcessGroupNCCL2") if hasattr(c10d, name)}
    functions = driver.functions()
    renamed = {"_exchange_device": "_cuda_exchangeDevice", "_maybe_exchange_device": "_cuda_maybeExchangeDevice"}
    state = {"_initialized": False, "_cached_device_count": None, "default_generators": (), "Event": Event}
    state |= {name: functions[c_name] for name, c_name in renamed.items()}
    with (
        patch.multiple(torch._C, **functions),
        patch.multiple(torch.cuda, **state),
        patch.object(torch.cuda, "_device_count_nvml", lambda: -1),  # as without NVML, which knows only real GPUs
        patch.object(torch.cuda, "_get_device_properties", None, create=True),
        patch.object(torch.cuda, "_queued_calls", []),
        patch.multiple(c10d, **nccl),
        OnTheCpu(driver),
    ):
        torch.cuda._lazy_call(torch.cuda._check_capability)
        torch.cuda._lazy_call(torch.cuda._check_cubins)
        yield driver


if __name__ == "__main__":
    gpus, capability, *arguments = sys.argv[1:]
    sys.path.insert(0, str(PROGRAM.parent))
    sys.argv = [str(PROGRAM), *arguments]
    with pretended_gpus(int(gpus), (int(capability[:-1]), int(capability[-1]))) as driver:
        try:
            runpy.run_path(str(PROGRAM), run_name="__main__")
        finally:
            Path(f"calls-{os.environ.get('RANK', 0)}.json").write_text(json.dumps(driver.calls))
