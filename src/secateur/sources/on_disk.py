"""Models of transformers whose weights stay on disk: read when they are touched, written in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.errors import InputError, UnsupportedError
from secateur.files.in_place import MappedTensors, trim
from secateur.sources.hugging_face import check_folder, class_of

ENDING = ".safetensors"


class ModelOnDisk:
    """A model over the weights of a folder, which change with it.

    Args:
        folder: in the layout of transformers, of safetensors in one file or several; it is written to.
        word: for messages.

    Attributes:
        model: in eval mode; its parameters are the bytes of the files.

    Raises:
        FileRefusedError: a folder or file that lies.
        UnsupportedError: weights of other names than those of the model, which transformers converts as it loads them.
    """

    def __init__(self, folder: Path, word: str) -> None:
        import transformers

        check_folder(folder)
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with _parameters_on_meta():
            self.model: nn.Module = class_of(transformers, config, word)(config).eval()
        self.files = MappedTensors.of(sorted(folder.glob(f"*{ENDING}")))
        self._fill(word)
        self._hooks = [block.register_forward_hook(self._leave) for block in _repeated(self.model)]

    def release(self) -> None:
        """Let all weights go out of memory; what is touched again is read again."""
        self._leave()
        trim()

    def close(self) -> None:
        """Write what has changed, and let go of the files."""
        for hook in self._hooks:
            hook.remove()
        for file in self.files:
            file.flush()

    def _leave(self, *_: object) -> None:
        for file in self.files:
            file.release()

    def _fill(self, word: str) -> None:
        model: Any = self.model
        tensors = {name: tensor for file in self.files for name, tensor in file.tensors.items()}
        try:
            # Assigned and not copied: a copy would be the whole model in memory.
            model.load_state_dict(tensors, strict=False, assign=True)
            model.tie_weights()
        except RuntimeError as error:
            raise _converted(word, str(error).strip()[:400]) from error
        lost = [name for name, value in model.named_parameters() if value.is_meta]
        unknown = [name for name in tensors if name not in model.state_dict()]
        if lost or unknown:
            raise _converted(word, f"not found: {', '.join(lost[:3]) or 'none'}; not known: {', '.join(unknown[:3])}")


def _converted(word: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"the weights of {word} cannot be used where they lie: transformers converts them as it loads them",
        why=why,
        hint="load and save the folder once by from_pretrained and save_pretrained; or prune it in memory",
    )


def require_weights(folder: Path) -> None:
    """Refuse a folder without safetensors.

    Raises:
        InputError: names the folder.
    """
    if not folder.is_dir() or not any(folder.glob(f"*{ENDING}")):
        raise InputError(
            f"{folder} is no folder with safetensors",
            why="blocks are read from disk one after the other, which other files do not allow",
            hint="give hf:FOLDER, of a model that save_pretrained has written",
        )


def _repeated(model: nn.Module) -> Iterator[nn.Module]:
    """What stands in lists of modules: blocks, for the most part. A hook too many costs a system call."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            yield from module


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that are made in here have no memory; buffers do, since they are computed and not loaded."""
    register: Callable[..., None] = nn.Module.register_parameter

    def without_memory(self: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if value is not None and not value.is_meta:
            value = nn.Parameter(value.to("meta"), requires_grad=value.requires_grad)
        register(self, name, value)

    vars_of: Any = nn.Module
    vars_of.register_parameter = without_memory
    before = torch.get_rng_state()
    try:
        yield
    finally:
        vars_of.register_parameter = register
        # Weights that nobody keeps were drawn; whoever draws next must not notice.
        torch.set_rng_state(before)
