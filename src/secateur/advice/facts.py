"""What advice is based on: facts of model, data and machine. Everything but one timing is exact."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn

from secateur.errors import InputError, UnsupportedError
from secateur.kinds.slices.anew import lock_computed
from secateur.measure import num_params
from secateur.measure.macs import samples_in
from secateur.model.call import default_loss, device_of, to_device, to_target
from secateur.model.guard import guard
from secateur.planning.build import grouped
from secateur.structure.capture import capture
from secateur.structure.cost import CostModel
from secateur.structure.groups import structure
from secateur.structure.trace import Trace
from secateur.types import Batch, Data, Example, Group, Json, Loss

# By name and along the classes' ancestors: BatchNorm2d, SyncBatchNorm and users' own share these.
NORMS = {"_BatchNorm": "batch", "LayerNorm": "layer", "GroupNorm": "group", "RMSNorm": "rms"}
PIECEWISE = ("relu", "relu_", "leaky_relu", "leaky_relu_", "hardtanh", "hardtanh_", "threshold")
SMOOTH = ("gelu", "silu", "silu_", "elu", "elu_", "mish", "tanh", "sigmoid", "hardswish", "softplus")
NONE, UNLABELLED, LABELLED = "none", "unlabelled", "labelled"


@dataclass(frozen=True)
class Facts:
    """What is known about a model, its data and the machine.

    Args:
        model: class name.
        params: number of parameters.
        macs: multiply-accumulates of one forward pass for one sample.
        norms: kinds of normalisation, of batch, layer, group, rms.
        activations: functions that really ran, sorted.
        piecewise_linear: a ReLU-like function ran, and no smooth one.
        units: granularity -> units that can be cut.
        shares: granularity -> fraction of the parameters that goes with these units.
        widest: largest input width of a linear layer.
        data: "none", "unlabelled" or "labelled".
        batches: per pass over the data; None = not known.
        seconds_per_batch: one forward and backward pass; None = not measured.
        budget_seconds: time that may be spent on recovery; None = not limited.
        device: of the model.
        sparse_tensor_cores: whether the GPU has them (compute capability 8.0 and up).
    """

    model: str
    params: int
    macs: int
    norms: tuple[str, ...]
    activations: tuple[str, ...]
    piecewise_linear: bool
    units: dict[str, int]
    shares: dict[str, float]
    widest: int
    data: str
    batches: int | None
    seconds_per_batch: float | None
    budget_seconds: float | None
    device: str
    sparse_tensor_cores: bool

    @property
    def heads(self) -> int:
        """Attention heads that can be cut, as the structure engine finds them."""
        return self.units.get("head", 0)

    @property
    def attention(self) -> bool:
        """Whether attention ran, by heads found or a softmax among the functions."""
        return self.heads > 0 or "softmax" in self.activations

    @property
    def epochs(self) -> float | None:
        """Passes over the data that the budget pays for; None where that is not known."""
        if self.budget_seconds is None or not self.seconds_per_batch or not self.batches:
            return None
        return self.budget_seconds / (self.seconds_per_batch * self.batches)

    def to_dict(self) -> dict[str, Json]:
        """Plain data, for JSON."""
        return asdict(self)


def gather_facts(
    model: nn.Module,
    example: Example,
    *,
    data: Data | None,
    labels: bool | None,
    budget_seconds: float | None,
    loss: Loss | None,
    protect: Sequence[str],
) -> Facts:
    """Collect the facts; see `advise` for the arguments.

    Raises:
        InputError: labels are promised and the batches hold none; data that holds no batch.
        ForwardError: the forward fails on the example.
    """
    record = capture(model, example)
    found, cost = structure(model, record, protect), CostModel(model, record, samples_in(model, example))
    lock_computed(model, example, record, found)
    whole = cost.params({})
    kinds: dict[str, list[Group]] = {}
    for group in found.groups:
        # What is locked cannot go, whatever its share.
        if not group.locks:
            kinds.setdefault(group.granularity, []).append(group)
    ran = _functions(record)
    units = {kind: sum(group.size for group in groups) for kind, groups in sorted(kinds.items())}
    # Of all groups of a kind at once: what two of them share goes once.
    shares = {
        kind: (whole - cost.params({found.atoms[group.name].id: 0 for group in groups})) / max(whole, 1)
        for kind, groups in sorted(kinds.items())
    }
    units |= _experts(model, example, protect)
    kind, batch, batches = _data(data, labels, loss)
    device = device_of(model)
    return Facts(
        model=type(model).__name__,
        params=num_params(model),
        macs=cost.macs({}),
        norms=_norms(model),
        activations=ran,
        piecewise_linear=any(name in PIECEWISE for name in ran) and not any(name in SMOOTH for name in ran),
        units=units,
        shares=shares,
        widest=max((m.in_features for m in model.modules() if isinstance(m, nn.Linear)), default=0),
        data=kind,
        batches=batches,
        seconds_per_batch=_seconds(model, batch, loss) if kind == LABELLED and budget_seconds is not None else None,
        budget_seconds=budget_seconds,
        device=device.type,
        sparse_tensor_cores=device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0),
    )


def _experts(model: nn.Module, example: Example, protect: Sequence[str]) -> dict[str, int]:
    """{"expert": how many can go one by one}, or nothing."""
    try:
        return {"expert": sum(group.size for group in grouped(model, example, "expert", protect)[0])}
    except UnsupportedError:
        return {}


def _functions(record: Trace) -> tuple[str, ...]:
    known = {*PIECEWISE, *SMOOTH, "softmax", "_softmax"}
    # From the calls that ran, since a module says nothing of functions that a forward calls by hand.
    names = {str(step.func).removeprefix("aten.").partition(".")[0] for step in record.steps}
    # Fused attention hides its softmax.
    attention = {"softmax"} if any("scaled_dot_product" in name for name in names) else set()
    return tuple(sorted({name.strip("_") for name in names & known} | attention))


def _norms(model: nn.Module) -> tuple[str, ...]:
    kinds = {name for module in model.modules() for kind in type(module).__mro__ if (name := NORMS.get(kind.__name__))}
    return tuple(sorted(kinds))


def _data(data: Data | None, labels: bool | None, loss: Loss | None) -> tuple[str, Batch, int | None]:
    if data is None:
        if labels:
            raise InputError("labels=True without data", hint="pass data, or leave labels out")
        return NONE, None, None
    batch = next(iter(data), None)
    if batch is None:
        raise InputError("the data holds no batch", hint="pass data with at least one batch")
    # A loss of the user's own knows where its targets are.
    has = loss is not None or to_target(batch) is not None
    if labels and not has:
        raise InputError("labels=True, but the first batch holds no target", hint="pass a loss, or (input, target)")
    try:
        length: int | None = len(data)  # type: ignore[arg-type]
    except TypeError:  # a stream has no length
        length = None
    return (LABELLED if (has if labels is None else labels) else UNLABELLED), batch, length


def _seconds(model: nn.Module, batch: Batch, loss: Loss | None) -> float:
    """The shorter of two passes: the first one pays for what torch sets up once."""
    loss_of, device, taken = loss or default_loss, device_of(model), []
    # Eval: running statistics must not move.
    with guard(model, mode="eval", seed=0):
        for _ in range(2):
            started = time.perf_counter()
            loss_of(model, to_device(batch, device)).backward()  # type: ignore[no-untyped-call]
            model.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - started)
    return min(taken)
