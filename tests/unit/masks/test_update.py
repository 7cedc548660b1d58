"""Masks that change: every element against a small model of what it should be."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from secateur.errors import InputError
from secateur.kinds.weights import parse
from secateur.masks import hidden, mask_model, sparsity_of
from secateur.masks.hidden import put, take


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def random_mask(shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["remembered", "zero", "train", "enforce"]), st.integers(0, 10**6)), max_size=6
)


@settings(max_examples=80, deadline=None)
@given(OPERATIONS, st.integers(0, 10**6), st.booleans())
def test_every_element_is_what_it_should_be(operations, seed, channels_last):
    layer = nn.Conv2d(2, 3, 2)
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    shape = layer.weight.shape
    now = {i: value for i, value in enumerate(layer.weight.detach().flatten().tolist())}
    under = {}  # what is hidden, by element

    def follow(mask, regrow):
        for i, keep in enumerate(mask.flatten().tolist()):
            if keep and i in under:
                value = under.pop(i)
                now[i] = value if regrow == "remembered" else 0.0
            elif not keep and i not in under:
                under[i], now[i] = now[i], 0.0

    mask = random_mask(shape, seed)
    handle = mask_model(layer, {"weight": mask})
    follow(mask, "remembered")
    for what, number in operations:
        if what == "train":
            with torch.no_grad():
                layer.weight.add_(number % 7)
            for i in now:
                now[i] = float(torch.tensor(now[i]) + number % 7)
            handle.enforce()
            now.update(dict.fromkeys(under, 0.0))
        elif what == "enforce":
            handle.enforce()
        else:
            handle.update({"weight": random_mask(shape, number)}, regrow=what)
            follow(random_mask(shape, number), what)
        assert layer.weight.detach().flatten().tolist() == list(now.values())
        assert handle.sparsity().masked == len(under)
    handle.remove()
    now.update(under)
    assert layer.weight.detach().flatten().tolist() == list(now.values())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([(), (1,), (7,), (4, 3), (2, 3, 4), (0, 3)]), st.integers(0, 99), st.sampled_from([1, 2, 5, 99]))
def test_values_are_taken_and_put_in_row_major_order(shape, seed, block):
    generator = torch.Generator().manual_seed(seed)
    whole = torch.randn(shape, generator=generator)
    for tensor in {len(shape): whole, 2: whole.movedim(0, -1) if shape else whole}.values():
        drop = torch.rand(tensor.shape, generator=generator) > 0.5
        flat, gone = tensor.flatten().tolist(), drop.flatten().tolist()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(hidden, "BLOCK", block)
            taken = take(tensor, drop)
            assert taken.tolist() == [value for value, g in zip(flat, gone, strict=True) if g]
            target = torch.zeros_like(tensor)
            put(target, drop, taken)
        assert target.flatten().tolist() == [value if g else 0.0 for value, g in zip(flat, gone, strict=True)]


def test_parameters_join_and_leave():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    handle = mask_model(model, {"0.weight": torch.zeros(4, 3).bool()})
    handle.update({"1.weight": torch.zeros(1, 1).bool()})
    assert not model[0].weight.any()
    assert not model[1].weight.any()
    handle.update({"0.weight": torch.ones(1, 1).bool()})
    assert torch.equal(model[0].weight, before["0.weight"])
    assert not model[1].weight.any()
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_refused_update_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    mask = random_mask((4, 3), 0)
    for handle in (mask_model(model, {"0.weight": mask}), mask_model(model, {"0.weight": mask}, keep_originals=False)):
        before = copy.deepcopy(model.state_dict())
        wrong = [{"0.weight": mask, "1.weight": torch.ones(3).bool()}, {"0.weight": mask, "2.weight": mask}]
        if not handle.keep_originals:
            wrong.append({"1.weight": torch.zeros(2, 4).bool(), "0.weight": ~mask})
        for masks in wrong:
            with pytest.raises(InputError):
                handle.update(masks)
            assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
            assert list(handle.masks) == ["0.weight"]
        with pytest.raises(InputError, match="regrow"):
            handle.update({}, regrow="one")


def test_without_originals_weights_come_back_as_zeros_only():
    layer, mask = nn.Linear(3, 4), random_mask((4, 3), 0)
    handle = mask_model(layer, {"weight": mask}, keep_originals=False)
    assert set(handle.state_dict()) == {"mask.weight"}
    with pytest.raises(InputError, match='regrow="zero"'):
        handle.update({"weight": ~mask})
    kept = layer.weight.detach().clone()
    handle.update({"weight": torch.ones(4, 3).bool()}, regrow="zero")
    assert torch.equal(layer.weight, kept)
    for use in (handle.remove, handle.__enter__):
        with pytest.raises(InputError, match="were not stored"):
            use()


def test_a_model_that_changed_its_dtype_is_given_back_in_it():
    layer, mask = nn.Linear(3, 4), random_mask((4, 3), 0)
    before = layer.weight.detach().clone()
    handle = mask_model(layer, {"weight": mask})
    layer.double()
    handle.enforce()
    handle.remove()
    assert torch.equal(layer.weight, before.double())


def test_masks_of_inference_mode_can_be_held():
    layer = nn.Linear(3, 4)
    with torch.inference_mode():
        mask = random_mask((4, 3), 0)
    handle = mask_model(layer, {"weight": mask})
    handle.enforce()
    assert handle.sparsity().zeros == int((~mask).sum())
    with torch.inference_mode():
        mask.fill_(True)  # goes unnoticed by torch
    assert torch.equal(handle.masks["weight"], random_mask((4, 3), 0))


# -- state -----------------------------------------------------------------------------------------------------


def test_masks_are_saved_and_taken_over(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    handle = mask_model(model, {"0.weight": random_mask((4, 3), 1), "1.weight": random_mask((1, 4), 2)})
    with torch.no_grad():
        model[0].bias.add_(1.0)
    torch.save({"model": model.state_dict(), "masks": handle.state_dict()}, tmp_path / "saved")

    saved = torch.load(tmp_path / "saved", weights_only=True)
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    other.load_state_dict(saved["model"])
    again = mask_model(other, {"0.weight": random_mask((4, 3), 3)})
    other.load_state_dict(saved["model"])
    again.load_state_dict(saved["masks"])
    assert all(torch.equal(mask, handle.masks[name]) for name, mask in again.masks.items())
    with torch.no_grad():
        other[0].weight.add_(1.0)
    again.enforce()
    assert not other[0].weight[~again.masks["0.weight"]].any()
    for name, mask in again.masks.items():
        other.get_parameter(name).data[mask] = before[name][mask]
    saved["masks"]["mask.0.weight"][0] = True  # copied, so nothing happens
    saved["masks"]["hidden.1.weight"].zero_()
    again.remove()
    assert torch.equal(other[0].weight, before["0.weight"])
    assert torch.equal(other[1].weight, before["1.weight"])


def test_an_optimizer_follows_loaded_masks():
    layer, mask = nn.Linear(3, 4), random_mask((4, 3), 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    handle = mask_model(layer, {})
    handle.hold(optimizer)
    handle.load_state_dict({"mask.weight": mask, "hidden.weight": torch.ones(int((~mask).sum()))})
    assert not optimizer.state[layer.weight]["momentum_buffer"][~mask].any()
    assert optimizer.state[layer.weight]["momentum_buffer"][mask].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({"weight": s["mask.weight"]}), "not the state of masks"),
        (lambda s: s.pop("mask.weight"), "not the state of masks"),
        (lambda s: s.pop("hidden.weight"), "do not fit: none"),
        (lambda s: s.update({"hidden.weight": s["hidden.weight"][1:]}), "do not fit"),
        (lambda s: s.update({"hidden.weight": s["hidden.weight"].double()}), "do not fit"),
        (lambda s: s.update({"mask.wait": s["mask.weight"]}), "did you mean 'weight'"),
        (lambda s: s.clear(), "no mask for 'weight'"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, message):
    layer, mask = nn.Linear(3, 4), random_mask((4, 3), 1)
    handle = mask_model(layer, {"weight": mask})
    state = dict(handle.state_dict())
    change(state)
    before = layer.weight.detach().clone()
    with pytest.raises(InputError, match=message):
        handle.load_state_dict(state)
    assert torch.equal(layer.weight, before)
    assert torch.equal(handle.masks["weight"], mask)


def test_the_state_of_a_model_that_ties_in_another_order():
    def tied(order):
        model = nn.ModuleDict({name: nn.Linear(3, 3) for name in order})
        model["b"].weight = model["a"].weight
        return model

    first, second = tied("ab"), tied("ba")
    handle = mask_model(first, {"b.weight": random_mask((3, 3), 1)})
    assert list(handle.masks) == ["a.weight"]
    other = mask_model(second, {})
    other.load_state_dict(handle.state_dict())
    assert list(other.masks) == ["b.weight"]


# -- what is held ----------------------------------------------------------------------------------------------


def test_masks_are_held_and_not_copied():
    layer, mask = nn.Linear(3, 4), random_mask((4, 3), 0)
    thin = torch.tensor([[True], [False], [True], [True]])
    assert mask_model(layer, {"weight": mask}).masks["weight"].data_ptr() == mask.data_ptr()
    held = mask_model(layer, {"weight": thin}).state_dict()["mask.weight"]
    assert held.shape == (4, 1)
    assert held.data_ptr() == thin.data_ptr()


class Peak(TorchDispatchMode):
    """The bytes of the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        shares = any(r.alias_info is not None for r in func._schema.returns)
        if isinstance(out, torch.Tensor) and not shares:
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("keep_originals", [False, True])
def test_masking_holds_little(keep_originals, monkeypatch):
    monkeypatch.setattr(hidden, "BLOCK", 1000)
    model = nn.Sequential(nn.Linear(200, 300, bias=False), nn.Linear(300, 100, bias=False))
    masks = {name: random_mask(p.shape, 0) for name, p in model.named_parameters()}
    hides = max(int((~mask).sum()) for mask in masks.values())
    with Peak() as seen:
        mask_model(model, masks, keep_originals=keep_originals)
    assert seen.bytes == (4 * hides if keep_originals else 200 * 300)  # the values, or one inverted mask


# -- counts ----------------------------------------------------------------------------------------------------


class Language(nn.Module):
    """Embedding tied to the head, recurrent weights between: most weights are not of linear layers."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Embedding(50, 16), nn.LSTM(16, 16)
        self.out, self.head = nn.Linear(16, 16), nn.Linear(16, 50)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(3))


def test_the_whole_model_is_counted_beside_what_was_masked():
    model = Language()
    parameters = {id(p): p for p in model.parameters()}.values()
    total = sum(p.numel() for p in parameters)
    assert total == 50 * 16 + 2 * (4 * 16 * 16 + 4 * 16) + 16 * 16 + 16 + 50
    handle = mask_model(model, {"out.weight": torch.zeros(16, 1).bool(), "head.weight": random_mask((50, 16), 0)})
    with torch.no_grad():
        model.lstm.bias_hh_l0.zero_()
    found = handle.sparsity()
    embedding = int((~random_mask((50, 16), 0)).sum())
    assert (found.elements, found.masked, found.zeros) == (50 * 16 + 256, embedding + 256, embedding + 256)
    assert (found.model_elements, found.model_zeros) == (total, sum(int((p == 0).sum()) for p in parameters))
    assert found.model_zeros == embedding + 256 + 64
    assert found.fraction == (embedding + 256) / (800 + 256)
    assert found.model_fraction == found.model_zeros / total
    assert sparsity_of(model, {}).model_zeros == found.model_zeros
    assert sparsity_of(model, {}).fraction == 0.0


def test_decisions_about_larger_units_are_masks_with_their_groups():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    groups = parse("vector").groups(model)
    keep = {group.name: torch.arange(group.size) % 2 == 0 for group in groups}
    with pytest.raises(InputError, match="pass groups="):
        mask_model(model, keep)
    mask_model(model, keep, groups=groups)
    for layer in model:
        assert (layer.weight[0::2] != 0).all()
        assert not layer.weight[1::2].any()
