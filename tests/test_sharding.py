"""Two ranks with half of the rows each give the numbers of one process: as DTensors, and over a process group."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import traceback

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import fastgen
from fastgen import elbo
from fastgen.cases import CASES, Case
from fastgen.core import distributed
from fastgen.core.operator import operators

ROWS = 8  # a rank holds four: whole pairs of rows that share a number
UNEVEN = (5, 1)  # three rows and two; one and none
OWN_SAMPLES = {"sds_loss", "vsd_loss", "dmd_loss", "decoupled_dmd_loss"}  # without a rule: ranks call them themselves


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


def sharded(t: torch.Tensor, rows: int, mesh: DeviceMesh) -> DTensor:
    return distribute_tensor(t, mesh, [Shard(0) if t.shape[:1] in ((rows,), (rows // 2,)) else Replicate()])


def parts_pairs(case: Case) -> bool:
    """Whether a pair's rows lie half a batch apart, so on two ranks."""
    op = operators.get(case.function)
    return op is not None and op.paired and not case.options.get("interleaved", False)


def disagree(case: Case, rows: int, mesh: DeviceMesh) -> None:
    """Raises where a sharded batch gives other numbers than one process, or leaves its ranks."""
    tensors = case.inputs((rows, 3, 4))
    parts = {n: sharded(t, rows, mesh) for n, t in tensors.items()}
    refused = parts_pairs(case)
    if refused:
        instead = "pass interleaved=True" if "dpo" in case.function else "pass plain tensors"
        advice = rf"^pred is .*{instead}.* pred\.redistribute\(placements=\[Replicate\(\)\]\)"
        with pytest.raises(ValueError, match=advice):
            case(fastgen, **parts)
        parts = {n: t.redistribute(placements=[Replicate()]) for n, t in parts.items()}
    with CommDebugMode() as communication:
        value = case(fastgen, **parts)
    assert not refused or value.placements == (Replicate(),)
    for mine, theirs in zip(value_and_gradients(case, parts), value_and_gradients(case, tensors), strict=True):
        torch.testing.assert_close(mine, theirs)
    if case.differentiable and value.dim():  # of a sum the gradient is an expanded one
        gradients = []
        for given in (parts, tensors):
            leaves = case.leaves(given)
            whole(case(fastgen, **leaves)).sum().backward()
            gradients.append([whole(leaves[name].grad) for name in case.differentiable])
        torch.testing.assert_close(*gradients)
    moved = [op for op, n in communication.get_comm_counts().items() if n and "reduce" not in str(op)]
    # DTensor itself shards no operator over more ranks than there are rows.
    assert case.function not in operators or not moved or rows < mesh.size(), f"rows leave their rank: {moved}"


def uneven() -> list[str]:
    """A case of each function, all of DDO's; those of pairs have rows in twos."""
    first = {case.function: name for name, case in reversed(CASES.items()) if case.function != "ddo_loss"}
    ddo = [name for name, case in CASES.items() if case.function == "ddo_loss" and "mc_samples" not in case.options]
    return [*first.values(), *ddo]


def disagreements(rank: int, out: str) -> None:
    """Writes which functions ask for our sharding rules, and which of their cases differ from one process."""
    mesh = init_device_mesh("cpu", (2,))
    register, asked, wrong = distributed.register_sharding_rules, set(), {}

    def tried(name: str, rows: int) -> None:
        case = CASES[name]
        distributed.register_sharding_rules = lambda: (asked.add(case.function), register())
        try:
            disagree(case, rows, mesh)
        except (Exception, pytest.fail.Exception) as error:
            # Of a function that asks for no rules, and where PyTorch lacks one of its own: it says so.
            asks = case.function in asked | OWN_SAMPLES or parts_pairs(case)
            if asks and "Operator aten." not in str(error):
                wrong[f"{name} of {rows} rows"] = traceback.format_exc()

    for name in CASES:
        tried(name, ROWS)
    for rows in UNEVEN:
        for name in uneven():
            if CASES[name].function in asked | OWN_SAMPLES and not getattr(
                operators.get(CASES[name].function), "paired", False
            ):
                tried(name, rows)
    if why := parted(mesh):
        wrong["pairs and groups"] = why
    torch.save((asked, wrong), f"{out}/{rank}.pt")


def parted(mesh: DeviceMesh) -> str:
    """What is wrong with the errors of shards that part neighbours that belong together."""
    for rows, name, expected in (
        (6, "diffusion_dpo_loss-interleaved", "pairs of neighbouring rows: let the rows be a multiple of 4, or gather"),
        (2, "diffusion_dpo_loss-interleaved", "pairs of neighbouring rows: let the rows be a multiple of 4, or gather"),
        (10, "ddo_loss-mc", "groups of mc_samples = 2 rows: let the rows be a multiple of 4, or gather"),
    ):
        tensors = CASES[name].inputs((rows, 3))
        streams = {n: sharded(t, rows, mesh) for n, t in tensors.items() if n != "pred"}
        try:  # the prediction is whole, and it is the first of the others that is named
            CASES[name](fastgen, pred=distribute_tensor(tensors["pred"], mesh, [Replicate()]), **streams)
            return f"{name} of {rows} rows is not refused"
        except ValueError as error:
            wanted = f"{next(iter(streams))} is a DTensor of {rows} rows that are sharded over a mesh [2], which parts "
            if not str(error).startswith(wanted + expected):
                return f"{name} of {rows} rows: {error}"
    return ""


def test_sharded_batches_give_the_numbers_of_one_process(tmp_path):
    spawn(disagreements, str(tmp_path))
    for rank in range(2):
        asked, wrong = torch.load(tmp_path / f"{rank}.pt")
        assert not wrong, "\n\n".join(f"{name}:\n{text}" for name, text in wrong.items())
        assert {name for name in elbo.__all__ if name.islower()} <= asked


def test_groups_are_whole_where_no_chunk_parts_one():
    for rows, ranks, together in itertools.product(range(13), range(1, 6), range(1, 5)):
        if rows % together:
            continue
        parts = torch.arange(rows).chunk(ranks)
        expected = all(len(part) % together == 0 for part in parts)
        assert distributed.whole_groups(rows, together, (ranks,)) == expected, (rows, ranks, together)
    # Over two dimensions: whichever of them the rows come to be sharded over.
    assert distributed.whole_groups(12, 2, (2, 3))
    assert not distributed.whole_groups(12, 2, (2, 4))
    assert distributed.whole_groups(5, 1, (2, 4))


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


TWO_DIMENSIONS = ("ddo_loss", "elbo_error", "dmd_loss", "diffusion_nft_loss", "reverse_step-epsilon")


def of_a_square(rank: int, out: str) -> None:
    """Batches that both dimensions of a mesh of four ranks shard, or one of them."""
    mesh, wrong = init_device_mesh("cpu", (2, 2)), {}
    for case in (case for case in CASES.values() if case.name in TWO_DIMENSIONS):
        tensors = case.inputs((ROWS, 3, 4))
        for name, along in (("both", [Shard(0), Shard(0)]), ("the second", [Replicate(), Shard(0)])):
            parts = {
                n: distribute_tensor(t, mesh, along if t.shape[:1] == (ROWS,) else 2 * [Replicate()])
                for n, t in tensors.items()
            }
            try:
                pairs = zip(value_and_gradients(case, parts), value_and_gradients(case, tensors), strict=True)
                for mine, theirs in pairs:
                    torch.testing.assert_close(mine, theirs)
            except Exception:
                wrong[f"{case.name}, {name}"] = traceback.format_exc()
    try:
        case = CASES["dmd_loss"]
        tensors = case.inputs((ROWS, 3, 4))
        tensors["fake"][1] = torch.inf  # a sample of the first rank's
        parts = {n: sharded_over(mesh, t) for n, t in tensors.items()}
        _, stats = fastgen.dmd_loss(**parts, **case.options, return_stats=True)
        _, expected = fastgen.dmd_loss(**tensors, **case.options, return_stats=True)
        for mine, theirs in zip(stats, expected, strict=True):
            torch.testing.assert_close(whole(mine).detach(), theirs.detach())
        whole_fake = distribute_tensor(tensors["fake"], mesh, 2 * [Replicate()])
        with pytest.raises(ValueError, match=r"^fake has placements .* pass fake\.redistribute\(placements="):
            fastgen.dmd_loss(**parts | {"fake": whole_fake}, **case.options)
        with pytest.raises(TypeError, match=r"^weight is a plain tensor, but x is sharded"):
            fastgen.dmd_loss(**parts, **case.options, weight=torch.ones(ROWS))
    except Exception:
        wrong["statistics and refusals"] = traceback.format_exc()
    torch.save(wrong, f"{out}/{rank}.pt")


def sharded_over(mesh: DeviceMesh, t: torch.Tensor) -> DTensor:
    return distribute_tensor(t, mesh, [Shard(0), Shard(0)] if t.shape[:1] == (ROWS,) else 2 * [Replicate()])


def test_batches_over_two_dimensions_of_a_mesh_give_the_numbers_of_one_process(tmp_path):
    assert set(TWO_DIMENSIONS) <= set(CASES)
    spawn(of_a_square, str(tmp_path), ranks=4)
    for rank in range(4):
        wrong = torch.load(tmp_path / f"{rank}.pt")
        assert not wrong, "\n\n".join(f"{name}:\n{text}" for name, text in wrong.items())
