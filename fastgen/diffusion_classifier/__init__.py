"""A conditional diffusion model as a classifier: the class whose condition denoises an image best."""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..core import checks, distributed
from ..elbo import elbo_error
from ..schedule import PREDICTION_TYPES, NoiseSchedule, check_schedule, prediction_target

__all__ = ["ClassifierStatistics", "DiffusionClassifier"]


@dataclass
class ClassifierStatistics:
    """What a :class:`DiffusionClassifier` knows about a batch of B images and C classes; resumable.

    ``torch.save(vars(statistics), path)`` keeps it, ``ClassifierStatistics(**torch.load(path))`` brings it back. All
    ranks of a classifier's `group` have the same, and it is one process's: what one rank has saved, any number of ranks
    go on from, if all of them load it.

    Attributes:
        errors: [M, B, C], one number for each (t, noise) pair, image and class, in the order of evaluation; float32
            (float64 for float64 images), NaN where not evaluated. It takes M·B·C numbers on the images' device.
        counts: int64 [B, C], how many pairs an image and class have seen: the first so many of M.
        labels: int64 [B], the best class so far.
        active: int64 [A], the images that are still undecided.
        candidates: int64 [A, K], the classes that are still in play for them.
        stage: the stage that is under way.
        rows: how many network evaluations of that stage are done.
        evaluations: how many are done in all.

    Example::

        >>> import torch, fastgen
        >>> classifier = fastgen.DiffusionClassifier(lambda x, t, c: x - c, fastgen.NoiseSchedule.vp(), stages=[(8, 1)])
        >>> x0, conditions = torch.zeros(3, 2), torch.tensor([[0.0], [1.0]])
        >>> statistics = classifier.statistics(x0, conditions)
        >>> classifier.predict(x0, conditions, statistics).shape, statistics.evaluations
        (torch.Size([3]), 48)
    """

    errors: Tensor
    counts: Tensor
    labels: Tensor
    active: Tensor
    candidates: Tensor
    stage: int = 0
    rows: int = 0
    evaluations: int = 0

    def mean_errors(self) -> Tensor:
        """Each class's mean over the pairs that it has seen, float64 [B, C]; NaN where it has seen none.

        Classes that left at different stages have seen different times, so compare them by :meth:`log_prob`.
        """
        return self._mean(self.errors)

    def log_prob(self, scale: float) -> Tensor:
        """``log_softmax(-scale · error)`` [B, C], each class compared with the best on the pairs that it saw."""
        best = self.labels[None, :, None].expand(len(self.errors), -1, 1)
        gap = self._mean(self.errors - self.errors.gather(2, best))
        return torch.log_softmax(-scale * gap.nan_to_num(nan=math.inf), 1).to(self.errors.dtype)

    def _mean(self, values: Tensor) -> Tensor:
        seen = torch.arange(len(values), device=values.device)[:, None, None] < self.counts
        return torch.where(seen, values, 0).sum(0, dtype=torch.float64) / self.counts


class DiffusionClassifier:
    """Diffusion Classifier (arXiv 2303.16203): classifies by which condition predicts the noise best.

    .. math:: error(c) = mean_{(t, ε)} \\, w(t) \\, mean_D \\, penalty(model(x_t, t, c) - target),
        p(c|x) = softmax_c(-D \\, error(c))

    The (t, noise) pairs are the same for all classes, so the noise of their comparison cancels, and for all images. In
    the paper's adaptive evaluation a stage ``(n_samples, to_keep)`` evaluates those of an even grid of n_samples times
    that no stage before it did, for the classes that are left, and keeps the to_keep best of them by the mean over all
    pairs so far. Every image has its own classes left. Batches are filled with pairs, images and classes alike, and
    errors stay on the device: nothing synchronises, except for `error_probability`, which does once a stage.

    Args:
        model: ``model(x_t, t, condition)`` with x_t [R, …], t [R] in the schedule's own times and condition [R, …];
            returns its prediction, like x_t. It runs without gradients; put it in eval mode, and wrap it for autocast
            or sharding as you like.
        schedule: the forward process, and with `times` unset the distribution that the times stand for.
        stages: ``(n_samples, to_keep)`` each, n_samples increasing and to_keep not, the last to_keep 1. The paper's
            for CIFAR-10 is the default; ``[(n, 1)]`` evaluates everything.
        prediction_type: what the model returns, and errors are of: ``"epsilon"``, ``"sample"``, ``"v_prediction"`` or
            ``"flow_prediction"``.
        loss: ``"l2"`` (the likelihood's), ``"l1"`` or ``"huber"``, as in :func:`fastgen.elbo_error`.
        weighting: w, a function from t [R] to float32 or float64 [R]; 1 if None, as in the paper. EDM's denoiser is a
            ``"sample"`` model with ``weighting=schedule.edm_weight``.
        times: [N] the finest grid, N the last n_samples; by default N even quantiles of the schedule's training times
            (:meth:`fastgen.NoiseSchedule.quantile_t`).
        batch_size: rows of a call of the model.
        error_probability: δ; decides an image at the end of a stage when a one-sided paired t-test separates the best
            class from every other one left. If the pairs' differences were independent and normal, an image's early
            decision would be for another class than the one of least expected error with probability at most δ
            (Bonferroni over classes and stages); nothing is claimed of the classes that a stage drops. None: every
            image goes through all stages.
        seed: of the noise. It is not stored but drawn again whenever it is needed, from a generator on the images'
            device that is seeded by `seed` and the pair's place in the grid: a full evaluation and an adaptive one
            share their pairs, and batch sizes do not matter.
        progress: show a progress bar.
        group: a ``torch.distributed`` process group whose ranks divide the classes of the same images: of a stage's
            rows, each a pair, an image and a class, every rank evaluates `batch_size` at a time. All get all errors, so
            they drop the same classes and return the same, what one process would. It costs a collective of a few
            integers at the beginning, which is waited for, and one of a number a row for each call of the model, of
            which every rank makes as many, so the model may be sharded over them. Ranks with images of their own need
            no group: they have nothing to exchange, and share their (t, noise) pairs.

    Raises:
        TypeError, ValueError: naming the argument that does not fit.

    Example::

        >>> import torch, fastgen
        >>> means = torch.tensor([[-1.0], [0.0], [1.0]])  # the denoiser of a class that is one point: the point
        >>> classifier = fastgen.DiffusionClassifier(
        ...     lambda x_t, t, mean: mean.expand_as(x_t), fastgen.NoiseSchedule.edm(), prediction_type="sample",
        ...     stages=[(2, 2), (8, 1)],
        ... )
        >>> classifier.predict(torch.tensor([[0.9, 1.2], [-0.6, -1.0]]), means)
        tensor([2, 0])
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor, Tensor], Tensor],
        schedule: NoiseSchedule,
        *,
        stages: Sequence[tuple[int, int]] = ((50, 5), (500, 1)),
        prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon",
        loss: Literal["l2", "l1", "huber"] = "l2",
        weighting: Callable[[Tensor], Tensor] | None = None,
        times: Tensor | None = None,
        batch_size: int = 256,
        error_probability: float | None = None,
        seed: int = 0,
        progress: bool = False,
        group: Any = None,
    ) -> None:
        checks.function("model", model)
        check_schedule(schedule)
        if weighting is not None:
            checks.function("weighting", weighting)
        checks.choice("prediction_type", prediction_type, PREDICTION_TYPES)
        checks.choice("loss", loss, ("l2", "l1", "huber"))
        batch_size = checks.positive_int("batch_size", batch_size)
        seed = checks.integer("seed", seed, low=0, high=checks.LAST_SEED)
        if error_probability is not None and not 0 < checks.number("error_probability", error_probability) < 1:
            raise ValueError(f"error_probability must be between 0 and 1, got {error_probability}")
        self.stages = _checked_stages(stages)
        finest = self.stages[-1][0]
        if times is None:
            times = schedule.quantile_t((torch.arange(finest, dtype=torch.float64) + 0.5) / finest)
            times = times.float() if times.is_floating_point() else times
        checks.tensor("times", times)
        if times.shape != (finest,):
            raise ValueError(f"times must have shape [{finest}], the last stage's samples; got {list(times.shape)}")
        self.model, self.schedule, self.weighting = model, schedule, weighting
        self.prediction_type, self.loss = prediction_type, loss
        self.batch_size, self.error_probability = batch_size, error_probability
        self.seed, self.progress = seed, progress
        self.group, (self._rank, self._ranks) = group, distributed.place_in(group)
        self._pairs, self._ends = _evaluation_order(self.stages)
        self.times = times[torch.tensor(self._pairs, device=times.device)]

    def predict(self, x0: Tensor, conditions: Tensor, statistics: ClassifierStatistics | None = None) -> Tensor:
        """The class of each image.

        Args:
            x0: clean images [B, …], any floating dtype.
            conditions: [C, …], the classes' conditions, such as labels or text embeddings, on the images' device.
                Where a condition is more than one tensor, pass ``torch.arange(C)`` and let the model look it up.
            statistics: of these images and conditions, by :meth:`statistics`. It is filled in place, and what it holds
                already is not evaluated again: an interrupted call goes on where it was. With a `group`, all ranks
                pass the same images, conditions and statistics; where these differ, all raise.

        Returns:
            int64 [B], indices into `conditions`. Of equal errors the lowest index wins; an error that is not finite is
            the worst.

        Raises:
            TypeError, ValueError: naming the argument that does not fit.
        """
        return self._run(x0, conditions, statistics).labels

    def log_prob(self, x0: Tensor, conditions: Tensor, statistics: ClassifierStatistics | None = None) -> Tensor:
        """``log p(c|x)`` under a uniform prior over the conditions [B, C], float32 (float64 for float64 images).

        With one stage this is the paper's equation 4, ``log_softmax(-D · error)``. With several, a class that left
        early is compared with the best class on the pairs that both have seen. A likelihood only with ``loss="l2"``;
        the arguments are those of :meth:`predict`, and with the statistics of one nothing is evaluated again.
        """
        return self._run(x0, conditions, statistics).log_prob(math.prod(x0.shape[1:]))

    def statistics(self, x0: Tensor, conditions: Tensor) -> ClassifierStatistics:
        """Empty statistics for these images and conditions, to hand to :meth:`predict` and :meth:`log_prob`."""
        _check_batch(x0, conditions)
        device, images, classes = x0.device, x0.shape[0], conditions.shape[0]
        dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
        return ClassifierStatistics(
            errors=torch.full((len(self._pairs), images, classes), math.nan, dtype=dtype, device=device),
            counts=torch.zeros((images, classes), dtype=torch.int64, device=device),
            labels=torch.zeros(images, dtype=torch.int64, device=device),
            active=torch.arange(images, device=device),
            candidates=torch.arange(classes, device=device).repeat(images, 1),
        )

    def _run(self, x0: Tensor, conditions: Tensor, statistics: ClassifierStatistics | None) -> ClassifierStatistics:
        _check_batch(x0, conditions)
        s = self.statistics(x0, conditions) if statistics is None else statistics
        expected = (len(self._pairs), x0.shape[0], conditions.shape[0])
        if s.errors.shape != expected or s.errors.device != x0.device:
            raise ValueError(
                f"statistics are of {list(s.errors.shape)} pairs, images and classes on {s.errors.device};"
                f" this call has {list(expected)} on {x0.device}"
            )
        x0, conditions, times = x0.detach(), conditions.detach(), self.times.to(x0.device)
        if self.group is not None:
            self._check_alike(x0, conditions, times, s)
        with torch.no_grad(), tqdm(disable=not self.progress, desc="diffusion classifier", unit="row") as bar:
            while s.stage < len(self.stages):
                begin, end = self._ends[s.stage], self._ends[s.stage + 1]
                rows = (end - begin) * s.candidates.numel()
                bar.reset(rows)  # a stage's: what the next one has to do depends on this one's outcome
                bar.update(s.rows)
                bar.set_postfix(stage=f"{s.stage + 1}/{len(self.stages)}", classes=s.candidates.shape[1])
                while s.rows < rows:
                    last = min(s.rows + self.batch_size * self._ranks, rows)
                    error = self._errors(x0, conditions, times[begin:end], s, begin, last)
                    # No index occurs twice, so this is deterministic.
                    s.errors.index_put_(_places(s, begin, last), error)
                    bar.update(last - s.rows)
                    s.evaluations += last - s.rows
                    s.rows = last
                self._eliminate(s, end)
        return s

    def _check_alike(self, x0: Tensor, conditions: Tensor, times: Tensor, s: ClassifierStatistics) -> None:
        settings = self.stages, self.prediction_type, self.loss, self.batch_size, self.error_probability, self.seed
        distributed.check_alike(
            self.group,
            x0.device,
            x0=distributed.fingerprint(x0),
            conditions=distributed.fingerprint(conditions),
            times=distributed.fingerprint(times),
            **{"statistics: their stage": s.stage, "statistics: their rows": s.rows},
            **{"the classifier's settings": zlib.crc32(repr(settings).encode())},
        )

    def _errors(
        self, x0: Tensor, conditions: Tensor, times: Tensor, s: ClassifierStatistics, begin: int, last: int
    ) -> Tensor:
        """Of rows `s.rows` to `last` of a stage, each by one rank."""
        count = last - s.rows
        own = slice(count * self._rank // self._ranks, count * (self._rank + 1) // self._ranks)
        first, size = s.rows + own.start, own.stop - own.start
        # A rank for which no row is left evaluates one again: a model that is sharded waits for all ranks' calls.
        error = self._evaluate(x0, conditions, times, s, begin, first, first + max(size, 1))
        if self.group is None:
            return error
        errors = error.new_zeros(count)
        errors[own] = error[:size]
        torch.distributed.all_reduce(errors, group=self.group)  # a sum with zeros: the same bits on all ranks
        return errors

    def _evaluate(
        self, x0: Tensor, conditions: Tensor, times: Tensor, s: ClassifierStatistics, begin: int, first: int, last: int
    ) -> Tensor:
        """The errors of rows `first` to `last` of a stage, counted by pair, then image, then class."""
        images, classes = s.candidates.shape
        first_cell, last_cell = first // classes, (last - 1) // classes  # a cell: one pair and image, one noisy image
        first_pair, last_pair = first_cell // images, last_cell // images
        cell = torch.arange(first_cell, last_cell + 1, device=x0.device)
        pair, slot = cell // images - first_pair, cell % images
        noise = torch.stack([self._noise(begin + k, x0) for k in range(first_pair, last_pair + 1)])[pair]
        clean, t = x0[s.active[slot]], times[first_pair : last_pair + 1][pair]
        x_t = self.schedule.add_noise(clean, noise, t)
        alpha, sigma = self.schedule.alpha_t(t), self.schedule.sigma_t(t)
        target = prediction_target(clean, noise, alpha, sigma, self.prediction_type)

        row = torch.arange(first, last, device=x0.device)
        of = row // classes - first_cell  # each row's place in the cells
        label = s.candidates.flatten()[row % (images * classes)]
        x_t, t, target = x_t[of], t[of], target[of]
        pred = self.model(x_t, t, conditions[label])
        if not isinstance(pred, Tensor) or pred.shape != x_t.shape:
            got = list(pred.shape) if isinstance(pred, Tensor) else type(pred).__name__
            raise ValueError(f"model must return a tensor like its x_t, {list(x_t.shape)}; got {got}")
        weight = None if self.weighting is None else self.weighting(t)
        return elbo_error(pred, target, weight=weight, loss=self.loss).to(s.errors.dtype)

    def _noise(self, place: int, like: Tensor) -> Tensor:
        """The noise of the pair that is evaluated as number `place`."""
        seed = np.random.SeedSequence((self.seed, self._pairs[place])).generate_state(1, np.uint64)[0]
        generator = torch.Generator(like.device).manual_seed(int(seed >> np.uint64(1)))
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return torch.randn(like.shape[1:], generator=generator, dtype=dtype, device=like.device).to(like.dtype)

    def _eliminate(self, s: ClassifierStatistics, seen: int) -> None:
        """Ends a stage: `seen` pairs are evaluated."""
        table = (s.active[:, None], s.candidates)
        s.counts[table] = seen
        errors = s.errors[:seen, table[0], table[1]]
        mean = (errors.sum(0, dtype=torch.float64) / seen).nan_to_num(nan=math.inf)
        keep = min(self.stages[s.stage][1], s.candidates.shape[1])
        place = mean.sort(dim=1, stable=True).indices[:, :keep]
        kept, best = place.sort(1).values, place[:, :1]
        s.labels[s.active] = s.candidates.gather(1, best).squeeze(1)
        s.candidates = s.candidates.gather(1, kept)
        s.stage, s.rows = s.stage + 1, 0
        if self.error_probability is not None and s.stage < len(self.stages):
            everyone = kept[None].expand(seen, -1, -1)
            gap = errors.gather(2, everyone) - errors.gather(2, best[None].expand(seen, -1, 1))
            decided = self._separated(gap.double(), kept == best, s.counts.shape[1])
            undecided = decided.logical_not().nonzero().squeeze(1)  # the stage's one synchronisation
            s.active, s.candidates = s.active[undecided], s.candidates[undecided]

    def _separated(self, gap: Tensor, is_best: Tensor, classes: int) -> Tensor:
        """Which images' best class is significantly better than the rest; gap [pairs, A, K] are paired differences."""
        pairs = len(gap)
        if pairs < 2 or len(is_best) == 0:
            return torch.zeros_like(is_best[:, 0])
        assert self.error_probability is not None
        share = self.error_probability / max(1, (classes - 1) * (len(self.stages) - 1))
        spread = gap.std(0) / math.sqrt(pairs)
        return ((gap.mean(0) > student_quantile(share, pairs - 1) * spread) | is_best).all(1)


def _places(s: ClassifierStatistics, begin: int, last: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where the errors of rows `s.rows` to `last` belong: the pairs, counted from `begin`, the images, the classes."""
    images, classes = s.candidates.shape
    row = torch.arange(s.rows, last, device=s.errors.device)
    cell = row // classes
    return begin + cell // images, s.active[cell % images], s.candidates.flatten()[row % (images * classes)]


def _check_batch(x0: Tensor, conditions: Tensor) -> None:
    checks.streams(x0=x0)
    checks.tensor("conditions", conditions)
    if conditions.dim() == 0 or conditions.shape[0] == 0:
        raise ValueError(f"conditions must have shape [C, ...] with C >= 1, got {list(conditions.shape)}")
    if conditions.device != x0.device:
        raise ValueError(f"conditions is on {conditions.device}, but x0 is on {x0.device}")


def _checked_stages(stages: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    pair = (tuple, list)
    if not isinstance(stages, pair) or not all(isinstance(stage, pair) and len(stage) == 2 for stage in stages):
        raise TypeError(f"stages must be a list of pairs (n_samples, to_keep), got {stages!r}")
    checked = [
        (checks.positive_int("stages: n_samples", n), checks.positive_int("stages: to_keep", keep))
        for n, keep in stages
    ]
    if not checked or checked[-1][1] != 1:
        raise ValueError(f"stages must end with to_keep = 1, got {checked}")
    for (n, keep), (more, fewer) in itertools.pairwise(checked):
        if more <= n or fewer > keep:
            raise ValueError(f"stages must have increasing n_samples and to_keep that does not increase, got {checked}")
    return checked


def _evaluation_order(stages: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Places in the finest grid in the order of evaluation, and where in that order each stage begins and ends."""
    finest = stages[-1][0]
    order: dict[int, None] = {}
    ends = [0]
    for n_samples, _ in stages:
        grid = ((2 * k + 1) * finest // (2 * n_samples) for k in range(n_samples))
        order.update(dict.fromkeys(grid))
        ends.append(len(order))
    return list(order), ends


def student_quantile(upper_tail: float, degrees: int) -> float:
    """What a Student t variable exceeds with probability `upper_tail` < 1/2."""
    # With t = sqrt(degrees) tan(a) the density is a power of cos(a) on [0, pi/2), however heavy t's tail.
    cells = 1 << 16
    edges = np.arange(cells + 1) * (np.pi / 2 / cells)
    mass = np.cos(edges[:-1] + edges[1] / 2) ** (degrees - 1)
    tail = np.append(np.cumsum(mass[::-1])[::-1], 0.0) / (2 * mass.sum())
    return math.sqrt(degrees) * math.tan(np.interp(upper_tail, tail[::-1], edges[::-1]))
