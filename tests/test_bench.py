"""``python -m fastgen bench``: its figures, its budget, and what it refuses. Timings themselves are not tested."""

import json
import math
import re

import pytest
import torch
from conftest import DEVICE

import fastgen
from fastgen.__main__ import main
from fastgen.core import bench, timing

FUNCTIONS = ["ddo_loss", "dmd_loss", "diffusion_nft_loss", "generalized_jsd_loss", "token_logprob"]


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    shapes = {"image": (4, 3, 8, 8), "vocabulary": (4, 50)}
    monkeypatch.setattr(bench, "SHAPES", {"cpu": shapes, "cuda": shapes})
    monkeypatch.setattr(timing, "POOL_BYTES", {"cpu": 1 << 12, "cuda": 1 << 12})
    monkeypatch.setattr(timing, "ROUNDS", {"cpu": 2, "cuda": 2})


def run(capsys, *options):
    assert main(["bench", "--device", DEVICE, *options]) == 0
    return capsys.readouterr().out


def test_the_figures_are_finite_and_fit_each_other(capsys):
    found = json.loads(run(capsys, "--json", "--no-compile"))
    assert found["fastgen"] == fastgen.__version__
    assert [row["function"] for row in found["rows"]] == FUNCTIONS
    for row in found["rows"]:
        assert row["missing"] == {}
        assert list(row["variants"]) == ["eager", "fastgen"]
        for entry in row["variants"].values():
            assert all(0 < value < math.inf for value in entry.values())
            ratio = entry["microseconds"] / row["variants"]["fastgen"]["microseconds"]
            assert entry["times_fastgen"] == pytest.approx(ratio)
            rate = row["floor_bytes"] / entry["microseconds"] * 1e-3  # GB/s
            assert entry["share_of_copy"] == pytest.approx(rate / row["copy_gb_per_s"])
    # pred, ref_pred, target and the gradient; the student's and the teacher's logits and the gradient
    size = bench.DTYPES[DEVICE].itemsize
    assert [found["rows"][i]["floor_bytes"] for i in (0, 3)] == [4 * 768 * size, 3 * 200 * size]


def test_the_table_has_a_line_for_each_variant(capsys):
    out = run(capsys, "--no-compile", "--seconds", "60")
    names = "|".join(FUNCTIONS)
    figures = r" +\d+\.\d +\d+\.\d\d × +\d+%"
    assert (
        re.findall(rf"^({names}) +eager{figures}\n  4×[×\d]+ \w+ +fastgen +\d+\.\d +1\.00 × +\d+%$", out, re.M)
        == FUNCTIONS
    )
    assert "torch.compile  " not in out


@pytest.mark.parametrize("error", [RuntimeError("\n no compiler\nin sight"), ValueError()])
def test_it_goes_on_without_torch_compile(capsys, monkeypatch, error):
    def fails(function):
        def call(**tensors):
            raise error

        return call

    monkeypatch.setattr(torch, "compile", fails)
    out = run(capsys)
    reason = "RuntimeError: no compiler" if str(error) else "ValueError"
    assert len(re.findall(rf"torch\.compile +{reason}$", out, re.M)) == len(FUNCTIONS)
    assert len(re.findall(r" fastgen .* 1\.00 ×", out)) == len(FUNCTIONS)


class Clock:
    """A second passes whenever somebody looks."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1.0
        return self.now

    perf_counter = monotonic


def test_nothing_begins_after_the_time_is_over(monkeypatch):
    monkeypatch.setattr(bench, "time", Clock())
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or function)
    rows = bench.bench(DEVICE, seconds=8.0, progress=False)
    assert [row.function for row in rows] == FUNCTIONS
    assert rows[0].missing == {"torch.compile": bench.NO_TIME}  # it would take what is left of the other calls
    assert set(rows[0].variants) == {"eager", "fastgen"}
    assert rows[-1].missing == dict.fromkeys(bench.VARIANTS, bench.NO_TIME)
    assert rows[-1].variants == {}
    assert bench.NO_TIME in bench.table(rows)
    rows = bench.bench(DEVICE, seconds=1000.0, progress=False)
    assert all(row.missing == {} for row in rows)


def test_logits_fit_a_gpu(monkeypatch):
    row = 50 * 2 * bench.EAGER_BYTES  # bfloat16
    for free, rows in ((4 * row, 4), (4 * row - 1, 2), (row, 1), (0, 1)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 40))
        assert bench._shape("vocabulary", "cuda") == (rows, 50)
        assert bench._shape("image", "cuda") == (4, 3, 8, 8)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_seconds_are_positive(capsys, text):
    with pytest.raises(SystemExit):
        main(["bench", f"--seconds={text}"])
    assert "argument --seconds: must be a positive number" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["gpu", "cuda:99", "meta"])
def test_devices_are_there(capsys, text):
    with pytest.raises(SystemExit):
        main(["bench", "--device", text])
    assert "argument --device: must be a" in capsys.readouterr().err
