"""Advice: which criterion, granularity and schedule to start with, and why, as a recipe that `prune` takes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import nn

from secateur import criteria
from secateur.advice.facts import Facts, gather_facts
from secateur.advice.recommend import Reason, RecipeDraft, recommend
from secateur.errors import RecipeError, TargetError
from secateur.model.admit import admit
from secateur.model.door import Given, enter
from secateur.model.protect import patterns_of
from secateur.planning import make_plan
from secateur.recipe import Recipe, dump_recipe, load_recipe
from secateur.report.safe_text import clean
from secateur.types import Example, Json, Loss, Protect
from secateur.words import spoken

SHARES = (0.6, 0.7, 0.8, 0.9)  # of the MACs, tried in turn where the first target cannot be reached


@dataclass(frozen=True, eq=False)
class Advice:
    """A recommendation and what it rests on.

    Args:
        recipe: ready for `secateur.prune`.
        reasons: why each choice was made, with evidence.
        alternatives: what else may be tried.
        facts: what was found out about model, data and machine.
    """

    recipe: Recipe
    reasons: tuple[Reason, ...]
    alternatives: tuple[str, ...]
    facts: Facts

    def to_yaml(self) -> str:
        """The recipe as YAML; the reasons stand above it as comments."""
        lines = [f"# {clean(self.facts.model)}: {self.facts.params:,} parameters, data: {self.facts.data}"]
        for reason in self.reasons:
            # Cleaned of line breaks: a class name must not be able to end its comment.
            lines.append(f"# {reason.topic}: {clean(reason.choice)}. {clean(reason.because)}")
            lines.append(f"#   {clean(reason.evidence)}")
        return "\n".join(lines) + "\n" + dump_recipe(self.recipe)

    def to_dict(self) -> dict[str, Json]:
        """Plain data, for JSON."""
        return {
            "recipe": self.recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
            "reasons": [asdict(reason) for reason in self.reasons],
            "alternatives": list(self.alternatives),
            "facts": self.facts.to_dict(),
        }

    def __str__(self) -> str:
        lines = []
        for reason in self.reasons:
            lines += [f"{reason.topic}: {reason.choice}", f"  because {reason.because}", f"  {reason.evidence}"]
        return "\n".join([*lines, *(f"or: {text}" for text in self.alternatives)])


@spoken()
def advise(
    model: nn.Module,
    example: Example = None,
    *,
    data: Given | None = None,
    labels: bool | None = None,
    budget_seconds: float | None = None,
    loss: Loss | None = None,
    protect: Protect = (),
) -> Advice:
    """Recommend a criterion, a granularity and a schedule, with reasons, as a recipe.

    The rules look at what can be cut, at norms and activation functions that really ran, at heads, at the data and
    their labels, at the device and the time. They are fixed, and a start: rankings of criteria change from model to
    model and from strength to strength, which `compare` measures on yours. A bad choice for the last half point.

    Args:
        model: left as it is.
        example: forward inputs; taken from the first batch of `data` where it is left out.
        data: batches that will be scored and trained with; or a mapping or `DataSet` of parts, of which train counts.
        labels: whether the batches have targets; None = look at the first.
        budget_seconds: time for recovery; None = not limited. With it one batch is timed, which is the only fact
            that may differ from call to call.
        loss: ``loss(model, batch) -> scalar``, where the batches do not imply it.
        protect: names or patterns that stay whole; they go into the recipe.

    Returns:
        the advice; ``secateur.prune(model, example, data=data, recipe=advice.recipe)`` takes it.

    Raises:
        InputError: no example and no data, or labels that are not there.
        RecipeError: a budget that is no time.
        ForwardError: the forward fails.

    Cost: one capture and one plan; with a budget two forward and backward passes of one batch.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> found = advise(net, torch.zeros(1, 4))
        >>> found.recipe.granularity, found.recipe.target.given()
        ('neuron', {'macs': 0.8})
    """
    if budget_seconds is not None and not budget_seconds > 0:
        raise RecipeError(f"budget_seconds={budget_seconds} is no time", hint="give seconds, or leave it out")
    model = admit(model)
    parts = enter(data)
    example = parts.example() if example is None else example
    patterns = patterns_of(model, protect)
    facts = gather_facts(
        model,
        example,
        data=parts.scoring if parts.train is None else parts.train,
        labels=labels,
        budget_seconds=budget_seconds,
        loss=loss,
        protect=patterns,
    )
    draft = recommend(facts, criteria.names())
    draft.recipe["protect"] = list(patterns)
    plain = _reachable(model, example, draft.recipe)
    # The rules know how much may go for the quality's sake; what the structure lets go only a plan can tell.
    if plain["target"] != draft.recipe["target"]:
        share = plain["target"]["macs"]
        draft.say("target", f"keep {share:.0%} of the multiply-accumulates", "less cannot be reached", "a trial plan")
    return Advice(load_recipe(plain), tuple(draft.reasons), tuple(dict.fromkeys(draft.alternatives)), facts)


def _reachable(model: nn.Module, example: Example, recipe: RecipeDraft) -> RecipeDraft:
    """The recipe with the first target that a trial plan reaches; how far a list goes is the same for all criteria."""
    # Any criterion will do for that: magnitude needs no data.
    tried = [recipe["target"], *({"macs": share} for share in SHARES if share > recipe["target"].get("macs", 1.0))]
    for target in tried:
        try:
            make_plan(
                model,
                example,
                target=target,
                granularity=recipe["granularity"],
                scope=recipe.get("scope", "global"),
                protect=recipe["protect"],
                round_to=recipe.get("round_to"),
            )
        except TargetError:
            continue
        return {**recipe, "target": target}
    return recipe  # pruning it says why it cannot be reached, better than advice could
