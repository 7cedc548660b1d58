"""Compiled kernels for secateur: matrix products with weights that have zeros."""

from secateur_native.build import BuildError, build, build_operator, cache_folder, fingerprint, library

__all__ = ["BuildError", "build", "build_operator", "cache_folder", "fingerprint", "library"]
