"""Two ranks with half of the rows each give the numbers of one process: as DTensors, and over a process group."""

from __future__ import annotations

import dataclasses
import inspect
import traceback

import torch
import torch.distributed as dist
from ranks import spawn

import fastgen
from fastgen import elbo
from fastgen.cases import CASES, Case
from fastgen.core import distributed
from fastgen.core.operator import operators

ROWS = 8  # a rank holds four: whole pairs of rows that share a number


def value_and_gradients(case: Case, tensors: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    leaves = case.leaves(tensors)
    value = whole(case(fastgen, **leaves))
    if not value.requires_grad:
        return [value]
    factors = (torch.arange(value.numel()) % 8 - 3.5) / 4
    (value * factors.reshape(value.shape)).sum().backward()
    return [value.detach(), *(whole(leaves[name].grad) for name in case.differentiable)]


def half(t: torch.Tensor, rank: int) -> torch.Tensor:
    return t.chunk(2)[rank] if t.shape[:1] in ((ROWS,), (ROWS // 2,)) else t


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def disagreements(rank: int, out: str) -> None:
    """Writes which functions ask for our sharding rules, and which of their cases differ from one process."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (2,))
    register, asked, wrong = distributed.register_sharding_rules, set(), {}
    for name, case in CASES.items():
        distributed.register_sharding_rules = lambda case=case: (asked.add(case.function), register())
        tensors = case.inputs((ROWS, 3, 4))
        parts = {
            n: distribute_tensor(t, mesh, [Shard(0) if t.shape[:1] in ((ROWS,), (ROWS // 2,)) else Replicate()])
            for n, t in tensors.items()
        }
        try:
            with CommDebugMode() as communication:
                case(fastgen, **parts)
            for mine, theirs in zip(value_and_gradients(case, parts), value_and_gradients(case, tensors), strict=True):
                torch.testing.assert_close(mine, theirs)
            moved = [op for op, n in communication.get_comm_counts().items() if n and "reduce" not in str(op)]
            op = operators.get(case.function)
            assert op is None or op.paired or not moved, f"rows leave their rank: {moved}"
        except Exception as error:
            # Of a function that asks for no rules, and where PyTorch lacks one of its own: it says so.
            if case.function in asked and "Operator aten." not in str(error):
                wrong[name] = traceback.format_exc()
    torch.save((asked, wrong), f"{out}/{rank}.pt")


def test_sharded_batches_give_the_numbers_of_one_process(tmp_path):
    spawn(disagreements, str(tmp_path))
    for rank in range(2):
        asked, wrong = torch.load(tmp_path / f"{rank}.pt")
        assert not wrong, "\n\n".join(f"{name}:\n{text}" for name, text in wrong.items())
        assert {name for name in elbo.__all__ if name.islower()} <= asked


# Of those that take a group, the means: what DDP and FSDP make of losses and gradients is their mean over ranks.
GROUPED = [
    name
    for name, case in CASES.items()
    if case.run is None
    and case.options.get("reduction", "mean") == "mean"
    and "group" in inspect.signature(getattr(fastgen, case.function)).parameters
]


def of_groups(rank: int, out: str) -> None:
    results = {}
    for name in GROUPED:
        case = dataclasses.replace(CASES[name], options={**CASES[name].options, "group": dist.group.WORLD})
        tensors = {n: half(t, rank) for n, t in case.inputs((ROWS, 3, 4)).items()}
        results[name] = value_and_gradients(case, tensors)
    torch.save(results, f"{out}/{rank}.pt")


def test_a_group_gives_the_numbers_of_one_process(tmp_path):
    spawn(of_groups, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert GROUPED
    for name in GROUPED:
        value, *gradients = value_and_gradients(CASES[name], CASES[name].inputs((ROWS, 3, 4)))
        torch.testing.assert_close((first[name][0] + second[name][0]) / 2, value, msg=lambda m, n=name: f"{n}: {m}")
        for mine, gradient in zip(zip(first[name][1:], second[name][1:], strict=True), gradients, strict=True):
            torch.testing.assert_close(torch.cat(mine) / 2, gradient, msg=lambda m, n=name: f"{n}: {m}")
