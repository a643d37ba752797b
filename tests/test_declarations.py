"""What follows from an operator's declaration: schema, launcher, sharding rule, and that options cost no memory."""

import importlib
import inspect
import subprocess
import sys
from typing import Annotated, Literal, NamedTuple

import pytest
import torch
from torch import Tensor

from fastgen.core import dispatch
from fastgen.core import operator as declarations
from fastgen.core.operator import Gradient, Loss, PerRow, Reduction, Role, Stream, Whole, operators

needs_native = pytest.mark.skipif(
    dispatch.missing("elbo_error", "native", "cpu") is not None, reason="needs the kernels"
)


@pytest.mark.parametrize("name", operators)
def test_triton_launchers_take_the_declared_arguments(name):
    pytest.importorskip("triton")
    op = operators[name]
    launcher = getattr(importlib.import_module(f"fastgen.triton_kernels.{op.family}"), name)
    parameters = inspect.signature(launcher).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        assert list(parameters) == list(op.arguments)


@pytest.mark.parametrize("name", operators)
def test_no_word_travels_as_a_string(name):
    """torch's stable ABI leaks each string that an operator is called with."""
    schema = operators[name].native._schema
    assert not any(str(argument.type) in ("str", "Optional[str]") for argument in schema.arguments)


def test_a_tensor_without_a_role_is_refused():
    def lost(pred: Tensor) -> PerRow: ...

    with pytest.raises(TypeError, match="argument pred of an operator needs a role"):
        declarations.operator(lost)


def test_a_call_needs_every_argument_by_name():
    with pytest.raises(TypeError, match="elbo_error takes pred, target"):
        operators["elbo_error"]("native", pred=torch.ones(2, 3), target=torch.ones(2, 3))


def test_words_become_numbers_in_the_order_of_the_declaration():
    op = operators["elbo_error"]
    assert dict(op.order)["loss"] == {"l2": 0, "l1": 1, "huber": 2}
    assert op.bind(*[None] * 3, 2, True)["loss"] == "huber"


class _Outputs(NamedTuple):
    loss: Loss
    stats: Annotated[Tensor, Role.STACKED_GROUP, 3]
    grad: Gradient


def test_shapes_follow_from_roles():
    def declared(
        x: Stream,
        weight: PerRow | None,
        count: Whole,
        kind: Literal["a", "b"],
        group_rows: int,
        reduction: Reduction,
        with_grad: bool,
    ) -> _Outputs: ...

    declared.__module__ = "fastgen._declared"
    op = declarations.operator(declared)
    try:
        x, count = torch.empty(6, 4, dtype=torch.bfloat16, device="meta"), torch.empty((), device="meta")
        shapes = [tuple(t.shape) for t in op.native(x, None, count, 0, 2, 2, True)]
        assert shapes == [(3,), (3, 3), (6, 4)]
        shapes = [tuple(t.shape) for t in op.native(x, None, count, 1, 2, 0, False)]
        assert shapes == [(), (3, 3), (0,)]
    finally:
        del operators["declared"]


LEAK = """
import resource, torch, fastgen
p, y = torch.ones(2, 3), torch.zeros(2, 3)
x = torch.zeros(2, 3, requires_grad=True)
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
def calls(n):
    for _ in range(n):
        fastgen.elbo_error(p, y, loss="huber")
        fastgen.sds_loss(p, y, p, reduction="sum_per_batch")
calls(5_000)
before = rss()
calls(50_000)
print((rss() - before) / 100_000)
"""


@needs_native
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_stays_flat_over_100_000_calls():
    run = subprocess.run([sys.executable, "-c", LEAK], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 4  # bytes a call; a string took 35 to 220
