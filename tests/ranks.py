"""Gloo ranks in processes of their own, and what they tell each other."""

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode

PATIENCE = 120.0  # seconds: a rank takes five on an idle machine, for its imports


class Traffic(TorchDispatchMode):
    """The collectives that a rank takes part in: (name, elements of its own part) of each."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("_c10d_functional", "c10d") and "wait" not in func.name():
            name = func.name().partition("::")[2]
            self.messages.append((name, args[0].numel() if isinstance(args[0], torch.Tensor) else 0))
        return func(*args, **(kwargs or {}))


def spawn(worker: Callable[..., None], *args: Any, ranks: int = 2, patience: float = PATIENCE) -> None:
    """Calls ``worker(rank, *args)`` in processes that form a group; raises what one raises, or TimeoutError.

    They meet in a file: a free port that is looked up here may be another's by the time that a rank binds it.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(
            _run, (os.path.join(folder, "store"), ranks, patience, worker, args), nprocs=ranks, join=False
        )
        try:
            end = time.monotonic() + patience
            while not context.join(timeout=max(0.0, end - time.monotonic()), grace_period=1.0):
                if time.monotonic() >= end:
                    raise TimeoutError(f"{worker.__name__} took more than {patience} s on {ranks} ranks")
        finally:  # of a rank that hangs, or where the wait was interrupted
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _run(
    rank: int, store: str, ranks: int, patience: float, worker: Callable[..., None], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=patience)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timeout)
    worker(rank, *args)
    dist.destroy_process_group()
