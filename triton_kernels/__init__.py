"""Triton kernels, one file a family. This package imports without Triton; its files other than ``layout`` do not."""
