"""In a clone the Triton kernels stand beside the package, in ``triton_kernels``; an installation has them here."""

from pathlib import Path

__path__ = [str(Path(__file__).parents[2] / "triton_kernels")]
