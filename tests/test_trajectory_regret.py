"""The regret of trajectories chosen from noisy moments: repaired ones cost next to nothing, clamped ones a lot."""

import pytest

from benchmarks.trajectory_regret import plot, study

STEPS = (10, 25, 100)


@pytest.fixture(scope="module")
def rows():
    return list(study(samples=(10, 1000), steps=STEPS, decays=(1.0, 1.5), seeds=3))


def of(rows, method):
    return [r for r in rows if r.method == method]


def test_repaired_moments_cost_little_where_clamped_ones_cost_much(rows):
    assert len(rows) == 2 * 2 * 2 * 3
    for clamped, repaired in zip(of(rows, "clamped"), of(rows, "regularised"), strict=True):
        for k, lost, kept in zip(STEPS, clamped.mean, repaired.worst, strict=True):
            assert lost >= 0.5, f"{clamped} K = {k}"
            assert -1e-9 <= kept <= 0.05, f"{repaired} K = {k}"


def test_a_steep_spectrum_from_few_samples():
    """The hardest case: single seeds lose up to 0.13 at K = 10, where even spacing loses 1.3."""
    clamped, repaired, even = study(samples=(10,), steps=STEPS, schedules=("cosine",), decays=(2.0,), seeds=8)
    assert min(clamped.mean) > 2
    assert max(repaired.mean) <= 0.05
    assert even.mean[0] > 1


def test_clamped_moments_lose_to_even_steps(rows):
    for clamped, even, repaired in zip(of(rows, "clamped"), of(rows, "even"), of(rows, "regularised"), strict=True):
        assert min(clamped.mean) > max(even.mean[1:])
        if even.mean[0] > 0.2:  # where there is something to be gained
            assert repaired.mean[0] < 0.2 * even.mean[0]


def test_the_plot_is_drawn(rows, tmp_path):
    pytest.importorskip("matplotlib")
    plot(rows, STEPS, tmp_path / "regret.png")
    assert (tmp_path / "regret.png").stat().st_size > 10_000
