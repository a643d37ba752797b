"""Joint energy models: a classifier's logits as an energy, its loss, its Langevin sampler and replay buffer."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
import torch
from torch import Tensor

from ..core import autograd, checks, dispatch, distributed
from ..sampling import langevin_step
from ..sequence import operators
from . import reference

__all__ = ["ReplayBuffer", "classifier_guidance", "joint_energy_loss", "langevin_sample"]

Classifier = Callable[[Tensor], Tensor]


class _JointEnergyLoss:
    """One sweep over each row of logits gives both of its terms: the label's log-probability and the log-sum-exp."""

    tensors = ("real", "labels", "fake", "stats_real", "stats_fake", "labelled", "count")
    options = ("weight",)

    def forward(
        self, backend: str, keep: bool, needed: tuple[bool, ...], arguments: dict[str, Any]
    ) -> autograd.Forward:
        real, labels, fake = arguments["real"], arguments["labels"], arguments["fake"]
        labelled = labels != arguments["ignore_index"]
        # -1 for any label outside: one that the sweep ignores would go without its row's log-sum-exp.
        inside = (labels >= 0) & (labels < real.shape[1])
        tokens = torch.where(labelled, torch.where(inside, labels, -1), 0)
        sweep = operators.token_logprob.operator
        options: dict[str, Any] = {"temperature": 1.0, "ignore_index": operators.IGNORE_INDEX}
        logprob, stats_real = sweep(backend, logits=real, tokens=tokens, **options)
        _, stats_fake = sweep(backend, logits=fake, tokens=labels.new_zeros(fake.shape[0]), **options)
        lse_real, lse_fake = (peak + total.log() for peak, total in (stats_real, stats_fake))
        count = labelled.sum().clamp(min=1)
        gap = lse_fake.sum() / max(fake.shape[0], 1) - lse_real.sum() / max(real.shape[0], 1)
        loss = arguments["weight"] * gap - torch.where(labelled, logprob, 0).sum() / count
        made = {"stats_real": stats_real, "stats_fake": stats_fake, "labelled": labelled, "count": count}
        return autograd.Forward((loss, -lse_real, -lse_fake), arguments | made, (None, None))

    def backward(
        self, backend: str, needed: tuple[bool, ...], saved: Mapping[str, Any], grad: Tensor
    ) -> autograd.Gradients:
        real, fake = saved["real"], saved["fake"]
        of_label = torch.where(saved["labelled"], grad / saved["count"], 0).unsqueeze(1)
        of_energy = grad * saved["weight"]
        probability = _softmax(real, saved["stats_real"])
        grad_real = probability * (of_label - of_energy / max(real.shape[0], 1))
        grad_real -= _onehot(real, saved["labels"]) * of_label
        return grad_real, _softmax(fake, saved["stats_fake"]) * (of_energy / max(fake.shape[0], 1))


_joint_energy = _JointEnergyLoss()


def _softmax(logits: Tensor, stats: Tensor) -> Tensor:
    peak, total = stats.unsqueeze(-1)
    return (logits.to(peak.dtype) - peak).exp_() / total


def _onehot(logits: Tensor, labels: Tensor) -> Tensor:
    return labels.unsqueeze(1) == torch.arange(logits.shape[1], device=labels.device)


@overload
def joint_energy_loss(
    logits_real: Tensor,
    labels: Tensor,
    logits_fake: Tensor,
    *,
    energy_weight: float = ...,
    ignore_index: int = ...,
    return_energies: Literal[False] = ...,
) -> Tensor: ...
@overload
def joint_energy_loss(
    logits_real: Tensor,
    labels: Tensor,
    logits_fake: Tensor,
    *,
    energy_weight: float = ...,
    ignore_index: int = ...,
    return_energies: Literal[True],
) -> tuple[Tensor, Tensor, Tensor]: ...
@overload
def joint_energy_loss(
    logits_real: Tensor,
    labels: Tensor,
    logits_fake: Tensor,
    *,
    energy_weight: float = ...,
    ignore_index: int = ...,
    return_energies: bool,
) -> Tensor | tuple[Tensor, Tensor, Tensor]: ...
def joint_energy_loss(
    logits_real: Tensor,
    labels: Tensor,
    logits_fake: Tensor,
    *,
    energy_weight: float = 1.0,
    ignore_index: int = operators.IGNORE_INDEX,
    return_energies: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """JEM (arXiv 1912.03263): trains a classifier f as p(y|x), and by the same logits as an energy model p(x).

    .. math:: L = mean CE(f(x^+), y) - w (mean LSE f(x^+) - mean LSE f(x^-))

    since ``p(x, y) ∝ exp f(x)[y]`` makes ``E(x) = -LSE f(x) = -logsumexp f(x)`` the energy of x. The x⁺ are data, the
    x⁻ samples of the model (:func:`langevin_sample`, :class:`ReplayBuffer`). One sweep over the logits gives both
    terms.

    Args:
        logits_real: f(x⁺) [B, C] in float32, bfloat16, float16 or float64. Gradients flow to it and to `logits_fake`.
            With C = 1 f is minus the energy of an ordinary energy model.
        labels: int64 [B]; `ignore_index` marks images without a label, which count for the energy alone.
        logits_fake: f(x⁻) [N, C]; N may differ from B.
        energy_weight: w ≥ 0; 1 in the paper, where the loss is the likelihood of p(x, y).
        ignore_index: see `labels`.
        return_energies: also return E(x⁺) [B] and E(x⁻) [N], detached. Watch their difference: training can diverge,
            and shows it there first.

    Returns:
        A scalar, float32 (float64 if an input is), or ``(loss, energy_real, energy_fake)``. The cross-entropy is the
        mean over images with a label; a mean over none is 0. A label that is neither in [0, C) nor `ignore_index`
        makes the loss NaN. Once differentiable.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> real, fake = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> fastgen.joint_energy_loss(real, torch.tensor([0]), fake)  # ln 2 - 2
        tensor(-1.3069)
    """
    checks.streams(logits_real=logits_real)
    checks.streams(logits_fake=logits_fake)
    for name, logits in (("logits_real", logits_real), ("logits_fake", logits_fake)):
        if logits.dim() != 2 or logits.shape[1] != logits_real.shape[-1]:
            raise ValueError(f"{name} must have shape [B, C], with C alike in both; got {list(logits.shape)}")
    if logits_fake.device != logits_real.device:
        raise ValueError(f"logits_fake is on {logits_fake.device}, but logits_real is on {logits_real.device}")
    checks.row_indices("labels", labels, logits_real)
    energy_weight = checks.number("energy_weight", energy_weight, low=0)
    ignore_index = checks.integer("ignore_index", ignore_index)
    backend = dispatch.backend_for("token_logprob", logits_real.device.type)
    if backend == "reference":
        return reference.joint_energy_loss(
            logits_real,
            labels,
            logits_fake,
            energy_weight=energy_weight,
            ignore_index=ignore_index,
            return_energies=return_energies,
        )
    arguments: dict[str, Any] = {"real": logits_real, "labels": labels, "fake": logits_fake}
    arguments |= {"weight": energy_weight, "ignore_index": ignore_index}
    results = autograd.apply(_joint_energy, backend, False, (logits_real, logits_fake), arguments)
    return results if return_energies else results[0]


def classifier_guidance(
    classifier: Classifier,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    score: Tensor | None = None,
) -> Tensor:
    """The guided score ``∇ log p(x) + γ ∇ log p(y|x)``, with p(y|x) by a classifier (arXiv 2105.05233).

    Without `score`, p(x) is the classifier's own, ``∇ log p(x) = ∇ logsumexp f(x)`` of a joint energy model (arXiv
    1912.03263), and one backward pass through f gives the sum; γ = 1 is then the score of p(x|y).

    Args:
        classifier: f, from x to logits [B, C].
        x: [B, …], any floating dtype. To guide a diffusion model at x_t, pass x_t and a classifier of noisy images.
        labels: y, int64 [B], each in [0, C), or the row becomes NaN; None for ``∇ log p(x)`` alone.
        guidance_scale: γ.
        score: ``∇ log p(x)`` of another model, like `x`. For a noise prediction ε that is ``-ε / sigma_t``, and the
            guided prediction ``-sigma_t`` times the result.

    Returns:
        Like `x`, without a graph. The classifier's parameters get no gradients.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> energy = lambda x: -0.5 * x.square().sum(1, keepdim=True)  # one class: the standard normal's
        >>> fastgen.classifier_guidance(energy, torch.tensor([[1.0, -2.0]]))
        tensor([[-1.,  2.]])
    """
    checks.streams(x=x, **({} if score is None else {"score": score}))
    guidance_scale = checks.number("guidance_scale", guidance_scale)
    if labels is None and score is not None:
        raise ValueError("labels must be given with score: there is nothing to guide to")
    checks.function("classifier", classifier)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = (x.clone() if x.is_inference() else x).detach().requires_grad_()
        logits = classifier(leaf)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != x.shape[0]:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"classifier must return logits [{x.shape[0]}, C], got {got}")
    probability = logits.detach().softmax(1, dtype=torch.promote_types(logits.dtype, torch.float32))
    # What the logits get: the gradient of logsumexp is the softmax, that of log p(y|x) onehot - softmax.
    slope = probability * float(score is None)
    if labels is not None:
        checks.row_indices("labels", labels, logits)
        onehot = _onehot(logits, labels).to(probability.dtype)
        inside = (labels >= 0) & (labels < logits.shape[1])
        slope = slope + guidance_scale * (torch.where(inside[:, None], onehot, torch.nan) - probability)
    if not logits.requires_grad:
        raise ValueError("classifier must return logits that depend on x: are they detached, or made under no_grad?")
    (grad,) = torch.autograd.grad(logits, leaf, slope.to(logits.dtype), materialize_grads=True)
    return grad if score is None else (score.to(torch.promote_types(score.dtype, torch.float32)) + grad).to(x.dtype)


def langevin_sample(
    classifier: Classifier,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    guidance_scale: float = 1.0,
    steps: int = 20,
    step_size: float = 1.0,
    noise_scale: float = 0.01,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Samples a joint energy model by stochastic-gradient Langevin dynamics: SGLD.

    .. math:: x ← x + step · (∇ log p(x) + γ ∇ log p(y|x)) + noise · ε

    by :func:`classifier_guidance` and :func:`fastgen.langevin_step`, with JEM's settings (arXiv 1912.03263) as
    defaults: a step far longer and a noise far smaller than those that sample p, ``step = noise² / 2``.

    Args:
        classifier: f, from x to logits [B, C]; in eval mode, if it has such layers.
        x: where the chains start, [B, …]: from :meth:`ReplayBuffer.sample`, say.
        labels, guidance_scale: of :func:`classifier_guidance`; without labels it samples p(x).
        steps: how many.
        step_size, noise_scale: see the formula.
        generator: of the noise; torch's own if None, of which ranks that were seeded alike draw the same noise. For
            samples of its own, each rank passes the `generator` of a :class:`ReplayBuffer` with a `group`, or one that
            it has seeded by its rank.

    Returns:
        The chains' ends, like `x`, without a graph; not clamped. No host sync.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> energy = lambda x: -0.5 * x.square().sum(1, keepdim=True)
        >>> fastgen.langevin_sample(energy, torch.ones(1, 2), step_size=0.5, noise_scale=0.0, steps=2)
        tensor([[0.2500, 0.2500]])
    """
    steps = checks.positive_int("steps", steps)
    x = x.detach() if isinstance(x, Tensor) else x
    for _ in range(steps):
        score = classifier_guidance(classifier, x, labels, guidance_scale=guidance_scale)
        x = langevin_step(x, score, step_size, noise_scale, generator=generator)
    return x


class ReplayBuffer:
    """Ends of earlier Langevin chains, where new ones start: persistent chains, of which some begin afresh.

    It lives on one device, draws from its own `generator` there, and never synchronises with the host. Each rank has a
    buffer of its own, with chains of its own. ``ReplayBuffer(…, group=group)``, and its `generator` for
    :func:`langevin_sample`, make ranks that are all called with one seed draw differently.

    Args:
        capacity: how many samples; JEM (arXiv 1912.03263) keeps 10 000. That is this rank's share, if there are ranks.
        shape: a sample's.
        reinit_rate: the probability that a chain starts from fresh noise instead; JEM's 5 %.
        low, high: fresh noise is uniform between them, and so is all that the buffer holds at first.
        seed: of the generator; with a `group`, together with the rank, where rank 0 draws what one process would.
            Without a group, ranks with one seed draw the same.
        dtype, device: of the samples.
        group: a ``torch.distributed`` process group, for the rank's place in it; nothing is exchanged.

    Attributes:
        samples: [capacity, …].
        generator: of all draws.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> net = torch.nn.Linear(4, 10)
        >>> buffer = fastgen.ReplayBuffer(100, (4,))
        >>> start, index = buffer.sample(8)
        >>> fakes = fastgen.langevin_sample(net, start)
        >>> buffer.update(index, fakes)
        >>> logits = net(torch.randn(8, 4)), torch.arange(8), net(fakes)
        >>> fastgen.joint_energy_loss(*logits).backward()
    """

    def __init__(
        self,
        capacity: int,
        shape: Sequence[int],
        *,
        reinit_rate: float = 0.05,
        low: float = -1.0,
        high: float = 1.0,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        group: Any = None,
    ) -> None:
        self._rank, self._ranks = distributed.place_in(group)
        capacity = checks.positive_int("capacity", capacity)
        self.low, self.high = checks.number("low", low), checks.number("high", high)
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {low} and {high}")
        self.reinit_rate = checks.share("reinit_rate", reinit_rate)
        if dtype not in checks.FLOATING:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        seed = checks.integer("seed", seed, high=checks.LAST_SEED)
        if not isinstance(shape, (tuple, list)):
            raise TypeError(f"shape must be a tuple of ints, one sample's, got {shape!r}")
        sizes = [checks.integer(f"shape[{i}]", size, low=0) for i, size in enumerate(shape)]
        self.samples = torch.empty((capacity, *sizes), dtype=dtype, device=device)
        seed = seed if self._rank == 0 else _seed_of(seed % 2**64, self._rank)
        self.generator = torch.Generator(self.samples.device).manual_seed(seed)
        self.samples.uniform_(self.low, self.high, generator=self.generator)

    def __len__(self) -> int:
        return self.samples.shape[0]

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        """Starts of `n` chains [n, …], and their places in the buffer, int64 [n], no two alike."""
        n = checks.positive_int("n", n)
        if n > len(self):
            raise ValueError(f"n must be at most the capacity, {len(self)}; got {n}")
        device = self.samples.device
        index = torch.randperm(len(self), generator=self.generator, device=device)[:n]
        start = self.samples[index]
        fresh = torch.empty_like(start).uniform_(self.low, self.high, generator=self.generator)
        afresh = torch.rand(n, generator=self.generator, device=device, dtype=torch.float32) < self.reinit_rate
        return torch.where(afresh.view(-1, *[1] * (start.dim() - 1)), fresh, start), index

    def update(self, index: Tensor, samples: Tensor) -> None:
        """Puts the chains' ends back to their places."""
        checks.tensor("samples", samples)
        index = checks.integers("index", index)
        if index.dim() != 1 or samples.shape != (len(index), *self.samples.shape[1:]):
            raise ValueError(
                f"samples must have shape {[*index.shape, *self.samples.shape[1:]]}, got {list(samples.shape)}"
            )
        self.samples[index] = samples.detach().to(self.samples.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """The samples and the generator's state; of several ranks, also which one's it is."""
        state = {"samples": self.samples.clone(), "generator": self.generator.get_state()}
        return state if self._ranks == 1 else state | {"rank": torch.tensor((self._rank, self._ranks))}

    def load_state_dict(self, state: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]]) -> None:
        """Takes the state of a buffer of the same capacity and shape; draws then go on as that one's would.

        With a `group` it must be the state of this rank, of as many: with another's, both would draw the same. A list
        holds the states of all ranks, in order. If they were not as many as now, rank r of R takes every R-th of all
        their samples from the r-th on, as many as it has room for, and leaves the rest of its own; its generator gets a
        seed that depends on the states of theirs and on the rank.

        The generator's state fits the type of device that it came from alone. Where an error is raised, the buffer is
        what it was.
        """
        if isinstance(state, (list, tuple)):
            if len(state) != self._ranks:
                return self._share(state)
            state = state[self._rank]
        state = _checked_state("state", state)
        samples, generator = state["samples"], state["generator"]
        if samples.shape != self.samples.shape:
            raise ValueError(f"state's samples have shape {list(samples.shape)}, not {list(self.samples.shape)}")
        rank, ranks = state["rank"].tolist() if "rank" in state else (0, 1)
        if (rank, ranks) != (self._rank, self._ranks):
            raise ValueError(
                f"state is that of rank {rank} of {ranks}, but this is rank {self._rank} of {self._ranks}: load the"
                " rank's own, or the list of all ranks' states"
            )
        try:
            self.generator.set_state(generator.cpu())  # before the samples: it is this that can fail
        except (RuntimeError, TypeError) as error:
            device = self.samples.device.type
            raise ValueError(f"state['generator'] is no state of a generator on {device}: {error}") from error
        self.samples.copy_(samples)

    def _share(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes this rank's part of what other ranks' buffers held."""
        if not states:
            raise ValueError("state must be one state or those of all ranks, got none")
        for i, state in enumerate(states):
            shape = list(_checked_state(f"state[{i}]", state)["samples"].shape)
            if shape[1:] != list(self.samples.shape[1:]):
                raise ValueError(f"state[{i}]'s samples have shape {shape}, not of {list(self.samples.shape[1:])} each")
        samples = torch.cat([state["samples"].to(self.samples) for state in states])[self._rank :: self._ranks]
        drawn = b"".join(state["generator"].cpu().numpy().tobytes() for state in states)
        self.generator.manual_seed(_seed_of(zlib.crc32(drawn), self._rank))
        samples = samples[: len(self)]
        self.samples[: len(samples)] = samples


def _checked_state(name: str, state: object) -> Mapping[str, Tensor]:
    if not isinstance(state, Mapping):
        raise TypeError(f"{name} must be what state_dict() returned, got {type(state).__name__}")
    if set(state) - {"rank"} != {"samples", "generator"}:
        raise ValueError(f"{name} must have the keys 'samples' and 'generator', got {sorted(state)}")
    checks.floating(f"{name}['samples']", state["samples"])
    checks.tensor(f"{name}['generator']", state["generator"])
    return state


def _seed_of(*numbers: int) -> int:
    """A seed for each tuple of numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
