"""A folder for `from_pretrained`: config, weights, tokenizer, and a card that says how it is loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from secateur.deployment.exports.base import EXPORTERS, Exported, Exporter, size_of_files
from secateur.errors import UnsupportedError
from secateur.files import publish_dir, save_tensors
from secateur.integrations.transformers import config_files, copy_tokenizer, express, is_transformers
from secateur.loading import PLAN, WEIGHTS
from secateur.measure import num_nonzero, num_params
from secateur.planning.files import to_json
from secateur.planning.history import origin_of
from secateur.types import Example


@EXPORTERS.register("hf")
class HuggingFaceExporter(Exporter):
    """What `from_pretrained` and everything that builds on it loads."""

    name = "hf"
    writes = "folder"
    uses = "smaller shapes that a config can say: transformers, vLLM and converters load them as any dense model"
    loses = "zeros, and widths that differ from layer to layer (plan with expressible=True)"

    def write(self, model: nn.Module, path: Path, example: Example, *, force: bool) -> Exported:
        """The folder, once a model built from its config has given the same outputs (with an example)."""
        if not is_transformers(model):
            raise UnsupportedError(
                f"{type(model).__name__} is no model of transformers, so no config describes it",
                hint="export it as safetensors, onnx or pt2",
            )
        example = some_tokens(model) if example is None else example
        config = express(model, model, example)
        if config is None:
            raise UnsupportedError(
                f"no config describes this {type(model).__name__}",
                why="a config holds one number for all layers alike, and these widths differ, or no field sets them",
                hint="plan with expressible=True (--expressible); sc.load reads the output folder as it is",
            )
        plan = origin_of(model)
        with publish_dir(path, force=force) as folder:
            for name, text in config_files(model, config).items():
                (folder / name).write_bytes(text.encode())
            copied = copy_tokenizer(model, folder)
            (folder / "README.md").write_text(_card(model, copied), encoding="utf-8")
            # What was removed, for whoever asks; and the mark by which --force knows the folder again.
            if plan is not None:
                (folder / PLAN).write_bytes(to_json(plan).encode())
            save_tensors(folder / WEIGHTS, {name: t.detach() for name, t in model.state_dict(keep_vars=True).items()})
        checked = (
            "built from its config it gives the same outputs" if example is not None else "its config gives its shapes"
        )
        return Exported(self.name, path, size_of_files(path), checked, {"tokenizer_files": len(copied)})


def some_tokens(model: nn.Module) -> Example:
    """An example for a model of tokens: enough to compare two models by; None for any other."""
    words = getattr(getattr(model, "config", None), "vocab_size", None)
    if getattr(model, "main_input_name", "") != "input_ids" or getattr(model.config, "is_encoder_decoder", False):
        return None
    return {"input_ids": (torch.arange(16).reshape(2, 8) * 7 + 3) % words} if type(words) is int else None


def _card(model: nn.Module, tokenizer: list[str]) -> str:
    kind, total = type(model).__name__, num_params(model)
    zeros = 1 - num_nonzero(model) / max(1, total)
    lines = ["---", "library_name: transformers", "tags:", "- pruning", "- secateur", "---", "", f"# Pruned {kind}", ""]
    lines += [f"{total:,} parameters, {zeros:.1%} of them zero. Pruned with secateur.", "", "```python"]
    lines += [f"from transformers import {kind}" + (", AutoTokenizer" if tokenizer else ""), ""]
    lines += [f'model = {kind}.from_pretrained("THIS_FOLDER")']
    lines += ['tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")'] if tokenizer else []
    lines += ["```", "", "Smaller shapes are less work for every runtime that loads this folder; zeros are stored and"]
    return "\n".join([*lines, "multiplied like other numbers (`secateur deploy` makes them fast on a CPU).", ""])
