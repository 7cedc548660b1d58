import copy
import gc
import json
import random
import weakref
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nets import example, net

import secateur as sc
from secateur.errors import (
    CertificateError,
    FileRefusedError,
    PlanMismatchError,
    RecipeError,
    TargetError,
    UnsupportedError,
)
from secateur.kinds.edit import Edit
from secateur.measure import macs, num_params


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_cut_is_certified_and_the_model_is_unharmed():
    model, x = net(), example()
    before = state(model)
    plan = sc.plan(model, x, target={"macs": 0.5})
    cut = plan.apply(model)
    assert same(before, state(model))
    assert plan.certificate is not None
    assert plan.certificate.max_abs_error <= 1e-5
    assert macs(cut, x) <= 0.5 * macs(model, x)
    assert plan.cost["macs"] == [macs(model, x), macs(cut, x)]
    assert plan.cost["params"] == [num_params(model), num_params(cut)]
    assert type(cut) is type(model)
    assert not [m for m in cut.modules() if m._forward_hooks or m._forward_pre_hooks]


def test_certificate_in_float64():
    model = net()
    plan = sc.plan(model, example(), target={"sparsity": 0.4}, dtype="float64")
    plan.apply(model)
    assert plan.certificate.dtype == "float64"
    assert plan.certificate.max_abs_error <= 1e-10


def test_cut_equals_zeroed_producers():
    """Independent of the replay: with ReLU after each norm, a channel whose affine is zero is a removed channel."""
    model, x = net(), example()
    plan = sc.plan(model, x, target={"sparsity": 0.3})
    cut = plan.apply(model)
    masked = copy.deepcopy(model)
    gone = {name: group["removed"] for name, group in plan.groups.items()}
    with torch.no_grad():
        for norm, group in ((masked.bn, "stem"), (masked.block.b1, "block.c1"), (masked.block.b2, "stem")):
            norm.weight[gone[group]] = 0
            norm.bias[gone[group]] = 0
        masked.fc.weight[gone["fc"]] = 0
        masked.fc.bias[gone["fc"]] = 0
    assert sum(map(len, gone.values())) > 5
    torch.testing.assert_close(cut(x), masked(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_changed_index_breaks_the_certificate(dtype):
    """The proof is not a formality: any single kept index that is swapped for a removed one is found."""
    model, x = net(), example()
    for tensor, d in (("stem.weight", 0), ("block.b1.running_mean", 0), ("block.c2.weight", 1), ("out.weight", 1)):
        plan = sc.plan(model, x, target={"sparsity": 0.3}, dtype=dtype)
        kept = plan.cuts[tensor][d]
        missing = sorted(set(range(int(kept.max()) + 1)) - set(kept.tolist()))
        kept[(kept > missing[0]).nonzero()[0]] = missing[0]
        plan.cuts[tensor][d] = kept.sort().values
        with pytest.raises(CertificateError):
            plan.apply(model)


@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.31])
@pytest.mark.parametrize("what", ["macs", "params"])
def test_budget_is_met_with_the_fewest_removals(what, fraction):
    model, x = net(), example()
    plan = sc.plan(model, x, target={what: fraction})
    before, after = plan.cost[what]
    assert after <= fraction * before
    one_less = sc.plan(model, x, target={"count": plan.units["removed"] - 1})
    assert one_less.cost[what][1] > fraction * before


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.333, 0.5])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_counts_are_exact(sparsity, scope):
    plan = sc.plan(net(), example(), target={"sparsity": sparsity}, scope=scope)
    removed = sum(len(g["removed"]) for g in plan.groups.values())
    total = sum(g["size"] for g in plan.groups.values())
    assert removed == plan.units["removed"] == int(sparsity * total + 0.5)


def test_counts_are_exact_when_all_scores_tie():
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    plan = sc.plan(model, example(), target={"count": 7})
    assert plan.units["removed"] == 7
    assert sc.plan(model, example(), target={"count": 7}).to_json() == plan.to_json()


def test_local_scope_shrinks_groups_alike():
    plan = sc.plan(net(), example(), target={"sparsity": 0.5}, scope="local")
    assert {len(g["removed"]) / g["size"] for g in plan.groups.values()} == {0.5}


def test_round_to():
    plan = sc.plan(net(width=16), example(), target={"macs": 0.6}, round_to=4)
    assert all((g["size"] - len(g["removed"])) % 4 == 0 for g in plan.groups.values())
    assert plan.cost["macs"][1] <= 0.6 * plan.cost["macs"][0]


def test_smaller_budgets_remove_supersets():
    model, x = net(), example()
    plans = [sc.plan(model, x, target={"macs": share}) for share in (0.8, 0.6, 0.4, 0.2)]
    for large, small in pairwise(plans):
        for name, group in large.groups.items():
            assert set(group["removed"]) <= set(small.groups[name]["removed"])


def test_unreachable_target_names_the_range():
    with pytest.raises(TargetError, match=r"least is \d+"):
        sc.plan(net(), example(), target={"macs": 0.0001})
    with pytest.raises(TargetError, match=r"at most \d+ of \d+ units"):
        sc.plan(net(), example(), target={"sparsity": 0.99})


def test_protect_keeps_a_layer_whole():
    plan = sc.plan(net(), example(), target={"sparsity": 0.5}, protect=["block.c1"])
    assert "block.c1" not in plan.groups
    plan = sc.plan(net(), example(), target={"sparsity": 0.5}, protect=["type:Linear"])
    assert "fc" not in plan.groups
    with pytest.raises(RecipeError, match="matches no"):
        sc.plan(net(), example(), target={"sparsity": 0.5}, protect=["nothing.*"])


def test_same_input_same_bytes_and_a_round_trip(tmp_path):
    model, x = net(), example()
    plans = [sc.plan(model, x, target={"macs": 0.5}) for _ in range(2)]
    for i, plan in enumerate(plans):
        plan.save(tmp_path / f"{i}.json")
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "1.json").read_bytes()
    loaded = sc.Plan.load(tmp_path / "0.json")
    assert loaded.to_json() == plans[0].to_json()
    assert loaded.diff(plans[1]) == ""
    torch.testing.assert_close(loaded.apply(net())(x), plans[0].apply(model)(x), atol=0, rtol=0)


def test_diff_and_explain():
    model, x = net(), example()
    a, b = (sc.plan(model, x, target={"count": n}) for n in (4, 5))
    assert len(a.diff(b).splitlines()) == 1
    assert "removes 4 of" in a.explain()
    m, n = (sc.plan(model, x, granularity="element", target={"count": n}) for n in (40, 50))
    assert "mask entries differ" in m.diff(n)


def test_plan_of_another_model_is_refused():
    plan = sc.plan(net(), example(), target={"macs": 0.5})
    other = net(width=8)
    before = state(other)
    with pytest.raises(PlanMismatchError):
        plan.apply(other)
    assert same(before, state(other))
    cut = plan.apply(net())
    with pytest.raises(PlanMismatchError):
        plan.apply(cut)


def hostile(data):
    yield {**data, "schema": 9}
    yield {**data, "groups": 3}
    yield {k: v for k, v in data.items() if k != "cuts"}
    yield {**data, "cuts": {"stem.weight": {"0": [[5, 3]]}}}
    yield {**data, "cuts": {"stem.weight": {"zero": [[0, 3]]}}}
    yield {**data, "attributes": [{"owner": "", "name": "x", "item": None, "value": "os.system"}]}
    yield {**data, "attributes": [{"owner": "", "name": 3, "item": None, "value": 1}]}
    yield [1, 2]


def test_damaged_plans_are_refused(tmp_path):
    plan = sc.plan(net(), example(), target={"macs": 0.5})
    plan.save(tmp_path / "plan.json")
    good = json.loads((tmp_path / "plan.json").read_text())
    for i, bad in enumerate(hostile(good)):
        path = tmp_path / f"bad{i}.json"
        path.write_text(json.dumps(bad))
        with pytest.raises(FileRefusedError):
            sc.Plan.load(path)


def test_out_of_range_indices_and_attributes_that_are_no_integers_are_refused(tmp_path):
    plan = sc.plan(net(), example(), target={"macs": 0.5})
    data = json.loads(plan.to_json())
    data["cuts"]["stem.weight"]["0"] = [[0, 500]]
    with pytest.raises(PlanMismatchError, match="does not fit"):
        sc.Plan.from_data(data).apply(net())
    data = json.loads(plan.to_json())
    for owner, name in (("", "training"), ("stem", "weight"), ("nowhere", "x"), ("", "__class__")):
        data["attributes"] = [{"owner": owner, "name": name, "item": None, "value": 1}]
        with pytest.raises(PlanMismatchError):
            sc.Plan.from_data(data).apply(net())


def test_inplace_cut_keeps_parameters_grads_and_optimizer_alive():
    model, x = net(), example()
    for parameter in model.block.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.Adam(p for p in model.parameters() if p.requires_grad)
    model(x).square().mean().backward()
    optimizer.step()
    identities = [id(p) for p in model.parameters()]
    moments = optimizer.state[model.stem.weight]["exp_avg"].clone()
    plan = sc.plan(model, x, target={"sparsity": 0.3})
    wanted = plan.apply(model)(x)
    plan.apply(model, inplace=True, optimizer=optimizer)
    assert [id(p) for p in model.parameters()] == identities
    torch.testing.assert_close(model(x), wanted, atol=0, rtol=0)
    assert not model.block.c1.weight.requires_grad
    kept = plan.cuts["stem.weight"][0]
    assert torch.equal(optimizer.state[model.stem.weight]["exp_avg"], moments[kept])
    assert model.stem.weight.grad.shape == model.stem.weight.shape
    weight = model.stem.weight.clone()
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(weight, model.stem.weight), "training goes on"


def test_a_failing_inplace_cut_rolls_back_bit_for_bit(monkeypatch):
    from secateur.kinds.slices import cut as module

    model, x = net(), example()
    plan = sc.plan(model, x, target={"sparsity": 0.3})
    before, sizes = state(model), {n: m.extra_repr() for n, m in model.named_modules()}
    real, calls = module.finish, []

    def fail_in_place(target, attributes):
        real(target, attributes)
        calls.append(target)
        if target is model:
            raise RuntimeError("interrupted")

    monkeypatch.setattr(module, "finish", fail_in_place)
    with pytest.raises(RuntimeError):
        plan.apply(model, inplace=True)
    assert model in calls
    assert same(before, state(model))
    assert sizes == {n: m.extra_repr() for n, m in model.named_modules()}


def test_cut_twice():
    model, x = net(), example()
    first = sc.plan(model, x, target={"macs": 0.7}).apply(model)
    second = sc.plan(first, x, target={"macs": 0.7})
    cut = second.apply(first)
    assert second.certificate is not None
    assert macs(cut, x) <= 0.49 * macs(model, x)


def test_masks_have_exact_counts_and_no_certificate_is_needed(tmp_path):
    model, x = net(), example()
    for granularity, sparsity in (("element", 0.9), ("kernel", 0.5), ({"name": "block", "shape": [2, 3]}, 0.4)):
        plan = sc.plan(model, x, granularity=granularity, target={"sparsity": sparsity})
        masked = plan.apply(model)
        assert plan.units["removed"] == int(sparsity * plan.units["total"] + 0.5)
        for name, mask in plan.masks.items():
            weight = masked.get_parameter(name)
            assert not torch.any(weight[~mask])
            assert not torch.any(torch.signbit(weight[~mask])), "zeros are +0.0"
            assert torch.equal(weight[mask], model.get_parameter(name)[mask])
        plan.save(tmp_path / "masks.json")
        assert sc.Plan.load(tmp_path / "masks.json").diff(plan) == ""


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"granularity": "chanel", "target": {"sparsity": 0.5}}, RecipeError, "chanel"),
        ({"criterion": "magnitud", "target": {"sparsity": 0.5}}, RecipeError, "magnitude"),
        ({"granularity": "element", "target": {"macs": 0.5}}, RecipeError, "does not apply to masks"),
        ({"granularity": "2:4", "target": {"sparsity": 0.6}}, RecipeError, "fixes the sparsity"),
        ({"granularity": "head", "target": {"sparsity": 0.5}}, UnsupportedError, "head"),
        ({"target": {"speed": 2}}, RecipeError, "speed"),
        ({"scope": "row", "target": {"sparsity": 0.5}}, RecipeError, "row"),
        ({"allocation": "erk", "target": {"sparsity": 0.5}}, RecipeError, "erk"),
    ],
)
def test_wrong_requests(arguments, error, text):
    with pytest.raises(error, match=text):
        sc.plan(net(), example(), **arguments)


def fake_latency(monkeypatch, off=lambda call: 1.0, load=lambda call: 1.0):
    """A clock that reads the multiply-accumulates: what is timed is real, only the time is not.

    Args:
        off: call -> by what the time of what is cut is wrong there.
        load: call -> how much slower the machine is then.
    """
    from secateur.planning import timed
    from secateur.types import Latency

    seen = []

    def latency(models, x, *, rounds, warmup):
        call = len(seen)
        ms = {name: macs(m, x) / 1e5 * load(call) for name, m in models.items()}
        if "cut" in ms:
            ms["cut"] *= off(call)
        seen.append(ms.get("cut"))
        first = next(iter(ms.values()))
        return {name: Latency(v, v, v, rounds, ratio=(v / first,) * 3) for name, v in ms.items()}

    monkeypatch.setattr(timed, "latency", latency)
    return seen


def wide_net():
    """So many units that single ones are far less than a hundredth of the time."""
    torch.manual_seed(0)
    layers = (torch.nn.Linear(16, 600), torch.nn.ReLU(), torch.nn.Linear(600, 600), torch.nn.ReLU())
    return torch.nn.Sequential(*layers, torch.nn.Linear(600, 4)).eval()


def busy_for_a_while(call):
    return 1.8 if 9 <= call < 17 else 1.0


def busy_at_times(call):
    return 2.5 if call % 5 == 3 else 1.0


def off_by_chance(seed):
    """As measured on two shared cores: about 1 % to either side, and one look of ten up to 12 % too long."""
    chance = random.Random(seed)
    return lambda call: (1 + 0.01 * chance.gauss(0, 1)) * (1 + (chance.random() < 0.1) * 0.12 * chance.random())


@pytest.mark.parametrize("load", [lambda call: 1.0, busy_for_a_while, busy_at_times], ids=["quiet", "while", "times"])
@pytest.mark.parametrize("share", [0.85, 0.6, 0.3])
def test_latency_target_is_met_within_two_percent_below_it(monkeypatch, load, share):
    """However the machine's speed changed: the limit is kept and not far away."""
    model, x = wide_net(), torch.randn(2, 16)
    dense = macs(model, x) / 1e5
    seen = fake_latency(monkeypatch, load=load)
    plan = sc.plan(model, x, target={"latency_ms": share * dense})
    reached = macs(plan.apply(model), x) / 1e5
    assert 0.98 * share * dense <= reached <= share * dense
    assert len(seen) < 35, "a bisection and a line, not a scan"


def test_looks_that_are_off_mislead_no_latency_target(monkeypatch):
    """One look too long at the wrong place must not rule out all amounts below it, nor one too short let pass."""
    model, x = wide_net(), torch.randn(2, 16)
    dense = macs(model, x) / 1e5
    for seed in range(10):
        fake_latency(monkeypatch, off=off_by_chance(seed))
        plan = sc.plan(model, x, target={"latency_ms": 0.6 * dense})
        reached = plan.cost["macs"][1] / 1e5
        assert 0.97 * 0.6 * dense <= reached <= 1.01 * 0.6 * dense, seed


class Curve:
    """In place of a stopwatch: the model is the number of removals, and its time is known."""

    def __init__(self, share, off):
        self.true, self.off, self.calls, self.whole = share, off, 0, 100.0

    def share(self, step):
        self.calls += 1
        return self.true(step) * self.off(self.calls)


def bent(step):
    """Slow at first, then steeply down in a hundredth of the list, then flat: what heads of an encoder do."""
    return float(np.interp(step, [0, 4000, 4500, 4600, 9000], [1.0, 0.73, 0.62, 0.2, 0.12]))


def stairs(step):
    return 0.92 ** (step // 700)


@pytest.mark.parametrize("curve", [bent, stairs])
@pytest.mark.parametrize("off", [None, 0, 1, 2], ids=str)
def test_latency_targets_on_curves_that_are_no_line(curve, off):
    """By brute force: of all prefixes that keep the limit the slowest is nearly found; by chance 3 % over at most."""
    from secateur.planning.timed import removals_for_latency

    order = SimpleNamespace(group=np.zeros(9000))
    for limit in (90.0, 75.0, 63.0, 58.0, 47.0, 40.0):
        watch = Curve(curve, off_by_chance(off) if off is not None else lambda call: 1.0)
        step = removals_for_latency(order, lambda step: step, lambda step: step, limit, watch)
        best = max(share for share in map(curve, range(9001)) if 100 * share <= limit)
        found = curve(step)
        assert 100 * found <= limit * (1.0 if off is None else 1.03)
        assert found >= (0.96 if curve is bent else 0.91) * best, (limit, step)
        assert watch.calls < 50


def looks_at(shares, limit):
    """Looks that are taken already; the model as it came takes 100 ms."""
    from secateur.planning.timed import Looks

    looks = Looks(lambda step: step, lambda step: step, limit, SimpleNamespace(whole=100.0))
    looks.shares.update({step: list(found) for step, found in shares.items()})
    return looks


def test_a_line_through_looks_is_followed_no_further_than_it_is_long():
    """Behind these looks the curve falls steeply; the line knows nothing of it, and would go on to 6,900."""
    near = {4380: [0.657], 4451: [0.629], 4486: [0.62], 4504: [0.601], 4513: [0.605], 4517: [0.62], 4519: [0.606]}
    found = looks_at({**near, 4520: [0.628], 4521: [0.606], 9042: [0.113]}, 59.9).crossing()
    assert 4521 <= found <= 4521 + (4521 - 4380)


def test_a_line_stays_between_looks_that_are_clearly_on_either_side():
    near = {500: [0.62], 510: [0.61]}  # alone they would cross 0.594 at 526
    assert looks_at({**near, 515: [0.5], 900: [0.2]}, 60.0).crossing() == 515
    assert looks_at({400: [0.7], **near, 520: [0.75], 900: [0.2]}, 60.0).crossing() == 520
    # One that was too fast before others that are clearly slower bounds nothing.
    assert looks_at({100: [0.5], 400: [0.7], 500: [0.62], 510: [0.61], 900: [0.2]}, 60.0).crossing() == 520


def test_without_looks_near_it_is_straight_between_those_around_and_a_look_too_slow_moves_it_little():
    shares = {100: [0.8], 200: [0.85], 300: [0.4], 400: [0.1]}  # at 200 too slow: as if it were 0.8
    assert looks_at(shares, 60.0).crossing() == 252  # 200 + 100 (0.8 - 0.594) / (0.8 - 0.4) = 251.5


def test_latency_that_cannot_be_reached_or_does_not_hold_is_refused(monkeypatch):
    model, x = net(), example()
    dense = macs(model, x) / 1e5
    fake_latency(monkeypatch)
    with pytest.raises(TargetError, match=r"latency_ms <= 0\.001 cannot be reached"):
        sc.plan(model, x, target={"latency_ms": 1e-3})
    fake_latency(monkeypatch, off=lambda call: 0.01 if call < 2 else 1.0)
    with pytest.raises(TargetError, match="does not hold"):
        sc.plan(model, x, target={"latency_ms": 0.01 * dense})
    fake_latency(monkeypatch)
    plan = sc.plan(model, x, target={"latency_ms": 1.1 * dense})
    assert plan.units["removed"] == 0, "the model as it came is fast enough"


def test_several_targets_hold_together(monkeypatch):
    model, x = net(), example()
    fake_latency(monkeypatch)
    dense = macs(model, x) / 1e5
    plan = sc.plan(model, x, target={"latency_ms": 0.8 * dense, "params": 0.3, "sparsity": 0.1})
    assert plan.cost["params"][1] <= 0.3 * plan.cost["params"][0]
    assert plan.units["sparsity"] >= 0.1
    assert plan.cost["macs"][1] <= 0.8 * plan.cost["macs"][0]


def test_in_place_the_certified_copy_is_gone_before_the_model_is_cut(monkeypatch):
    copies, alive = [], []
    copy_of, apply = Edit.copy, Edit.apply

    def copied(edit, model):
        result = copy_of(edit, model)
        copies.append(weakref.ref(result))
        return result

    def applied(edit, model, optimizer=None):
        gc.collect()
        alive.extend(one() for one in copies)
        apply(edit, model, optimizer)

    model = net()
    plan = sc.plan(model, example(), target={"sparsity": 0.5})
    monkeypatch.setattr(Edit, "copy", copied)
    monkeypatch.setattr(Edit, "apply", applied)
    assert plan.apply(model, inplace=True) is model
    assert copies
    assert alive == [None] * len(copies)
    assert num_params(model) < num_params(net())
