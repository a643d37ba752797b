"""In a clone the Triton kernels stand beside the package, in ``triton_kernels``; an installation has them here."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__path__ = [str(Path(__file__).parents[2] / "triton_kernels")]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...  # type checkers do not follow __path__
