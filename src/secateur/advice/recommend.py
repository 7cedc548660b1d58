"""The rules of the advice: facts in, a recipe and its reasons out. Pure, so the same facts give the same advice."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from secateur.advice.facts import LABELLED, NONE, UNLABELLED, Facts

FINETUNE_SHARE = 0.7  # of the budget; the rest is for scoring, measuring and the certificate
FEWEST_STEPS = 20  # less training than that does not repair a network
MOST_EPOCHS = 10
CUTS = ("channel", "neuron", "head")

# What the rules rest on, each with its origin. Figures are those of the authors unless it says otherwise.
BENCH = (
    "PruningBench, ResNet-50 on CIFAR-100: at 2x OBD-C 78.68, Taylor 78.51, L2 78.32, BN scale 78.30, random 77.97; "
    "scoring 7.6, 3.7 and 0.1 s"
)
RANKS = "PruningBench: rankings at 2x and 8x agree with Kendall's tau 0.33 only (ViT-S 2x and 4x: 0.11)"
RETRAIN = (
    "Renda et al. 2020, ResNet-50 at 10.7 % density, the same scores: fine-tuning 71.9, learning-rate rewinding "
    "74.0; iterative 75.7"
)
STATIONARY = (
    "exact: at an optimum with weight decay the mean gradient gives |g w| = lambda w^2, which is magnitude; "
    "per-sample products do not degenerate"
)
COLLAPSE = (
    "network slimming, CIFAR-10 VGG-19, 70 % of the channels: 32.5 % right after the cut, 93.8 % after fine-tuning"
)
SCALE = (
    "exact: scaling a filter before a batch norm leaves the network unchanged, so raw norms of layers differ by chance"
)
GLOBAL_T5 = "JaxPruner, T5-base: loss 2.58 dense, 2.95 with magnitude per layer, 5.44 with one global ranking"
ELEMENT = "JaxPruner, ResNet-50: magnitude 75.5, in one global ranking 75.5, saliency (gradient) 74.9, random 70.2"
ZEROS = "zeros in dense tensors bring neither speed nor size (pytorch#36214, pytorch#32928)"
IDENTITY = (
    "exact: in networks of ReLU, max-pooling and eval batch norm the Hessian diagonal equals the Gauss-Newton one"
)
TRIM = "Network Trimming, VGG-16: 1.96x fewer parameters by APoZ: 68.4 to 71.1 % top-1, much of it by training longer"
WANDA = "SmolLM2-135M at 50 %, WikiText-2 perplexity: magnitude 501.8, Wanda 41.2, dense 21.3 (measured, CPU)"
SPARSE_GPU = "sparse tensor cores pay from about 256 channels on (TensorRT#4065)"
REFRESH = "batch-norm statistics belong to the uncut network; new ones need samples, no labels (Wu and Johnson 2021)"
REFIT = (
    "He et al. 2017 refit the next layer in closed form, without labels: VGG-16 at 4x loses 1.0 points of top-5 with "
    "fine-tuning after it"
)
GLOBAL_TAYLOR = (
    "measured, Taylor after the same short recovery, equal shares per layer against one global ranking: demo:convnet "
    "on MNIST 0.87 and 0.41 with half of the multiply-accumulates gone; ResNet-20 on CIFAR-10 0.67 and 0.70 with half "
    "and 0.50 and 0.47 with three quarters gone (three seeds each): the safer of the two, and worth comparing"
)
SAME_UNIT = "exact: a change of the loss has the same unit in every layer"
EXPERTS = "less memory at the same work per token, as the router uses as many experts as before (REAP, 2025)"
LONG = (
    "PruningBench, ViT-S at 2x: 78.6 to 69.3 with the best of 12 criteria, 68.8 with random: the budget was too short"
)


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


@dataclass
class Draft:
    """A recipe in the making."""

    recipe: dict[str, Any] = field(default_factory=dict)
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
        draft.recipe["round_to"] = 8
    return draft


def _granularity(facts: Facts, draft: Draft) -> str:
    if facts.units.get("expert"):
        rule = "magnitude" if facts.data == NONE else "reap"
        draft.alternatives.append(f"granularity expert ({facts.units['expert']} units), criterion {rule}: {EXPERTS}")
    free = {kind: share for kind in CUTS if (share := facts.shares.get(kind, 0.0)) > 0}
    if free:
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
        return
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
        share = 0.5 if retrained else 0.8
        draft.recipe["target"] = {"macs": share}
        because = "the network is trained again" if retrained else "it is not trained again"
        draft.say("target", f"keep {share:.0%} of the multiply-accumulates", because, COLLAPSE)
    else:
        sparsity = 0.8 if retrained else 0.5
        draft.recipe["target"] = {"sparsity": sparsity}
        because = "the network is trained again" if retrained else "it is not trained again"
        draft.say("target", f"sparsity {sparsity:g}", because, ELEMENT if retrained else WANDA)


def _finetuning(facts: Facts) -> dict[str, int]:
    """How long to train: {"epochs": n}, {"steps": n} or nothing."""
    if facts.data != LABELLED:
        return {}
    if facts.budget_seconds is None or not facts.seconds_per_batch:
        return {"epochs": 3}
    steps = int(FINETUNE_SHARE * facts.budget_seconds / facts.seconds_per_batch)
    if steps < FEWEST_STEPS:
        return {}
    if facts.batches and steps >= facts.batches:
        return {"epochs": min(MOST_EPOCHS, steps // facts.batches)}
    return {"steps": steps}


def _schedule(facts: Facts, draft: Draft, length: dict[str, int], *, cuts: bool) -> None:
    recover: list[dict[str, Any]] = []
    if cuts and facts.data != NONE and not length and not facts.attention:
        recover.append({"method": "refit"})
    if cuts and _normed(facts) and facts.data != NONE:
        recover.append({"method": "bn_refresh", "batches": 20})
    if length:
        recover.append({"method": "finetune", **length, **_training(facts)})
    draft.recipe["recover"] = recover
    words = ["one shot", *(_step_words(step) for step in recover)]
    because, evidence = _schedule_reason(facts, length, recover)
    draft.say("schedule", ", then ".join(words), because, evidence)
    if length.get("epochs", 0) >= MOST_EPOCHS:
        draft.alternatives.append(f"several rounds of prune and fine-tune with rising targets: {RETRAIN}")
    if facts.attention and length:
        draft.alternatives.append(f"more epochs if you can: {LONG}")


def _schedule_reason(facts: Facts, length: dict[str, int], recover: list[dict[str, Any]]) -> tuple[str, str]:
    if length:
        return "training again decides more than the criterion; the rate starts high and falls", RETRAIN
    if facts.data == LABELLED:
        return f"the budget pays for fewer than {FEWEST_STEPS} training steps", _evidence(
            recover
        ) if recover else RETRAIN
    if recover:
        return "without labels only outputs and statistics can be repaired", _evidence(recover)
    return "there is nothing to train with, or no norm to refresh", COLLAPSE


def _evidence(recover: list[dict[str, Any]]) -> str:
    return "; ".join({"refit": REFIT, "bn_refresh": REFRESH}[step["method"]] for step in recover)


def _step_words(step: dict[str, Any]) -> str:
    if step["method"] == "refit":
        return "a refit of the layers behind the cuts"
    if step["method"] == "bn_refresh":
        return "batch-norm refresh"
    unit = "epochs" if "epochs" in step else "steps"
    word = unit.removesuffix("s") if step[unit] == 1 else unit
    return f"{step[unit]} {word} of fine-tuning ({step['optimizer']['name']}, {step['schedule']})"


def _training(facts: Facts) -> dict[str, Any]:
    if facts.attention:
        return {
            "optimizer": {"name": "adamw", "lr": 5e-5, "weight_decay": 0.01},
            "schedule": "linear",
            "warmup_steps": 10,
        }
    sgd = {"name": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4}
    return {"optimizer": sgd, "schedule": "cosine"}
