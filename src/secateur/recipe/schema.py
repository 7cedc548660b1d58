"""What a recipe may say. Names of criteria and granularities are checked later, against the registries."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, Strict, model_validator

from secateur.recipe.checks import (
    Allocation,
    Bytes,
    Choice,
    Count,
    Criterion,
    Granularity,
    Macs,
    Milliseconds,
    Params,
    Patterns,
    Removals,
    Schedule,
    Sparsity,
    Threshold,
    problem,
)
from secateur.recipe.parts import Distillation, Optimizer, Part
from secateur.recipe.training import Training, wrong_with
from secateur.request import (
    ALLOCATION,
    CRITERION,
    MIN_KEEP,
    MIN_KEEP_FRACTION,
    PROOF,
    Amount,
    Efforts,
    check_together,
)


class Targets(Part):
    """What must be reached. Where several are given, all of them hold.

    ``sparsity``, ``count`` and ``threshold`` say how much is removed, in units of the granularity; they
    exclude each other. The others bound what is left.
    """

    model_config = ConfigDict(json_schema_extra={"minProperties": 1})

    sparsity: Sparsity | None = None
    """Fraction of the units that is removed, in [0, 1); or name pattern: fraction, the first that matches counts."""
    count: Removals | None = None
    """Number of units that are removed."""
    threshold: Threshold | None = None
    """Units with a score below this are removed."""
    params: Params | None = None
    """Fraction of the parameters that is kept at most, in (0, 1]."""
    macs: Macs | None = None
    """Fraction of the multiply-accumulates that is kept at most, in (0, 1]."""
    memory_bytes: Bytes | None = None
    """Bytes of the weights at most."""
    latency_ms: Milliseconds | None = None
    """Median latency of one forward pass at most, in milliseconds."""

    @model_validator(mode="after")
    def _one_at_least(self) -> Self:
        wrong = check_together(list(self.given()))
        if wrong:
            raise problem(wrong)
        return self

    def given(self) -> dict[str, Amount]:
        """The bounds that were set: name -> number."""
        return {key: value for key, value in self.model_dump().items() if value is not None}


class BatchNormRefresh(Part):
    """Estimate the statistics of batch normalisation anew on calibration data."""

    method: Literal["bn_refresh"]
    """``bn_refresh``."""
    batches: Count = 20
    """Batches to run."""


class Refit(Part):
    """Fit layers that lost inputs, or that stand before removed blocks, anew in closed form; needs no labels."""

    read_with: ClassVar = {"ridge": ("what", "weights")}

    method: Literal["refit"]
    """``refit``."""
    ridge: Annotated[float, Field(ge=0)] | Literal["auto"] = "auto"
    """Pull towards the cut weights, relative to the mean square of the inputs; ``auto``: held-out batches choose."""
    positions: Count = 16
    """Places in space taken per image and convolution."""
    what: Literal["weights", "bias"] = "weights"
    """``weights``: least squares over what is kept; ``bias``: only the mean output is made good."""


class ObsUpdate(Part):
    """Move the weights that stay so that they make up for those that go, in one step; needs labels. Comes first."""

    read_with: ClassVar = {"block_size": ("form", "block")}

    method: Literal["obs_update"]
    """``obs_update``."""
    form: Literal["low-rank", "block"] = "low-rank"
    """Curvature over all weights at once, or in blocks of a tensor."""
    gradients: Count = 256
    """Per-sample gradients that the curvature is made of."""
    block_size: Count = 64
    """Weights per block, for form block."""
    damping: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Relative to the mean curvature; ``auto`` tries six and takes the best on held-out samples."""


class LowRankAdapters(Part):
    """Adapters: low-rank changes that are trained in the place of the weights, and merged with every zero in place."""

    rank: Count = 8
    """Rank of the change."""
    scale: Annotated[float, Field(gt=0)] = 2.0
    """Factor of the change."""
    targets: Patterns = ("*",)
    """Patterns of parameter names; all weights of linear layers and convolutions by default."""


class Finetune(Part):
    """Train the pruned model on."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [key], "properties": {key: {"type": "integer"}}} for key in ("epochs", "steps")]
        }
    )

    method: Literal["finetune"]
    """``finetune``."""
    epochs: Count | None = None
    """Passes over the data. Exactly one of epochs and steps is given."""
    steps: Count | None = None
    """Optimizer steps. Exactly one of epochs and steps is given."""
    optimizer: Optimizer = Optimizer()
    """See the optimizer's keys."""
    schedule: Schedule = "constant"
    """How the learning rate falls from its peak: constant, linear, cosine, or a scheduler of torch with its options."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises to its peak."""
    last_of: Count | None = None
    """Learning-rate rewinding: the rates are those of the last part of a training of so many epochs (or steps)."""
    accumulate: Count = 1
    """Batches whose mean gradient makes one step."""
    amp: Literal["bf16"] | None = None
    """Mixed precision of forward and loss."""
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the training data that is not trained on, and judged by after each pass."""
    best: bool = False
    """Keep the weights of the pass with the lowest loss on the held-out data."""
    patience: Count | None = None
    """Stop after so many passes without a lower loss on the held-out data."""
    distil: Distillation | None = None
    """Knowledge distillation from the dense model."""
    adapters: LowRankAdapters | None = None
    """Train low-rank adapters only."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise problem("give exactly one of epochs and steps")
        if self.last_of is not None and self.last_of < (self.epochs or self.steps or 0):
            raise problem("last_of is the length of the whole training, so it is no less than epochs or steps")
        if self.last_of is not None and self.schedule == "constant":
            raise problem("last_of rewinds the learning rate, and a constant one is the same everywhere")
        if self.warmup_steps and isinstance(self.schedule, dict):
            raise problem("warmup_steps belongs to the schedules constant, linear and cosine")
        judged = self.best or self.patience is not None or "plateau" in str(self.schedule).lower()
        if judged and self.holdout is None:
            raise problem("best, patience and ReduceLROnPlateau need holdout, a share of the training data to judge by")
        if self.holdout is not None and not judged:
            raise problem("holdout is judged by best, patience or ReduceLROnPlateau, and none of them is set")
        return self


class Measure(Part):
    """What is measured before and after."""

    latency: bool = True
    """Measure latency at all."""
    quality: bool = True
    """Measure quality at all: by `evaluate`, or by what the labels ask for."""
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 30
    """Timed rounds at most, before and after in turns; five at most for masks, of which no speed is expected."""
    warmup: Annotated[int, Field(ge=0, le=100_000)] = 5
    """Rounds at most that are not timed."""
    seconds: Annotated[float, Field(gt=0)] = 3.0
    """Time budget of all rounds; six are timed whatever they take, since fewer cannot tell a difference from chance."""
    spread: Annotated[float, Field(ge=0)] = 0.05
    """Enough when nine of ten rounds agree on the ratio after / before within this fraction of it; 0 = never enough."""
    batch_size: Count | None = None
    """Batch of the timed forward pass; left out: that of the example."""
    threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    """CPU threads; left out: torch's own choice."""


class Reconstruct(Part):
    """Training of each sub-block (attention, MLP) towards the outputs of the original, once its layers are solved."""

    epochs: Count = 8
    """Passes over the batches that are not held out; the best on those that are is kept, or none."""
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate of Adam at the start; it falls to zero along half a cosine."""
    target: Literal["branch", "stream"] = "stream"
    """``branch``: what the sub-block adds is to be the original's; ``stream``: the hidden state behind it."""
    normalise: Literal["coordinate", "total", "token"] = "coordinate"
    """What squares of errors are relative to: the original's mean square per coordinate, in total, or per token."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the order of batches."""


class Shares(Part):
    """How much each block gives up, where not all give up the same share."""

    read_with: ClassVar = {"outliers": ("name", "owl")}

    name: Literal["owl", "curve"] = "owl"
    """``owl``: blocks with more outliers among Wanda's scores keep more; ``curve``: what these lose in all is least."""
    limit: Annotated[float, Field(gt=0, lt=1)] = 0.08
    """How far shares go from their mean: at most so far (``curve``), or over a range of twice as much (``owl``)."""
    outliers: Annotated[float, Field(gt=0)] = 5.0
    """``owl``: a score is an outlier above so many times the mean of its block."""
    check: bool = True
    """Prune with equal shares too, and take these where outputs on held-out batches are nearer to the original's."""


class BlockByBlock(Part):
    """How a solver prunes block by block, each block behind blocks that are pruned already."""

    read_with: ClassVar = {"shrinkage": ("targets", "dense")}

    use: Literal["auto"] | bool = "auto"
    """``auto``: where the criterion is a solver (admm, sparsegpt, least_squares, swap); true: wanda, ria and magnitude,
    too; false: never."""
    targets: Literal["auto", "dense", "own"] = "auto"
    """``dense``: outputs of the original model are to be kept; ``own``: those of the layer on pruned inputs; ``auto``:
    dense with `reconstruct` or where more than 60 % of some weights go, else own."""
    shrinkage: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the correction towards the original's outputs; left out: chosen per layer on held-out batches."""
    hold_out: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the batches that choose and guard, and that no layer is learned from."""
    damping: Annotated[float, Field(ge=0)] = 0.01
    """Share of the mean diagonal that is added to second moments."""
    reconstruct: Reconstruct | None = None
    """Train each sub-block once its layers are solved; left out: not."""
    allocation: Shares | None = None
    """How much each block gives up; left out: all the same share."""
    memory_bytes: Bytes | None = None
    """Hidden states beyond so many bytes lie on disk; left out: all in memory. With `from_disk` a bound of all that the
    run holds beside the libraries: it is refused where that is not enough."""
    from_disk: bool = False
    """For models larger than the memory: `secateur prune hf:FOLDER` leaves the weights on disk, reads one block at a
    time, and writes it back."""
    checkpoint: Annotated[str, Field(max_length=4096)] | None = None
    """Folder of finished blocks; a run that was killed goes on from there."""


class Calibration(Part):
    """Text of language models: how much of it."""

    tokens: Count | None = None
    """Tokens per sequence; left out: 128."""
    sequences: Count | None = None
    """Sequences to calibrate with, from the start of the text; left out: 32."""
    batch: Count | None = None
    """Sequences per batch; left out: 64."""
    test: Count | None = None
    """Sequences of the test part at most that quality is measured on; left out: all."""


class Verify(Part):
    """How the certificate is made."""

    dtype: Literal["float32", "float64"] = "float32"
    """Precision in which cut model and replay are compared."""
    tolerance: Annotated[float, Field(gt=0)] | None = None
    """Largest absolute difference allowed; left out: chosen from dtype and size of the outputs."""
    proof: Efforts = PROOF
    """Inputs that the cut is proved on: ``example`` alone, ``default`` (others too, as small as they come) or ``full``
    (others at any size, each change alone, training mode on all)."""


REPEATABLE = ("finetune", "bn_refresh")
"""Recovery steps that a model without a cut can go through too; the others make up for what is gone."""
Step = Annotated[BatchNormRefresh | Refit | ObsUpdate | Finetune, Field(discriminator="method")]


class Recipe(Part):
    """Everything that decides about a run."""

    model_config = ConfigDict(title="secateur recipe")

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    """Version of this format."""
    criterion: Criterion = CRITERION
    """The rule that scores."""
    granularity: Granularity = "channel"
    """What is removed."""
    scope: Literal["local", "global", "row"] = "global"
    """Where units compete."""
    allocation: Allocation = ALLOCATION
    """How sparsity is spread over layers."""
    target: Targets
    """What must be reached."""
    protect: Patterns = ()
    """Names not to touch: shell patterns of module or parameter names, type:ClassName, or tag:WORD."""
    min_keep: Annotated[int, Field(ge=0)] = MIN_KEEP
    """Units that every group keeps at least."""
    min_keep_fraction: Annotated[float, Field(ge=0, lt=1)] = MIN_KEEP_FRACTION
    """Share of every group that a global ranking of slices keeps in any case."""
    round_to: Count | Literal["auto"] | None = None
    """Kept units per group are a multiple of this; ``auto`` measures the width grid of this machine. Left out: 8 for
    channels and neurons in groups of 64 or more, unless the target says exactly how much goes."""
    expressible: bool = False
    """For Hugging Face models: cut so that a config describes the result and ``from_pretrained`` loads it."""
    scales: Literal["keep", "follow"] = "keep"
    """Scales that the code takes from a width that is cut (the root in attention): ``keep`` folds them into the weights
    or refuses, ``follow`` lets the function change, which the certificate then says."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random."""
    training: Training | None = None
    """Train the model before or while it is pruned: gradual, slimming or movement; left out: it is pruned as it is."""
    recover: Annotated[tuple[Step, ...], Strict(False), Field(max_length=100)] = ()
    """Steps that restore quality, in order."""
    control: Literal["none", "dense"] = "none"
    """``dense``: train a copy of the original by the same steps (finetune and bn_refresh), and report its quality."""
    track: Annotated[tuple[Choice, ...], Strict(False), Field(max_length=8)] = ()
    """Trackers that log the run: tensorboard, wandb, mlflow, trackio, each with options of accelerate's class."""
    blocks: BlockByBlock = BlockByBlock()
    """How a solver prunes block by block."""
    calibration: Calibration = Calibration()
    """How much text a language model is calibrated and measured with."""
    measure: Measure = Measure()
    """What is measured before and after."""
    verify: Verify = Verify()
    """How the certificate is made."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if any(step.method == "obs_update" for step in self.recover[1:]):
            raise problem("recover: obs_update starts from the original weights, so it comes first")
        # A control that does nothing would repeat the figure of the original under another name.
        repeated = self.training is not None or any(step.method in REPEATABLE for step in self.recover)
        if self.control == "dense" and not repeated:
            raise problem(f"control: dense repeats {' and '.join(REPEATABLE)} on the original, and recover has neither")
        if self.control == "dense" and not self.measure.quality:
            raise problem("control: dense compares quality, and measure.quality is off")
        return self

    @model_validator(mode="after")
    def _trained(self) -> Self:
        wrong = "" if self.training is None else wrong_with(self.training, self)
        if wrong:
            raise problem(f"{'' if wrong.startswith('recover') else 'training: '}{wrong}")
        return self

    def choices(self) -> dict[str, Any]:
        """What says how units are chosen, as keywords that `secateur.plan` and `secateur.Pruner` share."""
        plain = self.model_dump(by_alias=True)
        allocation = plain["allocation"]
        return {
            "granularity": plain["granularity"],
            # With its options where it has any: measured curves are all that this one is.
            "allocation": allocation if isinstance(allocation, str) or len(allocation) > 1 else allocation["name"],
            "scope": self.scope,
            "min_keep": self.min_keep,
            "min_keep_fraction": self.min_keep_fraction,
            "round_to": self.round_to,
            "scales": self.scales,
            "seed": self.seed,
            "dtype": self.verify.dtype,
            "tolerance": self.verify.tolerance,
            "proof": self.verify.proof,
        }


def json_schema() -> dict[str, object]:
    """The JSON schema (draft 2020-12) of recipes, for editors and other tools."""
    schema = Recipe.model_json_schema(by_alias=True)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
