"""The registry of micro-models: each is declared with what its author would expect of a pruner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from harness import Expect
from torch import Tensor, nn

Build = Callable[[], nn.Module]
B = TypeVar("B", bound=Build)


@dataclass(frozen=True)
class Case:
    """A micro-model with its example and the expectation of its author."""

    name: str
    build: Build
    example: Callable[[], Any]
    expect: Expect


CASES: dict[str, Case] = {}


def case(
    example: Callable[[], Any],
    *,
    free: str,
    share: float,
    locked: dict[str, str] | None = None,
    zeroing: bool = True,
    double: bool = False,
) -> Callable[[B], B]:
    """Register a model class (or factory). `free` lists exactly the groups that can be cut, separated by blanks."""

    def add(build: B) -> B:
        name = build.__name__
        assert name not in CASES, name
        CASES[name] = Case(name, build, example, Expect(frozenset(free.split()), locked, share, zeroing, double))
        return build

    return add


def floats(*shape: int, seed: int = 0) -> Callable[[], Tensor]:
    """Example of normal numbers."""
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(*shape: int, vocabulary: int = 20, seed: int = 0) -> Callable[[], Tensor]:
    """Example of token numbers."""
    return lambda: torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def several(*parts: Callable[[], Any]) -> Callable[[], tuple[Any, ...]]:
    """Example of positional arguments."""
    return lambda: tuple(part() for part in parts)


def image(channels: int = 3, size: int = 8, batch: int = 2) -> Callable[[], Tensor]:
    """Example of images."""
    return floats(batch, channels, size, size)


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    """Convolution that keeps the size of the image."""
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def conv_bn(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(conv(inputs, outputs, kernel, bias=False, **options), nn.BatchNorm2d(outputs), nn.ReLU())


def head(channels: int, classes: int = 5) -> nn.Sequential:
    """Global pooling and a classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
