"""Two gloo ranks against one process: a process group, and batch-sharded DTensors."""

import itertools
import multiprocessing
import time

import pytest
import torch
import torch.distributed as dist
from ranks import spawn

import fastgen

ROWS = 8


def data():
    generator = torch.Generator().manual_seed(0)
    p, q, y = (torch.randn(ROWS, 3, 4, generator=generator) for _ in range(3))
    return p, q, y, torch.rand(ROWS, generator=generator) + 0.5


def single(is_real, reduction="mean"):
    p, q, y, w = data()
    p.requires_grad_()
    loss, delta = fastgen.ddo_loss(p, q, y, is_real, weight=w, alpha=2.0, reduction=reduction, return_delta=True)
    (grad,) = torch.autograd.grad(loss.sum(), p)
    return loss.detach(), delta, grad


FAKES = {"both ranks": (1, 4, 6), "one rank": (5, 7), "none": ()}
RUNS = [(fakes, backend) for fakes in FAKES.values() for backend in ("auto", "reference")]


def flags(fakes):
    is_real = torch.ones(ROWS, dtype=torch.bool)
    is_real[list(fakes)] = False
    return is_real


SPLITS = (4, 5, 8)  # rows of the first rank; the second has the rest


def run_group(rank, out):
    results = []
    for (fakes, backend), first in itertools.product(RUNS, SPLITS):
        p, q, y, w = data()
        mine = slice(first, ROWS) if rank else slice(first)
        p, real = p[mine].clone().requires_grad_(), flags(fakes)[mine]
        with fastgen.use_backend(backend):
            loss = fastgen.ddo_loss(p, q[mine], y[mine], real, weight=w[mine], alpha=2.0, group=dist.group.WORLD)
            loss.backward()
        # What DDP and FSDP do: average over ranks.
        mean_loss = loss.detach().clone()
        dist.all_reduce(mean_loss)
        results.append((mean_loss / 2, p.grad / 2))
    torch.save(results, f"{out}/{rank}.pt")


def run_dtensor(rank, is_real, reduction, out):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    mesh = init_device_mesh("cpu", (2,))
    p, q, y, w, real = (distribute_tensor(t, mesh, [Shard(0)]) for t in (*data(), is_real))
    p.requires_grad_()
    with CommDebugMode() as communication:
        loss, delta = fastgen.ddo_loss(p, q, y, real, weight=w, alpha=2.0, reduction=reduction, return_delta=True)
    per_term = reduction == "none"
    assert loss.placements == ((Shard(0),) if per_term else (Partial("sum"),)), loss.placements
    assert delta.placements == (Shard(0),)
    gathers = {
        str(op): n
        for op, n in communication.get_comm_counts().items()
        if "gather" in str(op) or "all_to_all" in str(op)
    }
    assert not any(gathers.values()), gathers
    (loss.sum() if per_term else loss).redistribute(mesh, [Replicate()]).backward()
    assert p.grad.placements == (Shard(0),)
    # The other row-wise operators, and the pair loss, whose shards hold whole pairs.
    torch.testing.assert_close(
        fastgen.elbo_error(p, y, weight=w).full_tensor(),
        fastgen.elbo_error(p.full_tensor(), y.full_tensor(), weight=w.full_tensor()),
    )
    losses = {}
    for sharded in (True, False):
        leaf, target = (t if sharded else t.full_tensor() for t in (p.detach(), y))
        losses[sharded] = fastgen.feature_distance([leaf.requires_grad_()] * 2, [target, 2 * target], [0.5, 2.0])
        (losses[sharded].full_tensor() if sharded else losses[sharded]).backward()
        losses[sharded] = [losses[sharded].detach(), leaf.grad]
    for actual, wanted in zip(losses[True], losses[False], strict=True):
        torch.testing.assert_close(actual.full_tensor(), wanted)
    assert losses[True][1].placements == (Shard(0),)
    pairs = {"beta": 3.0, "interleaved": True}
    torch.testing.assert_close(
        fastgen.diffusion_dpo_loss(p, q, y, **pairs).full_tensor(),
        fastgen.diffusion_dpo_loss(p.full_tensor(), q.full_tensor(), y.full_tensor(), **pairs),
    )
    torch.save((loss.full_tensor().detach(), delta.full_tensor(), p.grad.full_tensor()), f"{out}/{rank}.pt")


def test_a_group_makes_the_means_global(tmp_path):
    spawn(run_group, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    for i, ((fakes, _), _) in enumerate(itertools.product(RUNS, SPLITS)):
        loss, _, grad = single(flags(fakes))
        torch.testing.assert_close(ranks[0][i][0], loss)
        torch.testing.assert_close(torch.cat([r[i][1] for r in ranks]), grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sharded_dtensors_stay_sharded(reduction, tmp_path):
    is_real = torch.tensor([True, True, True, True, False, True, False, True])  # rank 0 has no fakes
    spawn(run_dtensor, is_real, reduction, str(tmp_path))
    expected = single(is_real, reduction)
    for rank in range(2):
        for actual, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


# -- Sequences: ranks of unequal numbers of sequences, of lengths and of tokens that count

VOCABULARY, SHARDS = 11, ((3, 4), (5, 7))  # [B, T] of each rank


def sequence_data(rank):
    generator = torch.Generator().manual_seed(rank)
    rows, length = SHARDS[rank]
    p, q = (2 * torch.randn(rows, length, VOCABULARY, generator=generator) for _ in range(2))
    tokens = torch.randint(VOCABULARY, (rows, length), generator=generator)
    return p, q, tokens, torch.rand(rows, length, generator=generator) < 0.6


def sequence_step(p, q, tokens, mask, is_real, group=None):
    p = p.clone().requires_grad_()
    loss = fastgen.sequence_ddo_loss(p, q, tokens, is_real, mask=mask, alpha=2.0, beta=0.3, normalize=True, group=group)
    (grad,) = torch.autograd.grad(loss, p)
    return loss.detach(), grad


def run_sequences(rank, out):
    results = []
    for fakes, backend in RUNS:
        mine = flags(fakes).split([rows for rows, _ in SHARDS])[rank]
        for group in (dist.group.WORLD, None):
            with fastgen.use_backend(backend):
                loss, grad = sequence_step(*sequence_data(rank), mine, group)
            dist.all_reduce(loss)
            results.append((loss / 2, grad / 2))
    torch.save(results, f"{out}/{rank}.pt")


def padded(shards):
    """The shards' [B, T, …] as one batch: shorter sequences go on with zeros."""
    length = max(t.shape[1] for t in shards)
    ends = [t.new_full((t.shape[0], length - t.shape[1], *t.shape[2:]), 0) for t in shards]
    return torch.cat([torch.cat(pair, 1) for pair in zip(shards, ends, strict=True)])


def assert_rounding(actual, expected):
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=0, atol=8 * eps * expected.abs().max().item())


def test_a_group_makes_the_means_over_sequences_global(tmp_path):
    spawn(run_sequences, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    p, q, tokens, mask = (padded(shards) for shards in zip(*map(sequence_data, range(2)), strict=True))
    assert len({int(sequence_data(r)[3].sum()) for r in range(2)}) == 2  # unequal numbers of tokens
    for i, (fakes, _) in enumerate(RUNS):
        loss, grad = sequence_step(p, q, tokens, mask, flags(fakes))
        (with_group, actual), (without, local) = (
            (ranks[0][j][0], padded([r[j][1] for r in ranks])) for j in (2 * i, 2 * i + 1)
        )
        assert torch.equal(ranks[1][2 * i][0], with_group)
        assert_rounding(with_group, loss)
        assert_rounding(actual, grad)
        for wrong in (torch.zeros_like(actual), -actual, local):
            with pytest.raises(AssertionError):
                assert_rounding(wrong, grad)
        with pytest.raises(AssertionError):
            assert_rounding(without, loss)


# -- The ranks themselves


def hang(rank):
    time.sleep(1000)


def fail(rank):
    if rank == 1:
        raise KeyError("rank 1 alone")
    dist.barrier()


def test_a_hanging_rank_is_killed_and_a_failing_one_is_heard():
    with pytest.raises(TimeoutError, match=r"hang took more than 0\.5 s"):
        spawn(hang, patience=0.5)
    assert not multiprocessing.active_children()
    with pytest.raises(Exception, match="rank 1 alone"):
        spawn(fail)
    assert not multiprocessing.active_children()
