"""A norm goes into a convolution only where the graph of a run shows that nothing else reads what lies between them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import secateur as sc
from secateur.deployment import convolving, native, planner
from secateur.deployment.convolution import SparseConv2d
from secateur.deployment.following import Behind, behind
from secateur.types import Latency

needs_kernels = pytest.mark.skipif(bool(native.why_not()), reason=native.why_not())


class Part(nn.Module):
    """Convolution, norm and ReLU, and whatever a test makes of them."""

    def __init__(self, channels: int = 3, relu: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), relu or nn.ReLU()
        self.conv.weight.data.masked_fill_(torch.rand_like(self.conv.weight) < 0.9, 0)
        for tensor in (self.norm.weight, self.norm.bias, self.norm.running_mean):
            tensor.data.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class Bare(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x)) + self.norm.eps


class Turned(Part):
    """The order in which modules stand is not the one in which they run."""

    def __init__(self) -> None:
        super().__init__(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.conv(self.norm(x.repeat(1, 8, 1, 1)[:, :8])))


class ReadAgain(Part):
    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x)
        return self.norm(found) + found


class Returned(Part):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.conv(x)
        return self.norm(found), found


class Viewed(Part):
    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x)
        seen = found[:, :1]
        return self.norm(found) + seen


class Kept(Part):
    last: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.conv(x)
        return self.norm(self.last)


class KeptBehindNorm(Part):
    last: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.norm(self.conv(x))
        return self.act(self.last)


class Listed(Part):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(self.conv(x))
        return self.norm(self.seen[-1])


class Penalised(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm.weight.abs().sum()


class AsksDtype(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x.to(self.norm.weight.dtype)))


class ByFunction(Part):
    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return functional.batch_norm(self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias)


class NormTwice(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(self.conv(x)))


class ConvTwice(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.conv(x + 1)


class NormShared(Part):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Conv2d(3, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.norm(self.more(x))


class ReluShared(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.act(self.norm(self.conv(x))) - 0.1)


class Between(Part):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x) * 2)


class ParametersShared(Part):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(8)
        self.other.weight = self.norm.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.norm(self.conv(x)))


class TwoNames(Part):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.norm


class ConvTwoNames(Part):
    def __init__(self) -> None:
        super().__init__()
        self.again = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.again(x))


class OtherWay(Part):
    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x)
        if x.mean() > 100:
            return found
        return self.norm(found)


class OtherWayBySize(Part):
    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x)
        return self.norm(found) if x.shape[-1] < 50 else found


class OtherWayUnseen(Part):
    """Decides by what no run can be told otherwise: values that left torch."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x)
        if x.numpy().mean() > 100:
            return found
        return self.norm(found)


class ReadByNumpy(Part):
    largest = 0.0

    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x)
        self.largest = float(found.numpy().max())
        return self.norm(found)


class OptionalPart(Part):
    skip: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        found = self.norm(self.conv(x))
        return found if self.skip is None else self.skip(found)


class ReluUnseen(Part):
    """The same between the norm, which stands in a block of its own, and the ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(self.conv, self.norm)
        del self.conv, self.norm

    def forward(self, x: Tensor) -> Tensor:
        found = self.block(x)
        if x.numpy().mean() > 100:
            return found
        return self.act(found)


class OtherWayInTraining(Part):
    def forward(self, x: Tensor) -> Tensor:
        found = self.norm(self.conv(x))
        return found * 2 if self.training else found


class ReadInTraining(Part):
    def forward(self, x: Tensor) -> Tensor:
        found = self.conv(x)
        return self.norm(found) + found if self.training else self.norm(found)


class OwnNorm(nn.BatchNorm2d):
    pass


def changed(change: Callable[[Part], object]) -> Callable[[], Part]:
    def make() -> Part:
        part = Part()
        change(part)
        return part

    return make


def swapped_norm(norm: nn.Module) -> Callable[[], Part]:
    return changed(lambda part: setattr(part, "norm", norm))


class Residual(Part):
    """As blocks are written: one ReLU behind the norm and behind the sum."""

    def forward(self, x: Tensor) -> Tensor:
        found = self.act(self.norm(self.conv(x)))
        return self.act(found - found.mean())


BOTH, NORM, RELU, NOTHING = ("norm", "act"), ("norm", ""), ("", "act"), ("", "")
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[str, str], str]] = {
    "both": (Part, BOTH, ""),
    "in place": (lambda: Part(relu=nn.ReLU(inplace=True)), BOTH, ""),
    "another activation": (lambda: Part(relu=nn.ReLU6()), NORM, ""),
    "no norm": (Bare, RELU, ""),
    "other order": (Turned, RELU, ""),
    "read again": (ReadAgain, NOTHING, "something else reads"),
    "returned": (Returned, NOTHING, "something else reads"),
    "viewed": (Viewed, NOTHING, ""),
    "kept": (Kept, NOTHING, "kept by the forward"),
    "listed": (Listed, NOTHING, "kept by the forward"),
    "kept behind the norm": (KeptBehindNorm, NORM, ""),
    "penalised": (Penalised, NOTHING, "its tensors"),
    "asks for a dtype": (AsksDtype, NOTHING, "fails with identities"),
    "by function": (ByFunction, NOTHING, ""),
    "norm twice": (NormTwice, NOTHING, "more than once"),
    "convolution twice": (ConvTwice, NOTHING, ""),
    "norm of two": (NormShared, NOTHING, "more than once"),
    "relu twice": (ReluShared, NORM, ""),
    "relu of the branch and of the sum": (Residual, NORM, ""),
    "between": (Between, NOTHING, ""),
    "parameters shared": (ParametersShared, NOTHING, "another place"),
    "two names": (TwoNames, NOTHING, "another place"),
    "convolution of two names": (ConvTwoNames, NOTHING, ""),
    "other way": (OtherWay, NOTHING, ""),
    "other way by size": (OtherWayBySize, NOTHING, ""),
    "other way unseen": (OtherWayUnseen, NOTHING, "another way"),
    "read by NumPy": (ReadByNumpy, NOTHING, ""),
    "optional part": (OptionalPart, NOTHING, "another way"),
    "other way in training": (OtherWayInTraining, NORM, ""),
    "read in training": (ReadInTraining, NOTHING, "something else reads"),
    "training": (changed(lambda part: part.norm.train()), NOTHING, "training mode"),
    "no statistics": (swapped_norm(nn.BatchNorm2d(8, track_running_stats=False)), NOTHING, "no running statistics"),
    "no factors": (swapped_norm(nn.BatchNorm2d(8, affine=False)), BOTH, ""),
    "subclass": (swapped_norm(OwnNorm(8)), NOTHING, ""),
    "group norm": (swapped_norm(nn.GroupNorm(2, 8)), NOTHING, ""),
    "hook": (changed(lambda part: part.norm.register_forward_hook(lambda *_: None)), NOTHING, "hooks"),
    "hook before": (changed(lambda part: part.norm.register_forward_pre_hook(lambda *_: None)), NOTHING, "hooks"),
    "hook of the relu": (changed(lambda part: part.act.register_forward_hook(lambda *_: None)), NORM, ""),
    "not finite": (changed(lambda part: part.norm.running_var.fill_(-1)), NOTHING, "finite"),
    "float64": (lambda: Mixed(), NOTHING, ""),
}  # fmt: skip


class Mixed(Part):
    def __init__(self) -> None:
        super().__init__()
        self.norm.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).double()).float()


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = CASES[name][0]().requires_grad_(False)
    trains = isinstance(model.norm, nn.BatchNorm2d) and name == "training"
    model.eval()
    model.norm.train(trains)
    return model


@pytest.mark.parametrize("name", CASES)
def test_only_what_is_directly_and_solely_behind_is_taken_in(name: str) -> None:
    _, wanted, why = CASES[name]
    [found] = behind(made(name), ["conv"], [torch.randn(2, 3, 6, 6)]).values()
    assert (found.norm, found.relu) == wanted
    assert why in found.stays
    assert not (found.norm and found.stays)


def wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed layers and models are always faster."""
    monkeypatch.setattr(convolving, "_measure", lambda *_: 0.5)
    both = {"dense": Latency(1.0, 1.0, 1.0, 9), "deployed": Latency(0.5, 0.5, 0.5, 9, ratio=(0.5, 0.5, 0.5))}
    monkeypatch.setattr(planner, "latency", lambda *_, **__: both)


def deployed_alike(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> sc.deployment.Deployment:
    """What `deploy` makes of a model where packed layers win, once its outputs were found the same on other inputs."""
    wins(monkeypatch)
    done = sc.deploy(model, torch.randn(2, 3, 6, 6), convolutions=True, table=False)
    for x in (torch.randn(2, 3, 6, 6), torch.randn(1, 3, 60, 55), torch.randn(2, 3, 5, 5) + 1000):
        outputs = [out if isinstance(out := each(x.clone()), tuple) else (out,) for each in (done.model, model)]
        for mine, other in zip(*outputs, strict=True):
            assert torch.allclose(mine, other, atol=1e-5 * float(other.abs().max()))
    return done


RUN = [name for name in CASES if name not in ("training", "not finite")]


@needs_kernels
@pytest.mark.parametrize("name", RUN)
def test_outputs_are_the_same_where_relus_write_in_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name)
    model.act.inplace = True
    deployed_alike(model, monkeypatch)


@needs_kernels
@pytest.mark.parametrize("name", RUN)
def test_whatever_is_taken_in_outputs_are_the_same_on_all_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = deployed_alike(made(name), monkeypatch)
    _, (norm, relu), why = CASES[name]
    places = [getattr(done.model, part) for part in ("norm", "act")]
    assert [type(place) is nn.Identity for place in places] == [bool(norm), bool(relu)]
    if "conv" in done.swapped:
        said = done.decisions[0].why
        assert isinstance(done.model.conv, SparseConv2d)
        assert ("with its norm" in said) == bool(norm)
        assert why in said


def test_the_model_is_as_it_was() -> None:
    model = made("both")
    model.conv.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    behind(model, ["conv"], [torch.randn(2, 3, 6, 6)])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert [model.conv.training, model.norm.training] == [True, False]


def test_where_the_graph_is_not_known_norms_stay() -> None:
    class Nested(Part):
        def forward(self, x: Tensor) -> Tensor:
            torch.nested.nested_tensor([x[0], x[0]]) + 1
            return self.norm(self.conv(x))

    [found] = behind(Nested().eval(), ["conv"], [torch.randn(1, 3, 6, 6)]).values()
    assert found.norm == ""
    assert "not known" in found.stays


@needs_kernels
def test_a_relu_stays_where_the_code_around_it_could_go_another_way() -> None:
    model = ReluUnseen().eval()
    [found] = behind(model, ["block.0"], [torch.randn(2, 3, 6, 6)]).values()
    assert found == Behind("block.1")


def test_deep_names_and_several_examples() -> None:
    model = nn.Sequential(nn.Sequential(Part(), Part(8)), nn.Flatten()).eval()
    found = behind(model, ["0.0.conv", "0.1.conv"], [torch.randn(size, 3, 6, 6) for size in (1, 4)])
    assert found == {f"0.{at}.conv": Behind(f"0.{at}.norm", f"0.{at}.act") for at in (0, 1)}


@needs_kernels
@pytest.mark.parametrize("factor", [1.01, float("nan"), float("inf")])
def test_what_differs_by_more_than_rounding_is_undone(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward = made("both"), SparseConv2d.forward
    wins(monkeypatch)
    monkeypatch.setattr(SparseConv2d, "forward", lambda self, x: forward(self, x) * factor)
    done = sc.deploy(model, torch.randn(2, 3, 6, 6), convolutions=True, table=False)
    assert not done.swapped
    assert "more than rounding" in done.note
    assert "more than rounding" in str(done)


@pytest.mark.parametrize(
    ("wanted", "found", "gap"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([float("nan"), 2.0], [float("nan"), 1.0], 0.5),
        ([float("inf"), 2.0], [float("inf"), 2.0], 0.0),
        ([1.0, 2.0], [float("nan"), 2.0], float("inf")),
        ([float("-inf"), 2.0], [float("inf"), 2.0], float("inf")),
        ([], [], 0.0),
    ],
)
def test_the_largest_gap_hides_nothing(wanted: list[float], found: list[float], gap: float) -> None:
    assert planner._difference([torch.tensor(wanted)], [torch.tensor(found)]) == gap
