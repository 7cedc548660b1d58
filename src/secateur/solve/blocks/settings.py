"""How a run goes about it: what a caller or a recipe may choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.errors import RecipeError
from secateur.registry import one_of
from secateur.request import Target

MUCH = 0.6  # share of the weights, see Settings.targets
LEAST_BATCHES = 4  # of which one is held out; fewer are all needed to learn from


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Training of each sub-block, once its weights are solved, towards the outputs of the original.

    Args:
        epochs: passes over the batches that are not held out.
        lr: of Adam at the start; it falls to zero along half a cosine.
        target: "branch" = what the sub-block adds to the hidden state is to be the original's, "stream" = the hidden
            state behind it, which makes up for what the blocks before lost, too.
        normalise: squares of errors are taken relative to the original's mean square "coordinate" by coordinate, in
            "total", or "token" by token.
        seed: of the order of batches.

    Raises:
        RecipeError: a number or word that means nothing.
    """

    epochs: int = 8
    lr: float = 1e-3
    target: str = "stream"
    normalise: str = "coordinate"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if isinstance(self.epochs, bool) or not isinstance(self.epochs, int) or self.epochs < 1:
            raise RecipeError(f"epochs={self.epochs!r} is not a whole number of at least 1")
        if not self.lr > 0:
            raise RecipeError(f"lr={self.lr!r} is not above 0")
        one_of("target", self.target, ("branch", "stream"))
        one_of("normalise", self.normalise, ("coordinate", "total", "token"))


@dataclass(frozen=True, kw_only=True)
class UnequalShares:
    """How much each block of a stack gives up, where not all give up the same share.

    Args:
        name: "owl" = blocks with more outliers among Wanda's scores keep more; "curve" = the sum over blocks of what
            these scores lose, relative to the block, is made least.
        limit: no share differs by more than this from the mean.
        outliers: a score is an outlier above so many times the mean of its block ("owl").
        check: the model is pruned with equal shares, too, and these are taken where outputs on held-out batches are
            nearer to the original's with them. Costs a second run.

    Raises:
        RecipeError: a number or word that means nothing.

    Source:
        Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", 2024, section 3.2.
    """

    name: str = "owl"
    limit: float = 0.08
    outliers: float = 5.0
    check: bool = True

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        one_of("name", self.name, ("owl", "curve"))
        if not 0 < self.limit < 1:
            raise RecipeError(f"limit={self.limit!r} is not between 0 and 1")
        if not self.outliers > 0:
            raise RecipeError(f"outliers={self.outliers!r} is not above 0")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a run goes about it.

    Args:
        targets: "dense" = the original's outputs under pruned inputs, "own" = the layer's own outputs on them, "auto" =
            dense with reconstruction, which has the original's outputs at hand, and where more than `MUCH` of the
            weights go; else own, since dense ones take twice the time and then bring nothing (benchmarks/README.md).
        shrinkage: share of the correction towards dense targets; None: chosen on held-out tokens.
        hold_out: share of the batches that only choose and guard; 0 leaves the guard out.
        damping: share of the mean diagonal that is added to second moments.
        reconstruct: training of each sub-block after its weights are solved; None: none.
        allocation: how much each block gives up; None: all the same share.
        checkpoint: folder in which finished blocks are kept, and from which a run that was killed goes on.
        memory_bytes: hidden states beyond so much lie on disk; None: all in memory.
        from_disk: weights stay on disk, see `secateur.from_disk`.
        together: the processes of torch's default group share the batches, and each ends with the same plan. Every
            one is given all batches, in the same order.

    Raises:
        RecipeError: a number or word that means nothing.
    """

    targets: str = "auto"
    shrinkage: float | None = None
    hold_out: float = 0.1
    damping: float = 0.01
    reconstruct: Reconstruction | None = None
    allocation: UnequalShares | None = None
    checkpoint: Path | None = None
    memory_bytes: int | None = None
    from_disk: bool = False
    together: bool = False

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        one_of("targets", self.targets, ("auto", "dense", "own"))
        for name, value in (("shrinkage", self.shrinkage), ("hold_out", self.hold_out)):
            if value is not None and not 0 <= value <= 1:
                raise RecipeError(f"{name}={value!r} is not between 0 and 1")
        if not self.damping >= 0:
            raise RecipeError(f"damping={self.damping!r} is below 0")
        if self.shrinkage is not None and self.targets != "dense":
            raise RecipeError(f"shrinkage={self.shrinkage!r} is read with targets=dense only")

    def dense(self, target: Target | None) -> bool:
        """Whether layers aim at the original's outputs.

        Args:
            target: how much is to go.
        """
        if self.targets != "auto":
            return self.targets == "dense"
        asked = {} if target is None else target.given().get("sparsity", {})
        amounts = asked.values() if isinstance(asked, Mapping) else [asked]
        return self.reconstruct is not None or max(amounts, default=0.0) > MUCH
