"""Process groups of what is no loss: two ranks against one process, all in one pair of processes: 10 s."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from ranks import spawn
from torch.distributed.tensor.debug import CommDebugMode

import fastgen
from fastgen import ClassifierStatistics, DiffusionClassifier, NoiseSchedule, ReplayBuffer
from fastgen.core import distributed

SETTINGS = {
    "all stages": {"stages": [(2, 4), (5, 2), (9, 1)], "batch_size": 4},
    "early stops": {"stages": [(4, 3), (8, 3), (32, 1)], "batch_size": 7, "error_probability": 0.05},
}
STOP = 16  # calls of the model until an interruption: of two ranks, in the second stage


def denoiser(x_t, t, c):
    """Classes' means, plus an error that the pair's noise decides: paired differences are noisy."""
    return c + 0.3 * x_t


def images():
    generator = torch.Generator().manual_seed(0)
    points = 2 * torch.eye(5)
    x0 = points.repeat(2, 1) + 0.2 * torch.randn(10, 5, generator=generator)
    x0[0] = 0.5 * (points[0] + points[1])  # on the border of two classes: stays to the end
    return x0, points


class Model:
    """Counts its calls and their rows, and may be interrupted."""

    def __init__(self, stop=None):
        self.rows, self.stop = [], stop

    def __call__(self, x_t, t, c):
        if len(self.rows) == self.stop:
            raise KeyboardInterrupt
        self.rows.append(len(x_t))
        return denoiser(x_t, t, c)


def classify(settings, stop=None, statistics=None, group=None, rows=slice(None)):
    """The statistics after a run, which may be interrupted, and the rows of the model's calls."""
    x0, points = images()
    model = Model(stop)
    classifier = DiffusionClassifier(
        model, NoiseSchedule.edm(), prediction_type="sample", group=group, **SETTINGS[settings]
    )
    statistics = classifier.statistics(x0[rows], points) if statistics is None else ClassifierStatistics(**statistics)
    labels = None
    with contextlib.suppress(KeyboardInterrupt):
        labels = classifier.predict(x0[rows], points, statistics)
        assert torch.equal(labels, statistics.labels)
    return vars(statistics), model.rows


def kept(statistics):
    """As saving and loading leave them."""
    return {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in statistics.items()}


def refusal(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing is raised"


# -- What each rank does


def classified(rank):
    found = {}
    for name in SETTINGS:
        with CommDebugMode() as communication:
            found[name] = *classify(name, group=dist.group.WORLD), communication.get_total_counts()
        with CommDebugMode() as communication:
            mine = slice(6) if rank == 0 else slice(6, None)
            found[f"{name}, own images"] = *classify(name, rows=mine), communication.get_total_counts()
        # Two ranks go on from where one process was interrupted, and one from where two were.
        alone, _ = classify(name, stop=STOP)
        found[f"{name}, from one process"] = classify(name, statistics=kept(alone), group=dist.group.WORLD)
        both, _ = classify(name, stop=STOP, group=dist.group.WORLD)
        found[f"{name}, interrupted"] = kept(both)
        found[f"{name}, from two ranks"] = classify(name, statistics=both)
    x0, points = images()
    model = Model()
    classifier = DiffusionClassifier(
        model, NoiseSchedule.edm(), prediction_type="sample", stages=[(1, 1)], batch_size=2, group=dist.group.WORLD
    )
    found["one row left"] = classifier.predict(x0[1:2], points).tolist(), model.rows
    classifier = DiffusionClassifier(denoiser, NoiseSchedule.edm(), stages=[(2, 1)], group=dist.group.WORLD)
    found["other images"] = refusal(classifier.predict, x0 + rank, points)
    found["other classes"] = refusal(classifier.predict, x0, points.roll(rank, 0))
    half = classifier.statistics(x0, points)
    half.rows = rank
    found["other statistics"] = refusal(classifier.predict, x0, points, half)
    other = DiffusionClassifier(denoiser, NoiseSchedule.edm(), stages=[(2, 1)], group=dist.group.WORLD, seed=rank)
    found["other settings"] = refusal(other.predict, x0, points)
    return found


def buffer(group=None, **options):
    return ReplayBuffer(**{"capacity": 6, "shape": (3,), "seed": 7, "group": group, "reinit_rate": 0.5, **options})


def chains(replay):
    """Two rounds of JEM's: what was drawn, and what the buffer holds."""
    drawn = []
    for _ in range(2):
        start, index = replay.sample(4)
        end = fastgen.langevin_sample(torch.nn.Flatten(), start, steps=2, generator=replay.generator)
        replay.update(index, end)
        drawn += [start, end, index]
    return drawn, replay.samples.clone()


def sampled(rank):
    replay = buffer(dist.group.WORLD)
    found = {"fresh": replay.samples.clone(), "chains": chains(replay), "without a group": chains(buffer())}
    state = replay.state_dict()
    found["goes on"] = chains(replay)
    again = buffer(dist.group.WORLD, seed=1)
    again.load_state_dict(state)
    found["resumed"] = chains(again)
    states = [None, None]
    dist.all_gather_object(states, state)
    found["states"] = states
    again.load_state_dict(states)
    found["resumed from all"] = chains(again)
    found["another rank's"] = refusal(again.load_state_dict, states[1 - rank])
    found["one process's"] = refusal(again.load_state_dict, buffer().state_dict())
    # From a run of three ranks; and into buffers that are larger than what there is.
    three = [buffer(seed=seed, capacity=4).state_dict() for seed in range(3)]
    for name, capacity in (("shared", 6), ("room left", 8), ("no room", 5)):
        replay = buffer(dist.group.WORLD, capacity=capacity)
        noise = replay.samples.clone()
        replay.load_state_dict(three)
        found[name] = noise, replay.samples.clone(), replay.sample(4)
    return found


def trajectories(n=6, batch=5):
    generator = torch.Generator().manual_seed(0)
    t = torch.linspace(2, 0.1, n, dtype=torch.float64)
    x, d = (torch.randn(n, batch, 2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, d, t


METRICS, SHARES = ("l2", "l1", "deviation"), (3, 5)  # of five trajectories, the first rank's


def costs(rank):
    x, d, t = trajectories()
    found = {}
    for metric in METRICS:
        for share in SHARES:
            mine = slice(share) if rank == 0 else slice(share, None)
            with CommDebugMode() as communication:
                cost = fastgen.deviation_cost(x[:, mine], d[:, mine], t, metric=metric, group=dist.group.WORLD)
            found[metric, share] = cost, communication.get_total_counts()
    found["float32"] = fastgen.deviation_cost(x.float(), d.float(), t.float(), group=dist.group.WORLD).dtype
    found["other times"] = refusal(fastgen.deviation_cost, x, d, t - 0.01 * rank, group=dist.group.WORLD)
    found["other metric"] = refusal(fastgen.deviation_cost, x, d, t, metric=METRICS[rank], group=dist.group.WORLD)
    return found


def run(rank, out):
    torch.save((classified(rank), sampled(rank), costs(rank)), f"{out}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each rank found, of the three."""
    out = tmp_path_factory.mktemp("ranks")
    spawn(run, str(out))
    return list(zip(*(torch.load(out / f"{rank}.pt") for rank in range(2)), strict=True))


# -- The classifier


def assert_same(actual, expected):
    """Statistics of one evaluation in other batches."""
    for name, value in expected.items():
        if name == "errors":
            torch.testing.assert_close(actual[name], value, equal_nan=True)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(actual[name], value), name
        else:
            assert actual[name] == value, name


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_share_the_work_on_images_and_agree(name, ranks):
    expected, rows = classify(name)
    assert len(rows) > STOP
    (first, rows_first, collectives), (second, rows_second, _) = (found[name] for found in ranks[0])
    for statistics in (first, second):
        assert_same(statistics, expected)
    assert all(torch.equal(first[n].nan_to_num(-1), second[n].nan_to_num(-1)) for n in ("errors", "counts", "labels"))
    stages = len(SETTINGS[name]["stages"])
    assert expected["evaluations"] <= sum(rows_first) + sum(rows_second) <= expected["evaluations"] + stages
    assert len(rows_first) == len(rows_second) <= len(rows) // 2 + stages
    assert collectives == 1 + len(rows_first)


def test_a_rank_without_a_row_calls_the_model_all_the_same(ranks):
    for found in ranks[0]:
        assert found["one row left"] == ([1], [2, 1])


@pytest.mark.parametrize("name", SETTINGS)
def test_ranks_with_images_of_their_own_exchange_nothing(name, ranks):
    expected, _ = classify(name)
    parts = [found[f"{name}, own images"] for found in ranks[0]]
    assert [collectives for *_, collectives in parts] == [0, 0]
    for key, dim in (("errors", 1), ("counts", 0), ("labels", 0)):
        together = torch.cat([statistics[key] for statistics, *_ in parts], dim)
        torch.testing.assert_close(together, expected[key], equal_nan=True)


@pytest.mark.parametrize("name", SETTINGS)
def test_statistics_go_on_with_another_number_of_ranks(name, ranks):
    expected, _ = classify(name)
    for found in ranks[0]:
        interrupted = found[f"{name}, interrupted"]
        assert interrupted["stage"] == 1
        assert interrupted["rows"] > 0
        for key in ("from one process", "from two ranks"):
            statistics, rows = found[f"{name}, {key}"]
            assert_same(statistics, expected)
            assert 0 < sum(rows) < expected["evaluations"]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("other images", "x0 must be the same on all ranks"),
        ("other classes", "conditions must be the same on all ranks"),
        ("other statistics", "statistics: their rows must be the same on all ranks"),
        ("other settings", "the classifier's settings must be the same on all ranks"),
    ],
)
def test_all_ranks_refuse_what_they_do_not_have_in_common(key, message, ranks):
    for found in ranks[0]:
        assert found[key].startswith(f"ValueError: {message}")


# -- Langevin chains


def differs(first, second):
    return all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_ranks_of_one_seed_draw_differently_with_a_group_alone(ranks):
    first, second = ranks[1]
    assert torch.equal(first["fresh"], buffer().samples)  # rank 0 draws what one process does
    assert differs(first["fresh"], second["fresh"])  # no sample of one rank is the other's
    for mine, theirs in zip(first["chains"][0], second["chains"][0], strict=True):
        assert not torch.equal(mine, theirs)
    for alike in (first["chains"], first["without a group"], second["without a group"]):
        for mine, one in zip(alike[0], chains(buffer())[0], strict=True):
            assert torch.equal(mine, one)
    # Rank 1 of one seed is not rank 0 of the next.
    assert differs(second["fresh"], buffer(seed=8).samples)


def test_a_rank_resumes_its_own_chains(ranks):
    for rank, found in enumerate(ranks[1]):
        for key in ("resumed", "resumed from all"):
            for mine, expected in zip(found[key][0], found["goes on"][0], strict=True):
                assert torch.equal(mine, expected)
        assert found["states"][rank]["rank"].tolist() == [rank, 2]
        other = f"ValueError: state is that of rank {1 - rank} of 2, but this is rank {rank} of 2"
        assert found["another rank's"].startswith(other)
        assert found["one process's"].startswith("ValueError: state is that of rank 0 of 1")


def test_ranks_share_the_chains_of_another_number_of_ranks(ranks):
    pool = torch.cat([buffer(seed=seed, capacity=4).samples for seed in range(3)])
    for rank, found in enumerate(ranks[1]):
        for name in ("shared", "room left", "no room"):
            noise, samples, _ = found[name]
            mine = pool[rank::2][: len(noise)]
            assert torch.equal(samples[: len(mine)], mine)
            assert torch.equal(samples[len(mine) :], noise[len(mine) :])
    starts = [found["shared"][2][1] for found in ranks[1]]
    assert not torch.equal(*starts)
    # Two ranks' into one process.
    states = ranks[1][0]["states"]
    alone = buffer(capacity=12)
    alone.load_state_dict(states)
    assert torch.equal(alone.samples, torch.cat([state["samples"] for state in states]))
    assert not torch.equal(alone.sample(4)[1], buffer(capacity=12).sample(4)[1])


@pytest.mark.parametrize(
    ("states", "error", "message"),
    [
        ([], ValueError, "state must be one state or those of all ranks"),
        (None, TypeError, "state must be what state_dict"),
        ([buffer().state_dict(), 3], TypeError, r"state\[1\] must be what state_dict"),
        ([buffer().state_dict(), {}], ValueError, r"state\[1\] must have the keys"),
        ([buffer(shape=(4,)).state_dict()] * 2, ValueError, r"state\[0\]'s samples have shape \[6, 4\], not of \[3\]"),
    ],
)
def test_states_that_do_not_fit_change_nothing(states, error, message):
    replay = buffer()
    with pytest.raises(error, match=message):
        replay.load_state_dict(states)
    for mine, expected in zip(chains(replay)[0], chains(buffer())[0], strict=True):
        assert torch.equal(mine, expected)


# -- GITS' costs


@pytest.mark.parametrize("metric", METRICS)
def test_costs_are_the_means_over_all_ranks_trajectories(metric, ranks):
    expected = fastgen.deviation_cost(*trajectories(), metric=metric)
    for share in SHARES:
        (first, collectives), (second, _) = (found[metric, share] for found in ranks[2])
        assert torch.equal(first, second)
        torch.testing.assert_close(first, expected)
        assert collectives == 2


def test_costs_of_ranks_that_disagree_are_refused(ranks):
    for found in ranks[2]:
        assert found["other times"].startswith("ValueError: times must be the same on all ranks")
        assert found["other metric"].startswith("ValueError: metric must be the same on all ranks")
        assert found["float32"] == torch.float32


# -- Groups


@pytest.mark.parametrize(
    "call",
    [
        lambda: DiffusionClassifier(denoiser, NoiseSchedule.edm(), stages=[(2, 1)], group="world"),
        lambda: buffer("world"),
        lambda: fastgen.deviation_cost(*trajectories(), group="world"),
    ],
)
def test_what_is_no_group_is_refused(call):
    with pytest.raises(TypeError, match=r"^group must be a torch\.distributed process group"):
        call()


def test_fingerprints_tell_values_places_and_types_apart():
    a = torch.tensor([1.0, 2.0])
    others = [a.flip(0), -a, a.double(), a.half(), a.long(), a + 1e-6, a[:1]]
    assert distributed.fingerprint(torch.eye(5)) != distributed.fingerprint(torch.eye(5).roll(1, 0))
    prints = [int(distributed.fingerprint(t)) for t in (a, *others)]
    assert len(set(prints)) == len(prints)
    assert prints[0] == int(distributed.fingerprint(a.clone().expand(1, 2)))
    for t in (torch.tensor([True, False]), torch.tensor([1 + 2j, 3j]), torch.zeros(0)):
        assert isinstance(int(distributed.fingerprint(t)), int)
