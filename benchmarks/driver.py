"""Triton's driver where there is no GPU: it names a target, and may launch what is compiled for it into nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class Target:
    """A driver with a target and no device."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.runtime import driver

        self.target = GPUTarget("cuda", arch, 32)
        driver.set_active(self)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # kernels are cached by device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class _Utilities:
    def load_binary(self, name: str, *_: Any) -> tuple[Any, ...]:
        return name, 1, 32, 0, 1024  # a module, a function; registers, spills, threads

    def unload_module(self, module: Any) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536, "warpSize": 32}


class _Idle(Target):
    utils = _Utilities()

    def __init__(self, arch: int, launcher: Callable[[Any, Any], Callable[..., None]]) -> None:
        self.launcher_cls = launcher
        super().__init__(arch)


def launch_idly(launcher: Callable[[Any, Any], Callable[..., None]]) -> Callable[[], int]:
    """From here on Triton's operators take CPU tensors, and launch their kernels as on a GPU, compiled for sm_90.

    Args:
        launcher: called with a compiled kernel's source and metadata, gives what is called instead of a launch.

    Returns:
        What says how many launches there were.
    """
    from fastgen.core import dispatch
    from fastgen.triton_kernels import rowwise

    _Idle(90, launcher)
    missing, launched = dispatch.missing, 0

    def launch(kernel: Any, programs: int, like: Tensor, *args: Any, **constants: Any) -> None:
        nonlocal launched
        launched += 1
        rowwise.launch_compiled(kernel, programs, 0, args, constants)

    rowwise.launch = launch
    dispatch.missing = lambda *of: None if of[1] == "triton" else missing(*of)  # type: ignore[assignment]
    return lambda: launched
