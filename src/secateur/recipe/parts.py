"""Parts of a recipe that several steps share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from secateur.recipe.checks import Name, Options, Patterns, problem


class Part(BaseModel):
    """Base of all parts: unknown keys are errors, nothing is converted in silence, nothing changes later."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    read_with: ClassVar[Mapping[str, tuple[str, object]]] = {}
    """Key -> (another key, its value without which nothing reads the first)."""

    @model_validator(mode="after")
    def _read(self) -> Self:
        for key, (other, value) in self.read_with.items():
            given, usual = getattr(self, key), type(self).model_fields[key].default
            if given != usual and getattr(self, other) != value:
                said = str(value).lower() if isinstance(value, bool) else value
                raise problem(f"{key}: {given} is read with {other}: {said} only")
        return self


class Optimizer(Part):
    """The optimizer of a fine-tuning step."""

    name: Name = "sgd"
    """Any optimizer of ``torch.optim``, for example sgd, adamw, RMSprop."""
    lr: Annotated[float, Field(gt=0)] = 0.01
    """Peak learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum, for sgd only."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay."""
    nesterov: bool = False
    """Nesterov momentum, for sgd with momentum only."""
    options: Options = {}
    """Further options of this optimizer, as torch names them."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        # Silence would let a reader believe that Adam ran with Nesterov momentum.
        if self.name.lower() != "sgd" and (self.momentum or self.nesterov):
            raise problem(f"momentum and nesterov belong to sgd, not to {self.name}")
        twice = sorted(set(self.options) & {"lr", "momentum", "weight_decay", "nesterov", "params"})
        if twice and not (twice == ["momentum"] and self.name.lower() != "sgd"):
            raise problem(f"{twice[0]} is no key of options: write it beside name")
        if self.nesterov and not self.momentum:
            raise problem("nesterov needs a momentum above 0")
        return self


class Distillation(Part):
    """What the dense model teaches the pruned one."""

    read_with: ClassVar = {"temperature": ("form", "kl")}

    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Outputs are divided by it before they become probabilities."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of the teacher's outputs in the loss; the labels have the rest."""
    form: Literal["kl", "mse"] = "kl"
    """``kl`` compares probabilities of classes, ``mse`` the outputs themselves."""
    hidden: Patterns = ()
    """Patterns of module names whose outputs are compared too."""
    hidden_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of their mean squared error."""

    @model_validator(mode="after")
    def _teaches(self) -> Self:
        if self.weight == 0 and not self.hidden:
            raise problem("weight 0 without hidden teaches nothing")
        if self.hidden_weight != 1.0 and not self.hidden:
            raise problem("hidden_weight weighs the outputs of hidden, and hidden is empty")
        return self
