"""Where a run is now: the operation, the module and the line of the user's code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import nn

from secateur.model.place import users_line
from secateur.structure.trace import Place

TORCH = str(Path(torch.__file__).parent)
HERE = str(Path(__file__).parent.parent)
ITERATES = torch.Tensor.__iter__.__code__
METHODS = (f"{TORCH}/_tensor.py", f"{TORCH}/overrides.py")  # methods of tensors that are written in Python


@dataclass
class Here:
    """Where the run is now; every step, lock and use of a size quotes it.

    Args:
        modules: qualified names of the modules that run, the innermost last.
        function: name of torch's Python function that runs; "" = the user's own code does.
        op: the ATen operator that runs, or "".
    """

    modules: list[str] = field(default_factory=list)
    function: str = ""
    op: str = ""

    @property
    def module(self) -> str:
        """Qualified name of the module that runs now."""
        return self.modules[-1] if self.modules else ""

    def place(self) -> Place:
        """The operation, the module and the user's source line."""
        return Place(self.op or self.function, self.module, users_line())

    def caller(self, called: CodeType | None = None) -> FrameType | None:
        """The frame of the code that did something to an integer or flag; None where that is torch's own.

        Args:
            called: code of a function of torch that counts for its caller.
        """
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and (frame.f_code is called or frame.f_code.co_filename.startswith((HERE, *METHODS))):
            frame = frame.f_back
        return None if frame is None or frame.f_code.co_filename.startswith(TORCH) else frame

    def is_iterated(self) -> bool:
        """Whether torch itself asks, as the code goes through a tensor row by row."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code.co_filename.startswith((HERE, *METHODS)):
            if frame.f_code is ITERATES:
                return True
            frame = frame.f_back
        return False

    def use(self) -> Place:
        """The place of a size that is used now: the function that took the integer stands for the operation."""
        return Place(self.function, self.module, users_line())

    @contextmanager
    def followed(
        self, modules: Mapping[str, nn.Module], left: Callable[[str, object], None] | None = None
    ) -> Iterator[None]:
        """Keep track of which of these modules runs, by its name; `left` hears what each of them returned."""
        paths = {id(module): name for name, module in modules.items()}

        def enter(module: nn.Module, _: object) -> None:
            # A module that the forward makes on the fly has no name: what it does counts for the one that made it.
            self.modules.append(paths.get(id(module), self.module))

        def leave(module: nn.Module, _: object, result: object) -> None:
            if self.modules:
                self.modules.pop()
            if left is not None:
                left(paths.get(id(module), ""), result)

        # Hooks of all modules at once: hooks of one's own on every module would change what its `_forward_hooks` hold.
        handles = [
            nn.modules.module.register_module_forward_pre_hook(enter),
            nn.modules.module.register_module_forward_hook(leave, always_call=True),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
