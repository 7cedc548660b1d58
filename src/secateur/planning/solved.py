"""A plan made by a solver: blocks are solved one after the other, and the plan holds masks and new weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from secateur import criteria
from secateur.errors import RecipeError
from secateur.kinds.weights.granularity import Granularity, parse
from secateur.model.call import require_reiterable
from secateur.planning.plan import Plan
from secateur.planning.written import masked_plan
from secateur.registry import build, suggestion
from secateur.request import Named, Plain, Request
from secateur.solve import SOLVERS, Solver
from secateur.solve.blocks.layer import LayerRecord
from secateur.solve.blocks.run import Settings, SolvedModel, prune_blocks
from secateur.solve.blocks.settings import Reconstruction, UnequalShares
from secateur.types import Data, Example

A = TypeVar("A", Reconstruction, UnequalShares)
Blocks = bool | str | Mapping[str, object] | None
"""Whether and how a model is pruned block by block: None and "auto" = where the criterion is a solver alone."""


def solver_of(criterion: object, blocks: Blocks) -> Solver | None:
    """The solver that a criterion names, or None where scores decide.

    Args:
        criterion: a name, {"name": ..., options}, or a criterion object.
        blocks: True or settings = block by block; None or "auto" = where the name is that of a solver and of no score.

    Raises:
        RecipeError: block by block was asked for, and there is no such solver.
    """
    use = blocks.get("use", True) if isinstance(blocks, Mapping) else blocks
    if use is False or not isinstance(criterion, (str, Mapping)):
        if use is True:
            raise RecipeError("block by block a solver decides, not an object.", hint="criterion: admm, for example")
        return None
    choice = Named.of(criterion)
    if use in (None, "auto") and (choice.name not in SOLVERS or choice.name in criteria.names()):
        return None
    return SOLVERS.build(choice.name, choice.options)


def settings_of(blocks: Blocks) -> Settings:
    """The settings that a recipe or a caller gives.

    Raises:
        RecipeError: an unknown setting, or a value that means nothing.
    """
    given = {k: v for k, v in blocks.items() if k != "use"} if isinstance(blocks, Mapping) else {}
    known = [field.name for field in fields(Settings)]
    for name in given:
        if name not in known:
            raise RecipeError(f"blocks has no option {name!r}", hint=suggestion(name, known))
    folder: Any = given.get("checkpoint")
    inner = {
        "checkpoint": None if folder is None else Path(folder),
        "reconstruct": _part(Reconstruction, "reconstruct", given.get("reconstruct")),
        "allocation": _part(UnequalShares, "allocation", given.get("allocation")),
    }
    return build(Settings, "blocks", {**given, **inner})


def _part(cls: type[A], name: str, given: object) -> A | None:
    """Settings inside of settings: a mapping, a word that is its name, true for all defaults, or nothing."""
    if given is None or given is False or isinstance(given, cls):
        return given or None
    if given is True:
        given = {}
    if isinstance(given, str) and cls is UnequalShares:
        given = {"name": given}
    if not isinstance(given, Mapping):
        raise RecipeError(f"blocks.{name}={given!r} is no mapping", hint="for example {} for its defaults")
    return build(cls, f"blocks.{name}", given)


def recorded_settings(blocks: Blocks) -> dict[str, Plain]:
    """The settings that decide about the result, as a plan's request holds them."""
    found = settings_of(blocks)
    told: dict[str, Plain] = {
        "targets": found.targets,
        "shrinkage": found.shrinkage,
        "hold_out": found.hold_out,
        "damping": found.damping,
    }
    for name, one in (("reconstruct", found.reconstruct), ("allocation", found.allocation)):
        if one is not None:
            told[name] = asdict(one)
    return told


def solved_plan(
    model: nn.Module,
    example: Example,
    request: Request,
    solver: Solver,
    data: Data | None,
    *,
    blocks: Blocks = None,
    progress: Callable[[int, int], None] | None = None,
) -> Plan:
    """Solve a model block by block. Nothing is changed; `Plan.apply` writes masks and weights.

    Args:
        model: left as it is.
        example: what one forward takes.
        request: what is asked for, by the solver's name and options.
        solver: how.
        data: batches to calibrate with.
        blocks: settings, see `secateur.solve.blocks.run.Settings`.
        progress: called as ``progress(done, total)`` with matrices.

    Raises:
        RecipeError: no data, or something that solvers do not take.
        UnsupportedError: nothing can be solved.
    """
    if data is None:
        raise RecipeError(
            f"criterion {solver.name!r} learns from data, and there are none.", hint="for example --data text:FILE"
        )
    require_reiterable(data, f"criterion {solver.name!r}")
    unit: Granularity = parse(request.granularity[0].spec())
    settings = settings_of(blocks)
    if settings.from_disk:
        raise RecipeError(
            "blocks.from_disk is for a folder, and this is a model in memory.",
            hint="secateur prune hf:FOLDER --set blocks.from_disk=true, or secateur.from_disk.prune_folder",
        )
    out = prune_blocks(
        model,
        example,
        data,
        solver=solver,
        granularity=unit,
        request=request,
        settings=settings,
        progress=progress,
    )
    masks = {name: mask.cpu() for name, mask in out.masks.items()}
    return replace(
        masked_plan(model, request, masks, example=example),
        weights={name: value.cpu() for name, value in out.weights.items()},
        left_out=tuple(out.left_out),
        notes=tuple(notes_of(out, settings, request, solver)),
    )


def notes_of(out: SolvedModel, settings: Settings, request: Request, solver: Solver) -> list[str]:
    """What of a run a reader should know: errors, refused updates, damping, what was chosen for the caller."""
    return [*_notes(out.records), *_aimed(settings, request, solver), *_told(out, settings)]


def _notes(records: Sequence[LayerRecord]) -> list[str]:
    """Of matrices."""
    refused = [one.name for one in records if one.kept_plain]
    raised = max((one.damping for one in records), default=0.0)
    without = [one.name for one in records if one.tokens == 0]
    few = [one.name for one in records if 0 < one.tokens < 64]
    lines = []
    errors = [one.error for one in records if one.error is not None]
    if errors:
        middle = float(torch.tensor(errors).median())
        beyond = " beyond what layers before have lost" if any(one.beyond for one in records) else ""
        spread = f"median {middle:.2%}, largest {max(errors):.2%} of {len(errors)} matrices"
        lines.append(f"held-out error of the outputs{beyond}: {spread}")
    if refused:
        lines.append(
            f"{len(refused)} updates were refused, as they made the held-out error larger: {', '.join(refused[:3])}"
        )
    if raised > 0:
        lines.append(f"largest damping: {raised:g} of the mean diagonal")
    if without:
        lines.append(
            f"{len(without)} matrices that no token reached were pruned by magnitude: {', '.join(without[:3])}"
        )
    if few:
        lines.append(f"{len(few)} matrices saw fewer than 64 tokens: {', '.join(few[:3])}")
    return lines


def _aimed(settings: Settings, request: Request, solver: Solver) -> list[str]:
    """What was chosen for who left it open."""
    if settings.targets != "auto" or not (solver.moves or settings.reconstruct is not None):
        return []
    chosen = "the original model's (dense)" if settings.dense(request.target) else "the layer's own"
    return [f"outputs that layers were solved towards: {chosen}"]


def _told(out: SolvedModel, settings: Settings) -> list[str]:
    """What came of training sub-blocks, and of unequal shares."""
    lines = []
    if out.choice is not None:
        shares = out.choice.shares.values()
        lines.append(
            f"shares of blocks by {out.choice.name}, {min(shares):.1%} to {max(shares):.1%}, "
            + ("were taken" if out.choice.taken else "were not taken")
        )
        if out.choice.equal is not None and out.choice.unequal is not None:
            lines[-1] += (
                f": divergence of the outputs on held-out batches {out.choice.unequal:.4g}, "
                f"{out.choice.equal:.4g} with equal shares"
            )
    if settings.reconstruct is not None and not out.tuned:
        lines.append("nothing was reconstructed: the model has no stack of blocks")
    if out.tuned:
        branches = sum(one.branch for one in out.tuned)
        refused = sum(one.epochs == 0 for one in out.tuned)
        ratios = torch.tensor([one.after / max(one.before, 1e-30) for one in out.tuned])
        lines.append(
            f"reconstructed: {branches} residual branches and {len(out.tuned) - branches} blocks or ends of blocks; "
            f"held-out error {float(ratios.median()):.1%} of what it was (median), {refused} were refused"
        )
    return lines
