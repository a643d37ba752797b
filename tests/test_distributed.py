"""Two gloo ranks against one process: a process group, and batch-sharded DTensors."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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


def run_group(rank, port, is_real, backend, out):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    p, q, y, w = data()
    mine = slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)
    p = p[mine].clone().requires_grad_()
    with fastgen.use_backend(backend):
        loss = fastgen.ddo_loss(p, q[mine], y[mine], is_real[mine], weight=w[mine], alpha=2.0, group=dist.group.WORLD)
        loss.backward()
    # What DDP and FSDP do: average over ranks.
    mean_loss = loss.detach().clone()
    dist.all_reduce(mean_loss)
    torch.save((mean_loss / 2, p.grad / 2), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def run_dtensor(rank, port, is_real, reduction, out):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
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
    # The other row-wise operators, and the pair loss, which needs its batch whole.
    torch.testing.assert_close(
        fastgen.elbo_error(p, y, weight=w).full_tensor(),
        fastgen.elbo_error(p.full_tensor(), y.full_tensor(), weight=w.full_tensor()),
    )
    pair = fastgen.diffusion_dpo_loss(p, q, y, beta=3.0)
    torch.testing.assert_close(
        pair.full_tensor(), fastgen.diffusion_dpo_loss(p.full_tensor(), q.full_tensor(), y.full_tensor(), beta=3.0)
    )
    torch.save((loss.full_tensor().detach(), delta.full_tensor(), p.grad.full_tensor()), f"{out}/{rank}.pt")
    dist.destroy_process_group()


def spawn(worker, *args):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (port, *args), nprocs=2)


@pytest.mark.parametrize("fakes", [(1, 4, 6), (5, 7), ()], ids=["both ranks", "one rank", "none"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_group_makes_the_means_global(fakes, backend, tmp_path):
    is_real = torch.ones(ROWS, dtype=torch.bool)
    is_real[list(fakes)] = False
    spawn(run_group, is_real, backend, str(tmp_path))
    loss, _, grad = single(is_real)
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    torch.testing.assert_close(ranks[0][0], loss)
    torch.testing.assert_close(torch.cat([r[1] for r in ranks]), grad)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sharded_dtensors_stay_sharded(reduction, tmp_path):
    is_real = torch.tensor([True, True, True, True, False, True, False, True])  # rank 0 has no fakes
    spawn(run_dtensor, is_real, reduction, str(tmp_path))
    expected = single(is_real, reduction)
    for rank in range(2):
        for actual, wanted in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
