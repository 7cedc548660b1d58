"""The table of cases: a model, the inputs that the original takes, and what its author would expect of a pruner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Build = Callable[[], nn.Module]
Make = Callable[[], Any]
Reference = Callable[[nn.Module, Any], None]


@dataclass(frozen=True)
class Case:
    """One model that is to deceive.

    Args:
        family: the file that it stands in.
        name: unique in the family.
        build: makes the model; called under a fixed seed.
        inputs: what the original accepts; the first is the example, the others differ in values, batch and length.
        kinds: granularities that are tried.
        right: those of `kinds` that a careful reader of the model could cut; a refusal there is needless.
        truths: what the zeroed original still needs to be the truth (`references.py`); the cut has to agree with one.
        still: methods that make noise; held at zero in the truth and in the cut model alike.
        condition: a piece of the line on which the model takes another path; if the plan names that line, a difference
            on other inputs than the example is told, not silent.
        chance: a method that draws numbers of a hidden shape; a cut model draws fewer of them, so the outputs differ on
            every input. That is told if the plan names the `condition` as a line that draws, and if the cut is right
            with this method held at zero.
        whole: tensors, as "name:dimension", that hold data and must not be cut.
        must: with `right`, the tensors of which something should go; any at all where none is named.
        train: whether train mode is compared too.
        targets: sparsities that are tried.
    """

    family: str
    name: str
    build: Build
    inputs: tuple[Make, ...]
    kinds: tuple[str, ...] = ("channel",)
    right: tuple[str, ...] = ()
    truths: tuple[Reference, ...] = ()
    still: tuple[str, ...] = ()
    condition: str = ""
    chance: str = ""
    whole: tuple[str, ...] = ()
    must: tuple[str, ...] = ()
    train: bool = True
    targets: tuple[float, ...] = (0.3,)


CASES: dict[str, Case] = {}


class Family:
    """Registers the cases of one file."""

    def __init__(self, name: str, **defaults: Any) -> None:
        self.name, self.defaults = name, defaults

    def add(self, name: str, build: Build, inputs: Sequence[Make], **options: Any) -> None:
        """One more case; strings are split into tuples."""
        options = {**self.defaults, **options}
        for key in ("kinds", "right", "still", "whole", "must"):
            if isinstance(options.get(key), str):
                options[key] = tuple(options[key].split())
        if options.get("right") and "kinds" not in options:
            options["kinds"] = options["right"]
        key = f"{self.name}/{name}"
        assert key not in CASES, key
        CASES[key] = Case(self.name, name, build, tuple(inputs), **options)

    def case(self, inputs: Sequence[Make], *arguments: Any, name: str = "", **options: Any) -> Callable[[Any], Any]:
        """Decorates a module class (or a factory), which is called with `arguments`."""

        def register(build: Any) -> Any:
            self.add(name or build.__name__, lambda: build(*arguments), inputs, **options)
            return build

        return register


def floats(*shapes: tuple[int, ...], loud: float = 4.0) -> list[Make]:
    """Normal numbers: the first shape is the example; others follow, and the example's shape once more, louder."""
    makes = [_normal(shape, seed, 1.0) for seed, shape in enumerate(shapes)]
    return [*makes, _normal(shapes[0], 99, loud)]


def quiet(example: Make, *others: Sequence[Make]) -> list[Make]:
    """A degenerate example (zeros, ones, one step), then live inputs."""
    return [example, *(make for each in others for make in each)]


def ids(vocabulary: int, *shapes: tuple[int, ...]) -> list[Make]:
    """Numbers of tokens."""
    return [_tokens(vocabulary, shape, seed) for seed, shape in enumerate((*shapes, shapes[0]))]


def both(*inputs: Sequence[Make]) -> list[Make]:
    """Several positional arguments: the n-th of each."""
    return [_tuple(makes) for makes in zip(*inputs, strict=True)]


def fixed(*values: Any) -> list[Make]:
    """Values as they stand."""
    return [_value(value) for value in values]


def _normal(shape: tuple[int, ...], seed: int, scale: float) -> Make:
    return lambda: scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tokens(vocabulary: int, shape: tuple[int, ...], seed: int) -> Make:
    return lambda: torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def _tuple(makes: Sequence[Make]) -> Make:
    return lambda: tuple(make() for make in makes)


def _value(value: Any) -> Make:
    return lambda: value.clone() if isinstance(value, Tensor) else value


def enliven(model: nn.Module) -> nn.Module:
    """Biases, norms and statistics differ per channel, so that a wrong slice is seen."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                if name == "running_var" or (name == "weight" and tensor.dim() == 1):
                    tensor.uniform_(0.5, 1.5, generator=generator)
                elif name == "running_mean" or (tensor.dim() == 1 and isinstance(tensor, nn.Parameter)):
                    tensor.uniform_(-0.3, 0.3, generator=generator)
    return model


IMAGES = ((2, 3, 8, 8), (1, 3, 8, 8), (3, 3, 12, 10))
ROWS = ((5, 8), (1, 8), (9, 8))
STEPS = ((2, 6, 8), (1, 1, 8), (3, 17, 8))
