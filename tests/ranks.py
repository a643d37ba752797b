"""Two gloo ranks in processes of their own."""

import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 120.0  # seconds: a rank takes five on an idle machine, for its imports


def spawn(worker: Callable[..., None], *args: Any, patience: float = PATIENCE) -> None:
    """Calls ``worker(rank, *args)`` in two processes that form a group; raises what one raises, or TimeoutError.

    They meet in a file: a free port that is looked up here may be another's by the time that a rank binds it.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = mp.spawn(_run, (os.path.join(folder, "store"), patience, worker, args), nprocs=2, join=False)
        try:
            end = time.monotonic() + patience
            while not context.join(timeout=max(0.0, end - time.monotonic()), grace_period=1.0):
                if time.monotonic() >= end:
                    raise TimeoutError(f"{worker.__name__} took more than {patience} s on two ranks")
        finally:  # of a rank that hangs, or where the wait was interrupted
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()


def _run(rank: int, store: str, patience: float, worker: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=patience)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    worker(rank, *args)
    dist.destroy_process_group()
