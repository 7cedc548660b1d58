"""Sparse tensors, files that are written in a forward, learned starts and losses: no error of the machinery."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from independent import cut_or_refused, locked
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.measure.macs import count, samples_in


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 24), nn.Linear(24, 4)

    def hidden(self, x: Tensor) -> Tensor:
        return F.relu(self.fc1(x))

    def forward(self, x: Tensor) -> object:
        return self.fc2(self.hidden(x))


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class GivesSparse(Net):
    def __init__(self, layout: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, x: Tensor) -> object:
        y = self.fc2(self.hidden(x))
        return y, self.layout(y * (y > 0))


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_sparse_outputs_are_compared(layout: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = GivesSparse(layout).eval()
    assert samples_in(model, X) == 5
    found = cut_or_refused(model, X)
    if not isinstance(found, sc.SecateurError):
        y, sparse = found[1](X)
        assert (y > 0).any()
        assert torch.equal(sparse.to_dense(), y * (y > 0))


class HoldsSparse(Net):
    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.register_buffer("table", made(torch.eye(24).roll(1, 0)))

    def hidden(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.table, super().hidden(x).T).T


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("made", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_a_sparse_buffer_locks_what_it_meets(made: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = HoldsSparse(made).eval()
    assert locked(model, X)["fc1"]
    assert isinstance(cut_or_refused(model, X), sc.SecateurError)


class ThroughAFile(Net):
    def hidden(self, x: Tensor) -> Tensor:
        h, file = super().hidden(x), io.BytesIO()
        torch.save({"h": h.detach().flip(1), "w": self.fc1.weight}, file)
        file.seek(0)
        return h + torch.load(file)["h"]


def test_a_file_that_a_forward_writes_holds_plain_numbers_and_is_a_door() -> None:
    torch.manual_seed(0)
    model = ThroughAFile().eval()
    assert any("storage" in reason for reason in locked(model, X)["fc1"])


class Start(nn.Module):
    """A learned state is spread over the batch and goes into a module."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.u, self.out = nn.Linear(8, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.start = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        h = self.start.expand(len(x), -1)
        for t in range(x.shape[1]):
            h = (self.w(x[:, t]) + self.u(h)).tanh()
        return self.out(h)


def test_operations_are_counted_where_a_view_of_a_parameter_goes_into_a_module() -> None:
    torch.manual_seed(0)
    model, x = Start().eval(), torch.randn(2, 6, 8)
    model.w.bias.requires_grad_(False)
    assert count(model, x).total == 2 * (6 * (8 * 12 + 12 * 12) + 12 * 3)
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["w.bias"]
    found = cut_or_refused(model, x)
    assert not isinstance(found, sc.SecateurError), found
    assert 0 in found[0].cuts["start"]


LOSSES: dict[str, Callable[..., Tensor]] = {
    "squares": F.mse_loss, "absolute": F.l1_loss, "smooth": F.smooth_l1_loss, "huber": F.huber_loss,
    "margins": lambda a, b, **k: F.soft_margin_loss(a, b.detach().sign(), **k),
    "logits": lambda a, b, **k: F.binary_cross_entropy_with_logits(a, b.sigmoid(), **k),
    "chances": lambda a, b, **k: F.binary_cross_entropy(a.sigmoid(), b.sigmoid(), **k),
}  # fmt: skip


class Compares(nn.Module):
    """A loss between two hidden layers beside the output."""

    def __init__(self, loss: Callable[..., Tensor], reduction: str) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 4)
        self.loss, self.reduction = loss, reduction

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = F.relu(self.a(x)), F.relu(self.b(x))
        return self.out(a + b), self.loss(a, b, reduction=self.reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_between_hidden_layers_runs_over_what_is_kept(name: str, reduction: str) -> None:
    torch.manual_seed(0)
    model = Compares(LOSSES[name], reduction).eval()
    found = cut_or_refused(model, X)
    assert not isinstance(found, sc.SecateurError), found
    plan, cut = found
    kept = plan.cuts["a.weight"][0]
    for x in (X, torch.randn(2, 8)):
        a, b = (F.relu(layer(x))[:, kept] for layer in (model.a, model.b))
        torch.testing.assert_close(cut(x)[1], LOSSES[name](a, b, reduction=reduction), rtol=1e-4, atol=1e-5)


class Ragged(nn.Module):
    """Packs its rows into a nested tensor of its own."""

    def __init__(self, layout: torch.layout) -> None:
        super().__init__()
        self.a, self.b, self.layout = nn.Linear(8, 16), nn.Linear(16, 4), layout

    def forward(self, x: Any) -> Any:
        packed = x if x.is_nested else torch.nested.as_nested_tensor([x[0], x[1][:3]], layout=self.layout)
        return torch.nested.to_padded_tensor(self.b(self.a(packed).relu()), 0.0)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["made", "given"])
def test_nested_tensors_are_refused_by_name(layout: torch.layout, given: bool) -> None:
    x: Any = torch.randn(2, 5, 8)
    if given:
        x = torch.nested.nested_tensor([x[0], x[1][:3]], layout=layout)
    for entry in (sc.inspect, lambda m, e: sc.plan(m, e, target={"sparsity": 0.3}, granularity="channel")):
        with pytest.raises(sc.errors.UnsupportedError, match=r"torch\.nested is not supported"):
            entry(Ragged(layout).eval(), x)


class Misused(nn.Module):
    """Calls an operator wrongly, of whose signature torch then says that it takes SymInt[]."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.view(self.a(x), ["two", 4])


def test_an_error_that_quotes_a_signature_is_not_one_of_nested_tensors() -> None:
    with pytest.raises(sc.SecateurError, match="SymInt") as caught:
        sc.inspect(Misused().eval(), torch.zeros(2, 4))
    assert "torch.nested" not in str(caught.value)
