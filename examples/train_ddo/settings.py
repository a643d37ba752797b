"""The command line, and the table of the paper's settings."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

# What is known of the settings of arXiv 2503.01103; none of these was run here. Noise levels and the ranges in which
# alpha and beta were searched, anew for each round, are the paper's; sigma_data, the ends of the sampler and its rho
# are those of EDM (arXiv 2206.00364), whose networks it tunes. Dropout is off and everything in float32, always.
# Learning rates, batches, lengths and numbers of rounds, of fakes, and the decay of the average are not in the table,
# and --preset asks for them.
_EDM = {"sigma_data": 0.5, "log_mean": -0.4, "log_std": 1.0, "sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}
PRESETS: dict[str, dict[str, Any]] = {
    # EDM's networks, unconditional or of 10 classes, which --classes has to say; 35 evaluations a sample.
    "cifar10": {**_EDM, "sampler_steps": 18},
    # EDM2-S, 1000 classes; 63 evaluations a sample.
    "imagenet64": {**_EDM, "sampler_steps": 32, "classes": 1000},
    # EDM2-L over the latents of Stable Diffusion's autoencoder, which --data has to be; 63 evaluations a sample.
    "imagenet512": {**_EDM, "sampler_steps": 32, "classes": 1000},
}
SEARCHED = {"alpha": (0.5, 50.0), "beta": (0.01, 0.1)}  # by the paper, over all of its diffusion models

# Without a preset. These are this script's own, and good for a first try at most.
DEFAULTS: dict[str, Any] = {
    **_EDM,
    "sampler_steps": 18,
    "classes": 0,
    "alpha": [2.0],
    "beta": [0.05],
    "lr": 1e-5,
    "batch": 64,
    "rounds": 2,
    "steps": 500,
    "fakes": 10000,
    "ema_decay": 0.999,
}
# May differ when a run goes on: they do not touch the weights.
FREE = {"out", "save_every", "log_every", "cpu"}


def _number(kind: type, low: float, high: float = float("inf"), *, open_low: bool = True) -> Callable[[str], Any]:
    """A converter for argparse that refuses what is out of range, NaN included."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not (low < value <= high or (not open_low and value == low)) or value in (float("inf"),):
            raise argparse.ArgumentTypeError(
                f"{text} is not {'above' if open_low else 'at least'} {low:g}, finite"
                + ("" if high == float("inf") else f" and at most {high:g}")
            )
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return convert


def parser() -> argparse.ArgumentParser:
    positive, count = _number(float, 0), _number(int, 0)
    natural = _number(int, 0, open_low=False)
    p = argparse.ArgumentParser(
        prog="train_ddo", description="Tune a diffusion model by Direct Discriminative Optimization (arXiv 2503.01103)."
    )

    def add(name: str, kind: Callable[[str], Any] = str, **options: Any) -> None:
        known = DEFAULTS.get(name.removeprefix("--").replace("-", "_"))
        if known is not None:
            default = " ".join(map(str, known)) if isinstance(known, list) else known
            options["help"] += f" (without a preset: {default})"
        p.add_argument(name, type=kind, **options)

    add(
        "--model",
        required=True,
        help="a folder with a UNet2DModel of diffusers (or with its pipeline), a .json of its"
        " configuration (random weights), or module:function, which returns a network called as"
        " net(x, sigma), net(x, sigma, label) with --classes, and returns the clean images",
    )
    add(
        "--data",
        required=True,
        help="a folder of images (subfolders are classes), a .npy or .npz of [N, C, H, W]"
        " (uint8, or floats to be taken as they are; in an .npz 'images' and 'labels'),"
        " or random[:NxCxHxW] for made-up ones",
    )
    add("--validation", help="the same for the images that choose the best weights; else a share of --data is held out")
    add("--validation-share", _number(float, 0, 0.9), default=0.1, help="that share; default 0.1")
    add("--out", Path, required=True, help="folder of the run, which goes on where it is if it is there")
    add("--preset", choices=sorted(PRESETS), help="the paper's settings, as far as they are known; none was ever run")
    add("--classes", natural, help="number of classes the network takes; 0 for none")
    add("--alpha", positive, nargs="+", help="weight of the fakes, one for all rounds or one for each")
    add("--beta", positive, nargs="+", help="inverse temperature, one for all rounds or one for each")
    add("--lr", positive, help="learning rate of Adam")
    add("--warmup", natural, default=0, help="steps over which a round raises it; default 0")
    add("--batch", count, help="real images a step, over all ranks, and as many fakes")
    add("--accumulate", count, default=1, help="parts into which a rank cuts its batch; default 1")
    add("--rounds", count, help="rounds of self-play")
    add("--steps", count, help="steps a round")
    add("--fakes", count, help="samples of the reference a round")
    add("--ema-decay", _number(float, 0, 1, open_low=False), help="of the average of the weights")
    add("--sigma-data", positive, help="standard deviation of the data, in the loss's weight")
    add("--log-mean", float, help="mean of ln sigma in training")
    add("--log-std", positive, help="standard deviation of ln sigma in training")
    add("--sampler-steps", _number(int, 1), help="of Heun's method; 2 n - 1 evaluations")
    add("--sigma-min", positive, help="the sampler's last noise level but 0")
    add("--sigma-max", positive, help="the sampler's first noise level")
    add("--rho", positive, help="how the sampler's levels are spread")
    add("--sample-batch", count, default=64, help="samples drawn at a time; default 64")
    add(
        "--metric",
        default="pixels",
        help="what the Frechet distance compares: pixels (averaged down to 8x8: no FID),"
        " fid (Inception by torch-fidelity), or module:function, which returns a network from images in [-1, 1] to"
        " [B, features]; default pixels",
    )
    add("--fid-weights", help="file of torch-fidelity's Inception; else it downloads it")
    add("--metric-samples", _number(int, 1), default=1000, help="samples a score; default 1000")
    add("--metric-every", count, help="steps between scores; by default one, at a round's end")
    add("--prediction-type", choices=("epsilon", "sample", "v_prediction"), help="of a UNet2DModel without a scheduler")
    add("--save-every", count, default=500, help="steps between checkpoints; default 500")
    add("--log-every", count, default=20, help="steps between lines in TensorBoard; default 20")
    add("--seed", natural, default=0, help="default 0")
    p.add_argument("--cpu", action="store_true", help="even where there is a GPU")
    return p


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The settings: what is given, else the preset's, else the defaults."""
    p = parser()
    args = p.parse_args(argv)
    known = DEFAULTS if args.preset is None else PRESETS[args.preset]
    missing = [name for name in DEFAULTS if getattr(args, name) is None and name not in known]
    if missing:
        flags = ", ".join("--" + name.replace("_", "-") for name in missing)
        ranges = "; ".join(f"it searched {k} from {a:g} to {b:g}" for k, (a, b) in SEARCHED.items())
        p.error(f"--preset {args.preset} leaves open what is not known of the paper ({ranges}): give {flags}")
    for name, value in known.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("alpha", "beta"):
        if len(getattr(args, name)) not in (1, args.rounds):
            p.error(f"--{name} must be one number or one for each of {args.rounds} rounds")
    if args.sigma_min >= args.sigma_max:
        p.error(f"--sigma-min must be below --sigma-max, got {args.sigma_min:g} and {args.sigma_max:g}")
    if args.metric_every is None or args.metric_every > args.steps:
        args.metric_every = args.steps
    if args.fid_weights is not None and args.metric != "fid":
        p.error("--fid-weights goes with --metric fid")
    if args.prediction_type is not None and ":" in args.model:
        p.error("--prediction-type is for a UNet2DModel: what module:function returns must return clean images")
    return args


def of_round(values: list[float], number: int) -> float:
    """The number for a round, counted from 1."""
    return values[0] if len(values) == 1 else values[number - 1]


def differences(kept: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """What keeps a run from going on with other settings. More rounds do not, nor what is said of new ones."""
    old, new = kept | {"rounds": 0}, given | {"rounds": 0}
    for settings, of in ((old, kept), (new, given)):
        for name in ("alpha", "beta"):
            rounds = range(1, min(kept["rounds"], given["rounds"]) + 1)
            settings[name] = [of_round(of[name], number) for number in rounds]
    return [f"{name} was {old.get(name)!r}, is {value!r}" for name, value in new.items() if old.get(name) != value]
