"""Logits whose vocabulary is divided among ranks give the numbers of one process, and no factor of the ranks.

Each rank compares what it gets with what it computes of whole tensors, and its rows' results with the other ranks'.
"""

from __future__ import annotations

import math
import re
import traceback
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import Traffic, spawn

import fastgen
from benchmarks import scaling

ROWS, WIDTH, VOCABULARY, ENTRIES = (4, 3), 6, 24, 5
IGNORED = -100


class Call(NamedTuple):
    """`sliced`: tensors by the dimension that is divided; `rows`: those of rows; `wrt`: what has gradients."""

    function: str
    sliced: dict[str, int]
    rows: tuple[str, ...]
    wrt: tuple[str, ...]
    options: dict[str, Any]
    hidden: tuple[str, ...] = ()


def calls() -> dict[str, Call]:
    token = ("token_logprob", {"logits": -1}, ("tokens",), ("logits",))
    jsd = ("generalized_jsd_loss", {"student_logits": -1, "teacher_logits": -1})
    sparse = ("sparse_divergence_loss", {"student_logits": -1}, ("teacher_logprobs", "teacher_ids", "labels"))
    head = {"student_weight": 0, "teacher_weight": 0, "student_bias": 0, "teacher_bias": 0}
    of_head = ("student_hidden", "student_weight", "student_bias")
    made = {
        "token_logprob": Call(*token, {"temperature": 0.7, "return_entropy": True}),
        "sequence_ddo_loss": Call(
            "sequence_ddo_loss",
            {"logits": -1, "ref_logits": -1},
            ("tokens", "is_real"),
            ("logits",),
            {"return_delta": True},
        ),
        "jsd, weighted": Call(
            *jsd,
            ("labels", "weight"),
            ("student_logits",),
            {"beta": 0.3, "num_items": 7, "reduction": "mean", "scaled": True, "return_entropy": True},
        ),
        "jsd, rows": Call(*jsd, ("mask",), ("student_logits",), {"beta": 0.9, "reduction": "none"}),
        "linear_token_logprob": Call(
            "linear_token_logprob",
            {"weight": 0, "bias": 0},
            ("tokens",),
            ("hidden", "weight", "bias"),
            {"temperature": 0.7, "softcap": 3.0, "max_chunk_bytes": 600, "return_entropy": True},
            hidden=("hidden",),
        ),
        "linear_jsd, rows": Call(
            "linear_generalized_jsd_loss",
            head,
            ("labels",),
            of_head,
            {"beta": 0.5, "reduction": "none", "max_chunk_bytes": 600},
            hidden=("student_hidden", "teacher_hidden"),
        ),
        "linear_jsd, labelled": Call(
            "linear_generalized_jsd_loss",
            head,
            ("labels",),
            of_head,
            {"cross_entropy_weight": 0.7, "return_cross_entropy": True, "max_chunk_bytes": 800},
            hidden=("student_hidden", "teacher_hidden"),
        ),
        "linear_sparse_divergence_loss": Call(
            "linear_sparse_divergence_loss",
            {"weight": 0, "bias": 0},
            ("teacher_logprobs", "teacher_ids", "token_weight"),
            ("hidden", "weight", "bias"),
            {"kind": "jsd", "max_chunk_bytes": 600},
            hidden=("hidden",),
        ),
    }
    for beta in (0.0, 0.5, 1.0):
        made[f"jsd {beta}"] = Call(*jsd, ("labels",), ("student_logits",), {"beta": beta, "temperature": 2.0})
        made[f"linear_jsd {beta}"] = Call(
            "linear_generalized_jsd_loss",
            head,
            ("labels", "token_weight") if beta == 0.5 else ("labels",),
            of_head,
            {"beta": beta, "logit_scale": 0.5, "max_chunk_bytes": 600, "return_entropy": True},
            hidden=("student_hidden", "teacher_hidden"),
        )
    for kind in ("forward", "reverse", "jsd"):
        for tail in ("bucket", "renormalize", "none"):
            options = {"kind": kind, "tail": tail, "return_masses": True}
            made[f"sparse {kind} {tail}"] = Call(*sparse, ("student_logits",), options)
    return made


def tensors_of(call: Call, vocabulary: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    ids = torch.stack([torch.randperm(vocabulary, generator=g)[:ENTRIES] for _ in range(math.prod(ROWS))])
    ids = ids.view(*ROWS, ENTRIES)
    tokens = torch.randint(vocabulary, ROWS, generator=g)
    tokens[0, 0], tokens[1, 1], tokens[2, 2] = IGNORED, vocabulary - 1, 0
    labels = torch.zeros(ROWS, dtype=torch.int64)
    labels[0, 1] = labels[3, 2] = IGNORED
    padded = ids.clone()
    padded[1, 0, 2] = -1
    padded[1, 1, 3] = padded[1, 1, 0]  # twice
    weight = torch.rand(ROWS, generator=g)
    weight[0, 1] = math.nan  # of a row that does not count
    made = {
        "tokens": tokens,
        "labels": labels,
        "mask": labels == 0,
        "is_real": torch.tensor([True, False, True, False]),
        "teacher_logprobs": normal(*ROWS, vocabulary).log_softmax(-1).gather(-1, ids),
        "teacher_ids": padded,
        "weight": weight,
        "token_weight": torch.rand(ROWS, generator=g),
    }
    for name in ("labels", "token_weight"):
        if "token_weight" in call.rows and name == "token_weight" and "labels" in call.rows:
            made[name] = torch.where(labels == 0, made[name], math.nan)
    names = (*call.hidden, *call.sliced, *call.rows)
    for name in names:
        if name.endswith("logits"):
            made[name] = 3 * normal(*ROWS, vocabulary)
        elif name.endswith("hidden"):
            made[name] = normal(*ROWS, WIDTH)
        elif name.endswith("bias"):
            made[name] = normal(vocabulary)
        elif (name == "weight" and name in call.sliced) or (name.endswith("_weight") and name != "token_weight"):
            made[name] = normal(vocabulary, WIDTH)
    return {name: made[name] for name in names}


def whole(t: Any) -> torch.Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def results_of(call: Call, tensors: dict[str, torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """What the function returns, then the gradients."""
    leaves = {n: t.detach().clone().requires_grad_() if n in call.wrt else t for n, t in tensors.items()}
    found = getattr(fastgen, call.function)(**leaves, **call.options, **options)
    found = found if isinstance(found, tuple) else (found,)
    value = whole(found[0])
    factors = (torch.arange(value.numel()) % 8 - 3.5) / 4
    (value * factors.reshape(value.shape).to(value.dtype)).sum().backward()
    gradients = [leaves[name].grad for name in call.wrt]
    assert all(g is not None for g in gradients)
    return [whole(t).detach() for t in (*found, *gradients)]


def same_on_all_ranks(t: torch.Tensor) -> bool:
    every = [torch.empty_like(t) for _ in range(dist.get_world_size())]
    dist.all_gather(every, t.contiguous())
    return all(torch.equal(t.nan_to_num(), other.nan_to_num()) for other in every)


def own_part(t: torch.Tensor, dim: int, rank: int, ranks: int) -> torch.Tensor:
    return t.chunk(ranks, dim)[rank].clone()


def of_a_group(rank: int, out: str, backend: str) -> None:
    """Slices of plain tensors over a process group."""
    ranks, wrong = dist.get_world_size(), {}
    for name, call in calls().items():
        try:
            tensors = tensors_of(call, VOCABULARY)
            expected = results_of(call, tensors)
            own = {n: own_part(t, call.sliced[n], rank, ranks) if n in call.sliced else t for n, t in tensors.items()}
            with fastgen.use_backend(backend):
                found = results_of(call, own, vocab_group=dist.group.WORLD)
            count = len(expected) - len(call.wrt)
            for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
                argument = call.wrt[i - count] if i >= count else None
                if argument in call.sliced:
                    theirs = own_part(theirs, call.sliced[argument], rank, ranks)
                else:
                    assert same_on_all_ranks(mine), f"result {i} differs between ranks"
                torch.testing.assert_close(mine, theirs, msg=lambda m, i=i: f"result {i}: {m}")
        except Exception:
            wrong[name] = traceback.format_exc()
    torch.save(wrong, f"{out}/{rank}.pt")


def check(folder: Any, ranks: int) -> None:
    for rank in range(ranks):
        wrong = torch.load(folder / f"{rank}.pt")
        assert not wrong, "\n\n".join(f"{name}:\n{text}" for name, text in wrong.items())


@pytest.mark.parametrize(("ranks", "backend"), [(2, "auto"), (4, "auto"), (2, "reference")])
def test_slices_over_a_group_give_the_numbers_of_one_process(tmp_path, ranks, backend):
    spawn(of_a_group, str(tmp_path), backend, ranks=ranks)
    check(tmp_path, ranks)


def of_dtensors(rank: int, out: str) -> None:
    """Vocabularies of DTensors that shard unevenly, and that leave a rank none; with sharded rows beside."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    wrong = {}
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts = [
        ("vocabulary", line, [None], 10),
        ("an empty shard", line, [None], 5),
        ("rows and vocabulary", square, [Shard(0), None], 7),
        ("tokens and vocabulary", square, [Shard(1), None], 24),
        ("rows", square, [Shard(0), Replicate()], 9),
    ]
    few = ("token_logprob", "sequence_ddo_loss", "jsd, weighted", "jsd, rows", "sparse jsd bucket", "linear_jsd 0.5")
    for layout, mesh, rows, vocabulary in layouts:
        for name, call in calls().items():
            if layout != "vocabulary" and name not in few:
                continue
            if (layout == "an empty shard" and call.hidden) or (
                call.function == "sequence_ddo_loss" and Shard(1) in rows
            ):
                continue
            try:
                tensors = tensors_of(call, vocabulary)
                if layout == "rows":  # the second half of the batch, two ranks', has no tokens that count
                    for n in ("tokens", "labels", "mask"):
                        if n in tensors:
                            tensors[n][2:] = 0 if n == "mask" else IGNORED
                expected = results_of(call, tensors)

                def placed(n: str, t: torch.Tensor, call: Call = call, rows: Any = rows) -> list[Any]:
                    if n in call.sliced:
                        dim = call.sliced[n] % t.dim()
                        beside = [Replicate() if n not in call.rows and dim == 0 else r for r in rows]
                        return [Shard(dim) if r is None else b for r, b in zip(rows, beside, strict=True)]
                    return [Replicate() if r is None else r for r in rows]

                own = {n: distribute_tensor(t, mesh, placed(n, t)) for n, t in tensors.items()}
                found = results_of(call, own)
                for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
                    torch.testing.assert_close(mine, theirs, msg=lambda m, i=i: f"result {i}: {m}")
            except Exception:
                wrong[f"{name}, {layout}"] = traceback.format_exc()
    torch.save(wrong, f"{out}/{rank}.pt")


def test_dtensors_give_the_numbers_of_one_process(tmp_path):
    spawn(of_dtensors, str(tmp_path), ranks=4)
    check(tmp_path, 4)


def refusals(rank: int, out: str) -> None:
    """Writes which calls with tensors that do not fit together said something else than they should."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    group = dist.group.WORLD
    plain, tokens, weight = torch.zeros(4, 2, 6), torch.zeros(4, 2, dtype=torch.int64), torch.zeros(6, 3)
    hidden, real = torch.zeros(4, 2, 3), torch.ones(4, dtype=torch.bool)

    def on(t: torch.Tensor, *placements: Any) -> Any:
        return distribute_tensor(t, mesh, placements)

    sliced, rows = on(plain, Shard(-1)), on(plain, Shard(0))
    part = DTensor.from_local(plain, mesh, [Partial()])
    jsd, logprob, ddo = fastgen.generalized_jsd_loss, fastgen.token_logprob, fastgen.sequence_ddo_loss
    linear, linear_jsd = fastgen.linear_token_logprob, fastgen.linear_generalized_jsd_loss
    calls = {
        "vocab_group must be a torch.distributed process group": lambda: logprob(plain, tokens, vocab_group="tp"),
        "vocab_group says how plain tensors are divided, but logits": lambda: logprob(
            sliced, tokens, vocab_group=group
        ),
        r"have \[5, 6\] columns": lambda: logprob(plain[..., : 5 + rank], tokens, vocab_group=group),
        r"have \[4, 6\] columns": lambda: linear(
            hidden, weight[: 4 + 2 * rank], tokens, vocab_group=group, max_chunk_bytes=100
        ),
        "teacher_logits has 4 columns": lambda: jsd(plain, plain[..., :4], vocab_group=group),
        r"teacher_logits has placements .*teacher_logits.redistribute": lambda: jsd(sliced, on(plain, Replicate())),
        "student_logits must both be DTensors": lambda: jsd(sliced, plain),
        r"labels has placements .*labels.redistribute\(placements=": lambda: jsd(sliced, sliced, on(tokens, Shard(0))),
        "tokens is a plain tensor, but the logits' rows are sharded": lambda: logprob(rows, tokens),
        "tokens is a DTensor: pass": lambda: logprob(plain, on(tokens, Replicate())),
        "logits is a sum that is still divided": lambda: logprob(part, tokens),
        "logits are sharded along their sequences": lambda: ddo(
            on(plain, Shard(1)), on(plain, Shard(1)), on(tokens, Shard(1)), on(real, Replicate())
        ),
        "weight is none on its mesh": lambda: linear(on(hidden, Replicate()), weight, tokens),
        "hidden is sharded along its features": lambda: linear(on(hidden, Shard(2)), on(weight, Shard(0)), tokens),
        r"weight must have placements of Shard\(0\)": lambda: linear(
            on(hidden, Replicate()), on(weight, Shard(1)), tokens
        ),
        "weight leaves ranks without any": lambda: linear(
            on(hidden, Replicate()), on(weight[:1], Shard(0)), torch.zeros_like(tokens)
        ),
        "student_hidden and teacher_hidden must both": lambda: linear_jsd(
            on(hidden, Replicate()), on(weight, Shard(0)), hidden, weight
        ),
        "redistribute one of the two": lambda: linear_jsd(
            on(hidden, Replicate()), on(weight, Shard(0)), on(hidden, Replicate()), on(weight, Replicate())
        ),
        "dimension of its mesh that vocab_group is": lambda: linear(
            hidden, on(weight, Replicate()), tokens, vocab_group=group
        ),
    }
    wrong = {}
    for pattern, call in calls.items():
        try:
            call()
            wrong[pattern] = "no error"
        except (TypeError, ValueError) as error:
            if not re.search(pattern, str(error)):
                wrong[pattern] = traceback.format_exc()
        except Exception:
            wrong[pattern] = traceback.format_exc()
    torch.save(wrong, f"{out}/{rank}.pt")


def test_what_does_not_fit_together_is_refused_with_what_would(tmp_path):
    spawn(refusals, str(tmp_path))
    check(tmp_path, 2)


def of_bad_rows(rank: int, out: str) -> None:
    """NaN, +inf, rows of -inf, masked columns, and tokens and ids that are in no vocabulary."""
    g = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(6, 8, generator=g) for _ in range(2))
    student[0, 5], student[1, 2], student[2] = math.nan, math.inf, -math.inf
    student[3, 4:], teacher[3, 4:] = -math.inf, -math.inf  # all of a rank's columns
    ids = torch.stack([torch.randperm(8, generator=g)[:3] for _ in range(6)])
    logprobs = teacher.log_softmax(-1).gather(-1, ids)
    tokens = torch.tensor([0, 1, 2, 3, 9, -1])
    calls: dict[str, Any] = {
        "token": lambda s, t, **o: fastgen.token_logprob(s, tokens, **o),
        "sparse": lambda s, t, **o: fastgen.sparse_divergence_loss(s, logprobs, ids, reduction="none", **o),
    }
    for beta in (0.0, 0.4, 1.0):
        calls[f"jsd {beta}"] = lambda s, t, beta=beta, **o: fastgen.generalized_jsd_loss(
            s, t, beta=beta, reduction="none", **o
        )
    wrong = {}
    for name, call in calls.items():
        expected = student.clone().requires_grad_()
        value = call(expected, teacher)
        value.sum().backward()
        own = own_part(student, -1, rank, 2).requires_grad_()
        mine = call(own, own_part(teacher, -1, rank, 2), vocab_group=dist.group.WORLD)
        mine.sum().backward()
        try:
            torch.testing.assert_close(mine, value, equal_nan=True)
            torch.testing.assert_close(own.grad, own_part(expected.grad, -1, rank, 2), equal_nan=True)
        except AssertionError:
            wrong[name] = traceback.format_exc()
    beyond = torch.where(ids == ids[4, 1], 8, ids)  # an id of no rank
    found = fastgen.sparse_divergence_loss(
        own.detach(), logprobs, beyond, reduction="none", vocab_group=dist.group.WORLD
    )
    if not torch.equal(found[3:].isnan(), (beyond == 8).any(-1)[3:]):
        wrong["an id beyond"] = f"{found} of {beyond}"
    torch.save(wrong, f"{out}/{rank}.pt")


def test_what_is_not_finite_or_not_in_the_vocabulary_does_as_in_one_process(tmp_path):
    spawn(of_bad_rows, str(tmp_path))
    check(tmp_path, 2)


def traffic(rank: int, out: str) -> None:
    """Writes the collectives of a forward and a backward pass, by function."""
    messages = {}
    for name, call in calls().items():
        tensors = tensors_of(call, VOCABULARY)
        ranks = dist.get_world_size()
        own = {n: own_part(t, call.sliced[n], rank, ranks) if n in call.sliced else t for n, t in tensors.items()}
        if call.hidden:
            call = call._replace(options=call.options | {"max_chunk_bytes": 1 << 20})  # one chunk
        with Traffic() as found:
            results_of(call, own, vocab_group=dist.group.WORLD)
        messages[name] = found.messages
    torch.save(messages, f"{out}/{rank}.pt")


def test_ranks_exchange_a_few_numbers_a_row(tmp_path):
    """One all-gather of maxima and sums, one of sums; no message grows with the vocabulary."""
    spawn(traffic, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    gather = "all_gather_into_tensor"

    def normals(rows: int, numbers: int) -> list[tuple[str, int]]:
        return [(gather, numbers * rows + 1)]

    def entropy(rows: int) -> list[tuple[str, int]]:
        return [*normals(rows, 2), (gather, 2 * rows)]

    rows = math.prod(ROWS)
    jsd = [*normals(rows, 4), (gather, 2 * rows)]
    assert first["jsd 0.5"] == first["jsd 0.0"] == jsd
    predicted = {loss.name.partition(",")[0]: loss.messages for loss in scaling.LOSSES}  # numbers a row
    assert [count // rows for _, count in jsd] == list(predicted["generalized_jsd_loss"])
    assert [count // rows for _, count in first["token_logprob"][:1]] == list(predicted["token_logprob"])
    assert first["token_logprob"] == [*normals(rows, 3), *entropy(rows)]  # with the token's logit
    assert first["sequence_ddo_loss"] == 2 * normals(rows, 3)
    assert first["sparse forward bucket"] == [("all_reduce", rows * ENTRIES), *normals(rows, 2)]
    # Output layers project the rows that count.
    assert first["linear_jsd 0.5"] == [
        (gather, 1),
        *entropy(10),
        *normals(10, 4),
        (gather, 20),
        ("all_reduce", 10 * WIDTH),
    ]
    assert first["linear_token_logprob"] == [(gather, 1), *entropy(11), *normals(11, 3), ("all_reduce", 11 * WIDTH)]


def of_compiled(rank: int, out: str) -> None:
    """Whole graphs of functional collectives, over a group and over DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, wrong = init_device_mesh("cpu", (2,)), {}
    for name in ("jsd 0.5", "linear_jsd 0.0"):
        call = calls()[name]
        tensors = tensors_of(call, VOCABULARY)
        expected = results_of(call, tensors)
        own = {n: own_part(t, call.sliced[n], rank, 2) if n in call.sliced else t for n, t in tensors.items()}
        spread = {
            n: distribute_tensor(t, mesh, [Shard(call.sliced[n] % t.dim()) if n in call.sliced else Replicate()])
            for n, t in tensors.items()
        }
        function = getattr(fastgen, call.function)
        for how, given, options in (("group", own, {"vocab_group": dist.group.WORLD}), ("DTensors", spread, {})):
            try:
                torch._dynamo.reset()
                compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
                leaves = {n: t.detach().requires_grad_() if n in call.wrt else t for n, t in given.items()}
                found = compiled(**leaves, **call.options, **options)
                value = whole(found[0] if isinstance(found, tuple) else found)
                factors = (torch.arange(value.numel()) % 8 - 3.5) / 4
                (value * factors.reshape(value.shape)).sum().backward()
                torch.testing.assert_close(value.detach(), expected[0])
                for argument, theirs in zip(call.wrt, expected[len(expected) - len(call.wrt) :], strict=True):
                    if how == "group" and argument in call.sliced:
                        theirs = own_part(theirs, call.sliced[argument], rank, 2)
                    torch.testing.assert_close(whole(leaves[argument].grad), theirs)
            except Exception:
                wrong[f"{name}, {how}"] = traceback.format_exc()
    torch.save(wrong, f"{out}/{rank}.pt")


def test_divided_vocabularies_compile_to_whole_graphs(tmp_path):
    spawn(of_compiled, str(tmp_path))
    check(tmp_path, 2)


def test_the_model_of_large_meshes_adds_up():
    """No message on one rank; slices share the work; and unfused it moves and holds a multiple, as counted."""
    machine, (jsd, *_) = scaling.Machine(), scaling.LOSSES
    alone, divided = (scaling.fused(jsd, 8192, 128_256, tp, machine) for tp in (1, 8))
    assert (alone.messages, alone.sent) == (0, 0)
    assert divided.messages == 2
    assert divided.sent == 4 * 8192 * sum(jsd.messages)
    assert divided.moved == alone.moved / 8
    unfused = scaling.unfused(jsd, 8192, 128_256, 8, machine)
    assert unfused.moved > 10 * divided.moved
    assert unfused.held > 5 * divided.held
    text = scaling.page(machine)
    assert text.count("\n| 4096 |") == len(scaling.VOCABULARIES) * len(scaling.WIDTHS)
