"""What stands where a branch was: it has no weights, computes nothing, and answers in the form of what was there."""

from __future__ import annotations

from torch import Tensor, nn

from secateur.model.bypass import hidden_of
from secateur.types import StubEntry


class Stub(nn.Module):
    """Answers with zeros of its hidden state's shape; all else of a tuple is None.

    Args:
        items: 0 = a tensor; else a tuple of so many items.

    Example:
        >>> import torch
        >>> Stub(2)(torch.ones(1, 3))
        (tensor([[0., 0., 0.]]), None)
    """

    def __init__(self, items: int = 0) -> None:
        super().__init__()
        self.items = items

    @classmethod
    def of(cls, entry: StubEntry) -> Stub:
        """As a plan has it."""
        return cls(entry["items"])

    def forward(self, *args: object, **kwargs: object) -> Tensor | tuple[Tensor | None, ...]:
        """The first tensor of the arguments decides about the shape."""
        hidden = hidden_of(args, kwargs)
        assert hidden is not None
        found = hidden.new_zeros(hidden.shape)
        return (found, *[None] * (self.items - 1)) if self.items else found
