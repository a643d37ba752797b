"""What would make a GPU wait for the host, counted on any device."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Syncs(TorchDispatchMode):
    """Counts reads of values, and indexing by masks, whose result's size is data."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        self.count += any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select"))
        if name.startswith("aten::index"):
            indices = [i for i in args[1] if i is not None] if isinstance(args[1], (list, tuple)) else []
            self.count += sum(i.dtype == torch.bool for i in indices)
        return func(*args, **(kwargs or {}))
