"""Positions, tokens, experts and features used as space are data, whatever they look like; widths stay free."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from independent import cut_or_refused, holds, left, locked, whole
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc

LONGEST, WIDTH, TOKENS = 24, 16, 6


class Sequence(nn.Module):
    """Reads a sequence that may be shorter than its tables; `mixed` is what a case does with a hidden state."""

    tables: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.up, self.down, self.out = (
            nn.Linear(a, b) for a, b in ((5, WIDTH), (WIDTH, 20), (20, WIDTH), (WIDTH, 3))
        )

    def mixed(self, h: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        h = self.mixed(self.lift(x))
        return self.out(h + self.down(F.relu(self.up(h))))


class AddedParameter(Sequence):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, LONGEST, WIDTH))

    def mixed(self, h: Tensor) -> Tensor:
        return h + self.table[:, : h.shape[1]]


class AddedFirst(AddedParameter):
    """One row more than the sequence is ever long."""

    def mixed(self, h: Tensor) -> Tensor:
        return h + self.table[:, 1 : h.shape[1] + 1]


class Narrowed(AddedParameter):
    def mixed(self, h: Tensor) -> Tensor:
        return h + self.table.narrow(1, 0, h.size(1))


class Padded(AddedParameter):
    def mixed(self, h: Tensor) -> Tensor:
        return h + F.pad(self.table, (0, 0, 0, h.shape[1] - LONGEST))


class SplitOff(AddedParameter):
    def mixed(self, h: Tensor) -> Tensor:
        return h + self.table.split([h.shape[1], LONGEST - h.shape[1]], 1)[0]


class TableWeight(Sequence):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(LONGEST, WIDTH)

    def mixed(self, h: Tensor) -> Tensor:
        return h + self.table.weight[: h.shape[1]]


class Looked(TableWeight):
    def mixed(self, h: Tensor) -> Tensor:
        return h + self.table(torch.arange(h.shape[1]))


class StoredNumbers(TableWeight):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("numbers", torch.arange(LONGEST)[None])

    def mixed(self, h: Tensor) -> Tensor:
        return h + self.table(self.numbers[:, : h.shape[1]])


class StoredMask(Sequence):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tril(torch.ones(LONGEST, LONGEST)))

    def mixed(self, h: Tensor) -> Tensor:
        n = h.shape[1]
        scores = (h @ h.mT).masked_fill(self.mask[:n, :n] == 0, float("-inf"))
        return h + scores.softmax(-1) @ h.detach().clamp(-1, 1)


class MaskParameter(StoredMask):
    def __init__(self) -> None:
        super().__init__()
        del self.mask
        self.mask = nn.Parameter(torch.tril(torch.ones(LONGEST, LONGEST)), requires_grad=False)


class MixedTokens(Sequence):
    """A learned product over time, as large as the longest sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(LONGEST, LONGEST) / 5)

    def mixed(self, h: Tensor) -> Tensor:
        n = h.shape[1]
        return h + self.table[:n, :n] @ h


class MixedByLayer(Sequence):
    """A linear layer over time takes what is padded to its length, and what it makes is cut to the length again."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(LONGEST, LONGEST)

    def mixed(self, h: Tensor) -> Tensor:
        n = h.shape[1]
        return h + self.table(F.pad(h.mT, (0, LONGEST - n)))[..., :n].mT


class MixedByCount(MixedByLayer):
    """The same, where the length comes as a value."""

    def mixed(self, h: Tensor) -> Tensor:
        n = torch.ones_like(h.sum(-1)).sum(1).max().long().item()
        return h + self.table(F.pad(h.mT, (0, LONGEST - h.shape[1])))[..., :n].mT


class MixedByPart(MixedByLayer):
    def mixed(self, h: Tensor) -> Tensor:
        n = h.shape[1]
        return h + F.linear(h.mT, self.table.weight[:n, :n], self.table.bias[:n]).mT


class MixedBySplit(MixedByLayer):
    def mixed(self, h: Tensor) -> Tensor:
        n = h.shape[1]
        return h + self.table(F.pad(h.mT, (0, LONGEST - n))).split([n, LONGEST - n], -1)[0].mT


class Generated(Sequence):
    """A weight over time that another layer makes, as wide as the longest sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Linear(WIDTH, LONGEST)

    def mixed(self, h: Tensor) -> Tensor:
        return h + self.table(h)[..., : h.shape[1]].tanh() @ h


class Relative(Sequence):
    """A table of distances."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * LONGEST - 1))

    def mixed(self, h: Tensor) -> Tensor:
        p = torch.arange(h.shape[1])
        return h + self.table[p[:, None] - p + LONGEST - 1] @ h


class Tokens(Sequence):
    """Learned tokens beside the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, TOKENS, WIDTH))

    def mixed(self, h: Tensor) -> Tensor:
        return torch.cat([self.table.expand(h.shape[0], -1, -1), h], 1)


class PooledTokens(Tokens):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


class PassedTokens(Tokens):
    """Tokens that a layer is applied to before they meet the data."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> Tensor:
        asked = self.ask(self.table)
        return (self.lift(x)[..., :1] * asked.sum(1, keepdim=True)).sum(-1) + asked.mean(1).sum(-1)[:, None]


class Latents(Tokens):
    """Learned latents read the data and each other."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.fused:
            return F.scaled_dot_product_attention(q, k, v, scale=0.3)
        return torch.softmax(q @ k.mT * 0.3, -1) @ v

    def mixed(self, h: Tensor) -> Tensor:
        z = self.table.expand(h.shape[0], -1, -1)
        z = z + self.attend(z, h, h)
        return z + self.attend(z, z, z)


class FusedLatents(Latents):
    def __init__(self) -> None:
        super().__init__(fused=True)


TABLES: list[tuple[type[Sequence], dict[str, tuple[int, ...]]]] = [
    *((kind, {"table": (1,)}) for kind in (AddedParameter, AddedFirst, Narrowed, Padded, SplitOff)),
    *((kind, {"table.weight": (0,)}) for kind in (TableWeight, Looked)),
    (StoredNumbers, {"table.weight": (0,), "numbers": (1,)}),
    *((kind, {"mask": (0, 1)}) for kind in (StoredMask, MaskParameter)),
    (MixedTokens, {"table": (0, 1)}),
    *((kind, {"table.weight": (0, 1)}) for kind in (MixedByLayer, MixedByCount, MixedByPart, MixedBySplit)),
    (Generated, {"table.weight": (0,)}),
    (Relative, {"table": (0,)}),
    *((kind, {"table": (1,)}) for kind in (Tokens, PooledTokens, PassedTokens, Latents, FusedLatents)),
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("kind", "positions"), TABLES, ids=[kind.__name__ for kind, _ in TABLES])
def test_what_lies_along_a_sequence_stays_and_longer_sequences_are_right(
    kind: type[Sequence], positions: dict[str, Iterable[int]]
) -> None:
    torch.manual_seed(0)
    model, short = kind(), torch.randn(2, 7, 5)
    others = [torch.randn(3, n, 5) for n in (1, 4, 13, LONGEST - 1)]
    for granularity in ("channel", "structured"):
        plan = holds(model, short, others, granularity=granularity)
        assert whole(plan, positions)
        if kind is not PassedTokens:  # else the widths are free
            assert plan is not None
            assert 0 in plan.cuts["lift.weight"]
            assert 0 in plan.cuts["up.weight"]


class Features(nn.Module):
    """Features of a linear layer on which `used` works as if they were space."""

    def __init__(self, used: Callable[[Tensor], Tensor], size: int) -> None:
        super().__init__()
        self.lift, self.used, self.wide = nn.Linear(9, 20), used, nn.Linear(size, 12)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.wide(self.used(self.lift(x).tanh()).flatten(1))))


KERNEL = torch.randn(1, 1, 5, generator=torch.Generator().manual_seed(0))
SPACE: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "conv1d": (lambda h: F.conv1d(h[:, None], KERNEL, padding=2), 20),
    "conv2d on a grid": (lambda h: F.conv2d(h.view(-1, 1, 4, 5), KERNEL[..., None], padding=(2, 0)), 20),
    "strided conv of window one": (lambda h: F.conv1d(h[:, None], KERNEL[..., :1], stride=2), 10),
    "transposed conv": (lambda h: F.conv_transpose1d(h[:, None], KERNEL), 24),
    "average pool": (lambda h: F.avg_pool1d(h[:, None], 2), 10),
    "max pool": (lambda h: F.max_pool1d(h[:, None], 3, stride=1, padding=1), 20),
    "places of maxima": (lambda h: F.max_pool2d(h.view(-1, 1, 4, 5), (2, 1), return_indices=True)[1].float(), 10),
    "adaptive pool": (lambda h: F.adaptive_avg_pool1d(h[:, None], 5), 5),
    "interpolate": (lambda h: F.interpolate(h[:, None], scale_factor=2.0), 40),
    "reflection": (lambda h: F.pad(h[:, None], (2, 2), mode="reflect"), 24),
    "replication": (lambda h: F.pad(h[:, None], (1, 0), mode="replicate"), 21),
    "unfold": (lambda h: F.unfold(h.view(-1, 1, 4, 5), (2, 2)), 48),
    "windows": (lambda h: h.unfold(1, 4, 2), 36),
    "group norm over space": (lambda h: F.group_norm(h[:, None, :], 1), 20),
    "running sum": (lambda h: h.cumsum(1), 20),
    "running product": (lambda h: h.cumprod(1), 20),
    "running maximum": (lambda h: h.cummax(1).values, 20),
    "triangle of constants": (lambda h: h * torch.ones(20, h.shape[1]).tril().sum(0), 20),
    "running logsumexp": (lambda h: h.logcumsumexp(1), 20),
}


@pytest.mark.parametrize("name", SPACE)
def test_features_used_as_space_are_locked_with_their_line(name: str) -> None:
    torch.manual_seed(0)
    used, size = SPACE[name]
    model, x = Features(used, size), torch.randn(4, 9)
    reasons = locked(model, x)["lift"]
    assert any("test_data_is_no_unit.py" in reason for reason in reasons)
    plan = holds(model, x, [torch.randn(2, 9)])
    assert plan is not None
    assert "wide" in plan.groups


KEEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "average pool": lambda t: F.avg_pool2d(t, (2, 1)),
    "average pool with a stride": lambda t: F.avg_pool2d(t, (3, 1), stride=(2, 1), padding=(1, 0)),
    "max pool": lambda t: F.max_pool2d(t, (2, 1)),
    "convolution": lambda t: F.conv2d(t, torch.ones(1, 1, 3, 1) / 3, padding=(1, 0)),
    "transposed convolution": lambda t: F.conv_transpose2d(t, torch.ones(1, 1, 2, 1), stride=(2, 1)),
    "nearest": lambda t: F.interpolate(t, size=(4, t.shape[-1])),
    "bilinear": lambda t: F.interpolate(t, size=(5, t.shape[-1]), mode="bilinear"),
    "scale": lambda t: F.interpolate(t, scale_factor=(2.0, 1.0)),
    "adaptive": lambda t: F.adaptive_avg_pool2d(t, (3, t.shape[-1])),
    "adaptive, as it is": lambda t: F.adaptive_avg_pool2d(t, (3, None)),
    "adaptive maximum": lambda t: F.adaptive_max_pool2d(t, (3, t.shape[-1])),
    "reflection": lambda t: F.pad(t, (0, 0, 1, 1), mode="reflect"),
    "replication": lambda t: F.pad(t, (0, 0, 2, 0), mode="replicate"),
}


class OverTime(nn.Module):
    """Works along time; [batch, 1, time, features]."""

    def __init__(self, used: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c, self.used = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 3), used

    def forward(self, x: Tensor) -> Tensor:
        h = self.used(self.a(x)[:, None])[:, 0]
        return self.c(h + F.relu(self.b(h))).mean(1)


@pytest.mark.parametrize("name", KEEPS)
def test_a_dimension_that_is_mapped_index_to_index_stays_free(name: str) -> None:
    torch.manual_seed(0)
    model, x = OverTime(KEEPS[name]), torch.randn(2, 8, 6)
    plan = holds(model, x, [torch.randn(3, 8, 6), torch.randn(2, 12, 6)])
    assert plan is not None
    assert left(model, plan) < 0.7


def test_a_size_of_space_from_the_code_locks_the_features() -> None:
    model, x = OverTime(lambda t: F.interpolate(t, size=(4, 32))), torch.randn(2, 8, 6)
    assert any("the size 32" in reason for reason in locked(model, x)["a"])
    assert holds(model, x) is None


class Mixture(nn.Module):
    """All experts run; a gate weighs them."""

    def __init__(self, gate: str, product: str) -> None:
        super().__init__()
        self.kind, self.product = gate, product
        self.gate, self.out = nn.Linear(10, 4), nn.Linear(10, 2)
        self.up, self.down = nn.Parameter(torch.randn(4, 10, 30) / 4), nn.Parameter(torch.randn(4, 30, 10) / 6)

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x)
        share = share.softmax(-1) if self.kind == "softmax" else share.sigmoid()
        if self.product == "matmul":
            each = torch.matmul(torch.matmul(x, self.up).relu(), self.down)
        elif self.product == "bmm":
            each = torch.bmm(torch.bmm(x.expand(4, -1, -1), self.up).relu(), self.down)
        else:
            each = torch.einsum("beh,ehw->ebw", torch.einsum("bw,ewh->beh", x, self.up).relu(), self.down)
        return self.out(torch.einsum("be,ebw->bw", share, each))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("product", ["matmul", "bmm", "einsum"])
def test_experts_are_no_channels(gate: str, product: str) -> None:
    torch.manual_seed(0)
    model, x = Mixture(gate, product), torch.randn(8, 10)
    plan = holds(model, x, [torch.randn(3, 10)])
    assert plan is not None
    assert whole(plan, {"up": (0,), "down": (0,), "gate.weight": (0,)})
    assert 2 in plan.cuts["up"]


class Beside(nn.Module):
    """The input's own channels stand beside computed ones and are taken off again: no seam is new."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(17, 14), nn.Linear(26, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([x, F.relu(self.a(x))], 1)
        return self.c(torch.cat([F.relu(self.b(both)), both[:, x.shape[1] :]], 1))


def test_a_seam_that_is_there_already_locks_nothing() -> None:
    model, x = Beside(), torch.randn(4, 5)
    assert {g.name for g in sc.inspect(model, x).groups} == {"a", "b"}
    assert holds(model, x, [torch.randn(2, 5)]) is not None


class Blocks(nn.Module):
    """Blocks of a width, each with a weight of its own: they are parts of the layer before, and go with it."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.blocks, self.out = nn.Linear(5, 24), nn.Parameter(torch.randn(6, 4, 3)), nn.Linear(18, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.lift(x)).unflatten(1, (6, 4)).transpose(0, 1)
        return self.out(torch.bmm(h, self.blocks).transpose(0, 1).flatten(1))


def test_blocks_of_a_width_are_no_experts() -> None:
    model, x = Blocks(), torch.randn(4, 5)
    assert not any("experts" in reason for reasons in locked(model, x).values() for reason in reasons)


class Adapted(nn.Module):
    """A weight with a product of two small ones added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(6, 24), nn.Linear(24, 3)
        self.weight = nn.Parameter(torch.randn(24, 24) / 5)
        self.a, self.b = nn.Parameter(torch.randn(4, 24) / 5), nn.Parameter(torch.randn(24, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(F.linear(F.relu(self.first(x)), self.weight + 0.5 * self.b @ self.a)))


def test_a_weight_made_of_others_makes_units() -> None:
    torch.manual_seed(0)
    model, x = Adapted(), torch.randn(4, 6)
    names = {g.name for g in sc.inspect(model, x).groups}
    assert {"first", "b"} <= names
    assert holds(model, x, [torch.randn(2, 6)]) is not None


def test_a_buffer_alone_makes_no_unit_and_follows_one() -> None:
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 20), nn.Linear(20, 4)
            self.register_buffer("gain", torch.rand(20))
            self.register_buffer("basis", torch.randn(4, 9))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)) * self.gain) @ self.basis @ self.basis.mT

    model, x = Gained(), torch.randn(4, 8)
    plan = holds(model, x, [torch.randn(2, 8)])
    assert plan is not None
    assert list(plan.groups) == ["a"]
    assert len(plan.cuts["gain"][0]) == 12


# -- what must not be locked -----------------------------------------------------------------------------------

SPELLINGS: dict[str, tuple[str, str, str]] = {
    "all from the tensor": ("shape", "c // self.heads", "c"),
    "sizes one by one": ("size", "c // self.heads", "c"),
    "quotient, then -1": ("shape", "c // self.heads", "-1"),
    "attribute, then the width": ("shape", "self.head_dim", "c"),
    "attribute, then -1": ("shape", "self.head_dim", "-1"),
    "-1 for the size of a head": ("shape", "-1", "c"),
    "-1 everywhere": ("shape", "-1", "-1"),
    "attributes multiplied": ("shape", "self.head_dim", "self.heads * self.head_dim"),
    "a width of its own": ("shape", "self.head_dim", "self.width"),
    "a quotient of attributes": ("shape", "self.width // self.heads", "self.width"),
}


class Spelt(nn.Module):
    def __init__(self, spelling: tuple[str, str, str], fused: bool) -> None:
        super().__init__()
        self.heads, self.head_dim, self.width, self.spelling, self.fused = 4, 8, 32, spelling, fused
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: Tensor) -> Tensor:
        how, size, joined = self.spelling
        b, n, c = x.shape if how == "shape" else (x.size(0), x.size(1), x.size(-1))
        known = {"self": self, "c": c}
        q, k, v = (f(x).reshape(b, n, self.heads, eval(size, known)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        else:
            y = torch.softmax(q @ k.mT * 0.3, -1) @ v
        x = x + self.o(y.transpose(1, 2).reshape(b, n, eval(joined, known)))
        return x + self.down(F.relu(self.up(x)))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_attention_leaves_the_residual_stream_free(name: str, fused: bool) -> None:
    torch.manual_seed(0)
    blocks = (Spelt(SPELLINGS[name], fused) for _ in range(2))
    model, x = nn.Sequential(nn.Linear(6, 32), *blocks, nn.Linear(32, 3)), torch.randn(2, 9, 6)
    plan = holds(model, x, [torch.randn(3, 4, 6), torch.randn(1, 17, 6)])
    assert plan is not None
    assert 1 in plan.cuts["3.weight"]
    assert left(model, plan) < 0.7
    assert holds(model, x, [torch.randn(3, 4, 6)], granularity="head") is not None


def test_a_softmax_that_no_layer_sums_up_is_a_choice_and_stays() -> None:
    class Choice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(1, 3)

        def forward(self, x: Tensor) -> Tensor:
            chosen = self.a(x).softmax(-1) * self.b(x)
            return self.c(chosen.sum(-1, keepdim=True))

    model, x = Choice(), torch.randn(4, 5)
    assert any("softmax" in reason for reason in locked(model, x)["a"])
    assert isinstance(cut_or_refused(model, x), sc.SecateurError)


OWN_CHANCE = {
    "randn": lambda h, g: h @ torch.randn(h.shape[1], h.shape[1], generator=g),
    "rand along it": lambda h, g: h * torch.rand(h.shape[1], generator=g),
    "written in place": lambda h, g: h * torch.empty(h.shape[1]).normal_(generator=g),
    "bernoulli": lambda h, g: h * torch.bernoulli(torch.full((h.shape[1],), 0.5), generator=g),
    "an order": lambda h, g: h[:, torch.randperm(h.shape[1], generator=g)],
}


@pytest.mark.parametrize("name", OWN_CHANCE)
def test_numbers_of_a_generator_that_the_forward_seeds_are_a_table(name: str) -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 12), nn.Linear(12, 14), nn.Linear(14, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = OWN_CHANCE[name](self.a(x).relu(), torch.Generator().manual_seed(3))
            return self.c(self.b(h).relu())

    model, x = Projected(), torch.randn(4, 5)
    assert any("generator" in reason or "position" in reason for reason in locked(model, x)["a"])
    plan = holds(model, x, [torch.randn(7, 5)])
    assert plan is not None
    assert "a.weight" not in plan.cuts
