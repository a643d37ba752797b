"""Rounds of self-play: fakes, training steps, scores, checkpoints."""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

from fastgen import NoiseSchedule, ddo_loss

from .data import Images, Shuffle, open_images, seed_of, write_whole
from .networks import Moments, UNetDenoiser, denoise, frechet, open_features, open_network, sample
from .settings import FREE, SEARCHED, differences, of_round

# The streams of random numbers, told apart by the second number of their seeds. 0 splits the data.
WEIGHTS, FEATURES, STEPS, REAL, FAKE, FAKE_NOISE, METRIC_NOISE = range(1, 8)
DDP = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Fakes:
    """Samples of a round's reference in chunks on disk, read as memory maps."""

    def __init__(self, folder: Path, total: int, chunk: int, classes: int) -> None:
        self.folder, self.total, self.chunk, self.classes = folder, total, chunk, classes
        # A map holds a file open, of which a process may have a thousand.
        self._map = lru_cache(maxsize=256)(lambda k: np.load(self.path(k), mmap_mode="r"))

    def __len__(self) -> int:
        return self.total

    def path(self, k: int) -> Path:
        """Chunk k's file."""
        return self.folder / f"fakes-{k:05d}.npy"

    def chunks(self) -> list[tuple[int, Tensor]]:
        """Each chunk's number and rows."""
        return list(enumerate(torch.arange(self.total).split(self.chunk)))

    def labels(self, index: Tensor) -> Tensor | None:
        """As many of each class as of any other."""
        return index % self.classes if self.classes else None

    def __getitem__(self, index: Tensor) -> Tensor:
        return torch.from_numpy(np.stack([self._map(i // self.chunk)[i % self.chunk] for i in index.tolist()]))


class Run:
    """A run in its folder, on one of the ranks."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.accelerator = Accelerator(cpu=args.cpu, mixed_precision="no")
        self.device, self.ranks = self.accelerator.device, self.accelerator.num_processes
        self.rank, self.main = self.accelerator.process_index, self.accelerator.is_main_process
        if self.accelerator.distributed_type not in DDP:
            raise ValueError(
                f"accelerate is set to {self.accelerator.distributed_type}: only DDP is supported, as the average of"
                " the weights and the reference are whole on each rank"
            )
        if args.batch % (self.ranks * args.accumulate):
            raise ValueError(f"--batch {args.batch} is not a multiple of {self.ranks} ranks times --accumulate")
        settings = self._settings_of_folder()
        self._open_data()
        self.schedule = NoiseSchedule.edm(sigma_data=args.sigma_data, log_mean=args.log_mean, log_std=args.log_std)
        # Random weights are the same on every rank, and each time.
        torch.manual_seed(seed_of(args.seed, FEATURES))
        self.features = open_features(args.metric, args.fid_weights, self.device)
        self.real_moments = self._moments(
            len(self.validation), lambda rows: self.validation[rows].to(self.device), "validation images"
        )
        torch.manual_seed(seed_of(args.seed, WEIGHTS))
        # Dropout is off in DDO: eval() turns it off, and nothing here calls train().
        self.net = open_network(args.model, args.prediction_type, args.classes).float().to(self.device).eval()
        self.reference = copy.deepcopy(self.net).requires_grad_(False)
        self.average = copy.deepcopy(self.net).requires_grad_(False)
        self._check_network()
        self.opt = torch.optim.Adam(self.net.parameters(), lr=args.lr)
        self.model = self.accelerator.prepare(self.net)
        self.generator = torch.Generator(self.device)
        self.round, self.step, self.best = 1, 0, float("inf")
        self.scores: list[tuple[int, int, float]] = []  # round, step, distance; step 0 is the reference
        self.writer: Any = None
        if self.main:  # now that all fits
            write_whole(args.out / "settings.json", lambda f: f.write(json.dumps(settings, indent=1).encode()))

    # What a run needs before its first step

    def _settings_of_folder(self) -> dict[str, Any]:
        """What settings.json is to say; a folder that has a run with others is refused."""
        given = {k: v for k, v in vars(self.args).items() if k not in FREE} | {"ranks": self.ranks}
        self.args.out.mkdir(parents=True, exist_ok=True)
        file = self.args.out / "settings.json"
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if other := differences(kept, given):
                raise ValueError(f"--out {self.args.out} has a run with other settings: {'; '.join(other)}")
            if kept["rounds"] > given["rounds"]:
                given = kept
        elif (self.args.out / "state.pt").exists() or (self.args.out / "round-1").exists():
            raise ValueError(f"--out {self.args.out} has a run without its settings.json")
        return given

    def _open_data(self) -> None:
        args = self.args
        self.images: Images = open_images("--data", args.data)
        if args.validation is None:
            self.images, self.validation = self.images.split(args.validation_share, args.seed)
        else:
            self.validation = open_images("--validation", args.validation)
            if self.validation.shape != self.images.shape:
                raise ValueError(f"--validation is of {self.validation.shape}, --data of {self.images.shape}")
        if args.classes:
            self.images.check_labels(args.classes)
        if args.metric == "fid" and self.images.shape[0] not in (1, 3):
            raise ValueError(
                f"--metric fid is of images with 1 or 3 channels, not {self.images.shape[0]}: decode latents"
                " in a network of --metric module:function"
            )

    def _check_network(self) -> None:
        x = torch.zeros(2, *self.images.shape, device=self.device)
        label = torch.zeros(2, dtype=torch.long, device=self.device) if self.args.classes else None
        try:
            with torch.no_grad():
                out = denoise(self.net, x, x.new_ones(2), label)
        except (TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"--model does not take images {list(x.shape)} of --data: {error}") from error
        if out.shape != x.shape:
            raise ValueError(f"--model must return clean images {list(x.shape)}, got {list(out.shape)}")

    def open_tensorboard(self) -> None:
        """Where it is installed. What a run that was killed logged after its last checkpoint is dropped."""
        if not self.main:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self.writer = SummaryWriter(str(self.args.out / "tensorboard"), purge_step=self.all_steps())

    def all_steps(self) -> int:
        return (self.round - 1) * self.args.steps + self.step

    def log(self, **values: float) -> None:
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(name, value, self.all_steps())

    def bar(self, total: int, desc: str, done: int = 0, leave: bool = False) -> Any:
        return tqdm(total=total, initial=done, desc=desc, leave=leave, disable=not self.main, file=sys.stderr)

    # Samples and scores

    def draw(self, net: nn.Module, rows: Tensor, label: Tensor | None, *seed: int) -> Tensor:
        """Samples of a network, the same whichever rank draws them, and whatever it drew before."""
        a = self.args
        generator = torch.Generator(self.device).manual_seed(seed_of(a.seed, *seed))
        noise = torch.randn(len(rows), *self.images.shape, generator=generator, device=self.device)
        label = None if label is None else label.to(self.device)
        levels = {"sigma_min": a.sigma_min, "sigma_max": a.sigma_max, "rho": a.rho}
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed_of(a.seed, *seed, 1))  # for a network that draws by itself
            return sample(net, noise, label, steps=a.sampler_steps, **levels)

    @torch.no_grad()
    def _moments(self, total: int, images: Callable[[Tensor], Tensor], desc: str) -> Moments:
        """Moments of the features of `total` images, each chunk of which one rank gets by its rows."""
        chunks = torch.arange(total).split(self.args.sample_batch)[self.rank :: self.ranks]
        own: list[Moments] = []
        with self.bar(len(chunks), desc) as bar:
            for rows in chunks:
                own.append(Moments.of(self.features(images(rows))))
                bar.update()
        # A rank that had no chunk must know the width to join the sum.
        width = max(gather_object([own[0].total.numel() if own else 0]))
        zeros = torch.zeros(width, dtype=torch.float64, device=self.device)
        summed = sum(own, start=Moments(zeros.new_zeros(()), zeros, torch.outer(zeros, zeros)))
        parts = (summed.count, summed.total, summed.outer)
        return Moments(*(self.accelerator.reduce(part, reduction="sum") for part in parts))

    def score(self, net: nn.Module) -> float:
        """The Frechet distance of samples of `net` to the validation images; from the same noise each time."""
        samples, classes = self.args.metric_samples, self.args.classes

        def images(rows: Tensor) -> Tensor:
            return self.draw(net, rows, rows % classes if classes else None, METRIC_NOISE, int(rows[0]))

        moments = self._moments(samples, images, "samples to score")
        if not bool(moments.outer.isfinite().all()):
            raise FloatingPointError(f"samples at step {self.step} of round {self.round} are not finite: lower --lr")
        # All ranks go on by the same number, to the bit.
        return float(broadcast_object_list([frechet(moments, self.real_moments)])[0])

    def make_fakes(self) -> Fakes:
        """Draws what is missing of the round's fakes, each rank its chunks."""
        fakes = Fakes(self.folder(), self.args.fakes, self.args.sample_batch, self.args.classes)
        own = fakes.chunks()[self.rank :: self.ranks]
        with self.bar(len(own), f"fakes of round {self.round}") as bar:
            for k, rows in own:
                if not fakes.path(k).exists():
                    x = self.draw(self.reference, rows, fakes.labels(rows), FAKE_NOISE, self.round, k).cpu().numpy()
                    write_whole(fakes.path(k), partial(np.save, arr=x))
                bar.update()
        self.accelerator.wait_for_everyone()
        return fakes

    # Checkpoints

    def folder(self, number: int | None = None) -> Path:
        path: Path = self.args.out / f"round-{self.round if number is None else number}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def save(self) -> None:
        """The whole state, in one file. At a round's start it is the round's number: the reference has the weights."""
        random = {"generator": self.generator.get_state(), "cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        state: dict[str, Any] = {"round": self.round, "step": self.step, "best": self.best, "scores": self.scores}
        state["random"] = gather_object([random])
        if self.step:
            state |= {"model": self.net.state_dict(), "average": self.average.state_dict()}
            state["optimizer"] = self.opt.state_dict()
        if self.main:
            write_whole(self.args.out / "state.pt", lambda f: torch.save(state, f))
        self.accelerator.wait_for_everyone()

    def keep(self, net: nn.Module, path: Path) -> None:
        """A network's weights in a file of their own."""
        if self.main:
            write_whole(path, lambda f: torch.save(net.state_dict(), f))
        self.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Takes up the checkpoint, if there is one, or begins round 1."""
        first, state = self.folder(1) / "reference.pt", None
        there = first.exists()
        self.accelerator.wait_for_everyone()  # before one rank writes what another looks for
        if (self.args.out / "state.pt").exists():
            state = torch.load(self.args.out / "state.pt", map_location="cpu", weights_only=True)
            self.round, self.step, self.best = state["round"], state["step"], state["best"]
            self.scores = [tuple(score) for score in state["scores"]]
        elif not there:
            self.keep(self.net, first)
        if self.round > self.args.rounds:
            return
        if state is None or self.step == 0:
            self.begin_round()
            return
        self.reference.load_state_dict(self._weights(self.folder() / "reference.pt"))
        self.net.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.opt.load_state_dict(state["optimizer"])
        random = state["random"][self.rank]
        self.generator.set_state(random["generator"])
        torch.set_rng_state(random["cpu"])
        if "cuda" in random and self.device.type == "cuda":
            torch.cuda.set_rng_state(random["cuda"], self.device)

    @staticmethod
    def _weights(path: Path) -> dict[str, Tensor]:
        return torch.load(path, map_location="cpu", weights_only=True)

    # The rounds

    def begin_round(self) -> None:
        weights = self._weights(self.folder() / "reference.pt")
        for net in (self.reference, self.net, self.average):
            net.load_state_dict(weights)
        self.opt.state.clear()
        seed = self.args.seed, STEPS, self.round, self.rank
        self.generator.manual_seed(seed_of(*seed))
        torch.manual_seed(seed_of(*seed, 1))  # for a network that draws by itself

    def play_round(self) -> None:
        """One round from where it stands; then the state is at the start of the next."""
        a = self.args
        fakes = self.make_fakes()
        if not any(score[0] == self.round for score in self.scores):
            self.best = self.best if self.round > 1 else self.score(self.reference)
            self.keep(self.reference, self.folder() / "best.pt")
            self.record(self.best)
        order = {
            kind: Shuffle(len(rows), a.seed, kind, self.round) for kind, rows in ((REAL, self.images), (FAKE, fakes))
        }
        with self.bar(a.steps, f"DDO round {self.round}", self.step, leave=True) as bar:
            while self.step < a.steps:
                values = self.train_step(fakes, order)
                if self.step % a.log_every == 0 or self.step == a.steps:
                    bar.set_postfix(self.check(values))
                bar.update()
                if self.step % a.metric_every == 0 or self.step == a.steps:
                    distance = self.score(self.average)
                    if distance < self.best:
                        self.best = distance
                        self.keep(self.average, self.folder() / "best.pt")
                    self.record(distance)
                if self.step % a.save_every == 0 and self.step < a.steps:
                    self.save()
        if self.main and self.best == next(score for number, _, score in self.scores if number == self.round):
            tqdm.write(f"round {self.round} did not improve on its reference, which the next starts from again")
        self.reference.load_state_dict(self._weights(self.folder() / "best.pt"))
        self.keep(self.reference, self.folder(self.round + 1) / "reference.pt")
        self.round, self.step = self.round + 1, 0
        self.save()

    def record(self, distance: float) -> None:
        self.scores.append((self.round, self.step, distance))
        self.log(distance=distance)
        if self.main:
            name = f"step {self.step}" if self.step else "reference"
            tqdm.write(f"round {self.round}, {name}: Frechet distance ({self.args.metric}) {distance:.5g}")

    def train_step(self, fakes: Fakes, order: dict[int, Shuffle]) -> Tensor:
        """One step of Adam; returns loss, mean delta of real images and of fakes, and how often their sign is right."""
        a = self.args
        alpha, beta = of_round(a.alpha, self.round), of_round(a.beta, self.round)
        each = a.batch // self.ranks
        start = self.step * a.batch + self.rank * each
        i, j = order[REAL](start, each), order[FAKE](start, each)
        for group in self.opt.param_groups:
            group["lr"] = a.lr * min(1.0, (self.step + 1) / max(1, a.warmup))
        values = torch.zeros(4, device=self.device)
        self.opt.zero_grad()
        parts = each // a.accumulate
        for k in range(a.accumulate):
            mine = slice(k * parts, (k + 1) * parts)
            last = k == a.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, delta = self.loss(fakes, i[mine], j[mine], alpha, beta)
                self.accelerator.backward(loss / a.accumulate)
            right = (delta[:parts] > 0).float().mean() + (delta[parts:] < 0).float().mean()
            found = torch.stack([loss.detach(), delta[:parts].mean(), delta[parts:].mean(), right / 2])
            values += found / a.accumulate
        self.opt.step()
        self.step += 1
        self.update_average()
        return values

    def loss(self, fakes: Fakes, i: Tensor, j: Tensor, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
        """Of real images i and fakes j; row k of either has the same noise level and noise."""
        n = len(i)
        x = torch.cat([self.images[i], fakes[j]]).to(self.device)
        label = None
        if self.args.classes:
            real, fake = self.images.labels(i), fakes.labels(j)
            assert real is not None
            assert fake is not None
            label = torch.cat([real, fake]).to(self.device)
        sigma = self.schedule.sample_t(n, generator=self.generator).repeat(2)
        noise = torch.randn(x[:n].shape, generator=self.generator, device=self.device).repeat(2, 1, 1, 1)
        noisy = self.schedule.add_noise(x, noise, sigma)
        with torch.no_grad():
            ref_pred = denoise(self.reference, noisy, sigma, label)
        pred = denoise(self.model, noisy, sigma, label)
        is_real = torch.arange(2 * n, device=self.device) < n
        weight = self.schedule.edm_weight(sigma)
        return ddo_loss(pred, ref_pred, x, is_real, weight=weight, alpha=alpha, beta=beta, return_delta=True)

    def update_average(self) -> None:
        decay = min(self.args.ema_decay, self.step / (self.step + 10))  # short at first: it starts at the reference
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.net.parameters()), 1 - decay)
            for average, buffer in zip(self.average.buffers(), self.net.buffers(), strict=True):
                average.copy_(buffer)

    def check(self, values: Tensor) -> dict[str, str]:
        """Logs what a step returned, as means over the ranks; stops where it is not finite."""
        loss, real, fake, right = self.accelerator.reduce(values, reduction="mean").tolist()
        if not np.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {self.step} of round {self.round}: lower --lr")
        self.log(loss=loss, delta_real=real, delta_fake=fake, right=right)
        return {"loss": f"{loss:.4g}", "right": f"{right:.2f}"}

    def export(self) -> Path:
        """What the last round chose, for use elsewhere."""
        self.reference.load_state_dict(self._weights(self.folder(self.args.rounds + 1) / "reference.pt"))
        if isinstance(self.reference, UNetDenoiser):
            path: Path = self.args.out / "model"
            if self.main:
                self.reference.unet.save_pretrained(path)
        else:
            path = self.args.out / "model.pt"
            self.keep(self.reference, path)
        self.accelerator.wait_for_everyone()
        return path


def train(args: argparse.Namespace) -> list[tuple[int, int, float]]:
    """All rounds, from the start or the checkpoint; returns (round, step, distance) of every score."""
    # Convolutions would take TF32 on GPUs, whose rounding is of the size of the differences that the loss is about.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    run = Run(args)
    for name, (low, high) in SEARCHED.items():
        outside = [x for x in getattr(args, name) if not low <= x <= high]
        if args.preset and outside and run.main:
            tqdm.write(f"note: {name} {outside} is outside of what the paper searched, {low:g} to {high:g}")
    run.resume()
    run.open_tensorboard()
    while run.round <= args.rounds:
        run.play_round()
        if run.round <= args.rounds:
            run.begin_round()
    path = run.export()
    if run.main:
        tqdm.write(f"done: {path}")
    if run.writer is not None:
        run.writer.close()
    return run.scores
