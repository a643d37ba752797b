"""The examples on real images: every script in a smoke run, on made-up images, and the parts that they share."""

import gzip
import math
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(
    p.stem for p in (EXAMPLES / "fashion").glob("*.py") if "\ndef main(" in p.read_text() and p.stem != "__main__"
)


def load(name):
    for needed in ("matplotlib", "safetensors", "tqdm"):
        pytest.importorskip(needed)
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return import_module(f"fashion.{name}")


def test_names():
    assert {"base", "ddo", "dmd", "analytic_dpm", "ddo_tokens", "jem"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_smoke(name, tmp_path, monkeypatch):
    # More threads than cores, as where tests run side by side, wait for one another a hundred times longer.
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    tables = load(name).main(["--smoke", "--out", str(tmp_path)])
    numbers = [float(x) for table in tables.values() for row in table.values() for x in row.values()]
    assert numbers
    assert all(math.isfinite(x) for x in numbers)
    assert list(tmp_path.glob("*.png")), "the script saved no picture"


@pytest.mark.parametrize("compressed", [True, False])
def test_data_are_read_and_split(compressed, tmp_path, monkeypatch):
    data = load("data")
    monkeypatch.setattr(data, "VALIDATION", 2)
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    for split in ("train", "t10k"):
        for kind, dims, values in (("images-idx3", (5, 28, 28), images), ("labels-idx1", (5,), torch.arange(5).byte())):
            raw = bytes([0, 0, 8, len(dims)]) + b"".join(n.to_bytes(4, "big") for n in dims) + values.numpy().tobytes()
            end = ".gz" if compressed else ""
            (tmp_path / f"{split}-{kind}-ubyte{end}").write_bytes(gzip.compress(raw) if compressed else raw)
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    found = data.load()
    assert [len(found.train), len(found.validation), len(found.test)] == [3, 2, 5]
    torch.testing.assert_close((found.test.images[:, 0] + 1) * 127.5, images.float())
    assert found.validation.labels.tolist() == [3, 4]
    torch.testing.assert_close(data.to_greys(found.test.images), found.test.images)
    assert data.to_greys(torch.tensor([-3.0, 0.001, 3.0])).tolist() == pytest.approx([-1, 1 / 255, 1], abs=1e-6)


def test_missing_data_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"apt install dataset-fashion-mnist.*torchvision.*FASHION_MNIST"):
        load("data").load()


def test_the_sampler_is_of_its_order():
    """Gaussian data of deviation 0.5, of which the exact solution is known."""
    networks = load("networks")

    def error(steps, order):
        sigmas = networks.karras(steps, 0.001, 10.0)
        model = lambda x, s, label: x * (0.25 / (0.25 + s**2))[:, None, None, None]  # noqa: E731
        noise = torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        exact = noise * 10 * (0.25 / (0.25 + 100)) ** 0.5
        return float((networks.solve(model, noise, torch.zeros(8), sigmas, order) - exact).abs().max())

    assert error(64, 1) < 0.1
    assert error(64, 2) < error(64, 1) / 8
    assert 2.5 < error(32, 2) / error(64, 2) < 6  # halving the steps' lengths: four times
    assert 1.5 < error(32, 1) / error(64, 1) < 2.5  # twice


def test_tokens():
    tokens = load("tokens")
    grey = torch.randint(0, 16, (3, 196), generator=torch.Generator().manual_seed(0))
    image = grey.float().view(3, 1, 14, 14) * 2 / 15 - 1
    assert torch.equal(tokens.to_tokens(image.repeat_interleave(2, 2).repeat_interleave(2, 3)), grey)
    assert tokens.to_images(grey).shape == (3, 1, 28, 28)

    torch.manual_seed(0)
    model = tokens.Transformer(width=12, layers=2).eval()
    label = torch.tensor([1, 7, 3])
    written = model.write(label, torch.Generator().manual_seed(5))
    # What was drawn one by one, with keys and values kept, is what the logits of the whole sequence draw.
    noise = torch.rand(196, 3, 16, generator=torch.Generator().manual_seed(5)).transpose(0, 1)
    with torch.no_grad():
        scores = model(label, written) - torch.log(-torch.log(noise))
    assert torch.equal(scores.argmax(2), written)
    # A token tells nothing of those before it.
    changed = written.clone()
    changed[:, 100:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(label, changed)[:, :101], model(label, written)[:, :101])


def test_scores():
    study, networks, data = load("study"), load("networks"), load("data")
    torch.manual_seed(0)
    split = data.made_up().train
    judge = study.Judge(split, networks.Classifier().eval())
    same = judge.scores(split.images, split.labels)
    assert same["distance"] == pytest.approx(0, abs=1e-6)
    assert same["precision"] == same["coverage"] == 1
    other = judge.scores(torch.randn(split.images.shape), split.labels)
    assert other["distance"] > 100 * same["distance"]
    assert other["precision"] < 0.5
    spread = study.Spread([1.0, 2.0, 3.0])
    assert (float(spread), spread.deviation, f"{spread:.4g}") == (2, 1, "2 ± 1")


def test_a_stopped_base_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    base, data = load("base"), load("data").load(smoke=True)
    whole, log = base.train_base(data, 4, 2, tmp_path / "whole.pt")
    assert [row["step"] for row in log] == [2, 4]

    class Stop(Exception):
        pass

    calls, weighted_error = [], base.weighted_error

    def stopping(*args):
        calls.append(args)
        if len(calls) == 2:
            raise Stop
        return weighted_error(*args)

    monkeypatch.setattr(base, "weighted_error", stopping)
    with pytest.raises(Stop):
        base.train_base(data, 4, 2, tmp_path / "stopped.pt")
    monkeypatch.setattr(base, "weighted_error", weighted_error)
    resumed, _ = base.train_base(data, 4, 2, tmp_path / "stopped.pt")
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_the_weights_are_what_the_page_says():
    data, networks, tokens = load("data"), load("networks"), load("tokens")
    try:
        test = data.load().test[:1000]
    except FileNotFoundError:
        pytest.skip("Fashion-MNIST is not on this machine")
    classifier = networks.load_weights(networks.Classifier(), networks.WEIGHTS / "classifier.safetensors")
    assert (classifier(test.images).argmax(1) == test.labels).double().mean() > 0.88
    base = networks.load_weights(networks.Denoiser(), networks.WEIGHTS / "base.safetensors")
    noise = torch.randn(test.images[:200].shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.full((200,), 0.5)
    denoised = base(test.images[:200] + 0.5 * noise, sigma, test.labels[:200])
    assert (denoised - test.images[:200]).square().mean() < 0.05  # of 0.25
    writer = networks.load_weights(tokens.Transformer(), networks.WEIGHTS / "tokens.safetensors")
    assert tokens.token_nll(writer, test) < 1.3  # of log 16 = 2.8
