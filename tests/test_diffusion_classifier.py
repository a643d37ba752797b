"""The Diffusion Classifier: against a plain double loop, by hand, and its promises of resuming, syncs, early stops."""

import math

import pytest
import torch
from syncs import Syncs

from fastgen import ClassifierStatistics, DiffusionClassifier, NoiseSchedule, reference
from fastgen.diffusion_classifier import student_quantile

SCHEDULES = {
    "linear": (NoiseSchedule.linear(100), "epsilon"),
    "vp": (NoiseSchedule.vp(), "v_prediction"),
    "edm": (NoiseSchedule.edm(), "sample"),
    "flow": (NoiseSchedule.flow(), "flow_prediction"),
}
STAGES = {
    "full": [(9, 1)],
    "nested": [(3, 3), (9, 1)],
    "not nested": [(2, 4), (5, 2), (9, 1)],
    "keep all": [(4, 9), (9, 1)],
}


def model(x_t, t, c):
    """Depends on everything, row by row, and is right for no class."""
    level = t.to(x_t.dtype).view(-1, *[1] * (x_t.dim() - 1))
    return torch.tanh(x_t * 0.5 + c.to(x_t.dtype)) - 0.1 * torch.log1p(level)


def batch(images=4, classes=5, dtype=torch.float32, device="cpu"):
    x0 = torch.randn(images, 2, 3, dtype=torch.float64).to(device, dtype)
    return x0, torch.randn(classes, 2, 1, dtype=torch.float64).to(device, dtype)


def plain(classifier, x0, conditions):
    """The reference on the classifier's own pairs; its errors in the classifier's order."""
    places = torch.tensor(classifier._pairs).argsort()
    times = classifier.times[places].to(x0.device)
    noise = torch.stack([classifier._noise(int(place), x0) for place in places])
    weight = None if classifier.weighting is None else classifier.weighting(times)
    alpha, sigma = classifier.schedule.alpha_t(times), classifier.schedule.sigma_t(times)
    labels, errors = reference.classify(
        classifier.model,
        x0,
        conditions,
        times,
        alpha,
        sigma,
        noise,
        stages=classifier.stages,
        prediction_type=classifier.prediction_type,
        weight=weight,
        loss=classifier.loss,
    )
    return labels, errors[classifier._pairs]


@pytest.mark.parametrize("loss", ["l2", "l1", "huber"])
@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("name", SCHEDULES)
def test_equals_the_double_loop(name, stages, loss):
    schedule, prediction_type = SCHEDULES[name]
    x0, conditions = batch(dtype=torch.float64)
    classifier = DiffusionClassifier(
        model,
        schedule,
        stages=STAGES[stages],
        prediction_type=prediction_type,
        loss=loss,
        batch_size=7,
        weighting=schedule.edm_weight if name == "edm" else None,
    )
    statistics = classifier.statistics(x0, conditions)
    labels = classifier.predict(x0, conditions, statistics)
    expected, errors = plain(classifier, x0, conditions)
    assert torch.equal(labels, expected)
    torch.testing.assert_close(statistics.errors, errors, rtol=1e-12, atol=0, equal_nan=True)
    torch.testing.assert_close(statistics.mean_errors(), errors.nanmean(0), rtol=1e-12, atol=0)
    assert torch.equal(statistics.counts, errors.isfinite().sum(0))
    assert statistics.evaluations == int(errors.isfinite().sum())


def test_backends_and_dtypes(backend, device):
    schedule = NoiseSchedule.linear(100)
    for dtype in (torch.float32, torch.bfloat16):
        x0, conditions = batch(dtype=dtype, device=device)
        classifier = DiffusionClassifier(model, schedule, stages=STAGES["nested"], batch_size=16)
        statistics = classifier.statistics(x0, conditions)
        labels = classifier.predict(x0, conditions, statistics)
        expected, errors = plain(classifier, x0, conditions)
        assert torch.equal(labels.cpu(), expected)
        assert statistics.errors.dtype == torch.float32
        torch.testing.assert_close(
            statistics.errors.cpu().double(),
            errors,
            rtol=1e-5 if dtype == torch.float32 else 0.02,
            atol=0,
            equal_nan=True,
        )


def test_batch_sizes_do_not_matter():
    x0, conditions = batch()
    results = []
    for batch_size in (1, 6, 45, 10_000):
        classifier = DiffusionClassifier(model, NoiseSchedule.linear(), stages=STAGES["nested"], batch_size=batch_size)
        statistics = classifier.statistics(x0, conditions)
        classifier.predict(x0, conditions, statistics)
        results.append(statistics)
    for other in results[1:]:
        torch.testing.assert_close(other.errors, results[0].errors, equal_nan=True)
        assert torch.equal(other.labels, results[0].labels)


def test_every_batch_is_full():
    rows = []

    def counted(x_t, t, c):
        assert len(x_t) == len(t) == len(c)
        rows.append(len(x_t))
        return model(x_t, t, c)

    x0, conditions = batch(3, 5)
    DiffusionClassifier(counted, NoiseSchedule.linear(), stages=[(2, 2), (8, 1)], batch_size=8).predict(x0, conditions)
    assert rows == [8, 8, 8, 6, 8, 8, 8, 8, 4]  # 2 * 3 * 5 and 6 * 3 * 2 rows


def test_the_paper_s_grids():
    classifier = DiffusionClassifier(model, NoiseSchedule.linear(1000), stages=[(50, 5), (500, 1)])
    assert classifier.times[:50].tolist() == list(range(11, 1000, 20))
    assert classifier.times.sort().values.tolist() == list(range(1, 1000, 2))
    assert len(set(classifier.times.tolist())) == 500


def test_by_hand():
    """Classes that are single points: their denoisers return them, and errors are squared distances, without noise."""
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    schedule = NoiseSchedule.edm()
    classifier = DiffusionClassifier(lambda x, t, c: c, schedule, prediction_type="sample", stages=[(1, 3), (4, 1)])
    x0 = torch.tensor([[0.5, 0.0], [2.0, 2.0]])
    distance = torch.tensor([[0.25, 2.25, 1.25], [8.0, 4.0, 5.0]])
    assert classifier.predict(x0, points).tolist() == [0, 1]
    torch.testing.assert_close(classifier.log_prob(x0, points), torch.log_softmax(-distance, 1))
    doubled = DiffusionClassifier(
        lambda x, t, c: c,
        schedule,
        prediction_type="sample",
        stages=[(4, 1)],
        weighting=lambda t: torch.full_like(t, 2),
    )
    torch.testing.assert_close(doubled.log_prob(x0, points), torch.log_softmax(-2 * distance, 1))


def test_log_prob_is_the_softmax_of_the_errors():
    x0, conditions = batch()
    full = DiffusionClassifier(model, NoiseSchedule.linear(), stages=STAGES["full"])
    statistics = full.statistics(x0, conditions)
    log_prob = full.log_prob(x0, conditions, statistics)
    torch.testing.assert_close(log_prob.double(), torch.log_softmax(-6 * statistics.errors.double().mean(0), 1))
    assert torch.equal(log_prob.argmax(1), statistics.labels)
    # A class that left is compared on the pairs that it saw, not with a mean over other times.
    staged = DiffusionClassifier(model, NoiseSchedule.linear(), stages=STAGES["nested"])
    some = staged.statistics(x0, conditions)
    log_prob = staged.log_prob(x0, conditions, some)
    gap = some.errors - some.errors.gather(2, some.labels[None, :, None].expand(9, -1, 1))
    torch.testing.assert_close(log_prob.double(), torch.log_softmax(-6 * gap.double().nanmean(0), 1))
    assert log_prob.isfinite().all()


def test_pairs_are_shared():
    """Among classes, images, and classifiers of the same finest grid; another seed draws others."""
    seen = {}

    def recorder(x_t, t, c):
        for x, level, mean in zip(x_t, t, c, strict=True):
            seen.setdefault(float(level), []).append((x - mean[0]) / level)
        return x_t

    x0, conditions = torch.zeros(3, 4), torch.zeros(2, 1)
    schedule = NoiseSchedule.edm()
    for stages in ([(6, 1)], [(2, 2), (6, 1)], [(3, 1), (6, 1)]):
        DiffusionClassifier(recorder, schedule, stages=stages, batch_size=5).predict(x0, conditions)
    assert len(seen) == 6
    for noises in seen.values():
        assert len(noises) >= 15
        for noise in noises:
            torch.testing.assert_close(noise, noises[0])
    assert len({tuple(noises[0].tolist()) for noises in seen.values()}) == 6
    first = next(iter(seen.items()))
    seen.clear()
    DiffusionClassifier(recorder, schedule, stages=[(6, 1)], seed=1).predict(x0, conditions)
    assert not torch.allclose(seen[first[0]][0], first[1][0])


def test_resumes_where_it_was_interrupted(tmp_path):
    x0, conditions = batch()
    calls = []

    def fails_once(x_t, t, c):
        calls.append(len(x_t))
        if len(calls) == 10:
            raise KeyboardInterrupt
        return model(x_t, t, c)

    settings = {"stages": STAGES["not nested"], "batch_size": 6}
    whole = DiffusionClassifier(model, NoiseSchedule.linear(), **settings)
    expected = whole.statistics(x0, conditions)
    whole.predict(x0, conditions, expected)

    classifier = DiffusionClassifier(fails_once, NoiseSchedule.linear(), **settings)
    statistics = classifier.statistics(x0, conditions)
    with pytest.raises(KeyboardInterrupt):
        classifier.predict(x0, conditions, statistics)
    assert 0 < statistics.evaluations < expected.evaluations
    torch.save(vars(statistics), tmp_path / "statistics.pt")
    loaded = ClassifierStatistics(**torch.load(tmp_path / "statistics.pt"))
    assert torch.equal(classifier.predict(x0, conditions, loaded), expected.labels)
    assert sum(calls) - calls[9] == loaded.evaluations == expected.evaluations
    assert torch.equal(loaded.errors.nan_to_num(nan=-1), expected.errors.nan_to_num(nan=-1))
    # What is complete is not evaluated again.
    done = len(calls)
    torch.testing.assert_close(classifier.log_prob(x0, conditions, loaded), whole.log_prob(x0, conditions))
    assert len(calls) == done


def points_in_noise(x_t, t, c):
    """Class means, plus an error that the pair's noise decides: paired differences are noisy."""
    return c + 0.3 * x_t


@pytest.mark.parametrize("stages", [[(4, 3), (8, 3), (32, 1)], [(2, 3), (8, 2), (32, 1)]], ids=["keep all", "drop"])
def test_early_stop_saves_evaluations_and_decides_alike(stages):
    points = 2 * torch.eye(3)
    schedule = NoiseSchedule.edm()
    x0 = points.repeat(20, 1) + 0.2 * torch.randn(60, 3)
    x0[0] = 0.5 * (points[0] + points[1])  # on the border of two classes: stays to the end
    results = {}
    for delta in (None, 0.05):
        classifier = DiffusionClassifier(
            points_in_noise, schedule, prediction_type="sample", stages=stages, error_probability=delta
        )
        results[delta] = classifier.statistics(x0, points)
        classifier.predict(x0, points, results[delta])
    early, whole = results[0.05], results[None]
    assert early.evaluations < 0.7 * whole.evaluations
    assert torch.equal(early.labels[1:], whole.labels[1:])
    assert 0 in early.active
    assert early.counts[0].max() == 32
    assert early.counts[1:].max(1).values.min() < 32
    # Evaluated alike: what is there equals the full run's.
    seen = early.errors.isfinite()
    torch.testing.assert_close(early.errors[seen], whole.errors[seen])


def test_early_stop_keeps_its_error_probability():
    """Differences without a true sign are called significant as seldom as stated."""
    classifier = DiffusionClassifier(
        model, NoiseSchedule.edm(), stages=[(4, 3), (8, 3), (16, 1)], error_probability=0.2
    )
    is_best = torch.tensor([True, False, True]).repeat(20_000, 1)
    for pairs in (3, 16):
        gap = torch.randn(pairs, 20_000, 3, dtype=torch.float64) * torch.tensor([0.0, 2.5, 0.0])
        rate = classifier._separated(gap, is_best, classes=3).double().mean().item()
        assert rate == pytest.approx(0.2 / (2 * 2), rel=0.1)  # of one class at one of two stages
    assert not classifier._separated(torch.ones(1, 4, 3), is_best[:4], classes=3).any()


@pytest.mark.parametrize(
    ("tail", "degrees", "t"),
    [(0.025, 1, 12.706), (0.025, 4, 2.7764), (0.005, 9, 3.2498), (1e-4, 49, 4.0205), (0.05, 1000, 1.6464)],
)
def test_student_quantiles(tail, degrees, t):
    assert student_quantile(tail, degrees) == pytest.approx(t, rel=1e-4)


@pytest.mark.parametrize(("delta", "expected"), [(None, 0), (0.1, 2)])
def test_one_sync_a_stage_at_most(delta, expected):
    x0, conditions = batch()
    classifier = DiffusionClassifier(
        model, NoiseSchedule.linear(), stages=STAGES["not nested"], batch_size=3, error_probability=delta
    )
    with Syncs() as syncs:
        classifier.predict(x0, conditions)
    assert syncs.count == expected
    with Syncs() as syncs:
        x0[x0 > 0].sum().item()
    assert syncs.count == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_classes_with_errors_that_are_not_finite_lose(bad):
    def broken(x_t, t, c):
        return model(x_t, t, c) * torch.where(c < 0, bad, 1.0)

    x0, conditions = batch()
    conditions = torch.tensor([-1.0, 0.5, -1.0, 2.0, 1.0]).view(5, 1, 1)
    classifier = DiffusionClassifier(broken, NoiseSchedule.linear(), stages=[(2, 4), (4, 3), (8, 1)])
    log_prob = classifier.log_prob(x0, conditions)
    assert set(classifier.predict(x0, conditions).tolist()) <= {1, 3, 4}
    assert (log_prob[:, [0, 2]] == -math.inf).all()
    torch.testing.assert_close(log_prob.exp().sum(1), torch.ones(4))
    nothing = DiffusionClassifier(lambda x, t, c: x * bad, NoiseSchedule.linear(), stages=[(4, 1)])
    assert nothing.predict(x0, conditions).tolist() == [0] * 4


def test_ties_go_to_the_first_class():
    x0, _ = batch()
    conditions = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(4, 1, 1)
    classifier = DiffusionClassifier(
        lambda x, t, c: c.expand_as(x), NoiseSchedule.linear(), prediction_type="sample", stages=[(1, 3), (2, 1)]
    )
    assert classifier.predict(torch.zeros_like(x0), conditions).tolist() == [1] * 4


def test_edge_shapes():
    schedule = NoiseSchedule.linear()
    classifier = DiffusionClassifier(model, schedule, stages=[(2, 7), (4, 1)], error_probability=0.1)
    x0, conditions = batch()
    assert classifier.predict(x0[:0], conditions).shape == (0,)
    assert classifier.log_prob(x0[:0], conditions).shape == (0, 5)
    assert classifier.predict(x0, conditions[:1]).tolist() == [0] * 4
    torch.testing.assert_close(classifier.log_prob(x0, conditions[:1]), torch.zeros(4, 1))
    expected = classifier.predict(x0, conditions)
    assert torch.equal(classifier.predict(x0.transpose(1, 2).contiguous().transpose(1, 2), conditions), expected)
    labels = DiffusionClassifier(lambda x, t, i: model(x, t, conditions[i]), schedule, stages=[(4, 1)])
    full = DiffusionClassifier(model, schedule, stages=[(4, 1)])
    assert torch.equal(labels.predict(x0, torch.arange(5)), full.predict(x0, conditions))
    log_prob = full.log_prob(x0.requires_grad_(), conditions)
    assert not log_prob.requires_grad
    shown = DiffusionClassifier(model, schedule, stages=[(4, 1)], progress=True)
    assert torch.equal(shown.predict(x0, conditions), full.predict(x0, conditions))


S = NoiseSchedule.linear()
X, C = torch.zeros(2, 3), torch.zeros(4, 3)


def build(**arguments):
    return DiffusionClassifier(lambda x, t, c: x, S, **{"stages": [(2, 1)], **arguments})


BAD_CALLS = {
    "model must be callable": (TypeError, lambda: DiffusionClassifier(None, S)),
    "schedule must be a NoiseSchedule": (TypeError, lambda: DiffusionClassifier(lambda x, t, c: x, None)),
    "stages must be a list of pairs": (TypeError, lambda: build(stages=5)),
    r"stages must be a list of pairs \(": (TypeError, lambda: build(stages=[5, 1])),
    "weighting must be callable": (TypeError, lambda: build(weighting="edm")),
    "prediction_type must be one of": (ValueError, lambda: build(prediction_type="eps")),
    "loss must be one of": (ValueError, lambda: build(loss="l3")),
    "batch_size must be at least 1": (ValueError, lambda: build(batch_size=0)),
    "seed must be at least 0": (ValueError, lambda: build(seed=-1)),
    "error_probability must be between 0 and 1": (ValueError, lambda: build(error_probability=1.0)),
    "error_probability must be a number": (TypeError, lambda: build(error_probability="0.1")),
    "stages must end with to_keep = 1": (ValueError, lambda: build(stages=[(4, 2)])),
    "stages must end with": (ValueError, lambda: build(stages=[])),
    "stages must have increasing n_samples": (ValueError, lambda: build(stages=[(4, 2), (4, 1)])),
    "to_keep that does not increase": (ValueError, lambda: build(stages=[(2, 2), (4, 3), (8, 1)])),
    "stages: n_samples must be at least 1": (ValueError, lambda: build(stages=[(0, 1)])),
    "stages: to_keep must be an int": (TypeError, lambda: build(stages=[(2, 1.0)])),
    r"times must have shape \[2\]": (ValueError, lambda: build(times=torch.arange(3))),
    "times must be a torch.Tensor": (TypeError, lambda: build(times=[1, 2])),
    "t must hold integers": (TypeError, lambda: build(times=torch.rand(2)).predict(X, C)),
    "x0 must be float32": (TypeError, lambda: build().predict(X.int(), C)),
    "conditions must be a torch.Tensor": (TypeError, lambda: build().predict(X, [0, 1])),
    "conditions must have shape": (ValueError, lambda: build().predict(X, C[:0])),
    "conditions is on meta": (ValueError, lambda: build().predict(X, C.to("meta"))),
    "statistics are of": (ValueError, lambda: build().predict(X, C, build().statistics(X, C[:3]))),
    "model must return a tensor like": (
        ValueError,
        lambda: DiffusionClassifier(lambda x, t, c: x[:, :1], S, stages=[(2, 1)]).predict(X, C),
    ),
}


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_input_names_the_argument(message):
    error, call = BAD_CALLS[message]
    with pytest.raises(error, match=message):
        call()
