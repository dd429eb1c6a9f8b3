"""A device for machines without one: it computes on the CPU and is as strict as a card (device.cpp).

What a program can get wrong on a GPU and not on the CPU is mostly not arithmetic: tensors of both mixed up, random
numbers drawn from the other's generator, a branch for devices that nothing runs, waiting for the device in the middle
of a step. Here all of that shows. Not shown: kernels that round in another order, cuDNN, streams, pinned memory.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.cpp_extension import get_default_build_root, include_paths

SOURCE = Path(__file__).parent / "device.cpp"
NAME = "pretend"


@cache
def load() -> None:
    """Make ``torch.device("pretend")``.

    For good: a process can have one such device, and torch takes it for the accelerator from then on.

    Raises:
        RuntimeError: there is no C++ compiler, or it doesn't take the source.
    """
    torch.ops.load_library(_built())
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend()


def _built() -> Path:
    """Return the compiled library: one per source and version of torch."""
    version = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    built = Path(get_default_build_root()) / f"gradtrace_pretend_{version}" / "device.so"  # of this user alone
    if built.exists():
        return built
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("The device of the tests needs a C++ compiler: no `c++`, `g++` or `clang++` was found.")
    built.parent.mkdir(parents=True, exist_ok=True)
    libraries = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory(dir=built.parent) as folder:
        made = Path(folder) / "device.so"
        includes = [f"-I{path}" for path in include_paths()]
        command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", *includes, str(SOURCE), "-o", str(made)]
        done = subprocess.run(
            [*command, f"-L{libraries}", "-ltorch_cpu", "-lc10"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"`{' '.join(command)}` failed:\n{done.stderr}")
        made.replace(built)
    return built


def _module() -> ModuleType:
    """Return what ``torch.pretend`` is."""
    module = ModuleType(f"torch.{NAME}")
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "_is_in_bad_fork": False,
        "device_count": 1,
        "current_device": 0,
        "get_amp_supported_dtype": [torch.bfloat16, torch.float16],
    }
    for name, answer in answers.items():
        setattr(module, name, lambda answer=answer: answer)
    # It draws from the CPU's random numbers.
    random = {
        "manual_seed_all": lambda seed: None,
        "get_rng_state": lambda device=0: torch.get_rng_state(),
        "set_rng_state": lambda state, device=0: torch.set_rng_state(state),
    }
    for name, function in random.items():
        setattr(module, name, function)
    return module


class PretendAccelerator(Accelerator):
    """What a Trainer needs to know of the device."""

    def setup_device(self, device: torch.device) -> None:
        assert device.type == NAME

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None:
        pass

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device(NAME, i) for i in range(int(devices))]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


def trainer(precision: str) -> dict[str, Any]:
    """Return the arguments of a Trainer that trains on the device, in a precision."""
    arguments: dict[str, Any] = {"strategy": SingleDeviceStrategy(torch.device(NAME, 0), PretendAccelerator())}
    if not precision.endswith("-mixed"):
        return {**arguments, "precision": precision}
    scaler = torch.amp.GradScaler(NAME) if precision == "16-mixed" else None
    return {**arguments, "plugins": MixedPrecision(precision, NAME, scaler)}  # Lightning would cast for CUDA


def take_waits() -> list[str]:
    """Return for what the program would have waited for the device, since the last call."""
    return list(torch.ops.pretend_device.take_waits())


def take_kernels() -> int:
    """Return how many kernels the program has asked for, since the last call; views need none."""
    return int(torch.ops.pretend_device.take_kernels())


def forbid_float64(on: bool) -> None:
    """Let the device have no float64, or have it again."""
    torch.ops.pretend_device.forbid_float64(on)
