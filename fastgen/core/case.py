"""What a case is: a named call of a public function, and the tensors it takes, each with a role.

A role makes its tensor for streams of any shape, dtypes and layout on any device. So one case serves a comparison with
float64 at an awkward shape, a compilation on the meta device and a benchmark alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]
Role = Callable[["Draw"], Tensor]


class Draw:
    """Where and how the tensors of one call are made: `dtypes` are those of its streams, in turn."""

    def __init__(
        self, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: str, layout: Layout | None, seed: int
    ) -> None:
        self.shape, self.rows, self.device, self.layout = tuple(shape), shape[0], device, layout
        self.wide = torch.float64 if torch.float64 in dtypes else torch.float32
        self.dtypes = tuple(dtypes)
        self.first: Tensor | None = None
        self._next = itertools.cycle(dtypes)
        self._generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device)

    def placed(self, stream: Tensor) -> Tensor:
        """In the next of the streams' dtypes, and in their layout."""
        stream = stream.to(next(self._next))
        return stream if self.layout is None else self.layout(stream)


def stream(draw: Draw) -> Tensor:
    """A row of the batch each."""
    t = draw.normal(*draw.shape)
    draw.first = t if draw.first is None else draw.first
    return draw.placed(t)


def near(draw: Draw) -> Tensor:
    """A stream close to the first one, as a reference model is to the model that started from it."""
    return stream(draw) if draw.first is None else draw.placed(draw.first + 0.1 * draw.normal(*draw.shape))


def per_row(draw: Draw) -> Tensor:
    return torch.linspace(0.3, 1.2, draw.rows, device=draw.device, dtype=draw.wide)


def falling(draw: Draw) -> Tensor:
    """Another number for each row."""
    return torch.linspace(0.9, 0.2, draw.rows, device=draw.device, dtype=draw.wide)


def for_all(draw: Draw) -> Tensor:
    """One number for all rows."""
    return (draw.normal(1).abs() + 0.3).to(draw.wide)


def flags(draw: Draw) -> Tensor:
    return torch.arange(draw.rows, device=draw.device) % 3 != 1


def flags_of_pairs(draw: Draw) -> Tensor:
    """One for two rows."""
    return torch.arange(draw.rows // 2, device=draw.device) % 3 != 1


def mask(draw: Draw) -> Tensor:
    """Of the streams' shape, and laid out like them."""
    selected = draw.normal(*draw.shape) > -0.5
    return selected if draw.layout is None else draw.layout(selected)


def weights(draw: Draw) -> Tensor:
    """A positive weight for each element."""
    return draw.placed(draw.normal(*draw.shape).abs() + 0.1)


@dataclass(frozen=True)
class Case:
    """A call of the public function that `name` starts with; after a "-" it says which of several.

    Called with a module (``fastgen`` or ``fastgen.reference``) and with tensors by the names of `roles`, it returns
    one tensor. Gradients flow to the inputs in `differentiable`, and to no other.
    """

    name: str
    roles: Mapping[str, Role]
    differentiable: tuple[str, ...]
    run: Callable[..., Tensor] | None = None  # where a call is more than the function, its tensors and `options`
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def function(self) -> str:
        return self.name.partition("-")[0]

    def __call__(self, module: ModuleType, **tensors: Tensor) -> Tensor:
        if self.run is not None:
            return self.run(module, **tensors, **self.options)
        return getattr(module, self.function)(**tensors, **self.options)

    def inputs(
        self,
        shape: Sequence[int],
        *dtypes: torch.dtype,
        device: str = "cpu",
        layout: Layout | None = None,
        seed: int = 0,
    ) -> dict[str, Tensor]:
        """The tensors by name, for streams of this shape; of several `dtypes`, each stream takes the next in turn."""
        draw = Draw(shape, dtypes or (torch.float32,), device, layout, seed)
        return {name: role(draw) for name, role in self.roles.items()}

    def leaves(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`tensors`, of which those that get a gradient require one."""
        return {n: t.detach().requires_grad_() if n in self.differentiable else t for n, t in tensors.items()}


def case(
    name: str,
    roles: Mapping[str, Role],
    differentiable: str = "",
    run: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Case:
    """`differentiable`: names, separated by blanks."""
    return Case(name, roles, tuple(differentiable.split()), run, options)
