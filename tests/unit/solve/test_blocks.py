"""One-shot pruning block by block, against a driver that knows nothing of it: hooks, and a forward pass per weight."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.errors import FileRefusedError, InputError, RecipeError, UnsupportedError
from secateur.kinds.weights import parse
from secateur.request import Named, Request, Target
from secateur.solve import SOLVERS, Problem, SecondMoments
from secateur.solve.blocks.layer import LayerInputs, solve_layer
from secateur.solve.blocks.run import Settings, prune_blocks
from secateur.solve.blocks.sums import add, empty
from secateur.solve.patterns import PerRow

WIDTH, INNER, TOKENS = 12, 20, 24


class Block(nn.Module):
    """Two products read one input; its output is added to what comes in, times a number that the caller gives."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH)

    def forward(self, hidden, *, scale):
        read = self.norm(hidden)
        return hidden + scale * self.down(torch.tanh(self.gate(read)) * self.up(read))


class Net(nn.Module):
    def __init__(self, depth=3):
        super().__init__()
        self.table = nn.Embedding(30, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 30)

    def forward(self, ids, attention_mask=None):
        hidden = self.table(ids)
        for number, block in enumerate(self.blocks):
            hidden = block(hidden, scale=1.0 + 0.1 * number)
        return self.head(hidden)


def net(depth=3, seed=0):
    torch.manual_seed(seed)
    return Net(depth).double().eval()


def data(batches=5):
    g = torch.Generator().manual_seed(1)
    return [{"ids": torch.randint(0, 30, (2, TOKENS), generator=g)} for _ in range(batches)]


def request(share=0.5, scope="row", granularity="element", protect=()):
    return Request(
        target=Target(sparsity=share),
        granularity=(Named(granularity),),
        scope=scope,
        protect=protect,
        criterion=Named("x"),
    )


def run(model, batches, name="sparsegpt", options=None, *, asked=None, unit="element", progress=None, **settings):
    return prune_blocks(
        model,
        {key: value[:1, :8] for key, value in batches[0].items()} if isinstance(batches[0], dict) else batches[0],
        batches,
        solver=SOLVERS.build(name, options or {}),
        granularity=parse(unit),
        request=asked or request(granularity="element"),
        settings=Settings(**settings),
        progress=progress,
    )


def inputs_of(model, name, batches):
    """What a layer reads, all tokens of all batches, by a hook and a whole forward pass."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat(seen)


ORDER = [f"blocks.{i}.{layer}" for i in range(3) for layer in ("gate", "up", "down")]


@pytest.mark.parametrize("name", ["wanda", "sparsegpt", "admm"])
def test_it_solves_every_layer_on_what_the_pruned_layers_before_it_hand_on(name):
    model, batches = net(), data()
    out = run(model, batches, name, targets="own", hold_out=0.0)
    reference, options = copy.deepcopy(model), {}
    total = [model.get_parameter(f"{layer}.weight").numel() for layer in ORDER]
    for number, layer in enumerate(ORDER):
        rows = inputs_of(reference, layer, batches)
        count = round(0.5 * sum(total[: number + 1])) - round(0.5 * sum(total[:number]))
        weight = reference.get_submodule(layer).weight
        solved = SOLVERS.build(name, options).solve(
            Problem(weight.detach(), SecondMoments(rows.T @ rows / len(rows)), PerRow(count))
        )
        with torch.no_grad():
            weight.copy_(solved.weight)
    for layer in ORDER:
        key = f"{layer}.weight"
        expected = reference.get_parameter(key).detach()
        assert torch.equal(out.masks[key], expected != 0)
        found = out.weights[key] if out.weights else model.get_parameter(key).detach() * out.masks[key]
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_dense_targets_are_the_regression_of_the_original_outputs_on_pruned_inputs():
    """With nothing to prune in the second layer, its weights are those of plain least squares against the original."""
    model, batches = net(1), data(8)
    asked = request({"*gate*": 0.5, "*up*": 0.5, "*": 0.0})
    out = run(model, batches, "admm", asked=asked, targets="dense", hold_out=0.0, shrinkage=1.0, damping=1e-10)
    dense = inputs_of(model, "blocks.0.down", batches)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for key in ("blocks.0.gate.weight", "blocks.0.up.weight"):
            pruned.get_parameter(key).copy_(out.weights[key])
    seen = inputs_of(pruned, "blocks.0.down", batches)
    wanted = dense @ model.get_parameter("blocks.0.down.weight").detach().T
    expected = torch.linalg.lstsq(seen, wanted).solution.T
    torch.testing.assert_close(out.weights["blocks.0.down.weight"], expected, rtol=1e-5, atol=1e-6)


def test_dense_targets_keep_the_outputs_of_the_model_better_on_other_data():
    errors = {"dense": 0.0, "own": 0.0}
    for seed in range(2):
        model, batches = net(5, seed), data(16)
        other = data(24)[16:]
        for targets in errors:
            out = run(model, batches, "admm", asked=request(0.6), targets=targets)
            pruned = copy.deepcopy(model)
            with torch.no_grad():
                for key, value in out.weights.items():
                    pruned.get_parameter(key).copy_(value)
                errors[targets] += sum(float((pruned(**b) - model(**b)).pow(2).mean()) for b in other)
    assert errors["dense"] < 0.95 * errors["own"]


def test_the_model_is_given_back_bit_for_bit_and_nothing_is_left_on_it():
    model, batches = net().train(), data()
    before = copy.deepcopy(model.state_dict())
    run(model, batches, "admm")
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


def test_an_error_in_a_block_comes_out_and_the_model_is_as_it_was():
    class Failing(Block):
        def forward(self, hidden, *, scale):
            if hidden.shape[1] > 8:  # not on the example
                self.gate(hidden)
                raise RuntimeError("no such thing")
            return super().forward(hidden, scale=scale)

    model = net()
    model.blocks[1] = Failing().double()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="no such thing"):
        run(model, data(), "wanda")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("scope", ["row", "local"])
@pytest.mark.parametrize("share", [0.37, 0.5, 0.71])
def test_counts_are_exact_over_all_that_is_pruned(share, scope):
    out = run(net(), data(), "admm", {"steps": 4, "choosing": 3, "polish": 0}, asked=request(share, scope))
    total = sum(mask.numel() for mask in out.masks.values())
    assert sum(int((~mask).sum()) for mask in out.masks.values()) == round(share * total)
    assert all(bool((out.weights[key][~mask] == 0).all()) for key, mask in out.masks.items())
    assert {one.name for one in out.left_out} == {"table.weight", "head.weight"}


def test_padding_is_not_looked_at():
    model, batches = net(), data()
    masks = [torch.ones(2, TOKENS, dtype=torch.int64) for _ in batches]
    for mask in masks:
        mask[1, 15:] = 0
    padded = [{**batch, "attention_mask": mask} for batch, mask in zip(batches, masks, strict=True)]
    other = [{**batch, "ids": torch.where(batch["attention_mask"] == 0, 7, batch["ids"])} for batch in padded]
    one, two, whole = (run(model, given, "admm") for given in (padded, other, batches))
    assert all(torch.equal(one.weights[key], two.weights[key]) for key in one.weights)
    assert not all(torch.equal(one.weights[key], whole.weights[key]) for key in one.weights)
    assert one.records[0].tokens == 4 * (TOKENS + 15)


def test_hidden_states_on_disk_change_nothing():
    one, two = (run(net(), data(), "admm", memory_bytes=room) for room in (None, 1000))
    assert all(torch.equal(one.weights[key], two.weights[key]) for key in one.weights)


class KilledError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 4, 8])
def test_a_run_that_was_killed_goes_on_with_the_same_result(tmp_path, after):
    def die(done, total):
        if done == after:
            raise KilledError

    model, batches = net(), data()
    whole = run(model, batches, "admm")
    with pytest.raises(KilledError):
        run(model, batches, "admm", progress=die, checkpoint=tmp_path)
    steps = []
    again = run(model, batches, "admm", progress=lambda done, total: steps.append(done), checkpoint=tmp_path)
    assert all(torch.equal(whole.weights[key], again.weights[key]) for key in whole.weights)
    assert all(torch.equal(whole.masks[key], again.masks[key]) for key in whole.masks)
    assert again.records == whole.records
    # Blocks of three weights that were finished are not solved again.
    assert len(steps) == (after // 3) + 9 - 3 * (after // 3)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("what", ["weights", "data", "solver", "settings", "target"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, what):
    run(net(), data(), "admm", checkpoint=tmp_path)
    changed = {
        "weights": lambda: run(net(seed=1), data(), "admm", checkpoint=tmp_path),
        "data": lambda: run(net(), data(6), "admm", checkpoint=tmp_path),
        "solver": lambda: run(net(), data(), "admm", {"steps": 19}, checkpoint=tmp_path),
        "settings": lambda: run(net(), data(), "admm", checkpoint=tmp_path, targets="dense"),
        "target": lambda: run(net(), data(), "admm", checkpoint=tmp_path, asked=request(0.4)),
    }[what]
    with pytest.raises(FileRefusedError, match="another run"):
        changed()


def test_an_update_that_makes_the_held_out_error_larger_is_refused():
    """Two tokens say nothing about others: what is learned from them is worse than weights that were not moved."""
    torch.manual_seed(3)
    batches = [{"ids": torch.full((1, TOKENS), i)} for i in range(5)]
    out = run(net(), batches, "least_squares", {"steps": 50}, hold_out=0.2, targets="own", damping=1e-8)
    refused = [one for one in out.records if one.kept_plain]
    assert refused
    for one in refused:
        assert one.error == one.plain
        before, mask = net().get_parameter(one.name), out.masks[one.name]
        assert torch.equal(out.weights[one.name], before.detach() * mask)


@pytest.mark.parametrize("near", [0.05, 2.0])
def test_the_error_of_a_record_is_what_a_layer_adds_to_the_loss_of_those_before(near):
    """With inputs that are far from the original's a solved layer brings some of the loss back, and adds below 0."""
    generator = torch.Generator().manual_seed(5)
    weight, dense = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (4, 200))
    rows = dense @ (torch.eye(6, dtype=torch.float64) + near * torch.randn(6, 6, generator=generator).double() / 6)
    sums = [empty(6, rows, cross=True) for _ in range(2)]
    for one, part in zip(sums, (slice(0, 150), slice(150, 200)), strict=True):
        add(one, rows[part], dense[part], full=True)
    solved, record = solve_layer(
        "w", weight, LayerInputs(*sums, 0.01), PerRow(8), SOLVERS.build("least_squares", {"steps": 50})
    )
    X, Y = dense[150:], rows[150:]
    whole, before = (X @ weight.T - Y @ solved.weight.T).square().sum(), ((X - Y) @ weight.T).square().sum()
    assert record.beyond
    assert record.error == pytest.approx(float((whole - before) / (Y @ weight.T).square().sum()), rel=1e-9)
    assert (record.error < 0) == (near > 1)


@pytest.mark.parametrize(
    ("share", "reconstruct", "dense"), [(0.5, None, False), (0.7, None, True), (0.5, {"epochs": 1}, True)]
)
def test_targets_that_were_left_open_are_chosen_and_named(share, reconstruct, dense):
    """Dense where much goes or the original's outputs are at hand: the plan is that of the word, and says so."""
    given = {"criterion": "admm", "granularity": "element", "scope": "row", "target": {"sparsity": share}}
    chosen, dense_plan, own = (
        sc.plan(net(), data()[0], data=data(), **given, blocks={"reconstruct": reconstruct, **more})
        for more in ({}, {"targets": "dense"}, {"targets": "own"})
    )
    same = dense_plan if dense else own
    assert all(torch.equal(chosen.weights[name], same.weights[name]) for name in chosen.weights)
    assert any(not torch.equal(own.weights[name], dense_plan.weights[name]) for name in own.weights)
    said = [note for note in chosen.notes if "solved towards" in note]
    assert said == [
        f"outputs that layers were solved towards: {'the original model' if dense else 'the layer'}'s"
        + (" (dense)" if dense else " own")
    ]
    assert not any("solved towards" in note for note in (*own.notes, *dense_plan.notes))


def test_one_share_above_the_rest_is_much():
    assert Settings().dense(Target(sparsity={"*gate*": 0.7, "*": 0.2}))
    assert not Settings().dense(Target(sparsity={"*gate*": 0.6, "*": 0.2}))
    with pytest.raises(RecipeError, match="targets=dense only"):
        Settings(shrinkage=0.5)


def test_what_is_said_of_errors_says_what_they_leave_out():
    with_others, alone = (
        sc.plan(net(), data()[0], criterion="admm", granularity="element", scope="row", target={"sparsity": 0.5},
                data=data(), blocks={"targets": targets}).notes
        for targets in ("dense", "own")
    )  # fmt: skip
    assert any("held-out error of the outputs beyond what layers before have lost:" in note for note in with_others)
    assert any("held-out error of the outputs: median" in note for note in alone)


class Experts(nn.Module):
    """A residual block whose experts lie in stacks; every token goes to the one that its sign chooses."""

    def __init__(self, turned):
        super().__init__()
        self.turned = turned
        shape = (3, WIDTH, INNER) if turned else (3, INNER, WIDTH)
        self.up = nn.Parameter(torch.randn(shape))
        self.down = nn.Parameter(torch.randn(3, WIDTH, INNER))

    def forward(self, hidden):
        flat = hidden.flatten(0, 1)
        out = torch.zeros_like(flat)
        for expert in range(2):  # the third is never chosen
            chosen = (flat[:, 0] > 0).long() == expert
            rows = flat[chosen]
            inner = rows @ self.up[expert] if self.turned else nn.functional.linear(rows, self.up[expert])
            out[chosen] = torch.tanh(inner) @ self.down[expert].T
        return hidden + out.view_as(hidden)


@pytest.mark.parametrize("turned", [False, True])
def test_experts_in_stacks_are_solved_on_their_own_tokens(turned):
    model = net()
    model.blocks = nn.ModuleList([Experts(turned).double(), Experts(turned).double()])
    model.forward = lambda ids: model.head(model.blocks[1](model.blocks[0](model.table(ids))))
    batches = data()
    out = run(model, batches, "sparsegpt", hold_out=0.0)
    assert set(out.masks) == {f"blocks.{i}.{name}" for i in range(2) for name in ("up", "down")}
    removed = sum(int((~mask).sum()) for mask in out.masks.values())
    assert removed == sum(mask.numel() for mask in out.masks.values()) // 2
    rows = torch.cat([model.table(batch["ids"]).detach().flatten(0, 1) for batch in batches])
    for expert in range(2):
        seen = rows[(rows[:, 0] > 0).long() == expert]
        weight = model.blocks[0].up[expert].detach()
        weight = weight.T if turned else weight
        solved = SOLVERS.build("sparsegpt", {}).solve(
            Problem(weight, SecondMoments(seen.T @ seen / len(seen)), PerRow(weight.numel() // 2))
        )
        found = out.weights["blocks.0.up"][expert]
        torch.testing.assert_close(found.T if turned else found, solved.weight, rtol=1e-7, atol=1e-9)
    never = [one for one in out.records if one.tokens == 0]
    assert [one.name for one in never] == [f"blocks.{i}.{name}[2]" for i in range(2) for name in ("up", "down")]


@pytest.mark.parametrize("unit", ["element", "2:4", {"name": "block", "shape": [4, 4]}])
def test_a_model_without_blocks_is_one_block(unit):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 8),
    ).double()
    batches = [torch.randn(4, 4, 6, 6).double() for _ in range(4)]
    name = unit if isinstance(unit, str) else "block"
    asked = request(granularity=name)
    out = run(model, batches, "admm", asked=asked, unit=unit, hold_out=0.0, targets="own")
    assert set(out.masks) == {"0.weight", "5.weight"}
    assert [(one.name, one.wanted) for one in out.left_out] == [("2.weight", True)]
    if unit == "2:4":  # along the channels, at each place of the kernel
        assert bool((out.masks["0.weight"].sum(1) == 2).all())
    if unit == "element":
        windows = nn.functional.unfold(torch.cat(batches), 3, padding=1).transpose(1, 2).flatten(0, 1)
        weight = model[0].weight.detach().flatten(1)
        solved = SOLVERS.build("admm", {}).solve(
            Problem(weight, SecondMoments(windows.T @ windows / len(windows)), PerRow(weight.numel() // 2))
        )
        torch.testing.assert_close(out.weights["0.weight"].flatten(1), solved.weight, rtol=1e-6, atol=1e-8)


def test_what_no_product_reads_is_named_and_left_whole():
    class Odd(Block):
        def forward(self, hidden, *, scale):
            if hidden.shape[1] <= 8:
                return super().forward(hidden, scale=scale)
            return hidden + self.down(torch.tanh(self.gate(hidden)))  # `up` is only used on the example

    model = net()
    model.blocks[2] = Odd().double()
    out = run(model, data(), "wanda")
    assert "blocks.2.up.weight" not in out.masks
    assert [(one.name, one.wanted) for one in out.left_out if one.wanted] == [("blocks.2.up.weight", True)]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"asked": request(scope="global")}, RecipeError, "scope"),
        ({"asked": request(0.4, granularity="2:4"), "unit": "2:4"}, RecipeError, "fixes the sparsity"),
        ({"asked": request(granularity="vector"), "unit": "vector"}, RecipeError, "granularity"),
        (
            {"asked": Request(target=Target(count=5), granularity=(Named("element"),), scope="row")},
            RecipeError,
            "sparsity",
        ),
        ({"asked": request(protect=("blocks.*",))}, UnsupportedError, "no weight"),
    ],
)
def test_what_solvers_do_not_take_is_refused(change, error, match):
    with pytest.raises(error, match=match):
        run(net(), data(), "wanda", **change)


def test_settings_that_mean_nothing_are_refused():
    for wrong in ({"targets": "some"}, {"shrinkage": 1.5}, {"hold_out": -0.1}, {"damping": -1.0}):
        with pytest.raises(RecipeError):
            Settings(**wrong)
    with pytest.raises(InputError, match="no data"):
        prune_blocks(
            net(), data()[0], [], solver=SOLVERS.build("wanda", {}), granularity=parse("element"), request=request()
        )


# -- plans -------------------------------------------------------------------------------------------------------------


def solved(model, batches, **more):
    example = {"ids": batches[0]["ids"][:1, :8]}
    given = {"criterion": "admm", "granularity": "element", "scope": "row", "target": {"sparsity": 0.5}, **more}
    return sc.plan(model, example, data=batches, **given)


def test_a_plan_holds_masks_and_weights_and_comes_back_from_its_files(tmp_path):
    model = net()
    plan = solved(model, data())
    plan.save(tmp_path / "plan.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]
    again = sc.Plan.load(tmp_path / "plan.json")
    one, two = plan.apply(model), again.apply(net())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert again.request == plan.request
    for key, mask in plan.masks.items():
        value = one.get_parameter(key)
        assert torch.equal(value, plan.weights[key])
        assert not bool(value[~mask].any())
    (tmp_path / "again").mkdir()
    again.save(tmp_path / "again" / "plan.json")
    for name in ("plan.json", "plan.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("what", ["missing", "changed", "other"])
def test_a_plan_whose_tensors_are_not_those_it_names_is_refused(tmp_path, what):
    solved(net(), data()).save(tmp_path / "plan.json")
    beside = tmp_path / "plan.safetensors"
    if what == "missing":
        beside.unlink()
    elif what == "changed":
        raw = bytearray(beside.read_bytes())
        raw[-1] ^= 1
        beside.write_bytes(bytes(raw))
    else:
        solved(net(), data(6)).save(tmp_path / "other.json")
        beside.write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(FileRefusedError):
        sc.Plan.load(tmp_path / "plan.json")


def test_a_plan_with_weights_composes_with_a_cut():
    model, batches = net(), data()
    first = solved(model, batches)
    between = first.apply(model)
    second = sc.plan(between, {"ids": batches[0]["ids"]}, granularity="neuron", target={"sparsity": 0.4})
    whole = first.then(second, model)
    expected, found = second.apply(between), whole.apply(net())
    assert all(torch.equal(a, found.state_dict()[key]) for key, a in expected.state_dict().items())


def test_scores_by_the_same_names_stay_what_they_were():
    """Wanda is a criterion, too: blocks are walked only where that is asked for."""
    model, batches = net(), data()
    scored = solved(model, batches, criterion="wanda")
    walked = solved(model, batches, criterion="wanda", blocks=True)
    assert scored.request.blocks is None
    assert walked.request.blocks is not None
    assert not walked.weights
    with pytest.raises(RecipeError, match="block by block"):
        solved(model, batches, criterion=sc.criteria.get("wanda") if hasattr(sc, "criteria") else object(), blocks=True)
    with pytest.raises(RecipeError, match="did you mean 'shrinkage'"):
        solved(model, batches, blocks={"shrinkag": 0.5})


def test_parameters_that_lie_in_one_memory_are_told_apart():
    model, flat = net(), net()
    buffer = torch.cat([p.detach().flatten() for p in flat.parameters()])
    begin = 0
    for parameter in flat.parameters():
        parameter.data = buffer[begin : begin + parameter.numel()].view(parameter.shape)
        begin += parameter.numel()
    example = data()[0]
    found = [
        prune_blocks(
            one, example, data(), solver=SOLVERS.build("admm", {"steps": 4, "choosing": 2}),
            granularity=parse("element"), request=request(),
        )
        for one in (model, flat)
    ]  # fmt: skip
    assert found[0].weights.keys() == found[1].weights.keys()
    assert all(torch.equal(value, found[1].weights[name]) for name, value in found[0].weights.items())
