"""Models that torch has masked: the same function and the same bits afterwards, and refused where that cannot be."""

import copy

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier
from torch.nn.utils import parametrizations, parametrize, prune

import secateur as sc
from secateur.errors import UnsupportedError
from secateur.kinds.weights import parse
from secateur.masks import import_masks, masks_of
from secateur.model.carried import carried_masks


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Mask(nn.Module):
    """What a user writes: a buffer of any name, and a product."""

    def __init__(self, pattern):
        super().__init__()
        self.register_buffer("pattern", pattern)

    def forward(self, weight):
        return weight * self.pattern


class Rows(Mask):
    def forward(self, weight):
        return weight * self.pattern.view(-1, 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.lstm, self.out = nn.Conv2d(1, 4, 3), nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.lstm(self.conv(x).flatten(2))[0][:, -1])


EXAMPLE = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def by_prune(net):
    prune.l1_unstructured(net.conv, "weight", amount=0.4)
    prune.random_structured(net.conv, "weight", amount=1, dim=0)  # two methods in one container
    prune.random_unstructured(net.out, "bias", amount=1)
    prune.ln_structured(net.out, "weight", amount=2, n=2, dim=1)
    prune.custom_from_mask(net.lstm, "weight_hh_l0", torch.rand(32, 8) > 0.5)
    return {"conv.weight", "out.bias", "out.weight", "lstm.weight_hh_l0"}


def globally(net):
    prune.global_unstructured([(net.conv, "weight"), (net.out, "weight")], prune.L1Unstructured, amount=0.5)
    return {"conv.weight", "out.weight"}


def by_sparsifier(net):
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 4), zeros_per_block=4)
    sparsifier.prepare(net, [{"tensor_fqn": "out.weight"}])
    sparsifier.step()
    return {"out.weight"}


def by_hand(net):
    parametrize.register_parametrization(net.out, "weight", Mask(torch.rand(3, 8) > 0.5))
    parametrize.register_parametrization(net.out, "weight", Rows(torch.tensor([1.0, 0.0, 1.0])))
    parametrize.register_parametrization(net.conv, "weight", Mask((torch.rand(4, 1, 1, 3) > 0.5).float()))
    return {"out.weight", "conv.weight"}


WAYS = [by_prune, globally, by_sparsifier, by_hand]


def masked(way, seed=0):
    torch.manual_seed(seed)
    net = Net()
    dense = copy.deepcopy(net.state_dict())
    return net, dense, way(net)


@pytest.mark.parametrize("way", WAYS)
def test_the_function_the_names_and_the_hidden_bits_stay(way):
    net, dense, names = masked(way)
    with torch.no_grad():
        before = net(EXAMPLE)
    own = masks_of(net)
    assert set(own) == names
    assert all(mask.shape == dense[name].shape and not mask.all() for name, mask in own.items())
    handle = import_masks(net)
    assert handle.model is net
    assert sorted(net.state_dict()) == sorted(dense)
    assert type(net.out) is nn.Linear
    assert not list(carried_masks(net))
    with torch.no_grad():
        assert torch.equal(net(EXAMPLE), before)
    for name, mask in own.items():
        weight = net.get_parameter(name)
        assert torch.equal(handle.masks[name], mask)
        assert torch.equal(weight[mask], dense[name][mask])
        assert not weight[~mask].any()
    handle.remove()
    assert all(torch.equal(value, dense[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_leaves_the_model_as_it_is(way):
    net, _, names = masked(way)
    net(EXAMPLE).sum().backward()  # the products in the modules now have a history
    before = {name: value.clone() for name, value in net.state_dict().items()}
    handle = import_masks(net, inplace=False)
    assert handle.model is not net
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert {carried.name for carried in carried_masks(net)} == names
    assert not {id(p) for p in net.parameters()} & {id(p) for p in handle.model.parameters()}
    with torch.no_grad():
        assert torch.equal(handle.model(EXAMPLE), net(EXAMPLE))


@pytest.mark.parametrize("way", WAYS)
def test_copies_made_before_keep_their_masks(way):
    net, _, names = masked(way)
    with torch.no_grad():
        before = net(EXAMPLE)  # the products have no history now: torch copies no others
        earlier = copy.deepcopy(net)
        import_masks(net)
        assert {carried.name for carried in carried_masks(earlier)} == names
        assert torch.equal(earlier(EXAMPLE), before)
        import_masks(earlier)
        assert torch.equal(earlier(EXAMPLE), before)


@pytest.mark.parametrize("way", WAYS)
def test_the_optimizer_of_the_masked_model_goes_on(way):
    net, _, names = masked(way)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, weight_decay=0.1)
    net(EXAMPLE).pow(2).sum().backward()
    optimizer.step()
    handle = import_masks(net)
    handle.hold(optimizer)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        net(EXAMPLE).pow(2).sum().backward()
        optimizer.step()
    for name in names:
        weight, mask = net.get_parameter(name), handle.masks[name]
        assert not weight[~mask].any()
        assert (weight[mask] != before[name][mask]).any()


def test_a_model_without_masks_is_left_alone():
    net = Net()
    parametrizations.weight_norm(net.out)
    parametrizations.spectral_norm(net.conv)
    square = nn.Linear(4, 4)
    nn.init.eye_(square.weight)
    parametrizations.orthogonal(square)  # its base is the identity, of zeros and ones
    net.square = square
    names = list(net.state_dict())
    assert masks_of(net) == {}
    assert import_masks(net).masks == {}
    assert list(net.state_dict()) == names


def test_values_that_were_not_kept_are_gone():
    net, _, _ = masked(globally)
    handle = import_masks(net, keep_originals=False)
    assert all(key.startswith("mask.") for key in handle.state_dict())


# -- what is refused -------------------------------------------------------------------------------------------


class Halves(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t, default_mask):
        return default_mask * 0.5


class Shifts(prune.BasePruningMethod):
    PRUNING_TYPE = "unstructured"

    def compute_mask(self, t, default_mask):
        return default_mask * (torch.arange(t.numel()).view(t.shape) % 2)

    def apply_mask(self, module):
        return super().apply_mask(module) + 1.0


class Leaky(Mask):
    def forward(self, weight):
        return torch.where(self.pattern, weight, weight.clamp(min=0.9, max=1.1) - 0.9)


def soft(net):
    Halves.apply(net[0], "weight")


def shifted(net):
    Shifts.apply(net[0], "weight")


def normed(net):
    parametrizations.spectral_norm(net[0])
    parametrize.register_parametrization(net[0], "weight", Mask(torch.rand(4, 4) > 0.5))


def several(net):
    parametrizations.weight_norm(net[0])
    parametrize.register_parametrization(net[0], "weight", Mask(torch.rand(4, 4) > 0.5))


def tied(net):
    net[2].weight = net[0].weight
    prune.l1_unstructured(net[0], "weight", amount=0.5)


def tied_by_parametrization(net):
    net[2].weight = net[0].weight
    parametrize.register_parametrization(net[2], "weight", Mask(torch.rand(4, 4) > 0.5))


def two_masks(net):
    net[2].weight = net[0].weight
    prune.custom_from_mask(net[0], "weight", torch.eye(4))
    prune.custom_from_mask(net[2], "weight", 1 - torch.eye(4))


class Sizes(Mask):
    def forward(self, weight):
        return weight.abs() * self.pattern


class Signs(Mask):
    def forward(self, weight):
        return weight.sign() * self.pattern


def sizes(net):
    parametrize.register_parametrization(net[0], "weight", Sizes(torch.rand(4, 4) > 0.5))


@pytest.mark.parametrize(
    ("way", "message"),
    [
        (sizes, "Sizes does more than multiply"),
        (soft, r"'0\.weight' cannot be imported.*other values than 0 and 1"),
        (shifted, "Shifts does more than multiply"),
        (normed, "parametrized by _SpectralNorm too"),
        (several, "in terms of several tensors"),
        (tied, r"'0\.weight' is tied to '2\.weight', which is not masked"),
        (tied_by_parametrization, r"'2\.weight' is tied to '0\.weight', which is not masked"),
        (two_masks, r"'0\.weight' and '2\.weight' are one tensor under two masks"),
    ],
)
def test_what_is_no_mask_of_a_parameter_is_refused_and_left_as_it_is(way, message):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    prune.l1_unstructured(net[2], "bias", amount=1)
    way(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for use in (masks_of, import_masks):
        with pytest.raises(UnsupportedError, match=rf"(?s){message}"):
            use(net)
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("kind", [Leaky, Signs])
def test_a_step_that_is_no_product_is_no_mask(kind):
    net = nn.Linear(4, 4)
    parametrize.register_parametrization(net, "weight", kind(torch.rand(4, 4) > 0.5))
    assert masks_of(net) == {}


def test_tied_weights_under_one_mask_are_one():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    net[2].weight = net[0].weight
    for layer in (net[0], net[2]):
        prune.custom_from_mask(layer, "weight", torch.eye(4))
    handle = import_masks(net)
    assert net[2].weight is net[0].weight
    assert list(handle.masks) == ["0.weight"]
    assert int((net[0].weight != 0).sum()) == 4


# -- pruning such a model --------------------------------------------------------------------------------------


def pair():
    """A model that torch masks, and the same one with the zeros written into its weights."""
    torch.manual_seed(1)
    carrying = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)).eval()
    with torch.no_grad():
        carrying[0].weight.mul_(torch.logspace(-1, 1, 12)[torch.randperm(12)].view(-1, 1))
    baked = copy.deepcopy(carrying)
    prune.random_unstructured(carrying[0], "weight", 0.5)
    with torch.no_grad():
        baked[0].weight.copy_(carrying[0].weight)
    return carrying, baked, torch.randn(8, 16)


DOORS = {
    "inspect": lambda net, x: sc.inspect(net, x),
    "estimate": lambda net, x: sc.estimate(net, x, granularity="neuron", target={"sparsity": 0.5}),
    "pruner": lambda net, x: sc.Pruner(net, sparsity=0.5, schedule="one_shot"),
    "score": lambda net, x: sc.score(net),
    "score of neurons": lambda net, x: sc.score(net, x, granularity="neuron"),
    "plan": lambda net, x: sc.plan(net, x, granularity="neuron", target={"sparsity": 0.5}),
    "plan of masks": lambda net, x: sc.plan(net, x, granularity="element", target={"sparsity": 0.5}),
    "prune": lambda net, x: sc.prune(net, x, recipe={"granularity": "neuron", "target": {"sparsity": 0.5}}),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("by", ["prune", "parametrize"])
def test_every_door_names_the_function_that_helps(door, by):
    carrying, _, x = pair()
    if by == "parametrize":
        mask = masks_of(carrying)["0.weight"]
        import_masks(carrying)
        parametrize.register_parametrization(carrying[0], "weight", Mask(mask))
    with pytest.raises(UnsupportedError, match=rf"(?s)'0\.weight' is masked by torch\.nn\.utils\.{by}.*import_masks"):
        DOORS[door](carrying, x)


def test_a_model_of_masked_layers_alone_is_not_said_to_have_no_weights():
    net = nn.Sequential(prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5))
    for use in (
        lambda: sc.plan(net, torch.zeros(1, 4), granularity="element", target={"sparsity": 0.5}),
        lambda: parse("2:4").groups(net),
    ):
        with pytest.raises(UnsupportedError, match="import_masks"):
            use()


def test_an_imported_model_is_pruned_like_one_with_the_zeros_written_in():
    carrying, baked, x = pair()
    sc.import_masks(carrying)
    assert all(torch.equal(score, sc.score(baked)[name]) for name, score in sc.score(carrying).items())
    options = {"granularity": "neuron", "target": {"sparsity": 0.5}}
    ours, theirs = sc.plan(carrying, x, **options), sc.plan(baked, x, **options)
    assert ours.to_json() == theirs.to_json()
    fresh = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))
    fresh.load_state_dict(carrying.state_dict())
    ours.validate(fresh)
