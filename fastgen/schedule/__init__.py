"""Noise schedules, the forward process ``x_t = alpha_t x0 + sigma_t noise``, and conversions between predictions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core import checks, dispatch
from ..core.autograd import apart, needs_grad
from ..core.operator import Output, PerRow, Stream, operator
from ..triton_kernels.layout import new_output
from . import reference

__all__ = ["NoiseSchedule", "add_noise", "diffuse_pair", "prediction_to_x0"]

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "flow_prediction")


@operator
def row_combination(x: Stream, a: PerRow, y: Stream | None, b: PerRow | None) -> Output:
    """``a_i x (+ b_i y)``"""
    inputs = (x,) if y is None else (x, y)
    dtype = x.dtype if y is None else torch.promote_types(x.dtype, y.dtype)
    return new_output(*inputs, dtype=dtype)


class _RowCombination(torch.autograd.Function):
    """``a_i x (+ b_i y)``: linear, so its backward is itself, and differentiable again."""

    @staticmethod
    def forward(ctx: Any, backend: str, x: Tensor, a: Tensor, y: Tensor | None, b: Tensor | None) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(a, b)
        return row_combination(backend, x=x, a=a, y=y, b=b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        needs_x, needs_y = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        grad_x = _RowCombination.apply(ctx.backend, grad, a, None, None) if needs_x else None
        grad_y = _RowCombination.apply(ctx.backend, grad, b, None, None) if needs_y else None
        return None, grad_x, None, grad_y, None


def _combine(x: Tensor, a: Tensor, y: Tensor, b: Tensor, backend: str) -> Tensor:
    if needs_grad(x, y):
        return _RowCombination.apply(backend, *apart(x, a, y, b))
    return row_combination(backend, x=x, a=a, y=y, b=b)


def add_noise(x0: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """The forward process (arXiv 2006.11239), fused and differentiable: ``x_t = alpha_t x0 + sigma_t noise``.

    Args:
        x0: images [B, …], any floating dtype.
        noise: like `x0` (dtypes may differ; an expanded tensor is read in place).
        alpha_t, sigma_t: the coefficients, float32 or float64 [B]. For DDPM ``alpha_t = sqrt(alphas_cumprod[t])``.

    Returns:
        x_t [B, …] in the promoted dtype of `x0` and `noise`; computed in float32 (float64 for float64 images).
        Gradients flow to `x0` (``alpha_t grad``) and `noise` (``sigma_t grad``), any number of times; none to the
        coefficients.

    Raises:
        TypeError, ValueError: naming the argument whose dtype, shape or device does not fit.

    Example::

        >>> import torch, fastgen
        >>> x0, noise = torch.ones(2, 3), torch.zeros(2, 3)
        >>> fastgen.add_noise(x0, noise, torch.tensor([1.0, 0.5]), torch.tensor([0.0, 1.0]))
        tensor([[1.0000, 1.0000, 1.0000],
                [0.5000, 0.5000, 0.5000]])
    """
    checks.streams(x0=x0, noise=noise)
    for name, value in (("alpha_t", alpha_t), ("sigma_t", sigma_t)):
        checks.tensor(name, value)
        checks.per_row(name, value, x0)
    backend = dispatch.backend_for("row_combination", x0.device.type)
    if backend == "reference":
        return reference.add_noise(x0, noise, alpha_t, sigma_t)
    return _combine(x0, alpha_t, noise, sigma_t, backend)


def prediction_to_x0(
    pred: Tensor, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, prediction_type: str = "epsilon"
) -> Tensor:
    """The x0 that a network's output implies, fused and differentiable.

    With ``x_t = alpha_t x0 + sigma_t noise`` and diffusers' names::

        "epsilon"          (x_t - sigma_t pred) / alpha_t
        "sample"           pred
        "v_prediction"     (alpha_t x_t - sigma_t pred) / (alpha_t² + sigma_t²)      arXiv 2202.00512
        "flow_prediction"  (x_t - sigma_t pred) / (alpha_t + sigma_t)                arXiv 2209.03003

    A flow prediction means ``noise - x0``, time 1 being noise; on a flow's schedule, where alpha_t + sigma_t is 1, that
    is ``x_t - sigma_t pred``.

    Args:
        pred, x_t: [B, …], any floating dtypes.
        alpha_t, sigma_t: float32 or float64 [B].
        prediction_type: one of the four.

    Returns:
        x0 [B, …] in the promoted dtype of `pred` and `x_t`, computed in float32: at Stable Diffusion's t = 980
        ``sigma_t / alpha_t`` is 13, which would amplify the rounding errors of half precision.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> one = torch.ones(1)
        >>> fastgen.prediction_to_x0(torch.tensor([[0.5]]), torch.tensor([[2.0]]), one, one, "epsilon")
        tensor([[1.5000]])
    """
    checks.streams(pred=pred, x_t=x_t)
    checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
    for name, value in (("alpha_t", alpha_t), ("sigma_t", sigma_t)):
        checks.tensor(name, value)
        checks.per_row(name, value, x_t)
    backend = dispatch.backend_for("row_combination", pred.device.type)
    if backend == "reference" or prediction_type == "sample":
        return reference.prediction_to_x0(pred, x_t, alpha_t, sigma_t, prediction_type)
    if prediction_type == "epsilon":
        a, b = 1 / alpha_t, -sigma_t / alpha_t
    elif prediction_type == "v_prediction":
        norm = alpha_t.square() + sigma_t.square()
        a, b = alpha_t / norm, -sigma_t / norm
    else:
        total = alpha_t + sigma_t
        a, b = 1 / total, -sigma_t / total
    return _combine(x_t, a, pred, b, backend)


def prediction_target(x0: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor, prediction_type: str) -> Tensor:
    """What a network of this prediction type is trained to return; of half-precision images not rounded again."""
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x0
    noise = reference.widened(noise)
    if prediction_type == "v_prediction":
        return add_noise(noise, x0, alpha_t, -sigma_t)
    return add_noise(noise, x0, torch.ones_like(alpha_t), -torch.ones_like(sigma_t))


def diffuse_pair(
    schedule: NoiseSchedule,
    x0: Tensor,
    t: Tensor,
    *,
    s: Tensor | None = None,
    noise: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Two successive states of one forward path, as a Denoising Diffusion GAN's discriminator sees them
    (arXiv 2112.07804): x_s from x0, then x_t from x_s with a second noise; two fused passes.

    .. math:: x_s = \\sqrt{ᾱ_s} x_0 + \\sqrt{1 - ᾱ_s} ε, \\quad x_t = \\sqrt{ᾱ_t/ᾱ_s} x_s + \\sqrt{1 - ᾱ_t/ᾱ_s} ε'

    Each alone is distributed as :func:`add_noise` gives it. With one noise for both, x_s would be determined by x_t and
    x0, instead of distributed around them as :func:`posterior_sample` draws it.

    Args:
        schedule: a discrete one, such as :meth:`NoiseSchedule.ddgan`.
        x0: images [B, …], any floating dtype.
        t: integers [B], the noisier state.
        s: integers [B], ``-1 <= s < t``, -1 being clean data; t - 1 if None.
        noise: (ε, ε'), each like `x0`; drawn if None.
        generator: for that.

    Returns:
        (x_s, x_t), like `x0`, computed in float32 (float64 for float64 images). Gradients flow to `x0` and `noise`.

    Raises:
        TypeError, ValueError: naming the argument that does not fit. The values in `t` and `s` are not looked at.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.ddgan(4)
        >>> t = torch.randint(1, 5, (8,))
        >>> x_s, x_t = fastgen.diffuse_pair(schedule, torch.zeros(8, 1, 4, 4), t)
        >>> x_s.shape == x_t.shape == (8, 1, 4, 4)
        True
    """
    checks.streams(x0=x0)
    check_schedule(schedule)
    if noise is not None and (not isinstance(noise, (tuple, list)) or len(noise) != 2):
        raise TypeError("noise must be a pair of tensors, the first step's and the second's")
    if schedule.num_timesteps is None:
        raise ValueError(f"schedule must be discrete, such as NoiseSchedule.ddgan(4); got the kind {schedule.kind!r}")
    t = checks.indices("t", t, x0)
    s = t - 1 if s is None else checks.indices("s", s, x0)
    first, second = reference.noise_pair(x0, generator) if noise is None else noise
    bar_s, bar_t = schedule._alphas_cumprod_at(s), schedule._alphas_cumprod_at(t)
    x_s = add_noise(x0, first, bar_s.sqrt(), (1 - bar_s).sqrt())
    return x_s, add_noise(x_s, second, (bar_t / bar_s).sqrt(), ((bar_s - bar_t) / bar_s).sqrt())


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """``alpha_t`` and ``sigma_t`` of a forward process, and how its times are drawn.

    Made by one of the constructors:

    ========================== ============================== ===========================================
    constructor                time t                         alpha_t, sigma_t
    ========================== ============================== ===========================================
    ``linear``, ``cosine``     int64 in [0, num_timesteps)    sqrt(ᾱ[t]), sqrt(1 - ᾱ[t])
    ``from_alphas_cumprod``    (diffusers' numbering)
    ``ddgan``                  int64 in [0, steps]
    ``vp``                     (0, 1]                         exp(-½∫β), sqrt(1 - alpha_t²)
    ``edm``                    the noise level itself         1, t
    ``flow``                   [0, 1], 1 is noise             1 - t, t
    ========================== ============================== ===========================================

    Coefficients are computed in float64 and returned in float32 (float64 where t is float64), as [B] vectors on t's
    device: ᾱ tables in half precision are a known source of wrong results.

    Example::

        >>> import torch, fastgen
        >>> schedule = fastgen.NoiseSchedule.linear(1000)
        >>> t = schedule.sample_t(4, generator=torch.Generator().manual_seed(0))
        >>> t.shape, schedule.alpha_t(t).dtype
        (torch.Size([4]), torch.float32)
        >>> x_t = schedule.add_noise(torch.zeros(4, 3, 8, 8), torch.randn(4, 3, 8, 8), t)
    """

    kind: str
    sigma_data: float = 0.5
    log_mean: float = -1.2
    log_std: float = 1.2
    beta_min: float = 0.1
    beta_max: float = 20.0
    shift: float = 1.0
    logit_std: float = 0.0
    alphas_cumprod: Tensor | None = None

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> NoiseSchedule:
        """A discrete schedule from its ᾱ [num_timesteps], such as ``scheduler.alphas_cumprod`` of diffusers.

        Raises:
            TypeError: for half precision, which rounds ᾱ near 1 to 1.
            ValueError: unless ᾱ is one-dimensional with values in (0, 1] that do not increase.
        """
        checks.tensor("alphas_cumprod", alphas_cumprod)
        if alphas_cumprod.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"alphas_cumprod must be float32 or float64, got {alphas_cumprod.dtype}")
        table = alphas_cumprod.detach().double().cpu()
        if table.dim() != 1 or len(table) == 0:
            raise ValueError(f"alphas_cumprod must have shape [num_timesteps], got {list(table.shape)}")
        if not (bool((table > 0).all()) and bool((table <= 1).all()) and bool((table.diff() <= 0).all())):
            raise ValueError("alphas_cumprod must lie in (0, 1] and not increase")
        return cls("discrete", alphas_cumprod=table)

    @classmethod
    def linear(
        cls, num_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02, *, scaled: bool = False
    ) -> NoiseSchedule:
        """DDPM's schedule: β from `beta_start` to `beta_end`; linear in sqrt(β) if `scaled` (Stable Diffusion)."""
        num_timesteps = checks.positive_int("num_timesteps", num_timesteps)
        low = checks.number("beta_start", beta_start, low=0, open_low=True)
        high = checks.number("beta_end", beta_end, low=0, open_low=True)
        if max(low, high) >= 1:
            raise ValueError(f"beta_start and beta_end must be below 1, got {beta_start} and {beta_end}")
        power = 2 if scaled else 1
        beta = torch.linspace(low ** (1 / power), high ** (1 / power), num_timesteps, dtype=torch.float64) ** power
        return cls.from_alphas_cumprod(torch.cumprod(1 - beta, 0))

    @classmethod
    def cosine(cls, num_timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
        """Improved DDPM's schedule (arXiv 2102.09672): ᾱ ∝ cos²(π/2 (t/N + s)/(1 + s)), each β at most `max_beta`."""
        num_timesteps = checks.positive_int("num_timesteps", num_timesteps)
        s = checks.number("s", s, low=0)
        t = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
        max_beta = checks.number("max_beta", max_beta, low=0, open_low=True)
        if max_beta >= 1:
            raise ValueError(f"max_beta must be below 1, got {max_beta}")
        beta = (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta)
        return cls.from_alphas_cumprod(torch.cumprod(1 - beta, 0))

    @classmethod
    def ddgan(cls, steps: int = 4, beta_min: float = 0.1, beta_max: float = 20.0) -> NoiseSchedule:
        """A Denoising Diffusion GAN's few states (arXiv 2112.07804): `steps` + 1 of the ``vp`` process.

        State k is at time ``1e-3 + (1 - 1e-3) k / steps`` relative to time 1e-3, and state 0 is data but for a variance
        of 1e-8, the first β. Training pairs and samplers go from t = 1 … `steps` to t - 1; 2 to 4 steps are usual.
        """
        steps = checks.positive_int("steps", steps)
        low = checks.number("beta_min", beta_min, low=0, open_low=True)
        high = checks.number("beta_max", beta_max, low=0, open_low=True)
        t = torch.linspace(1e-3, 1, steps + 1, dtype=torch.float64)
        integral = 0.5 * t.square() * (high - low) + t * low
        return cls.from_alphas_cumprod((1 - 1e-8) * torch.exp(integral[0] - integral))

    @classmethod
    def vp(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> NoiseSchedule:
        """The continuous variance-preserving process (arXiv 2011.13456), t uniform in (0, 1]."""
        return cls(
            "vp",
            beta_min=checks.number("beta_min", beta_min, low=0, open_low=True),
            beta_max=checks.number("beta_max", beta_max, low=0, open_low=True),
        )

    @classmethod
    def edm(cls, *, sigma_data: float = 0.5, log_mean: float = -1.2, log_std: float = 1.2) -> NoiseSchedule:
        """EDM (arXiv 2206.00364): t is the noise level; training levels have ln t ~ N(log_mean, log_std²)."""
        return cls(
            "edm",
            sigma_data=checks.number("sigma_data", sigma_data, low=0, open_low=True),
            log_mean=checks.number("log_mean", log_mean),
            log_std=checks.number("log_std", log_std, low=0),
        )

    @classmethod
    def flow(cls, *, shift: float = 1.0, logit_std: float = 0.0, logit_mean: float = 0.0) -> NoiseSchedule:
        """Rectified flow, 1 = noise. t is uniform, or logit-normal if `logit_std` > 0 (arXiv 2403.03206), then shifted:
        ``t ← shift t / (1 + (shift - 1) t)``."""
        return cls(
            "flow",
            shift=checks.number("shift", shift, low=0, open_low=True),
            logit_std=checks.number("logit_std", logit_std, low=0),
            log_mean=checks.number("logit_mean", logit_mean),
        )

    @property
    def num_timesteps(self) -> int | None:
        """The number of discrete times; None for a continuous schedule."""
        return None if self.alphas_cumprod is None else len(self.alphas_cumprod)

    def alpha_t(self, t: Tensor) -> Tensor:
        """The signal's coefficient at times t [B]."""
        return self._coefficients(t)[0]

    def sigma_t(self, t: Tensor) -> Tensor:
        """The noise's coefficient at times t [B]."""
        return self._coefficients(t)[1]

    def edm_weight(self, t: Tensor) -> Tensor:
        """EDM's weight of x0-errors: ``(s² + sigma_data²) / (s sigma_data)²``, s = sigma_t / alpha_t.

        It goes to ``1 / sigma_data²`` where all is noise, alpha_t = 0, and is inf where there is none.
        """
        alpha, sigma = self._coefficients(t)
        return (alpha / sigma).square() + 1 / self.sigma_data**2

    def sample_t(
        self, n: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """`n` training times, drawn as the constructor says (discrete and ``vp`` ones uniformly): float32, or int64 for
        a discrete schedule."""
        device = generator.device if device is None and generator is not None else device
        if self.num_timesteps is not None:
            return torch.randint(self.num_timesteps, (n,), generator=generator, device=device)
        options: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.float32}
        if self.kind == "edm":
            return torch.exp(self.log_mean + self.log_std * torch.randn(n, **options))
        if self.kind == "flow" and self.logit_std > 0:
            t = torch.sigmoid(self.log_mean + self.logit_std * torch.randn(n, **options))
        else:
            t = 1 - torch.rand(n, **options)  # (0, 1]: at t = 0 nothing is to be learnt
        return self.shift * t / (1 + (self.shift - 1) * t) if self.kind == "flow" else t

    def quantile_t(self, u: Tensor) -> Tensor:
        """The times below which a share `u` of the training times lie; even `u` in (0, 1) give an even grid of times.

        Args:
            u: floating-point, in (0, 1).

        Returns:
            Like `u`, float32 (float64 where `u` is); int64 for a discrete schedule.
        """
        checks.tensor("u", u)
        if not u.is_floating_point():
            raise TypeError(f"u must be floating-point, got {u.dtype}")
        wide = u.double()
        if self.num_timesteps is not None:
            # The middle of a cell can fall on an integer: rounding must not take it one below.
            return (wide * self.num_timesteps + 1e-6).floor().long().clamp(0, self.num_timesteps - 1)
        t = wide
        if self.kind == "edm":
            t = torch.exp(self.log_mean + self.log_std * torch.special.ndtri(wide))
        elif self.kind == "flow":
            if self.logit_std > 0:
                t = torch.sigmoid(self.log_mean + self.logit_std * torch.special.ndtri(wide))
            t = self.shift * t / (1 + (self.shift - 1) * t)
        return t.to(torch.promote_types(u.dtype, torch.float32))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """:func:`fastgen.add_noise` at times t [B]."""
        alpha, sigma = self._coefficients(t)
        return add_noise(x0, noise, alpha, sigma)

    def prediction_to_x0(self, pred: Tensor, x_t: Tensor, t: Tensor, prediction_type: str = "epsilon") -> Tensor:
        """:func:`fastgen.prediction_to_x0` at times t [B]."""
        alpha, sigma = self._coefficients(t)
        return prediction_to_x0(pred, x_t, alpha, sigma, prediction_type)

    def _coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        checks.tensor("t", t)
        if t.dim() != 1:
            raise ValueError(f"t must have shape [B], got {list(t.shape)}")
        if self.alphas_cumprod is not None:
            index = checks.integers("t", t)
            return self._table("alpha_t", t.device)[index], self._table("sigma_t", t.device)[index]
        if not t.is_floating_point():
            raise TypeError(f"t must be floating-point for the schedule {self.kind!r}, got {t.dtype}")
        result = torch.float64 if t.dtype == torch.float64 else torch.float32
        t = t.double() if t.device.type != "mps" else t.float()
        if self.kind == "edm":
            alpha, sigma = torch.ones_like(t), t
        elif self.kind == "flow":
            alpha, sigma = 1 - t, t
        else:
            log_alpha = -0.25 * t.square() * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min
            alpha, sigma = log_alpha.exp(), (-torch.expm1(2 * log_alpha)).sqrt()
        return alpha.to(result), sigma.to(result)

    def _alphas_cumprod_at(self, t: Tensor) -> Tensor:
        """ᾱ at integer times t of any shape, float64 on t's device; 1 at t = -1, which is clean data."""
        return self._table("nodes", t.device)[t.long() + 1]

    def _table(self, name: str, device: torch.device) -> Tensor:
        kept = self._keep(name, device)
        return getattr(self, kept) if kept else self._make(name, device)

    def _keep(self, name: str, device: torch.device) -> str:
        """The attribute that holds a table, made once for each device. Empty where what is made would be no numbers
        but a fake of torch.export or a wrapper of torch.func, of no use to later calls."""
        attribute = f"_{name}_on_{device}"
        if attribute not in self.__dict__:
            if torch._C._are_functorch_transforms_active():
                return ""
            with torch.inference_mode(False):
                table = self._make(name, device)
            if type(table) is not Tensor:
                return ""
            object.__setattr__(self, attribute, table)
        return attribute

    # It runs while torch.compile traces a call, whose graph then reads the attribute, under a guard.
    _keep._dynamo_marked_constant = True  # type: ignore[attr-defined]

    def _make(self, name: str, device: torch.device) -> Tensor:
        bar = self.alphas_cumprod
        assert bar is not None
        if name == "nodes":
            return torch.cat([bar.new_ones(1), bar]).to(device)
        return (bar if name == "alpha_t" else 1 - bar).sqrt().float().to(device)


def check_schedule(schedule: object) -> None:
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a NoiseSchedule, got {type(schedule).__name__}")
