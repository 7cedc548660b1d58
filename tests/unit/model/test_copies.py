"""Copies of modules are those that deepcopy makes."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.model.copies import copied


class Own(nn.Linear):
    """Copies itself in its own way."""

    def __deepcopy__(self, memo: object) -> nn.Module:
        return nn.Linear(3, 4)


class Held(nn.Module):
    """Attributes of many kinds, shared ones and a way back among them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.again, self.plain = self.first, [self.first]
        self.own = Own(1, 1)
        self.sizes, self.names = (1, 2), {"a", "b"}
        self.nested = OrderedDict(a={"list": [1]}, b=self.plain)
        self.register_buffer("count", torch.ones(2))
        self.tied = self.first.weight
        object.__setattr__(self, "above", self)
        self.register_forward_hook(lambda module, args, result: result + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x) + self.count


@pytest.mark.parametrize("shared", [False, True])
def test_a_copy_is_what_deepcopy_makes(shared: bool) -> None:
    model = Held()
    memo = {id(model.first.weight): model.first.weight} if shared else {}
    new, reference = copied(model, dict(memo)), copy.deepcopy(model, dict(memo))
    assert repr(new) == repr(reference)
    assert vars(new).keys() == vars(reference).keys()
    assert new.again is new.first is new.plain[0] is new.nested["b"][0]
    assert new.first is not model.first
    assert (new.first.weight is model.first.weight) == shared
    assert new.first.weight is new.tied
    assert new.above is new
    assert new.own.in_features == 3
    new.names.add("c")
    new.nested["a"]["list"].append(2)
    new.count += 1
    assert model.names == {"a", "b"}
    assert model.nested["a"]["list"] == [1]
    assert model.count.tolist() == [1, 1]
    x = torch.ones(1, 2)
    assert torch.equal(copied(model, {})(x), model(x))


class Rebuilt(nn.Module):
    """Copies itself by making a new model, whatever is to stand for its tensors."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def __deepcopy__(self, memo):
        made = type(self)()
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, x):
        return self.b(self.a(x).relu())


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = Rebuilt(), nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.inner(x))


@pytest.mark.parametrize(("make", "path"), [(Rebuilt, "a"), (Around, "inner.a")])
def test_a_class_that_copies_in_its_own_way_is_cut_all_the_same(make, path):
    model, x = make().eval(), torch.randn(5, 8)
    plan = sc.plan(model, x, granularity="channel", target={"sparsity": 0.3})
    cut = plan.apply(model)
    assert cut.get_submodule(path).out_features < 16
    masked = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, dims in plan.cuts.items():
        for d, kept in dims.items():
            gone = torch.ones(masked[name].shape[d], dtype=torch.bool).index_fill(0, kept, False)
            masked[name].index_fill_(d, gone.nonzero().flatten(), 0)
    with torch.no_grad():
        assert torch.allclose(torch.func.functional_call(model, masked, (x,)), cut(x), atol=1e-5)


def test_its_own_way_is_taken_where_nothing_has_to_stand_for_anything():
    model = Rebuilt()
    assert copied(model, {}) is not model
    held = {id(model.a.weight): nn.Parameter(model.a.weight[:3].detach())}
    assert copied(model, held).a.weight.shape == (3, 8)


def test_a_copy_does_not_call_the_original_by_what_compile_has_made():
    model = Around().eval()
    for module in (model, model.inner.a):
        # What `module.compile()` sets, without a compiler.
        module._compiled_call_impl = lambda *args, call=module._call_impl: call(*args)
    made = copied(model, {})
    with torch.no_grad():
        made.inner.a.weight.zero_()
        model.last.bias.fill_(7.0)
    x = torch.randn(5, 8)
    assert not torch.allclose(made(x), model(x))
    assert torch.equal(made.inner.a(x), made.inner.a.bias.expand(5, 16))


class Compiled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 6), nn.Linear(4, 3)
        self.inner = torch.compile(nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4)), fullgraph=True)

    def forward(self, x):
        return self.last(self.inner(self.first(x)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using `torch.compile")
def test_parts_that_torch_compile_takes_whole_are_cut_line_by_line():
    model, x = Compiled().eval(), torch.randn(5, 8)
    plain = model.inner._orig_mod
    hidden = plain[1](plain[0](model.first(x))).index_fill(1, torch.tensor([1, 2]), 0)
    cut = sc.plan(model, x, remove={"inner._orig_mod.0": [1, 2]}, granularity="channel").apply(model)
    with torch.compiler.set_stance("force_eager"):
        assert torch.allclose(cut(x), model.last(plain[2](hidden)), atol=1e-5)
