"""Rules for tensors that are made, not computed: every dimension is new."""

from __future__ import annotations

from secateur.structure.rules.base import Call, base_name, register
from secateur.structure.trace import Axes

CONSTANT = frozenset(
    ["zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided",
     "empty_strided", "scalar_tensor", "_efficientzerotensor", "rand", "randn"]
)  # fmt: skip


@register(
    "arange", "zeros", "ones", "full", "empty", "rand", "randn", "randint", "eye", "linspace", "logspace", "randperm",
    "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "empty_strided", "tril_indices",
    "triu_indices", "range", "hann_window", "scalar_tensor", "_efficientzerotensor",
)  # fmt: skip
def factory(call: Call) -> list[Axes]:
    """Fresh dimensions; those of constants and noise are free until something ties them to a literal or a parameter."""
    constant = base_name(call.func) in CONSTANT
    axes = [
        tuple(call.fresh(n, "" if constant else "its values depend on positions") for n in t.shape)
        for t in call.results
    ]
    if constant:
        call.recorder.made += axes
    return axes
