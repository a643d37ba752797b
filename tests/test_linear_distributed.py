"""Two gloo ranks against one process: output layers that are DTensors, beside hidden states of each rank's own."""

import torch
from ranks import spawn
from torch import nn

import fastgen

WIDTH, VOCABULARY = 6, 11  # whose shards have 6 and 5 rows
ROWS = (4, 7)


def data():
    """Hidden states, weight and bias of a student and of a teacher; tokens."""
    generator = torch.Generator().manual_seed(0)
    shapes = 2 * [(sum(ROWS), WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return tensors, torch.randint(VOCABULARY, (sum(ROWS),), generator=generator)


def jsd(tensors, tokens, share=1.0):
    """The mean over all ranks' rows, if `share` is a rank's share of their number."""
    h, w, b, t, v, c = tensors
    items = torch.tensor(share * sum(ROWS))
    return fastgen.linear_generalized_jsd_loss(h, w, t, v, student_bias=b, teacher_bias=c, num_items=items)


def logprob(tensors, tokens, share=1.0):
    h, w, b, *_ = tensors
    return -fastgen.linear_token_logprob(h, w, tokens, bias=b).sum() / (share * sum(ROWS))


LOSSES = (jsd, logprob)


def value_and_gradients(loss, tensors, *args):
    leaves = [t.detach().requires_grad_() for t in tensors]
    value = loss(leaves, *args)
    value.backward()
    return value.detach(), [t.grad for t in leaves[:3]]


def own(rank):
    return slice(0, ROWS[0]) if rank == 0 else slice(ROWS[0], None)


def run_dtensors(rank, out):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    results = {}
    tensors, tokens = data()
    mine = own(rank)
    for name, shape, placements in (
        ("sharded", (2,), [Shard(0)]),
        ("replicated", (2,), [Replicate()]),
        ("replicated and sharded", (1, 2), [Replicate(), Shard(0)]),
        ("sharded twice", (2, 1), [Shard(0), Shard(0)]),
    ):
        mesh = init_device_mesh("cpu", shape)
        h, w, b, t, v, c = tensors
        layers = [distribute_tensor(p, mesh, placements) for p in (w, b, v, c)]
        given = [h[mine], *layers[:2], t[mine], *layers[2:]]
        for loss in LOSSES:
            for backend in ("auto", "reference"):
                with fastgen.use_backend(backend):
                    value, (of_hidden, of_weight, of_bias) = value_and_gradients(loss, given, tokens[mine], 0.5)
                assert of_weight.placements == of_bias.placements == tuple(placements)
                results[name, loss.__name__, backend] = value, of_hidden, of_weight.full_tensor(), of_bias.full_tensor()
    torch.save(results, f"{out}/{rank}.pt")


def test_a_sharded_layer_gets_the_gradient_of_all_ranks_rows(tmp_path):
    """Values and gradients are means over the ranks, as everywhere under FSDP2 and DDP."""
    spawn(run_dtensors, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{r}.pt") for r in range(2))
    tensors, tokens = data()
    expected = {loss.__name__: value_and_gradients(loss, tensors, tokens) for loss in LOSSES}
    assert len(first) == 16
    for case, (value, of_hidden, of_weight, of_bias) in first.items():
        other = second[case]
        wanted, (hidden, weight, bias) = expected[case[1]]
        torch.testing.assert_close((value + other[0]) / 2, wanted, msg=lambda m, c=case: f"{c}: {m}")
        torch.testing.assert_close(torch.cat([of_hidden, other[1]]) / 2, hidden)
        for actual, same, exact in ((of_weight, other[2], weight), (of_bias, other[3], bias)):
            assert torch.equal(actual, same)
            torch.testing.assert_close(actual, exact, msg=lambda m, c=case: f"{c}: {m}")
            for wrong in (2 * exact, exact / 2, torch.zeros_like(exact)):
                assert (actual - exact).norm() < 1e-5 * (wrong - exact).norm()


def model():
    torch.manual_seed(0)
    return nn.ModuleDict({"body": nn.Linear(WIDTH, WIDTH), "head": nn.Linear(WIDTH, VOCABULARY)})


def step(net, loss, tensors, *args):
    """A training step whose loss takes the head's parameters, not its output."""
    h, _, _, *teacher = tensors
    value = loss([net["body"](h), net["head"].weight, net["head"].bias, *teacher], *args)
    value.backward()
    return value.detach()


def run_fsdp(rank, out):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    tensors, tokens = data()
    h, w, b, t, v, c = tensors
    mine = own(rank)
    results = {}
    for loss in LOSSES:
        net = model()
        for module in (net["body"], net["head"]):
            fully_shard(module, mesh=init_device_mesh("cpu", (2,)))
        assert isinstance(net["head"].weight, DTensor)
        value = step(net, loss, [h[mine], w, b, t[mine], v, c], tokens[mine], 0.5)
        results[loss.__name__] = value, {n: p.grad.full_tensor() for n, p in net.named_parameters()}
    torch.save(results, f"{out}/{rank}.pt")


def test_under_fsdp2_the_head_and_the_body_get_gradients_of_one_scale(tmp_path):
    spawn(run_fsdp, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    tensors, tokens = data()
    for loss in LOSSES:
        net = model()
        value = step(net, loss, tensors, tokens)
        torch.testing.assert_close((ranks[0][loss.__name__][0] + ranks[1][loss.__name__][0]) / 2, value)
        for name, parameter in net.named_parameters():
            for r in ranks:
                torch.testing.assert_close(r[loss.__name__][1][name], parameter.grad, msg=lambda m, n=name: f"{n}: {m}")


def run_whole_logits(rank, out):
    """What the message advises, of logits sharded over the vocabulary, as a column-parallel layer returns them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    tensors, tokens = data()
    h, w, *_ = tensors
    mesh = init_device_mesh("cpu", (2,))
    results = []
    for dim in (0, 1):
        logits = distribute_tensor(h @ w.t(), mesh, [Shard(dim)]).requires_grad_()
        value = fastgen.token_logprob(logits.full_tensor(), tokens).mean()
        value.backward()
        results.append((value.detach(), logits.grad.full_tensor()))
    torch.save(results, f"{out}/{rank}.pt")


def test_the_advice_for_logits_that_are_dtensors_is_right(tmp_path):
    spawn(run_whole_logits, str(tmp_path))
    (h, w, *_), tokens = data()
    logits = (h @ w.t()).requires_grad_()
    value = fastgen.token_logprob(logits, tokens).mean()
    value.backward()
    for rank in range(2):
        for result in torch.load(tmp_path / f"{rank}.pt"):
            torch.testing.assert_close(result, (value.detach(), logits.grad))


class Tied(nn.Module):
    """A body whose first layer's weight is the output layer's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.body = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, tokens):
        return self.body(self.embedding(tokens)).tanh()


def tied_step(net, tensors, tokens, share):
    *_, t, v, c = tensors
    loss = fastgen.linear_generalized_jsd_loss(
        net(tokens), net.embedding.weight, t, v, teacher_bias=c, num_items=torch.tensor(share * sum(ROWS))
    )
    loss.backward()
    return loss.detach()


def run_policies(rank, out):
    """What FSDP2 does besides sharding: tied layers, gradients that accumulate, lower precision; and a refusal."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    tensors, tokens = data()
    h, w, b, t, v, c = tensors
    mine, mesh = own(rank), init_device_mesh("cpu", (2,))
    results = {}

    net = fully_shard(Tied(), mesh=mesh)
    tied_step(net, [h[mine], w, b, t[mine], v, c], tokens[mine], 0.5)
    results["tied"] = {n: p.grad.full_tensor() for n, p in net.named_parameters()}

    net = model()
    for module in (net["body"], net["head"]):
        fully_shard(module, mesh=mesh)
    rows = list(range(sum(ROWS)))[mine]
    for half in (rows[:2], rows[2:]):
        net["body"].set_requires_gradient_sync(half is not rows[:2] and half[-1] == rows[-1])
        step(net, jsd, [h[half], w, b, t[half], v, c], tokens[half], 0.5)
    results["accumulated"] = {n: p.grad.full_tensor() for n, p in net.named_parameters()}

    net = model()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(net["body"], mesh=mesh, mp_policy=policy)
    fully_shard(net["head"], mesh=mesh, mp_policy=policy)
    hidden = net["body"](h[mine].bfloat16())
    weight, bias = (p.to(torch.bfloat16) for p in (net["head"].weight, net["head"].bias))
    items = torch.tensor(0.5 * sum(ROWS))
    fastgen.linear_generalized_jsd_loss(
        hidden, weight, t[mine], v, student_bias=bias, teacher_bias=c, num_items=items
    ).backward()
    results["bfloat16"] = {n: p.grad.full_tensor() for n, p in net.named_parameters()}

    try:
        fastgen.linear_generalized_jsd_loss(h, w[: -(-VOCABULARY // 2)], h, net["head"].weight)
        results["refused"] = "no"
    except ValueError as error:
        results["refused"] = str(error)
    torch.save(results, f"{out}/{rank}.pt")


def test_fsdp2_with_tied_layers_accumulation_and_mixed_precision(tmp_path):
    spawn(run_policies, str(tmp_path))
    ranks = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    tensors, tokens = data()
    tied, plain = Tied(), model()
    tied_step(tied, tensors, tokens, 1.0)
    step(plain, jsd, tensors, tokens)
    for results in ranks:
        for name, net, tolerance in (("tied", tied, 1e-5), ("accumulated", plain, 1e-5), ("bfloat16", plain, 2e-2)):
            for key, parameter in net.named_parameters():
                torch.testing.assert_close(
                    results[name][key],
                    parameter.grad,
                    rtol=tolerance,
                    atol=tolerance * float(parameter.grad.abs().max()),
                    msg=lambda m, n=name, k=key: f"{n}, {k}: {m}",
                )
        assert "student_weight has 6 rows, as a rank's shard of 11" in results["refused"]
