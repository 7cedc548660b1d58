"""Compiled kernels for secateur: matrix products with weights that have zeros."""

from secateur_native.build import BuildError, build, cache_folder, library

__all__ = ["BuildError", "build", "cache_folder", "library"]
