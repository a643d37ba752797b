"""How outputs are laid out; the rules live beside the Triton launchers, which never import fastgen."""

from .triton_kernels.layout import arithmetic_dtype, as_rows, dense_row_strides, new_output, shared_row_strides

__all__ = ["arithmetic_dtype", "as_rows", "dense_row_strides", "new_output", "shared_row_strides"]
