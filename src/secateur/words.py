"""The words of the field, and what they are called here: one table for Python, recipe and command line. Needs no torch.

Names that mean exactly one thing of ours are understood (`filter` is `channel`). Whatever could mean two things, and
every key or argument, is answered with the right word instead: a recipe that is read again should say what it does.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import ParamSpec, TypeVar

from secateur.errors import RecipeError
from secateur.registry import suggestion

P = ParamSpec("P")
R = TypeVar("R")
Choice = Mapping[str, object]

# Granularities that are cut out of the weights around them; one ranking may hold several of them.
SLICES = ("channel", "neuron", "head", "head_dim", "conv_group")

# -- names of granularities and criteria ---------------------------------------------------------------------------


def _each(name: str, *words: str, **options: object) -> dict[str, Choice]:
    return {word: {"name": name, **options} for word in words}


GRANULARITIES: Mapping[str, Choice] = {
    **_each("channel", "filter", "filters", "channels", "out_channel", "output_channel"),
    **_each("neuron", "neurons", "hidden_unit", "hidden_units"),
    **_each("head", "heads", "attention_head", "attention_heads"),
    **_each("expert", "experts"),
    **_each("layer", "layers", "depth"),
    **_each("sub_block", "sub-block", "sub_blocks", "sublayer", "sublayers", "branch", "residual_branch"),
    **_each("element", "unstructured", "weight", "weights", "elements", "fine_grained", "fine-grained"),
    **_each("vector", "row", "rows", axis="row"),
    **_each("vector", "column", "columns", axis="column"),
    **_each("2:4", "semi_structured", "semi-structured", "2to4", "2of4", "2_4"),
}
CRITERIA: Mapping[str, Choice] = {
    **_each("magnitude", "l1", "L1", "l1_norm", "l1-norm", "abs", norm="l1"),
    **_each("magnitude", "l2", "L2", "l2_norm", "l2-norm", norm="l2"),
    **_each("magnitude", "weight_magnitude", "group_norm", "MagnitudeImportance", "GroupNormImportance"),
    **_each("magnitude", "GroupMagnitudeImportance"),
    **_each("taylor", "TaylorImportance", "GroupTaylorImportance", "first_order", "taylor_fo"),
    **_each("bn-scale", "slimming", "network_slimming", "bn", "bn_gamma", "BNScaleImportance"),
    **_each("fpgm", "geometric_median", "geometric-median", "FPGMImportance"),
    **_each("random", "RandomImportance"),
}
ABOUT_GRANULARITIES: Mapping[str, str] = {
    **dict.fromkeys(
        ("kv_head", "kv_heads", "key_value_head", "query_head"),
        "write head: a key and value head goes together with all queries that share it",
    ),
    **dict.fromkeys(
        ("blocks", "stage", "residual_block", "transformer_block"),
        "write layer for whole blocks of a network; block is a tile of a weight matrix",
    ),
    **dict.fromkeys(
        ("ffn", "mlp", "intermediate", "feed_forward"),
        "write neuron, the hidden units of linear layers, and protect what should stay whole",
    ),
    **dict.fromkeys(("group", "groups"), "write conv_group for groups of a convolution, or channel"),
    "embedding": "embeddings are no granularity; masks cover them with {name: element, embeddings: true}",
}
ABOUT_CRITERIA: Mapping[str, str] = {
    **dict.fromkeys(
        ("hessian", "HessianImportance", "GroupHessianImportance", "second_order"),
        "write obd (true Hessian), fisher (squared gradients) or kfac (whole units)",
    ),
    **dict.fromkeys(("lamp", "LAMPImportance", "erk"), "these spread an amount over layers: write allocation"),
    **dict.fromkeys(("activation", "activations"), "write mean-activation, activation-variance or apoz"),
    **dict.fromkeys(("norm", "lp"), "write magnitude, with norm: l1 or l2"),
}

# -- targets and other keys ----------------------------------------------------------------------------------------

ABOUT_TARGETS: Mapping[str, str] = {
    **dict.fromkeys(
        ("flops", "flop", "FLOPs", "ops", "mac", "MACs", "madds"),
        "macs = flops / 2, so the fraction that is kept is the same: write macs",
    ),
    **dict.fromkeys(
        ("pruning_ratio", "ch_sparsity", "channel_sparsity", "amount", "ratio", "global_sparsity", "final_sparsity"),
        "write sparsity, the fraction of the units that goes",
    ),
    **dict.fromkeys(("density", "keep_ratio", "keep"), "write sparsity = 1 - density, the fraction that goes"),
    **dict.fromkeys(("parameters", "param", "num_params"), "write params, the fraction of the parameters that is kept"),
    **dict.fromkeys(("latency", "time", "ms"), "write latency_ms, the milliseconds of one forward pass at most"),
    **dict.fromkeys(("size", "memory", "bytes", "model_size"), "write memory_bytes, the bytes of the weights at most"),
    **dict.fromkeys(("speedup", "speed_up"), "write macs, the fraction that is kept (1 / speed-up), or latency_ms"),
}
ABOUT_KEYS: Mapping[str, str] = {
    **dict.fromkeys(
        ("ignored_layers", "ignore", "exclude", "excluded", "skip", "ignored_modules", "exclude_op_names"),
        "write protect: names, patterns or (in Python) the modules themselves",
    ),
    "unwrapped_parameters": "parameters of your own are found; write protect to leave one whole",
    **dict.fromkeys(("importance", "imp", "method", "pruner", "strategy"), "write criterion"),
    **dict.fromkeys(("structure", "mask_structure", "pruning_type", "op_type"), "write granularity"),
    **dict.fromkeys(("global_pruning", "global"), "write scope: global or local"),
    **dict.fromkeys(
        ("pruning_ratio_dict", "ch_sparsity_dict", "layer_sparsity"),
        'write target: {sparsity: {"name pattern": fraction}}; the first pattern that matches counts',
    ),
    **dict.fromkeys(
        ("max_pruning_ratio", "max_ch_sparsity"), "write min_keep_fraction, the share of every group that stays"
    ),
    **dict.fromkeys(
        ("iterative_steps", "current_step"),
        "a plan is one step; plans compose: first.then(second, model), and recover trains in between",
    ),
    **dict.fromkeys(
        ("example_inputs", "dummy_input", "inputs", "sample_input"), "write example, what one forward takes"
    ),
    **dict.fromkeys(("dataset", "dataloader", "train_loader", "calib_data"), "write data, an iterable of batches"),
    **dict.fromkeys(("criterion_fn", "loss_fn"), "write loss: loss(model, batch) -> scalar"),
    **dict.fromkeys(("metric", "metrics", "eval_fn", "evaluator"), "write evaluate"),
    **dict.fromkeys(("device", "gpu"), "move the model: it is pruned where it lies (on the command line: --device)"),
    "epochs": "write recover, a list of steps: [{method: finetune, epochs: 3}]",
    "output": "write out",
}
TARGETS = ("sparsity", "count", "threshold", "params", "macs", "memory_bytes", "latency_ms")


def translated(value: object, table: Mapping[str, Choice]) -> object:
    """A name, or a mapping with one, in the words of secateur; options that were written stand over those implied.

    Args:
        value: as users write it; whatever is no choice comes back as it is.
        table: `GRANULARITIES` or `CRITERIA`.

    Example:
        >>> translated("l1", CRITERIA), translated({"name": "filter"}, GRANULARITIES)
        ({'name': 'magnitude', 'norm': 'l1'}, 'channel')
    """
    name = value.get("name") if isinstance(value, Mapping) else value
    if not isinstance(name, str) or name not in table:
        return value
    given = {key: item for key, item in value.items() if key != "name"} if isinstance(value, Mapping) else {}
    found = {**table[name], **given}
    return found["name"] if len(found) == 1 else found


def about_target(name: str) -> str:
    """The right word for a target of others; "" where there is none.

    Example:
        >>> about_target("pruning_ratio")
        'write sparsity, the fraction of the units that goes'
    """
    return ABOUT_TARGETS.get(name, "")


def about_key(name: str) -> str:
    """The right word for a key, argument or option of others; "" where there is none.

    Example:
        >>> about_key("--ignored-layers")
        'write protect: names, patterns or (in Python) the modules themselves'
    """
    word = name.lstrip("-").replace("-", "_")
    if word in TARGETS:
        return f"write it into the target: {{{word}: ...}}"
    if word in ABOUT_KEYS:
        return ABOUT_KEYS[word]
    said = ABOUT_TARGETS.get(word, "")
    return f"{said} (of the target)" if said else ""


def right_word(name: str, known: Iterable[str], answers: Mapping[str, str], *, more: str = "") -> str:
    """The hint for an unknown name: the right word of ours, the nearest known one, or where all of them are listed."""
    return answers.get(name) or suggestion(name, known, otherwise=more or None)


def spoken(*also: Collection[str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: an argument that the function does not have is answered with the right word, not with a TypeError.

    Args:
        also: further names that are taken, for a function with ``**options``.

    Raises:
        RecipeError: in the function's place, for an unknown argument.

    Example:
        >>> @spoken()
        ... def prune(model, *, protect=()): ...
        >>> prune(None, ignored_layers=[])
        Traceback (most recent call last):
        secateur.errors.RecipeError: prune() has no argument 'ignored_layers'
          do:  write protect: names, patterns or (in Python) the modules themselves
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        mine = [name for name in inspect.signature(function).parameters if name != "self"]
        known = [*mine, *(name for names in also for name in names)]
        # A class is called by its own name, and `plan` is made elsewhere.
        called = function.__qualname__.removesuffix(".__init__").rpartition(".")[2]
        called = "plan" if called == "make_plan" else called

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs:
                if name not in known:
                    raise RecipeError(
                        f"{called}() has no argument {name!r}",
                        hint=about_key(name) or suggestion(name, known, form="{}"),
                    )
            return function(*args, **kwargs)

        return checked

    return decorate
