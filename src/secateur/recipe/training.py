"""What a recipe may say about a training before or while the model is pruned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, WithJsonSchema, model_validator

from secateur.recipe.checks import Choice, Count, Granularity, Schedule, choice_schema, problem
from secateur.recipe.parts import Distillation, Optimizer, Part
from secateur.request import ALLOCATION, CRITERION, MIN_KEEP

if TYPE_CHECKING:
    from secateur.recipe.schema import Recipe

Share = Annotated[float, Field(ge=0, le=1)]
PENALTIES = ("slimming", "l1", "l2", "group_lasso", "growing", "gates", "hard_concrete")
DECIDING = ("growing", "gates", "hard_concrete")
"""Penalties that say themselves which units go: those that were to pay, or those whose gates became small."""


UNREAD = {"one_shot": ("end", "every"), "steps": ("every",), "cycles": ("every",)}
"""Schedule -> keys of a walk that it does not ask for; an exchange of weights (regrow) does."""


class Lessons(Part):
    """How long a model is trained, and by what."""

    prunes: ClassVar[bool] = True
    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [key], "properties": {key: {"type": "integer"}}} for key in ("epochs", "steps")]
        }
    )

    epochs: Count | None = None
    """Passes over the data. Exactly one of epochs and steps is given."""
    steps: Count | None = None
    """Optimizer steps. Exactly one of epochs and steps is given."""
    optimizer: Optimizer = Optimizer()
    """See the optimizer's keys."""
    rates: Schedule = "constant"
    """How the learning rate falls: constant, linear, cosine, or a scheduler of torch with its options."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises to its peak."""
    accumulate: Count = 1
    """Batches whose mean gradient makes one step."""
    amp: Literal["bf16"] | None = None
    """Mixed precision of forward and loss."""
    distil: Distillation | None = None
    """Knowledge distillation from the model as it came."""

    @property
    def decides(self) -> bool:
        """Whether the training says which units go."""
        return self.prunes

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise problem("give exactly one of epochs and steps")
        if "plateau" in str(self.rates).lower():
            raise problem("rates: ReduceLROnPlateau needs held-out data, which this training has not")
        if self.warmup_steps and isinstance(self.rates, dict):
            raise problem("warmup_steps belongs to the rates constant, linear and cosine")
        return self


class _Walk(Lessons):
    """A training in which the amount that is gone grows along a schedule."""

    schedule: Annotated[
        Choice, WithJsonSchema(choice_schema("cubic, linear, exponential, steps, cycles or one_shot."))
    ] = "cubic"
    """How the amount grows: cubic, linear, exponential, steps, cycles, one_shot, with options."""
    begin: Share = 0.0
    """Share of the steps after which pruning begins."""
    end: Share = 0.7
    """Share of the steps after which the whole amount is gone; the rest trains what is left."""
    every: Count = 10
    """Steps between updates."""
    initial: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share that goes at once at the beginning."""

    @model_validator(mode="after")
    def _forwards(self) -> Self:
        if self.begin > self.end:
            raise problem("begin lies behind end")
        return self


class GradualTraining(_Walk):
    """Prune step by step while the model trains, by the recipe's criterion, asked anew at every update."""

    method: Literal["gradual"]
    """``gradual``."""
    regrow: Annotated[Choice, WithJsonSchema(choice_schema("set or rigl."))] | None = None
    """Exchange kept for masked weights at every update: set or rigl, with the option fraction."""

    @model_validator(mode="after")
    def _walks(self) -> Self:
        name = str(self.schedule["name"] if isinstance(self.schedule, dict) else self.schedule)
        unread = () if self.regrow is not None else UNREAD.get(name, ())
        for key in (*unread, *(("initial",) if name == "one_shot" and not self.begin else ())):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise problem(f"{key} is not read with schedule: {name}")
        return self


class MovementTraining(_Walk):
    """Train scores together with the weights: what moves towards zero goes. Needs criterion movement."""

    read_with: ClassVar = {"threshold": ("form", "soft"), "strength": ("form", "soft")}

    method: Literal["movement"]
    """``movement``."""
    form: Literal["hard", "soft"] = "hard"
    """``hard`` keeps the top scores, ``soft`` those above a threshold, under a penalty that follows the schedule."""
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of the soft form: what sigmoid(score) has to exceed."""
    strength: Annotated[float, Field(ge=0)] = 1.0
    """Of the soft form: the penalty at the beginning."""
    scores: Annotated[float, Field(gt=0)] = 0.01
    """Learning rate of the scores."""
    start: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Where scores start: at so many times the size of their unit, in units of the usual size in its tensor."""
    freeze: Literal["none", "masks", "weights"] = "none"
    """``masks`` rest after the schedule's end; ``weights`` are not trained at all."""
    fill: Granularity | None = None
    """Units of this coarser granularity come back whole at the end where something of them is left; fewer go then."""


class SlimmingTraining(Lessons):
    """Train the whole model under a penalty; then it is pruned by the recipe's criterion, and `recover` trains on."""

    prunes: ClassVar[bool] = False
    method: Literal["slimming"]
    """``slimming``."""
    penalty: Annotated[Choice, WithJsonSchema(choice_schema(f"one of {', '.join(PENALTIES)}."))] = Field(
        default={"name": "slimming", "strength": 1e-4}
    )
    """What is paid: slimming (scales of norms), l1, l2, group_lasso, growing, gates, hard_concrete, with strength."""

    @property
    def decides(self) -> bool:
        """Whether the penalty says which units go, and not the criterion."""
        return self.pays in DECIDING

    @property
    def pays(self) -> str:
        """The penalty's name."""
        return str(self.penalty["name"] if isinstance(self.penalty, dict) else self.penalty)

    @model_validator(mode="after")
    def _pays(self) -> Self:
        told: dict[str, object] = self.penalty if isinstance(self.penalty, dict) else {"name": self.penalty}
        if told["name"] not in PENALTIES or "strength" not in told:
            raise problem(
                f"penalty is one of {', '.join(PENALTIES)} with its strength: {{name: slimming, strength: 1e-4}}"
            )
        if {"sparsity", "granularity", "criterion"} & set(told):
            raise problem("penalty takes sparsity, granularity and criterion from the recipe, which has them once")
        return self


Training = Annotated[GradualTraining | SlimmingTraining | MovementTraining, Field(discriminator="method")]


def wrong_with(training: Lessons, recipe: Recipe) -> str:
    """What a recipe and its training cannot mean together; "" where nothing is wrong."""
    given, method = recipe.target.given(), str(getattr(training, "method", ""))
    if training.prunes and any(step.method in ("refit", "obs_update") for step in recipe.recover):
        return (
            f"recover: refit and obs_update start from the weights that were cut, and training: {method} "
            "moves them meanwhile; use finetune or bn_refresh"
        )
    if training.prunes and ({"threshold", "latency_ms"} & set(given)):
        return f"{method} walks to an amount, and threshold and latency_ms are none"
    share = isinstance(recipe.target.sparsity, float) and len(given) == 1
    if isinstance(training, SlimmingTraining):
        if training.pays == "growing" and not share:
            return "growing chooses at the beginning how much goes: write target: {sparsity: ...}"
        if training.pays in ("gates", "hard_concrete") and recipe.criterion != CRITERION:
            return f"penalty {training.pays} scores by the sizes of its gates, so leave criterion out"
    if isinstance(training, MovementTraining):
        name = recipe.criterion["name"] if isinstance(recipe.criterion, dict) else recipe.criterion
        if name != "movement" or not share:
            return "movement trains scores: write criterion: movement, and target: {sparsity: ...}"
        if recipe.scope == "row":
            return "movement knows the scopes global and local"
        if recipe.allocation != ALLOCATION or recipe.min_keep != MIN_KEEP:
            return "movement trains what goes, and reads neither allocation nor min_keep"
    return ""
