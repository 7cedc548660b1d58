"""What `prune` hands back, and how it is written to a folder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from torch import nn

from secateur import shown
from secateur.errors import CertificateError
from secateur.files.atomic import publish_dir
from secateur.files.checkpoint import INDEX, Checkpoint
from secateur.files.manifest import MANIFEST
from secateur.files.safe import save_tensors
from secateur.files.seeds import canonical_json
from secateur.integrations.transformers import config_files, copy_tokenizer, express, is_transformers
from secateur.kinds.layers.drop import stub_names
from secateur.loading import BUFFERS, PLAN, WEIGHTS, beside_state
from secateur.model.tensors import require_storable
from secateur.planning.beside import save_beside
from secateur.planning.files import to_json
from secateur.planning.history import origin_of
from secateur.planning.plan import Plan
from secateur.recipe import Recipe, dump_recipe
from secateur.report import Report, render_html, verdict
from secateur.report.card import render_card
from secateur.report.journal import LogLine
from secateur.report.terminal import proof_line
from secateur.report.verdict import rows
from secateur.types import Degradation

LOAD_WITH_US = (
    "from_pretrained cannot load the saved folder: no config expresses what was cut. "
    "Load it with secateur.load(), or plan with expressible=True (--expressible) where a config can say it."
)


class NotNativeWarning(UserWarning):
    """A Hugging Face model is saved in a form that `from_pretrained` cannot load."""


@dataclass(frozen=True, eq=False, repr=False)
class Estimate:
    """What a recipe would bring, with the plan that would bring it.

    Args:
        plan: the decision, certified where something would be cut.
        report: the figures now and then. Its `achieved` is empty: nothing was done.
    """

    plan: Plan
    report: Report

    def __repr__(self) -> str:
        return shown.line("Estimate", repr(self.plan)[1:-1])

    def _repr_html_(self) -> str:
        cells = [(row.label, row.before, row.after, row.change) for row in rows(self.report)]
        return shown.table(repr(self)[1:-1], ("", "now", "then", "change"), cells, notes=["quality: not predicted"])


@dataclass(frozen=True)
class Native:
    """What stands beside the weights of a Hugging Face model.

    Args:
        files: name -> text of config.json and the like; empty for other models.
        kind: class of the model, "" for other models.
        loads: whether `from_pretrained` loads the folder.
    """

    files: Mapping[str, str]
    kind: str = ""
    loads: bool = True

    @property
    def warning(self) -> str:
        """What is said where the folder does not load natively; "" where it does, or where nobody would expect it."""
        return "" if self.loads else LOAD_WITH_US


def native(model: nn.Module, plan: Plan) -> Native:
    """Find the config that describes a pruned Hugging Face model, or that there is none."""
    if not is_transformers(model):
        return Native({})
    known, kind = plan.evidence, type(model).__name__
    config = express(model, model, None if known is None else known.example)
    if config is not None:
        return Native(config_files(model, config), kind)
    if stub_names(plan.layers):
        # No shape is another one: from_pretrained would make up what is gone, at random, and hand that out.
        files = {name: text for name, text in config_files(model, model.config).items() if name != "config.json"}
        return Native(files, kind, loads=False)
    # The original's config beside cut weights: from_pretrained fails on the shapes, so everybody is told.
    whole = model if known is None else known.model
    return Native(config_files(whole, whole.config), kind, loads=False)


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """A pruned model with everything that is known about it.

    Args:
        model: the pruned model, an ordinary module.
        plan: the decision, certified where something was cut.
        report: what report.json and report.html are made of.
        recipe: as it was resolved.
        degradations: what was done less well than asked; empty when all went as asked.
        log: stages of the run, in order.
        native: config files of a Hugging Face model, and whether they express it; None = not found out yet.
        unfinished: the folder in which the run kept what it had done; `save` removes it.
    """

    model: nn.Module
    plan: Plan
    report: Report
    recipe: Recipe
    degradations: tuple[Degradation, ...] = ()
    log: tuple[LogLine, ...] = ()
    native: Native | None = None
    unfinished: Path | None = None

    def __repr__(self) -> str:
        return shown.line("Result", str(verdict(self.report)))

    def _repr_html_(self) -> str:
        cells = [(row.label, row.before, row.after, row.change) for row in rows(self.report)]
        notes = [
            proof_line(self.report),
            *(f"degraded: {one.what}" for one in self.degradations),
            *self.report.warnings,
        ]
        return shown.table(str(verdict(self.report)), ("", "before", "after", "change"), cells, notes=notes)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the output folder, whole or not at all.

        It holds plan.json, model.safetensors, recipe.yaml, report.json, report.html, README.md (a model card),
        environment.json, log.jsonl and manifest.json (SHA-256 of every file), and buffers.safetensors where the model
        has buffers that are no part of its state (`persistent=False`). For Hugging Face models also config.json and the
        tokenizer's files: where a config can express the result `from_pretrained` loads the folder natively;
        else config.json is the original's, and a warning, the report and the card say that secateur.load() is needed.

        Args:
            path: the folder.
            force: replace an output folder that is there.

        Raises:
            CertificateError: something was cut and not certified.
            UnsupportedError: modules keep a state of their own that is no tensor.
            FileRefusedError: the folder exists, or is no output folder of secateur.
            ResourceError: the disk is full; nothing is left behind.
        """
        # A composed or loaded plan may lack its proof. A folder is taken for proved, so it is not written then.
        if self.plan.removes and self.plan.certificate is None:
            raise CertificateError(
                "The plan has no certificate, so nothing is saved.",
                hint="Prove it first: plan.prove(model, example).",
            )
        require_storable(self.model)
        with publish_dir(path, force=force) as folder:
            self._write(folder, Path(path))
        if self.unfinished is not None and (self.unfinished / INDEX).exists():
            Checkpoint(self.unfinished).remove()
        return Path(path)

    def _write(self, folder: Path, home: Path) -> None:
        configs, told = self._native()
        plan = origin_of(self.model) or self.plan
        beside = save_beside(plan, folder / PLAN)
        texts = {
            PLAN: to_json(plan, beside),
            "recipe.yaml": dump_recipe(self.recipe),
            "report.json": told.to_json(),
            "report.html": render_html(told, folder=str(home), kind=configs.kind, native=configs.loads),
            "README.md": render_card(told, kind=configs.kind, native=configs.loads),
            "environment.json": canonical_json(self.report.environment.model_dump(mode="json")),
            "log.jsonl": "".join(canonical_json(event).replace("\n", "") + "\n" for event in self.log),
        }
        texts.update(configs.files)
        # Of the texts, not of the files: what the disk holds is to be compared with what was meant.
        hashes = {name: sha256(text.encode()).hexdigest() for name, text in texts.items()}
        if beside is not None:
            hashes[beside.file] = beside.sha256
        if configs.kind:
            copied = copy_tokenizer(self.model, folder)
            hashes.update({name: sha256((folder / name).read_bytes()).hexdigest() for name in copied})
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
        tensors = {name: tensor.detach() for name, tensor in self.model.state_dict(keep_vars=True).items()}
        hashes[WEIGHTS] = save_tensors(folder / WEIGHTS, tensors)
        others = beside_state(self.model)
        if others:
            hashes[BUFFERS] = save_tensors(folder / BUFFERS, others)
        # Last, and without its own hash: it speaks of every other file.
        (folder / MANIFEST).write_text(canonical_json(hashes))

    def _native(self) -> tuple[Native, Report]:
        """Config files of a Hugging Face model, and the report with a word on how the folder is loaded."""
        found = native(self.model, self.plan) if self.native is None else self.native
        if not found.warning:
            return found, self.report
        warnings.warn(found.warning, NotNativeWarning, stacklevel=4)
        if found.warning in self.report.warnings:
            return found, self.report
        return found, self.report.model_copy(update={"warnings": (*self.report.warnings, found.warning)})
