"""examples/train_ddo: rounds on two ranks, killed and taken up again; what it reads, scores and refuses."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import spawn
from torch import nn

pytest.importorskip("accelerate")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from train_ddo import data, networks, settings, training

sys.path.pop(0)  # other tests mean other modules by the names of what is there


class Tiny(nn.Module):
    """EDM's preconditioning around two convolutions."""

    def __init__(self, classes=0):
        super().__init__()
        self.inp, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.noise, self.label = nn.Linear(1, 8), nn.Embedding(max(classes, 1), 8)
        self.label.requires_grad_(classes > 0)

    def forward(self, x, sigma, label=None):
        s = sigma[:, None, None, None]
        norm = (s.square() + 0.25).sqrt()
        h = self.inp(x / norm) + self.noise(sigma.log()[:, None] / 4)[:, :, None, None]
        if label is not None:
            h = h + self.label(label)[:, :, None, None]
        return x * 0.25 / norm.square() + self.out(nn.functional.silu(h)) * 0.5 * s / norm


class Drawing(Tiny):
    """With noise of its own, from PyTorch's global generator."""

    def forward(self, x, sigma, label=None):
        return super().forward(x, sigma, label) + 1e-3 * torch.randn_like(x)


def of_two_classes():
    return Tiny(2)


def frozen():
    return Tiny().requires_grad_(False)


def half_channels():
    return nn.Conv2d(3, 1, 1)


def features():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 5))


def arguments(out, model="test_train_ddo:Tiny", **options):
    """Two rounds of four steps that score twice; checkpoints on another beat."""
    options = {
        "model": model,
        "data": "random:40x3x8x8",
        "out": out,
        "batch": 4,
        "accumulate": 2,
        "fakes": 12,
        "rounds": 2,
        "steps": 4,
        "lr": 1e-3,
        "sampler-steps": 2,
        "sample-batch": 4,
        "metric-samples": 16,
        "metric-every": 2,
        "save-every": 3,
        "log-every": 1,
        **options,
    }
    return ["--cpu"] + [word for name, value in options.items() for word in (f"--{name}", str(value))]


def train(out, **options):
    return training.train(settings.parse(arguments(out, **options)))


def final(out):
    return torch.load(out / "model.pt", weights_only=True)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def on_two_ranks(rank, out, kill_at, options):
    """A run, at whose `kill_at`-th step both ranks die; launchers set these variables."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= ranks | {"OMP_NUM_THREADS": "1"}
    step, done = training.Run.train_step, []

    def counted(self, *args):
        done.append(self)
        if len(done) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    training.Run.train_step = counted
    train(out, **options)
    training.Run.train_step = step


def resumed_and_whole_on_two_ranks(rank, killed, whole, options):
    on_two_ranks(rank, killed, 0, options)
    on_two_ranks(rank, whole, 0, options)


def test_two_killed_ranks_go_on_to_the_same_weights(tmp_path):
    options = {"model": "test_train_ddo:of_two_classes", "classes": 2}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with pytest.raises(Exception, match="SIGKILL"):
        spawn(on_two_ranks, killed, 8, options)
    # The seventh step is the third of round 2, after which there is a checkpoint: neither the start nor the end.
    state = torch.load(killed / "state.pt", weights_only=True)
    assert (state["round"], state["step"], len(state["random"])) == (2, 3, 2)
    assert not (killed / "model.pt").exists()
    spawn(resumed_and_whole_on_two_ranks, killed, whole, options)
    assert same(final(killed), final(whole))
    first, last = (torch.load(whole / f"round-{k}/reference.pt", weights_only=True) for k in (1, 3))
    assert not torch.equal(first["inp.weight"], last["inp.weight"])
    # Fakes are the same whoever draws them: one process has those of two.
    one = tmp_path / "one"
    train(one, **options)
    for k in range(3):
        name = f"round-1/fakes-{k:05d}.npy"
        assert np.array_equal(np.load(one / name), np.load(whole / name))
    with pytest.raises(ValueError, match="ranks was 2, is 1"):
        train(whole, **options)


class Killed(BaseException):
    """Nothing catches it, so that what is on disk is what a kill leaves."""


def killing(function, at, name):
    """`function`, but dying in place of its `at`-th call, or of that which would put a file of this name in place."""
    calls = []

    def call(*args, **kwargs):
        if name is None or Path(args[-1]).name == name:
            calls.append(args)
            if len(calls) == at:
                raise Killed
        return function(*args, **kwargs)

    return call


POINTS = [
    (data.os, "replace", 1, "settings.json"),
    (data.os, "replace", 1, "reference.pt"),
    (data.os, "replace", 1, "fakes-00002.npy"),
    (data.os, "replace", 1, "best.pt"),
    (data.os, "replace", 2, "best.pt"),  # a better one, over that of step 2
    (data.os, "replace", 1, "state.pt"),
    (data.os, "replace", 2, "state.pt"),  # after round 2 got its reference
    (training.Run, "draw", 2, None),  # among the first fakes
    (training.Run, "score", 3, None),  # at the end of round 1
    (training.Run, "begin_round", 2, None),
    (training.Run, "train_step", 8, None),  # the last of round 2, after a checkpoint
    (training.Run, "export", 1, None),
]


DRAWING = "test_train_ddo:Drawing"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return train(out, model=DRAWING), final(out)


@pytest.mark.parametrize(("owner", "call", "at", "file"), POINTS, ids=[f"{c}-{f}-{at}" for _, c, at, f in POINTS])
def test_killed_anywhere_it_goes_on_to_the_same_weights(owner, call, at, file, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, killing(getattr(owner, call), at, file))
        with pytest.raises(Killed):
            train(tmp_path, model=DRAWING)
    drawn, draw = [], training.Run.draw
    monkeypatch.setattr(training.Run, "draw", lambda self, *args: drawn.append(args) or draw(self, *args))
    made = len(list(tmp_path.glob("round-*/fakes-*.npy")))
    torch.manual_seed(1)  # what the process did before must not matter
    scores = train(tmp_path, model=DRAWING)
    assert same(final(tmp_path), whole[1])
    assert scores == whole[0]
    assert sum(args[3] == training.FAKE_NOISE for args in drawn) == 6 - made  # what is there is not drawn again


def test_rounds_choose_by_the_score_and_more_can_follow(whole, tmp_path):
    options = {"model": DRAWING}
    scores = train(tmp_path, rounds=1, alpha=2, **options)
    assert [score[:2] for score in scores] == [(1, 0), (1, 2), (1, 4)]
    assert scores == whole[0][:3]
    best = torch.load(tmp_path / "round-1/best.pt", weights_only=True)
    assert same(best, torch.load(tmp_path / "round-2/reference.pt", weights_only=True))
    train(tmp_path, rounds=2, **options)
    assert same(final(tmp_path), whole[1])
    assert json.loads((tmp_path / "settings.json").read_text())["rounds"] == 2
    train(tmp_path, rounds=1, **options)  # fewer: the result of the first again
    assert same(final(tmp_path), best)
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert settings.differences(kept, kept | {"rounds": 3, "alpha": [2.0, 2.0, 9.0]}) == []
    with pytest.raises(ValueError, match=r"alpha was \[2.0, 2.0\], is \[2.0, 3.0\]; lr was 0.001, is 0.002"):
        training.train(settings.parse([*arguments(tmp_path, lr=2e-3, **options), "--alpha", "2", "3"]))


def test_alpha_and_the_learning_rate_of_each_step(tmp_path, monkeypatch):
    """A round begins at its reference, where the loss is (1 + alpha) ln 2."""
    found, step = [], training.Run.train_step

    def watched(self, *args):
        values = step(self, *args)
        found.append((values[0].item(), self.opt.param_groups[0]["lr"]))
        return values

    monkeypatch.setattr(training.Run, "train_step", watched)
    training.train(settings.parse([*arguments(tmp_path, warmup=4), "--alpha", "4", "0.5"]))
    losses, rates = zip(*found, strict=True)
    assert [losses[0], losses[4]] == pytest.approx([5 * np.log(2), 1.5 * np.log(2)])
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3] * 2)


def test_the_best_of_a_round_need_not_be_its_last(tmp_path, monkeypatch, capsys):
    found = iter([5.0, 1.0, 2.0])
    monkeypatch.setattr(training.Run, "score", lambda self, net: next(found))
    kept = []
    monkeypatch.setattr(
        training.Run,
        "keep",
        lambda self, net, path, keep=training.Run.keep: (kept.append((path.name, self.step)), keep(self, net, path)),
    )
    scores = train(tmp_path, rounds=1)
    assert scores == [(1, 0, 5.0), (1, 2, 1.0), (1, 4, 2.0)]
    assert [step for name, step in kept if name == "best.pt"] == [0, 2]
    found = iter([5.0, 6.0, 7.0, 4.0, 8.0])  # round 2 starts again from the reference, which round 1 did not better
    train(tmp_path / "two")
    first, second, third = (torch.load(tmp_path / f"two/round-{k}/reference.pt") for k in (1, 2, 3))
    assert same(first, second)
    assert not same(second, third)
    assert "round 1 did not improve on its reference" in capsys.readouterr().out


def test_accumulated_parts_add_up_to_the_batch(tmp_path, monkeypatch):
    """The gradient of a batch does not depend on the parts, where these draw the same noise."""
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: None)
    grads = []
    for parts in (1, 2):
        run = training.Run(settings.parse(arguments(tmp_path / str(parts), accumulate=parts)))
        run.resume()
        fakes = run.make_fakes()
        order = {kind: data.Shuffle(12, kind) for kind in (training.REAL, training.FAKE)}
        run.net.out.weight.data += 0.01  # away from the reference, where loss and gradient are no constants
        monkeypatch.setattr(run.schedule.__class__, "sample_t", lambda self, n, generator: torch.ones(n))
        monkeypatch.setattr(run.schedule.__class__, "add_noise", lambda self, x, noise, t: x)
        values = run.train_step(fakes, order)
        grads.append((run.net.out.weight.grad.clone(), values))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-5)


def test_a_unet_of_diffusers(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    config = tmp_path / "config.json"
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [8]}
    config.write_text(
        json.dumps(blocks | {"sample_size": 8, "norm_num_groups": 4, "layers_per_block": 1, "num_class_embeds": 2})
    )
    train(tmp_path / "a", model=config, classes=2)
    net = networks.open_network(str(tmp_path / "a/model"), None, 2)
    assert isinstance(net.unet, diffusers.UNet2DModel)
    reference = torch.load(tmp_path / "a/round-3/reference.pt", weights_only=True)
    assert same(net.state_dict(), reference)
    # At the noise level of a timestep it is what the model's own scheduler makes of the prediction.
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    x_t, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    bar, label = scheduler.alphas_cumprod[t], torch.tensor([0, 1, 1])
    eps = net.unet(x_t, t, class_labels=label).sample
    x0 = torch.stack([scheduler.step(e, k, x).pred_original_sample for e, k, x in zip(eps, t, x_t, strict=True)])
    sigma = ((1 - bar) / bar).sqrt()
    torch.testing.assert_close(net.time(sigma), t.float(), rtol=0, atol=2e-2)
    got = net(x_t / bar.sqrt()[:, None, None, None], sigma, label)
    torch.testing.assert_close(got, x0, rtol=1e-3, atol=1e-3)
    for classes, kind, says in ((0, None, "--classes 0"), (2, "sample", "prediction-type is sample")):
        scheduler.save_pretrained(tmp_path / "a/model")
        with pytest.raises(ValueError, match=says):
            networks.open_network(str(tmp_path / "a/model"), kind, classes)


def test_the_sampler_solves_the_ode_of_a_gaussian():
    """Data of variance v: D = x v / (v + sigma²), and a path ends at sqrt(v / (v + sigma_max²)) of its start."""
    v = 0.25

    class Gaussian(nn.Module):
        def forward(self, x, sigma):
            return x * (v / (v + sigma.square()))[:, None, None, None]

    noise = torch.randn(4, 1, 2, 2, dtype=torch.float64)
    got = networks.sample(Gaussian(), noise, None, steps=256, sigma_min=0.002, sigma_max=80.0, rho=7.0)
    torch.testing.assert_close(got, noise * 80 * (v / (v + 80**2)) ** 0.5, rtol=5e-4, atol=0)


def test_frechet_by_parts():
    a, b = torch.randn(50, 3), 2 * torch.randn(40, 3) + 1
    parts = [networks.Moments.of(part) for part in a.split(7)]
    got = networks.frechet(sum(parts[1:], start=parts[0]), networks.Moments.of(b))
    A, B = (np.cov(x.numpy().astype(np.float64).T) for x in (a, b))
    roots = np.sqrt(np.linalg.eigvals(A @ B).real).sum()
    mean = ((a.double().mean(0) - b.double().mean(0)) ** 2).sum().item()
    assert got == pytest.approx(mean + np.trace(A) + np.trace(B) - 2 * roots, rel=1e-6)


def test_images_of_every_kind(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6), dtype=np.uint8)
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", images=x / 100, labels=np.array([0, 1, 2, 0, 1]))
    rows = torch.tensor([4, 0])
    plain = data.open_images("--data", str(tmp_path / "x.npy"))
    assert torch.equal(plain[rows], torch.from_numpy(x[[4, 0]]).float() / 127.5 - 1)
    assert plain.labels(rows) is None
    labelled = data.open_images("--data", str(tmp_path / "x.npz"))
    torch.testing.assert_close(labelled[rows], torch.from_numpy(x[[4, 0]] / 100).float())
    assert labelled.labels(rows).tolist() == [1, 0]
    rest, held = labelled.split(0.4, 0)
    both = torch.cat([rest[torch.arange(3)], held[torch.arange(2)]]).flatten(1).sum(1).sort().values
    torch.testing.assert_close(both, labelled[torch.arange(5)].flatten(1).sum(1).sort().values)
    image = pytest.importorskip("PIL.Image")
    for name, k in (("cat/1.png", 0), ("cat/0.png", 1), ("ant/0.png", 2)):
        (tmp_path / "f" / name).parent.mkdir(parents=True, exist_ok=True)
        image.fromarray(x[k].transpose(1, 2, 0)).save(tmp_path / "f" / name)
    folder = data.open_images("--data", str(tmp_path / "f"))
    assert torch.equal(folder[torch.arange(3)], torch.from_numpy(x[[2, 1, 0]]).float() / 127.5 - 1)
    assert folder.labels(torch.arange(3)).tolist() == [0, 1, 1]
    image.fromarray(x[0].transpose(1, 2, 0)[:2]).save(tmp_path / "f/cat/2.png")
    with pytest.raises(ValueError, match=r"cat/2.png is \(6, 2\).*resize"):
        data.open_images("--data", str(tmp_path / "f"))[torch.arange(4)]


def test_every_epoch_has_every_row_once():
    order = data.Shuffle(7, 3, 1)
    stream = order(0, 21).view(3, 7)
    assert all(sorted(epoch.tolist()) == list(range(7)) for epoch in stream)
    assert not torch.equal(stream[0], stream[1])
    assert torch.equal(order(5, 11), stream.flatten()[5:16])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"model": "test_train_ddo:none_such"}, "--model test_train_ddo:none_such"),
        ({"model": "test_train_ddo:features", "data": "random:40x3x4x4"}, r"does not take images \[2, 3, 4, 4\]"),
        ({"model": "test_train_ddo:half_channels", "data": "random:40x3x4x4"}, r"does not take images"),
        ({"model": "test_train_ddo:frozen"}, "without weights that require gradients"),
        ({"model": "builtins:dict"}, "must return a torch.nn.Module, got dict"),
        ({"data": "none/such"}, "there is no 'none/such'"),
        ({"data": "random:3x3"}, "four positive numbers"),
        ({"data": "random:3x3x8x8"}, "too few to hold some out"),
        ({"validation": "random:4x3x4x4"}, r"--validation is of \(3, 4, 4\)"),
        ({"classes": 1}, "labels go from 0 to 1"),
        ({"batch": 3}, "--batch 3 is not a multiple of 1 ranks times --accumulate"),
        ({"metric": "inception"}, "--metric must be pixels, fid or module:function"),
        ({"metric": "fid", "data": "random:40x4x8x8"}, "1 or 3 channels, not 4"),
        ({"metric": "test_train_ddo:none_such"}, "--metric test_train_ddo:none_such"),
        ({"lr": 1e30}, "lower --lr"),
    ],
)
def test_what_does_not_fit_is_refused(options, says, tmp_path):
    with pytest.raises((ValueError, TypeError, FloatingPointError), match=says):
        train(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": 0}, "--lr: 0 is not above 0"),
        ({"lr": "nan"}, "--lr: nan is not above 0"),
        ({"ema-decay": 1.5}, "--ema-decay: 1.5 is not at least 0, finite and at most 1"),
        ({"steps": "x"}, "--steps: invalid int value: 'x'"),
        ({"sigma-min": 100}, "--sigma-min must be below --sigma-max"),
        ({"preset": "imagenet"}, "invalid choice: 'imagenet'"),
        ({"preset": "cifar10"}, "give --classes, --alpha, --beta, --ema-decay"),
        ({"fid-weights": "x"}, "goes with --metric fid"),
        ({"prediction-type": "sample"}, "is for a UNet2DModel"),
    ],
)
def test_bad_arguments(options, says, tmp_path, capsys):
    with pytest.raises(SystemExit):
        settings.parse(arguments(tmp_path, **options))
    assert says in capsys.readouterr().err


def test_one_number_or_one_a_round(tmp_path, capsys):
    args = settings.parse([*arguments(tmp_path), "--alpha", "4", "2"])
    assert [settings.of_round(args.alpha, k) for k in (1, 2)] == [4, 2]
    assert [settings.of_round(args.beta, k) for k in (1, 2)] == [0.05, 0.05]
    with pytest.raises(SystemExit):
        settings.parse([*arguments(tmp_path), "--beta", "0.1", "0.05", "0.02"])
    assert "--beta must be one number or one for each of 2 rounds" in capsys.readouterr().err


def test_a_preset_fills_in_what_is_known(tmp_path):
    given = {"alpha": 4, "beta": 0.05, "ema-decay": 0.99}
    argv = [*arguments(tmp_path, preset="imagenet64", **given)]
    args = settings.parse(argv)
    assert (args.log_mean, args.log_std, args.classes, args.sampler_steps) == (-0.4, 1.0, 1000, 2)  # 2 is given
    assert all(preset.keys() <= settings.DEFAULTS.keys() for preset in settings.PRESETS.values())


def test_a_feature_network_of_the_users(tmp_path, monkeypatch):
    """Here one of random weights, which are the same however often the run is taken up."""
    options = {"metric": "test_train_ddo:features", "rounds": 1}
    whole = train(tmp_path / "a", **options)
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "train_step", killing(training.Run.train_step, 4, None))
        with pytest.raises(Killed):
            train(tmp_path / "b", **options)
    assert train(tmp_path / "b", **options) == whole
    assert len(whole) == 3


def test_what_is_refused_leaves_the_folder_free(tmp_path):
    with pytest.raises(ValueError, match="multiple"):
        train(tmp_path, batch=3)
    with pytest.raises(TypeError, match="Module"):
        train(tmp_path, model="builtins:dict")
    train(tmp_path, rounds=1)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"has a run without its settings.json"):
        train(tmp_path, rounds=1)


def test_only_ddp(tmp_path, monkeypatch):
    monkeypatch.setattr(training.Accelerator, "distributed_type", training.DistributedType.FSDP)
    with pytest.raises(ValueError, match="FSDP: only DDP is supported"):
        train(tmp_path)


def test_tensorboard_goes_on_at_the_checkpoint(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append(("from", purge_step))

        def add_scalar(self, name, value, step):
            assert np.isfinite(value)
            written.append((name, step))

        def close(self):
            written.append(("close", None))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "train_step", killing(training.Run.train_step, 4, None))
        with pytest.raises(Killed):
            train(tmp_path, rounds=1)
    assert [step for name, step in written if name == "distance"] == [0, 2]
    written.clear()
    train(tmp_path, rounds=1)
    step = [(name, 4) for name in ("loss", "delta_real", "delta_fake", "right", "distance")]
    assert written == [("from", 3), *step, ("close", None)]
