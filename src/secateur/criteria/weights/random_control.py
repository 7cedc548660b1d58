"""Random scores: the control that every criterion must beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.criteria.base import Context, Criterion, Reads, register


@register
@dataclass(frozen=True, kw_only=True)
class Random(Criterion):
    """Score every unit with a uniform random number in [0, 1).

    The idea: whatever a criterion gains over random removal of the same amount is its own merit; the rest is
    due to the network's redundancy and to the recovery that follows. A bad choice for anything but
    a control. Scores depend on the seed and on the group's name alone, so that adding a layer, or scoring
    the layers in another order, leaves the numbers of the others as they were.

    Args:
        seed: None takes the seed of the context; a number fixes it whatever the context says.

    Cross-layer normalisation:
        None needed: all groups are drawn from the same distribution, so under the scope "global" each loses
        the same fraction on average.

    Cost:
        One random number per unit.

    Source:
        The floor of Gale, Elsen, Hooker, "The State of Sparsity in Deep Neural Networks", 2019, and of
        Blalock et al., "What is the State of Neural Network Pruning?", 2020, section 6.

    Example:
        >>> from secateur.types import Group, Span
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> group = Group("weight", "element", (2, 2), (Span("weight", None, "self"),))
        >>> first, again = (Random(seed=7).score(Context(layer, [group]))["weight"] for _ in range(2))
        >>> bool((first == again).all()), bool((0 <= first).all() & (first < 1).all())
        (True, True)
    """

    name: ClassVar[str] = "random"
    summary: ClassVar[str] = "a random number per unit: the control that a criterion must beat"
    speed: ClassVar[str] = "fastest: no data"
    best_for: ClassVar[str] = "comparisons: what removal costs when nothing is known"
    comparable: ClassVar[bool] = True
    reads: ClassVar[Reads] = "nothing"
    complex_weights: ClassVar[bool] = True
    promises: ClassVar[frozenset[str]] = frozenset()

    seed: int | None = None

    def _score(self, context: Context) -> dict[str, Tensor]:
        seed = context.seed if self.seed is None else self.seed
        return {group.name: _uniform(f"{seed}:{group.name}", group.shape) for group in context.groups}


def _uniform(key: str, shape: tuple[int, ...]) -> Tensor:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.rand(shape, generator=generator)
