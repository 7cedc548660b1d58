"""The rules of the advice: facts in, a recipe and its reasons out. Pure, so the same facts give the same advice."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, Required, TypedDict

from secateur.advice.facts import LABELLED, NONE, UNLABELLED, Facts
from secateur.advice.literature import (
    BENCH,
    COLLAPSE,
    ELEMENT,
    EXPERTS,
    GLOBAL_T5,
    GLOBAL_TAYLOR,
    IDENTITY,
    LONG,
    RANKS,
    REFIT,
    REFRESH,
    RETRAIN,
    SAME_UNIT,
    SCALE,
    SPARSE_GPU,
    STATIONARY,
    TRIM,
    WANDA,
    ZEROS,
)
from secateur.types import Json

FINETUNE_SHARE = 0.7  # of the budget; the rest is for scoring, measuring and the certificate
FEWEST_STEPS = 20  # less training than that does not repair a network
MOST_EPOCHS = 10
CUTS = ("channel", "neuron", "head")


@dataclass(frozen=True)
class Reason:
    """Why one thing is recommended.

    Args:
        topic: criterion, granularity, scope, target, schedule.
        choice: what is recommended.
        because: the fact that decided.
        evidence: what is known about it, with its origin.
    """

    topic: str
    choice: str
    because: str
    evidence: str


class OptimizerDraft(TypedDict, total=False):
    """The optimizer of a training step, as a recipe writes it."""

    name: Required[str]
    lr: Required[float]
    momentum: float
    weight_decay: float


class StepDraft(TypedDict, total=False):
    """A recovery step, as a recipe writes it; which keys there are depends on the method."""

    method: Required[str]
    batches: int
    epochs: int
    steps: int
    optimizer: OptimizerDraft
    schedule: str
    warmup_steps: int


class RecipeDraft(TypedDict, total=False):
    """A recipe in the making: what the rules have decided so far."""

    criterion: str | dict[str, Json]
    granularity: str
    scope: str
    target: dict[str, float]
    recover: list[StepDraft]
    round_to: int
    protect: list[str]


@dataclass(frozen=True)
class Length:
    """How long to train: in epochs, or in steps where an epoch is too long."""

    count: int
    unit: Literal["epochs", "steps"]


@dataclass
class Draft:
    """A recipe in the making, and why."""

    recipe: RecipeDraft = field(default_factory=RecipeDraft)
    reasons: list[Reason] = field(default_factory=list)
    alternatives: list[str] = field(default_factory=list)

    def say(self, topic: str, choice: str, because: str, evidence: str) -> None:
        """Add a reason."""
        self.reasons.append(Reason(topic, choice, because, evidence))


def recommend(facts: Facts, known: Collection[str]) -> Draft:
    """Apply the rules.

    Args:
        facts: of model, data and machine.
        known: names of the criteria that can be used.
    """
    draft = Draft()
    steps = _finetuning(facts)
    granularity = _granularity(facts, draft)
    cuts = granularity in CUTS
    criterion = _criterion(facts, draft, set(known), granularity, retrained=bool(steps))
    _scope(facts, draft, criterion, cuts=cuts, retrained=bool(steps))
    _target(facts, draft, granularity, retrained=bool(steps))
    _schedule(facts, draft, steps, cuts=cuts)
    if facts.device == "cuda" and cuts:
        draft.recipe["round_to"] = 8  # tensor cores work on eights; other widths are padded to them
    return draft


def _granularity(facts: Facts, draft: Draft) -> str:
    if facts.units.get("expert"):
        criterion = "magnitude" if facts.data == NONE else "reap"
        draft.alternatives.append(
            f"granularity expert ({facts.units['expert']} units), criterion {criterion}: {EXPERTS}"
        )
    free = {kind: share for kind in CUTS if (share := facts.shares.get(kind, 0.0)) > 0}
    if free:
        # Of equals the first in CUTS, so that the same facts give the same advice.
        chosen = max(CUTS, key=lambda kind: free.get(kind, 0.0))
        what = ", ".join(f"{kind} {share:.0%}" for kind, share in sorted(free.items(), key=lambda item: -item[1]))
        draft.say(
            "granularity",
            chosen,
            f"parameters that can be removed for real: {what}",
            f"{ZEROS}; a cut does",
        )
        draft.alternatives += [f"granularity {kind}: {facts.units[kind]} units" for kind in free if kind != chosen]
        draft.recipe["granularity"] = chosen
        return chosen
    if facts.sparse_tensor_cores and facts.widest >= 256:
        draft.say("granularity", "2:4", "nothing can be cut, and the GPU has sparse tensor cores", SPARSE_GPU)
        draft.recipe["granularity"] = "2:4"
        return "2:4"
    draft.say("granularity", "element", "nothing of the model can be cut: see `secateur inspect`", ZEROS)
    draft.recipe["granularity"] = "element"
    return "element"


def _criterion(facts: Facts, draft: Draft, known: set[str], granularity: str, *, retrained: bool) -> str:
    chosen, because, evidence = _best(facts, known, granularity, retrained=retrained)
    draft.say("criterion", chosen, because, evidence)
    draft.recipe["criterion"] = (
        {"name": "magnitude", "norm": "l2", "reduce": "mean"} if chosen == "magnitude" else chosen
    )
    # The norm of one weight is the weight.
    if granularity == "element" and chosen == "magnitude":
        draft.recipe["criterion"] = "magnitude"
    draft.alternatives.append(f"compare on your own model before you trust any ranking: {RANKS}")
    return chosen


def _best(facts: Facts, known: set[str], granularity: str, *, retrained: bool) -> tuple[str, str, str]:
    cuts = granularity in CUTS
    if facts.data == NONE:
        why = (
            f"there are no data; {SCALE}, so scores are taken relative to their layer"
            if _normed(facts) and cuts
            else BENCH
        )
        return "magnitude", "no data: only weights can be looked at", why
    if facts.data == UNLABELLED:
        return _unlabelled(facts, known, cuts=cuts)
    # From here on there are labels, so what is asked is how the loss would change.
    if granularity == "head" and "head-importance" in known:
        return "head-importance", "labelled data, and heads have a gate each", STATIONARY
    if cuts and not retrained and facts.piecewise_linear and "gauss-newton" in known:
        return (
            "gauss-newton",
            "labelled data, ReLU-like functions only, and no time to train again",
            f"{IDENTITY}; {BENCH}",
        )
    if cuts and "taylor" in known:
        return "taylor", "labelled data; one pass over the scoring samples", f"{BENCH}; {STATIONARY}"
    if not cuts and not retrained and "fisher" in known:
        return "fisher", "labelled data, single weights, and no time to train again", STATIONARY
    return "magnitude", "single weights that are trained again afterwards", ELEMENT


def _unlabelled(facts: Facts, known: set[str], *, cuts: bool) -> tuple[str, str, str]:
    if not cuts and "wanda" in known:
        return "wanda", "samples without labels, single weights", WANDA
    if cuts and facts.piecewise_linear and not _normed(facts) and "apoz" in known:
        return "apoz", "samples without labels, ReLU, no batch norm", TRIM
    return "magnitude", "samples without labels: they serve to refresh and measure", BENCH


def _normed(facts: Facts) -> bool:
    return "batch" in facts.norms


def _scope(facts: Facts, draft: Draft, criterion: str, *, cuts: bool, retrained: bool) -> None:
    if draft.recipe["granularity"] == "2:4":
        return  # every block of four loses two: there is nothing to compete for
    plain = criterion in ("magnitude", "wanda", "apoz")
    if plain and facts.attention:
        chosen, because, evidence = "local", "weights of a transformer's layers have no common scale", GLOBAL_T5
    elif plain and cuts and not retrained:
        chosen, because, evidence = "local", "nothing repairs a layer that a global ranking makes too thin", COLLAPSE
    elif plain:
        chosen, because = "global", "training repairs what a global ranking makes thin"
        evidence = BENCH if cuts else ELEMENT
    elif cuts:
        because = "units of a wide layer matter little one by one, and much together"
        chosen, evidence = "local", GLOBAL_TAYLOR
    else:
        chosen, because, evidence = "global", "these scores estimate one loss, so layers may compete", SAME_UNIT
    draft.recipe["scope"] = chosen
    draft.say("scope", chosen, because, evidence)


def _target(facts: Facts, draft: Draft, granularity: str, *, retrained: bool) -> None:
    if granularity == "2:4":
        draft.recipe |= {"target": {"sparsity": 0.5}, "scope": "global"}
        draft.say("target", "sparsity 0.5", "the pattern has no other", SPARSE_GPU)
    elif granularity in CUTS:
        share = 0.5 if retrained else 0.8  # of the work that stays; careful where nothing repairs the cut
        draft.recipe["target"] = {"macs": share}
        because = "the network is trained again" if retrained else "it is not trained again"
        draft.say("target", f"keep {share:.0%} of the multiply-accumulates", because, COLLAPSE)
    else:
        sparsity = 0.8 if retrained else 0.5
        draft.recipe["target"] = {"sparsity": sparsity}
        because = "the network is trained again" if retrained else "it is not trained again"
        draft.say("target", f"sparsity {sparsity:g}", because, ELEMENT if retrained else WANDA)


def _finetuning(facts: Facts) -> Length | None:
    """How long to train; None where there is nothing to train with, or no time for it."""
    if facts.data != LABELLED:
        return None
    if facts.budget_seconds is None or not facts.seconds_per_batch:
        return Length(3, "epochs")
    steps = int(FINETUNE_SHARE * facts.budget_seconds / facts.seconds_per_batch)
    if steps < FEWEST_STEPS:
        return None
    if facts.batches and steps >= facts.batches:
        return Length(min(MOST_EPOCHS, steps // facts.batches), "epochs")
    return Length(steps, "steps")


def _schedule(facts: Facts, draft: Draft, length: Length | None, *, cuts: bool) -> None:
    recover: list[StepDraft] = []
    if cuts and facts.data != NONE and not length and not facts.attention:
        # What can be repaired without a training loop: the outputs of the layers behind the cuts.
        recover.append({"method": "refit"})
    if cuts and _normed(facts) and facts.data != NONE:
        recover.append({"method": "bn_refresh", "batches": 20})
    if length:
        recover.append(_training(facts, length))
    draft.recipe["recover"] = recover
    words = ["one shot", *(_step_words(step) for step in recover)]
    because, evidence = _schedule_reason(facts, length, recover)
    draft.say("schedule", ", then ".join(words), because, evidence)
    if length == Length(MOST_EPOCHS, "epochs"):
        draft.alternatives.append(f"several rounds of prune and fine-tune with rising targets: {RETRAIN}")
    if facts.attention and length:
        draft.alternatives.append(f"more epochs if you can: {LONG}")


def _schedule_reason(facts: Facts, length: Length | None, recover: list[StepDraft]) -> tuple[str, str]:
    if length:
        return "training again decides more than the criterion; the rate starts high and falls", RETRAIN
    if facts.data == LABELLED:
        return f"the budget pays for fewer than {FEWEST_STEPS} training steps", _evidence(
            recover
        ) if recover else RETRAIN
    if recover:
        return "without labels only outputs and statistics can be repaired", _evidence(recover)
    return "there is nothing to train with, or no norm to refresh", COLLAPSE


def _evidence(recover: list[StepDraft]) -> str:
    return "; ".join({"refit": REFIT, "bn_refresh": REFRESH}[step["method"]] for step in recover)


def _step_words(step: StepDraft) -> str:
    if step["method"] == "refit":
        return "a refit of the layers behind the cuts"
    if step["method"] == "bn_refresh":
        return "batch-norm refresh"
    many, unit = (step["epochs"], "epoch") if "epochs" in step else (step["steps"], "step")
    word = unit if many == 1 else f"{unit}s"
    return f"{many} {word} of fine-tuning ({step['optimizer']['name']}, {step['schedule']})"


def _training(facts: Facts, length: Length) -> StepDraft:
    step: StepDraft = {"method": "finetune"}
    step[length.unit] = length.count
    if facts.attention:
        # Adaptive rates and a warm-up: the gradients of a transformer's layers differ by orders of magnitude.
        step["optimizer"] = {"name": "adamw", "lr": 5e-5, "weight_decay": 0.01}
        step["schedule"], step["warmup_steps"] = "linear", 10
    else:
        step["optimizer"] = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
        step["schedule"] = "cosine"
    return step
