"""Masks that are held through a training, and a cut in place that would pull the weights from under them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from secateur.errors import UnsupportedError
from secateur.masks.handle import HANDLES


def require_unheld(model: nn.Module, cuts: Iterable[str], layers: Mapping[str, object]) -> None:
    """Refuse a cut in place of weights whose masks an optimizer's steps hold: the next step would fail.

    Args:
        model: about to be cut in place.
        cuts: names of tensors that are cut.
        layers: names of stacks that lose blocks.

    Raises:
        UnsupportedError: names the weight and what to do.

    Cost: nothing where the model has no living handle.
    """
    cut = set(cuts)
    for handle in HANDLES.get(model, ()):
        stacks = tuple(f"{stack}." if stack else "" for stack in layers)
        held = sorted(name for name in handle.masks if name in cut or (stacks and name.startswith(stacks)))
        if held and handle.is_held:
            raise UnsupportedError(
                f"{type(model).__name__} cannot be cut in place: {held[0]!r} is masked, and the mask is held.",
                why=f"the masks of {len(held)} weights that are cut have the old shapes, and an optimizer's next step "
                "would fail",
                hint="End the hold first (hold.remove(), or handle.remove(), which takes the masks back), cut, then "
                "mask and hold the cut model anew; or leave out inplace=True.",
            )
