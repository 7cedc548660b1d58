"""Agreement inside a model: what its modules return is compared as well, where the outputs of the whole may hide it.

A gate that starts at zero, labels in the place of numbers or a branch that the example leaves asleep hide from the
outputs that a scale has changed. The modules behind them still show it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from secateur.errors import CertificateError
from secateur.kinds.reference import Reference, agrees
from secateur.model.agreement import agreement
from secateur.model.call import tensors_in
from secateur.types import Example

Overheard = dict[tuple[str, int, int], Tensor]  # module, which of its runs, which of its tensors -> what it returned


@contextmanager
def overheard(model: nn.Module) -> Iterator[Overheard]:
    """What the modules of a model return while a block runs it."""
    names = {id(module): name for name, module in model.named_modules()}
    found: Overheard = {}
    runs: dict[str, int] = {}

    def hear(module: nn.Module, _: object, result: object) -> None:
        name = names.get(id(module))
        if name is not None:
            number = runs[name] = runs.get(name, -1) + 1
            found.update({(name, number, i): t.detach() for i, t in enumerate(tensors_in(result))})

    handle = nn.modules.module.register_module_forward_hook(hear)
    try:
        yield found
    finally:
        handle.remove()


def agrees_inside(reference: Reference, example: Example) -> Callable[[nn.Module], bool]:
    """As `secateur.kinds.reference.agrees`, for what modules return as well, as far as no removed part is in it."""
    with overheard(reference.model) as expected:
        right = agrees(reference, example)

    def both(cut: nn.Module) -> bool:
        with overheard(cut) as found:
            return right(cut) and all(_alike(expected[key], found[key]) for key in expected.keys() & found.keys())

    return both


def _alike(expected: Tensor, found: Tensor) -> bool:
    if expected.shape != found.shape or not expected.is_floating_point() or bool(torch.isnan(expected).any()):
        return True
    try:
        agreement([expected], [found], None, method="", differs="", hint="")
    except CertificateError:
        return False
    return True
