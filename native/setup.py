"""The wheel holds the built library: one per platform, for every Python and every PyTorch."""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))
from secateur_native.build import build


class WithLibrary(build_py):
    """Compile into the package that is being built, never into the sources."""

    def run(self) -> None:
        super().run()
        build(Path(self.build_lib) / "secateur_native" / "kernels.so")


class OfThisPlatform(bdist_wheel):
    """No Python is linked, so one wheel serves all of them."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class Compiled(Distribution):
    """A distribution with something compiled in it."""

    def has_ext_modules(self) -> bool:
        return True


setup(cmdclass={"build_py": WithLibrary, "bdist_wheel": OfThisPlatform}, distclass=Compiled)
