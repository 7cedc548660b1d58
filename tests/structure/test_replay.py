"""The replay proves as much as one that runs every call at full size, and notices what is put in by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import STRUCTURED, enliven
from micro import CASES
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import secateur as sc
from secateur.errors import CertificateError, SecateurError
from secateur.kinds.slices.certify import certify
from secateur.kinds.slices.cut import cut_copy
from secateur.kinds.slices.originals import KeptSlices, Originals, StoredView
from secateur.kinds.slices.replay import Replay
from secateur.model.tensors import named_tensors
from secateur.structure.attributes import edits
from secateur.structure.axes import kept, resolve
from secateur.structure.capture import capture, quiet
from secateur.structure.groups import structure
from secateur.structure.rules import base
from secateur.structure.rules.attention import attention
from secateur.structure.trace import Trace

Masks = dict[int, np.ndarray]
Cuts = dict[str, dict[int, Tensor]]
QUICK = ("Dense", "transposed", "GroupedConvolution", "Concat", "TensorSplitEqual", "SeparateAttention", "group_norms")


def draw(model: nn.Module, trace: Trace, share: float = 0.6) -> tuple[Masks, Cuts]:
    """Kept units of every free group, by atom, and the cuts that follow."""
    found, rng, masks = structure(model, trace), np.random.default_rng(3), {}
    for group in (g for g in found.groups if not g.locks and g.granularity in STRUCTURED):
        step = int(group.attributes.get("multiple", 1))
        stays = np.zeros(group.size, bool)
        stays[rng.permutation(group.size)[: max(1, -(-int(group.size * share) // step)) * step]] = True
        masks[found.atoms[group.name].id] = stays
    cuts: Cuts = {}
    for name, axes in found.tensors.items():
        for d, axis in enumerate(axes):
            if not kept(axis, masks).all():
                cuts.setdefault(name, {})[d] = torch.from_numpy(np.flatnonzero(kept(axis, masks)))
    return masks, cuts


def cut_by(model: nn.Module, trace: Trace, masks: Masks, cuts: Cuts) -> nn.Module:
    return cut_copy(model, cuts, edits(model, trace, {i: int(m.sum()) for i, m in masks.items()}))


# -- the short ways are the long way ------------------------------------------------------------------------


def every_value(replay: Replay) -> dict[int, Tensor]:
    """All tensors of a replay, by number."""
    replay.done.clear()
    replay.run()
    return {n: replay._value(n) for n in replay.trace.axes}


def in_full(replay: Replay) -> Replay:
    """The same with every weight copied whole and every call at full size."""
    replay.originals.views = {}
    for n, name in replay.trace.names.items():
        replay.values[n] = replay.originals.whole(StoredView(name, tuple(range(len(replay.trace.axes[n])))))
    return replay


def agree_everywhere(model: nn.Module, example: object) -> None:
    trace = capture(model, example)
    masks, _ = draw(model, trace)
    tensors = named_tensors(model)
    with quiet(model):
        short, long = (every_value(f(Replay(trace, tensors, masks))) for f in (lambda replay: replay, in_full))
    assert short.keys() == long.keys()
    for n, expected in long.items():
        assert short[n].shape == expected.shape
        if expected.is_floating_point():
            assert torch.equal(short[n].isnan(), expected.isnan()), f"other parts of tensor {n} are marked as removed"
            scale = float(expected.nan_to_num().abs().max()) if expected.numel() else 0.0
            torch.testing.assert_close(short[n], expected, rtol=1e-4, atol=1e-5 * max(scale, 1.0), equal_nan=True)


@pytest.mark.parametrize("name", QUICK)
def test_removed_parts_are_marked_where_a_replay_in_full_marks_them(name: str) -> None:
    torch.manual_seed(0)
    agree_everywhere(enliven(CASES[name].build()), CASES[name].example())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", sorted(set(CASES) - set(QUICK)))
def test_so_in_every_micro_model(name: str) -> None:
    torch.manual_seed(0)
    agree_everywhere(enliven(CASES[name].build()), CASES[name].example())


class _Largest(TorchDispatchMode):
    """The most numbers that a call made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and func._schema.returns[0].alias_info is None:
            self.numbers = max(self.numbers, result.numel())
        return result


@pytest.mark.parametrize("layer", ["linear", "convolution", "embedding"])
def test_no_weight_is_copied_whole(layer: str) -> None:
    build: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
        "linear": lambda: (
            nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 2)),
            torch.randn(2, 8),
        ),
        "convolution": lambda: (
            nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 30, 3), nn.ReLU(), nn.Conv2d(30, 2, 1)),
            torch.randn(1, 3, 6, 6),
        ),
        "embedding": lambda: (nn.Sequential(nn.Embedding(5000, 8), nn.Linear(8, 2)), torch.tensor([[3, 4999]])),
    }
    model, example = build[layer]()
    trace = capture(model, example)
    masks, _ = draw(model, trace, 0.5)
    watch = _Largest()
    with torch.no_grad(), watch:
        Replay(trace, named_tensors(model), masks).run()
    assert 0 < watch.numbers < max(p.numel() for p in model.parameters())


# -- what is put in by hand ---------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A table, an attention that reads its head count from an attribute, grouped and plain products."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.table, self.qkv = 4, nn.Embedding(50, 12), nn.Linear(12, 3 * 24)
        self.mix, self.out = nn.Conv1d(24, 24, 1, groups=4), nn.Linear(24, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.qkv(self.table(tokens))
        q, k, v = (part.view(*tokens.shape, self.heads, -1).transpose(1, 2) for part in x.chunk(3, -1))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(F.relu(self.mix(seen.transpose(1, 2)).transpose(1, 2)))


@pytest.fixture
def tokens() -> tuple[nn.Module, Tensor, Trace, Masks, Cuts]:
    torch.manual_seed(0)
    model, example = enliven(Tokens()), torch.tensor([[1, 2, 3, 49]])
    trace = capture(model, example)
    return model, example, trace, *draw(model, trace)


def test_the_model_of_these_tests_is_proved(tokens) -> None:
    model, example, trace, masks, cuts = tokens
    agree_everywhere(model, example)
    assert {"table.weight", "qkv.weight", "qkv.bias", "out.weight", "mix.weight"} <= set(cuts)
    certify(model, cut_by(model, trace, masks, cuts), example, trace, masks)


@pytest.mark.parametrize("name", ["table.weight", "qkv.weight", "qkv.bias", "mix.weight", "out.weight"])
def test_a_wrong_index_is_named(tokens, name: str) -> None:
    """As many positions as planned, one of them another: in a table, in products, in a vector, in groups."""
    model, example, trace, masks, cuts = tokens
    for d, stays in cuts[name].items():
        whole = named_tensors(model)[name].shape[d]
        gone = [i for i in range(whole) if i not in stays.tolist()]
        wrong = torch.cat([stays[:-1], torch.tensor(gone[:1])]).sort().values
        cut = cut_by(model, trace, masks, {**cuts, name: {**cuts[name], d: wrong}})
        with pytest.raises(CertificateError, match=f"{name}.*does not hold the slices"):
            certify(model, cut, example, trace, masks)


@pytest.mark.parametrize("name", ["table.weight", "qkv.weight", "mix.weight"])
def test_one_wrong_number_is_named(tokens, name: str) -> None:
    """Also in a row that the example does not read."""
    model, example, trace, masks, cuts = tokens
    cut = cut_by(model, trace, masks, cuts)
    with torch.no_grad():
        named_tensors(cut)[name][20 if name == "table.weight" else 0, -1] *= 1 + 2**-20
    with pytest.raises(CertificateError, match=f"{name}.*does not hold the slices"):
        certify(model, cut, example, trace, masks)


def test_an_attribute_that_does_not_follow_is_noticed(tokens) -> None:
    model, example, trace, masks, cuts = tokens
    cut = cut_by(model, trace, masks, cuts)
    assert isinstance(cut.heads, int)
    assert cut.heads < model.heads
    cut.heads = next(n for n in (1, 3, 4) if n != cut.heads)
    with pytest.raises(SecateurError):
        certify(model, cut, example, trace, masks)


def _of_one_step(trace: Trace, change: Callable[[list], list], words: str) -> Trace:
    """The trace with what one product sums over changed."""
    steps = [
        replace(step, contracted=change(step.contracted)) if words in str(step.func) and step.contracted else step
        for step in trace.steps
    ]
    return replace(trace, steps=steps)


def test_a_product_that_takes_a_dimension_for_another_is_noticed() -> None:
    """The rule names an axis that keeps as many positions, but others, for both factors or for one."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(2, 4)
    trace = capture(model, x)
    first, second = (trace.tensors()[f"{i}.weight"][0] for i in (0, 2))
    masks = {first.id: np.array([1, 1, 1, 0, 0, 0], bool), second.id: np.array([0, 0, 1, 1, 1, 0], bool)}
    tensors = named_tensors(model)

    def swapped(number: int | None) -> Callable[[list], list]:
        def change(contracted: list) -> list:
            return [
                (n, d, second) if resolve(axis) is first and number in (None, i) else (n, d, axis)
                for i, (n, d, axis) in enumerate(contracted)
            ]

        return change

    assert torch.isfinite(Replay(trace, tensors, masks).run()[0]).all()
    corrupted = _of_one_step(trace, swapped(None), "addmm").steps
    assert sum(a.contracted != b.contracted for a, b in zip(corrupted, trace.steps, strict=True)) == 1
    for number in (None, 0, 1):
        wrong = Replay(_of_one_step(trace, swapped(number), "addmm"), tensors, masks)
        try:
            assert torch.isnan(wrong.run()[0]).any()
        except RuntimeError:  # factors of different lengths
            assert number is not None


def test_removed_positions_of_a_weight_poison_the_factor_that_picks_them() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(2, 4)
    trace = capture(model, x)
    first, free = (trace.tensors()[f"{i}.weight"][0] for i in (0, 2))
    other = trace.space.fresh(6)
    masks = {
        first.id: np.array([1, 1, 1, 0, 0, 0], bool),
        other.id: np.array([0, 0, 1, 1, 0, 1], bool),
        free.id: np.array([0, 1, 1, 0, 1], bool),
    }
    found = Originals(trace, named_tensors(model), KeptSlices(masks)).factor(
        StoredView("2.weight", (1, 0)), 0, other, 1
    )
    assert found.shape == (3, 3)
    assert found.isnan().all(1).tolist() == [False, True, True]  # of the positions 2, 3 and 5 the weight keeps 2
    assert torch.equal(found[0], model[2].weight[[1, 2, 4], 2])


class _Apart(nn.Module):
    """Queries and keys made by layers of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x)[:, None] for layer in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v)


def test_operands_that_would_meet_at_different_coordinates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of each, so shapes fit and both runs compute the same wrong thing: only the alignment tells."""

    def forgetful(call: base.Call):
        apart = {id(call.axes(call.operand(i))[3]) for i in (0, 1)}
        genuine = call.unify
        call.unify = lambda a, b: None if {id(a), id(b)} == apart else genuine(a, b)
        return attention(call)

    monkeypatch.setitem(base._RULES, "_scaled_dot_product_flash_attention_for_cpu", forgetful)
    base._find.cache_clear()
    try:
        model, x = _Apart().eval(), torch.randn(2, 5, 4)
        trace = capture(model, x)
        q, k, v = (resolve(trace.tensors()[f"{name}.weight"][0]) for name in "qkv")
        assert q is not k
        masks = {axis.id: np.array([1, 1, 1, 1, 0, 0], bool) for axis in (q, v)}
        masks[k.id] = np.array([0, 0, 1, 1, 1, 1], bool)
        cuts = {
            f"{name}.{part}": {0: torch.from_numpy(np.flatnonzero(masks[axis.id]))}
            for name, axis in (("q", q), ("k", k), ("v", v))
            for part in ("weight", "bias")
        }
        cut = cut_copy(model, cuts, {})
        with pytest.raises(CertificateError, match="meet index by index"):
            certify(model, cut, x, trace, masks)
    finally:
        monkeypatch.undo()
        base._find.cache_clear()


class Rescaled(nn.Module):
    """Doubles its weight in place before it reads it, and halves it afterwards."""

    def __init__(self, through: str) -> None:
        super().__init__()
        self.through, self.a, self.b = through, nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.a.weight
        for factor in (2.0, 0.5):
            turned = weight.t()
            with torch.no_grad():
                (weight.view(-1) if self.through == "view" else weight).mul_(factor)
            if factor == 2.0:
                x = F.relu(x @ turned)
        return self.b(x)


@pytest.mark.parametrize("through", ["weight", "view"])
def test_a_weight_that_the_run_writes_to_is_read_as_it_then_is(through: str) -> None:
    model, x = Rescaled(through).eval(), torch.randn(3, 4)
    trace = capture(model, x)
    masks, cuts = draw(model, trace)
    assert "a.weight" in cuts
    certify(model, cut_by(model, trace, masks, cuts), x, trace, masks)
    assert all(view.name != "a.weight" for view in Replay(trace, named_tensors(model), masks).originals.views.values())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("addend", [(5,), (1, 5), (5, 5), (5, 1), ()])
def test_what_is_added_to_a_product_stays_in_its_place(side: str, addend: tuple[int, ...]) -> None:
    """A square product, so that a vector could be taken for rows as well as for columns."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.w = nn.Linear(3, 5), nn.Parameter(torch.randn(5, 5))
            self.last, self.c = nn.Linear(5, 2), torch.randn(addend)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.first(x))
            if side == "right":
                return self.last(torch.addmm(self.c, h, self.w))
            return self.last(torch.addmm(self.c, self.w, h.t()).t())

    torch.manual_seed(0)
    model, x = Added().eval(), torch.randn(5, 3)
    trace = capture(model, x)
    masks, cuts = draw(model, trace)
    with torch.no_grad():
        expected = in_full(Replay(trace, named_tensors(model), masks)).run()
        found = Replay(trace, named_tensors(model), masks).run()
    torch.testing.assert_close(found, expected)
    assert "first.weight" in cuts
    certify(model, cut_by(model, trace, masks, cuts), x, trace, masks)


class Narrow(nn.Module):
    """Heads by hand; of heads of one coordinate torch adds the bias of the last product apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.out = nn.Linear(5, 6), nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        q, k, v = self.qkv(h).view(*x.shape[:2], 3, 3, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


def test_numbers_are_found_where_another_product_is_called() -> None:
    torch.manual_seed(0)
    model, x = Narrow().eval(), torch.randn(2, 4, 5)
    plan = sc.plan(model, x, granularity="head_dim", remove={"qkv/head_dim": [1]})
    cut = plan.apply(model)
    calls = [[str(step.func) for step in capture(net, x).steps] for net in (model, cut)]
    assert [names.count("aten.addmm.default") for names in calls] == [3, 2]  # else nothing was asked
    zeroed = Narrow().eval()
    zeroed.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, dims in plan.cuts.items():
            tensor = zeroed.get_parameter(name)
            for dim, stay in dims.items():
                gone = torch.ones(tensor.shape[dim], dtype=torch.bool).index_fill(0, torch.as_tensor(stay), False)
                tensor.index_fill_(dim, gone.nonzero().flatten(), 0.0)
        torch.testing.assert_close(cut(x), zeroed(x))
