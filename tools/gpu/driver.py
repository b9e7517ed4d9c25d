"""Triton without a GPU: its own binder, specialisation, cache and compiler; only the driver is replaced.

A launch comes to a function instead of a GPU. `install` must come before the first import of `diffdrr.kernels.gpu`,
since `TRITON_INTERPRET` decides then whether a kernel is compiled."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ["TRITON_INTERPRET"] = "0"

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver as triton_driver

PROPERTIES = dict(max_shared_mem=232448, max_num_regs=65536, multiprocessor_count=132, warpSize=32)


class Launch(NamedTuple):
    "What would have been started on a GPU."

    kernel: CompiledKernel  # `kernel.asm` holds "ptx" and "cubin"
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # by name, without those that are compiled in


class Driver:
    "What Triton asks of a driver and of its tools."

    binary_ext = "cubin"

    def __init__(
        self,
        on_launch: Callable[[Launch], None],
        arch: int,  # compute capability times ten
    ):
        self.on_launch, self.arch, self.utils = on_launch, arch, self
        self.kernels: list[CompiledKernel] = []  # by handle

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # Triton caches compiled kernels by device: each architecture has its own

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return PROPERTIES

    def load_binary(self, name: str, binary: bytes, shared: int, device: int, *_) -> tuple[int, int, int, int, int]:
        "Return module, function, registers, spills and threads; `kernels` has the kernel last that is loaded."
        handle = len(self.kernels) - 1
        return handle, handle, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        "Make what starts a kernel."

        def start(x, y, z, stream, function, packed, about, enter, leave, *values):
            values = values[0] if len(values) == 1 and isinstance(values[0], tuple) else values
            named = zip(source.signature.items(), values)
            arguments = {name: value for (name, kind), value in named if kind != "constexpr"}
            self.on_launch(Launch(self.kernels[function], (x, y, z), arguments))

        return start


def install(
    on_launch: Callable[[Launch], None],
    arch: int = 90,
) -> Driver:
    "Let launches come to a function. Returns the driver, whose `arch` may be changed from call to call."
    driver = Driver(on_launch, arch)
    triton_driver.set_active(driver)
    original = CompiledKernel._init_handles

    def init_handles(kernel: CompiledKernel) -> None:
        if kernel.module is None:
            driver.kernels.append(kernel)
        original(kernel)

    CompiledKernel._init_handles = init_handles
    return driver
