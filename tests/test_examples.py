"""Every example runs, in a smoke version of seconds."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    return execute(name)


def execute(name):
    sys.path.insert(0, str(EXAMPLES))
    try:
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def numbers(value):
    if isinstance(value, dict):
        for v in value.values():
            yield from numbers(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from numbers(v)
    elif isinstance(value, (int, float)):
        yield float(value)


RUNNER = execute("__main__").RUNNER
MARKDOWN = execute("runner").markdown


@pytest.mark.parametrize("name", RUNNER.names())
def test_smoke(name, tmp_path, monkeypatch):
    # More threads than cores, as where tests run side by side, wait for one another a hundred times longer.
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    results = load(name).main(["--smoke", "--out", str(tmp_path)])
    found = list(numbers(results))
    assert found
    assert all(math.isfinite(x) for x in found)
    assert list(tmp_path.glob("*.png")), "the example saved no picture"
    if name == "distributed":  # the same curve on two ranks as on one
        assert all(row["difference"] < 1e-6 for row in results.values())


def test_the_runner_writes_the_page(tmp_path, capfd):
    load("digits")  # skips where what the examples need is missing
    assert {"ddo_digits", "ddgan_digits", "gan_modes"} <= set(RUNNER.names())
    assert "digits" not in RUNNER.names()
    assert RUNNER.main(["gan_modes", "--smoke", "--folder", str(tmp_path)]) == 0
    page = (tmp_path / "README.md").read_text()
    assert "## gan_modes" in page
    assert "| forward KL" in page
    assert str(tmp_path) not in page
    for picture in re.findall(r"!\[.*\]\((.*)\)", page):
        assert (tmp_path / picture).exists()
    assert "results/gan_modes/gan_modes.png" in page
    assert MARKDOWN("a  b\n\nx    y\nz    w\n\n| t | u    v |") == (
        "a  b\n\n```\nx    y\nz    w\n```\n\n| t | u    v |"
    )


EXAMPLE = """\"\"\"{says}\"\"\"
import pathlib, sys

if __name__ == "__main__":
    out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
    (out / "{picture}.png").write_bytes(b"picture")
    print("{says}")
    sys.exit({code})
"""


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_the_runner_keeps_what_did_not_run_or_failed(jobs, tmp_path, monkeypatch, capfd):
    def write(name, **parts):
        (tmp_path / f"{name}.py").write_text(EXAMPLE.format(**parts))

    def page():
        text = (tmp_path / "README.md").read_text()
        pictures = re.findall(r"!\[.*\]\((.*)\)", text)
        assert all((tmp_path / picture).exists() for picture in pictures)
        return text, {Path(picture).stem for picture in pictures}

    monkeypatch.setattr(RUNNER, "here", tmp_path)
    write("first", says="first, in May", picture="a", code=0)
    write("second", says="second, in May", picture="b", code=0)
    write("third", says="third, in May", picture="c", code=3)
    run = ["--folder", str(tmp_path), "--jobs", jobs]
    assert RUNNER.main(run) == 1
    assert "third: FAILED" in capfd.readouterr().out
    text, pictures = page()
    assert "## third" not in text
    assert pictures == {"a", "b"}

    write("first", says="first, in June", picture="d", code=1)  # fails after it saved another picture
    write("second", says="second, in June", picture="e", code=0)
    assert RUNNER.main([*run, "second"]) == 0
    text, pictures = page()
    assert "\nfirst, in May\n\nRun on" in text
    assert "\nsecond, in June\n\nRun on" in text
    assert pictures == {"a", "e"}
    assert RUNNER.main([*run, "first"]) == 1
    text, pictures = page()
    assert "\nfirst, in May\n\nRun on" in text
    assert pictures == {"a", "e"}


def test_the_runner_refuses(capsys):
    refused = {"none_such": "no such example: none_such", "--smoke": "--smoke needs a --folder", "--jobs=0": "least 1"}
    for argv, says in refused.items():
        with pytest.raises(SystemExit):
            RUNNER.main([argv])
        assert says in capsys.readouterr().err
