"""Compares the emulated CUDA kernels with the float64 reference. Run by tests/test_aot_cuda.py: LIBRARY KIND SIZES…

KIND is ``images`` or ``logits``, and SIZES are ``rows,elements,dtypes``: those of the streams in turn (``h``, ``b``,
``f``, ``d``).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

import torch
from torch import Tensor

sys.modules["fastgen._C"] = None  # type: ignore[assignment]  # its kernels would hold the CPU's place
import fastgen  # noqa: E402
from fastgen import reference  # noqa: E402
from fastgen.cases import CASES, FAMILIES, Case  # noqa: E402
from fastgen.core.accuracy import accurate  # noqa: E402
from fastgen.core.verify import results, widened  # noqa: E402

DTYPES = {"h": torch.float16, "b": torch.bfloat16, "f": torch.float32, "d": torch.float64}
# Relative to the largest element, where that is more than eager PyTorch's error.
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-5, torch.float64: 1e-13}
Layout = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, dict[str, Layout | None]] = {
    "images": {
        "plain": None,
        "misaligned": lambda t: torch.cat([t[:, :1], t], 1)[:, 1:],
        "padded": lambda t: torch.cat([t, t[:, :1].expand(-1, 8)], 1)[:, : t.shape[1]],
    },
    "logits": {
        "plain": None,
        "slices": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
        "padded": lambda t: torch.cat([t, t[..., :5]], -1)[..., : t.shape[-1]],
        # All streams an element past their allocations: like each other, unlike the gradient.
        "beyond": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    },
}
IN_EVERY_LAYOUT = {"elbo_error", "ddo_loss", "token_logprob"}
IN_EVERY_LAYOUT |= {f"generalized_jsd_loss-{which}" for which in ("0", "0.5", "1", "none")}


def compare(what: str, case: Case, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    exact, eager = results(case, reference, widened(tensors)), results(case, reference, tensors)
    got = results(case, fastgen, {n: loosely(t) if t.dtype == torch.bool else t for n, t in tensors.items()})
    for part, mine in got.items():
        truth = exact[part]
        assert mine.shape == truth.shape, f"{what} {part}: {mine.shape} is not {truth.shape}"
        if mine.numel() and not accurate(mine, eager[part], truth):
            error, largest = (mine.double() - truth).abs().max().item(), truth.abs().max().item() + 1e-30
            assert error <= TOLERANCE[mine.dtype] * largest, f"{what} {part}: error {error / largest:.3g}"
    return got


def loosely(flags: Tensor) -> Tensor:
    """The same flags, with other bytes than 1 for true."""
    odd = torch.tensor([255, 2, 128, 1], dtype=torch.uint8)[torch.arange(flags.numel()) % 4].reshape(flags.shape)
    loose = torch.empty_like(flags)  # in the same layout
    loose.view(torch.uint8).copy_(torch.where(flags, odd, 0))
    return loose


def check_offsets(what: str, size: int) -> None:
    """A constant between the rows of student and teacher costs no digits."""
    s = 3 * torch.randn(2, max(size, 50))
    t = s + 1e-2 * torch.randn_like(s)
    for beta in ("0", "0.5", "1"):
        case = CASES[f"generalized_jsd_loss-{beta}"]
        labels, limit = torch.zeros(2, dtype=torch.int64), torch.inf
        for x, y in ((s, t), (s + 1000, t), (s, t + 1000), (s - 1e4, t), (s, t - 1e4)):
            tensors = {"student_logits": x, "teacher_logits": y, "labels": labels}
            part = "gradient of student_logits"
            grad, want = results(case, fastgen, tensors)[part], results(case, reference, widened(tensors))[part]
            error = ((grad - want).norm() / want.norm()).item()
            assert error <= limit, f"{what} jsd {beta}: error {error:.3g}, allowed {limit:.3g}"
            # The first pair has no constant. Rows 1 % apart lose two digits of float32, a lost offset all of them.
            if limit == torch.inf:
                limit = 10 * error + 1e-5


def check_rows_far_apart(what: str, size: int) -> None:
    """What a sum of the hardware's 2^x is off from 1 is a hundred times as much in the center of a reverse divergence
    whose logarithms of probabilities differ by a hundred, unless the center is divided by that sum."""
    s, t = (torch.randn(64, max(size, 50)) for _ in range(2))
    s[:, :2] += 30
    t[:, 2] += 100
    tensors = {"student_logits": s, "teacher_logits": t, "labels": torch.zeros(64, dtype=torch.int64)}
    compare(f"{what} far apart", CASES["generalized_jsd_loss-1"], tensors)


def check_images(what: str, rows: int, size: int, dtypes: list[torch.dtype]) -> None:
    for family in ("elbo", "policy", "score_distillation", "sampling", "schedule", "analytic_dpm", "adversarial"):
        if rows == 0 and family in ("analytic_dpm", "adversarial"):  # means of nothing
            continue
        for case in FAMILIES[family]:
            for layout, arrange in LAYOUTS["images"].items():
                if arrange is not None and case.name not in IN_EVERY_LAYOUT:
                    continue
                tensors = case.inputs((rows, size), *dtypes, layout=arrange)
                if arrange is not None and "target" in tensors:  # one for all
                    tensors["target"] = tensors["target"][:1].expand(rows, -1)
                compare(f"{what} {case.name} {layout}", case, tensors)
    tensors = CASES["reverse_step-epsilon"].inputs((rows, size), *dtypes)
    step, again = (CASES[name](fastgen, **tensors) for name in ("reverse_step-epsilon", "reverse_step_-epsilon"))
    assert torch.equal(step, again), f"{what}: in place differs"
    if rows:
        check_launches(what, rows, size, dtypes)
        case = CASES["decoupled_dmd_loss"]
        tensors = case.inputs((rows, size), *dtypes)
        tensors["dm_real"][-1, -1] = torch.inf
        grad = results(case, fastgen, tensors)["gradient of x"]
        assert not grad[-1].any(), f"{what}: a row that is not finite has a gradient"
        assert grad[:-1].any(), f"{what}: the others have none"


def check_launches(what: str, rows: int, size: int, dtypes: list[torch.dtype]) -> None:
    """A step is the loss, whose last block adds up its terms, and the gradient that comes in. A CUDA graph has one
    launch more, for the sum; its result is the same to the bit."""
    half = torch.float16 in dtypes  # whose gradient is made in the backward pass
    for name in () if half else ("ddo_loss", "diffusion_dpo_loss", "dmd_loss", "sds_loss", "diffusion_nft_loss"):
        case = CASES[name]
        tensors, found, counts = case.inputs((rows, size), *dtypes), [], []
        for captured in (False, True, False):
            if captured:
                os.environ["EMULATED_CAPTURE"] = "1"
            before, leaves = emulated.emulated_launches(), case.leaves(tensors)
            loss = case(fastgen, **leaves)
            loss.backward()
            counts.append(emulated.emulated_launches() - before)
            os.environ.pop("EMULATED_CAPTURE", None)
            found.append([loss.detach(), *(leaves[n].grad for n in case.differentiable)])
        assert counts[0] in (2, 4), f"{what} {name}: {counts[0]} launches"  # two more where a group fits no block
        assert counts[1:] == [counts[0] + 1, counts[0]], f"{what} {name}: {counts} launches"
        for again in found[1:]:
            assert all(map(torch.equal, found[0], again)), f"{what} {name}: two runs differ"


def check_many_terms() -> None:
    """More than a block adds up soon, and then more flags than a block counts: a launch more for each."""
    case = CASES["ddo_loss"]
    for rows, launches in ((2000, 2), (2100, 3), (4200, 4)):
        tensors = case.inputs((rows, 4), torch.float32)
        before, leaves = emulated.emulated_launches(), case.leaves(tensors)
        case(fastgen, **leaves).backward()
        assert emulated.emulated_launches() - before == launches, f"{rows} rows"
        compare(f"{rows} rows", case, tensors)


def check_logits(what: str, rows: int, size: int, dtypes: list[torch.dtype]) -> None:
    for case in FAMILIES["sequence"]:
        for layout, arrange in LAYOUTS["logits"].items():
            if arrange is not None and case.name not in IN_EVERY_LAYOUT:
                continue
            tensors = case.inputs((2, rows, size), *dtypes, layout=arrange)
            for name, t in tensors.items():
                # Masked columns; one is the teacher's alone where its divergence is finite.
                if name in ("student_logits", "logits_real", "logits", "ref_logits"):
                    t[..., [3] if case.options.get("beta") == 0 else [3, 5]] = -torch.inf
                elif name in ("teacher_logits", "logits_fake"):
                    t[..., [3, 5]] = -torch.inf
                elif name in ("tokens", "labels", "teacher_ids"):
                    t.masked_fill_((t == 3) | (t == 5), -1 if name == "teacher_ids" else 4)
            compare(f"{what} {case.name} {layout}", case, tensors)
    case = CASES["generalized_jsd_loss-0.5"]
    tensors = case.inputs((2, rows, size), *dtypes)
    grads = [results(case, fastgen, tensors)["gradient of student_logits"] for _ in range(2)]
    assert torch.equal(*grads), f"{what}: two runs differ"
    check_offsets(what, size)
    check_rows_far_apart(what, size)


if __name__ == "__main__":
    library, kind, *sizes = sys.argv[1:]
    torch.ops.load_library(library)
    emulated = ctypes.CDLL(library)
    emulated.emulated_launches.restype = ctypes.c_long
    with fastgen.use_backend("native"):
        if kind == "images" and os.environ["EMULATED_GPU"].startswith("132,"):  # smaller ones divide rows
            check_many_terms()
        for what in sizes:
            rows, size, dtypes = what.split(",")
            check = check_images if kind == "images" else check_logits
            check(what, int(rows), int(size), [DTYPES[d] for d in dtypes])
    print(f"{len(sizes)} cases agree")
