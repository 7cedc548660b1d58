"""What `prune` hands back, and how it is written to a folder."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from torch import nn

from secateur.errors import CertificateError
from secateur.files.atomic import publish_dir
from secateur.files.checkpoint import INDEX, Checkpoint
from secateur.files.manifest import MANIFEST
from secateur.files.safe import save_tensors
from secateur.files.seeds import canonical_json
from secateur.integrations.transformers import config_files, copy_tokenizer, express, is_transformers
from secateur.loading import PLAN, WEIGHTS
from secateur.model.tensors import require_storable
from secateur.planning.beside import save_beside
from secateur.planning.files import to_json
from secateur.planning.history import origin_of
from secateur.planning.plan import Plan
from secateur.recipe import Recipe, dump_recipe
from secateur.report import Report, render_html
from secateur.report.journal import LogLine
from secateur.types import Degradation

LOAD_WITH_US = "No config expresses these widths: load with secateur.load(), or plan with expressible=True."


@dataclass(frozen=True, eq=False)
class Estimate:
    """What a recipe would bring, with the plan that would bring it.

    Args:
        plan: the decision, certified where something would be cut.
        report: the figures now and then. Its `achieved` is empty: nothing was done.
    """

    plan: Plan
    report: Report


@dataclass(frozen=True, eq=False)
class Result:
    """A pruned model with everything that is known about it.

    Args:
        model: the pruned model, an ordinary module.
        plan: the decision, certified where something was cut.
        report: what report.json and report.html are made of.
        recipe: as it was resolved.
        degradations: what was done less well than asked; empty when all went as asked.
        log: stages of the run, in order.
        unfinished: the folder in which the run kept what it had done; `save` removes it.
    """

    model: nn.Module
    plan: Plan
    report: Report
    recipe: Recipe
    degradations: tuple[Degradation, ...] = ()
    log: tuple[LogLine, ...] = ()
    unfinished: Path | None = None

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the output folder, whole or not at all.

        It holds plan.json, model.safetensors, recipe.yaml, report.json, report.html, environment.json, log.jsonl and
        manifest.json (SHA-256 of every file). For Hugging Face models also config.json and the tokenizer's files: where
        a config can express the result `from_pretrained` loads the folder natively; else config.json is the original's,
        and the report says that secateur.load() is needed.

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
            self._write(folder)
        if self.unfinished is not None and (self.unfinished / INDEX).exists():
            Checkpoint(self.unfinished).remove()
        return Path(path)

    def _write(self, folder: Path) -> None:
        native, told = self._native()
        plan = origin_of(self.model) or self.plan
        beside = save_beside(plan, folder / PLAN)
        texts = {
            PLAN: to_json(plan, beside),
            "recipe.yaml": dump_recipe(self.recipe),
            "report.json": told.to_json(),
            "report.html": render_html(told),
            "environment.json": canonical_json(self.report.environment.model_dump(mode="json")),
            "log.jsonl": "".join(canonical_json(event).replace("\n", "") + "\n" for event in self.log),
        }
        texts.update(native)
        # Of the texts, not of the files: what the disk holds is to be compared with what was meant.
        hashes = {name: sha256(text.encode()).hexdigest() for name, text in texts.items()}
        if beside is not None:
            hashes[beside.file] = beside.sha256
        if native:
            copied = copy_tokenizer(self.model, folder)
            hashes.update({name: sha256((folder / name).read_bytes()).hexdigest() for name in copied})
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
        tensors = {name: tensor.detach() for name, tensor in self.model.state_dict(keep_vars=True).items()}
        hashes[WEIGHTS] = save_tensors(folder / WEIGHTS, tensors)
        # Last, and without its own hash: it speaks of every other file.
        (folder / MANIFEST).write_text(canonical_json(hashes))

    def _native(self) -> tuple[dict[str, str], Report]:
        """Config files of a Hugging Face model, and the report with a word on how the folder is loaded."""
        if not is_transformers(self.model):
            return {}, self.report
        known = self.plan.evidence
        config = express(self.model, self.model, None if known is None else known.example)
        if config is not None:
            return config_files(self.model, config), self.report
        whole = self.model if known is None else known.model
        # The original's config beside cut weights: from_pretrained would fail on the shapes, so the report says why.
        warnings = (*self.report.warnings, LOAD_WITH_US)
        return config_files(whole, whole.config), self.report.model_copy(update={"warnings": warnings})
