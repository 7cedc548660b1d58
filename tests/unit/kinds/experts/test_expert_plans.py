import copy

import pytest
import torch
from mixtures import Apart, Cosine, Dense, E, Grouped, H, K, Net, Stacked, Stubborn, Telling, W, net
from torch import nn

import secateur as sc
from secateur.errors import CertificateError, InputError, RecipeError, SecateurError, TargetError, UnsupportedError
from secateur.kinds.experts.find import find_mixtures
from secateur.kinds.experts.prove import certify_experts
from secateur.structure.capture import capture
from secateur.structure.groups import structure


def test_experts_go_with_their_rows_and_integers(x):
    model = net()
    before = copy.deepcopy(model.state_dict())
    plan = sc.plan(model, x, granularity="expert", target={"sparsity": 1 / 3})
    cut = plan.apply(model)
    assert plan.certificate.method == "masked-router"
    assert plan.certificate.max_abs_error < 1e-5
    assert plan.units == {"what": "expert", "removed": 4, "total": 12, "sparsity": 1 / 3}
    for name, block in cut.blocks.named_children():
        stay = [i for i in range(E) if i not in plan.groups[f"blocks.{name}/expert"]["removed"]]
        assert block.router.weight.shape == (4, H)
        assert block.router.num_experts == block.experts.num_experts == 4
        assert block.router.top_k == K
        for part in ("router.weight", "router.correction_bias", "experts.up", "experts.up_bias", "experts.down"):
            assert torch.equal(cut.state_dict()[f"blocks.{name}.{part}"], before[f"blocks.{name}.{part}"][stay])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert plan.cost["params"][1] == sum(p.numel() for p in cut.parameters())


def test_plans_are_saved_replayed_and_trained_on(x, tmp_path):
    model = net()
    plan = sc.plan(model, x, granularity="expert", target={"count": 2})
    cut = plan.apply(model)
    plan.save(tmp_path / "plan.json")
    again = sc.Plan.load(tmp_path / "plan.json").apply(copy.deepcopy(model))
    assert torch.equal(cut(x), again(x))
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().mean().backward()
    optimizer.step()
    plan.replay(model, optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
    assert torch.isfinite(loss)


def test_scores_decide_and_targets_hold(x):
    model = net()
    with torch.no_grad():
        model.blocks[0].experts.up[4] = 0
        model.blocks[0].experts.down[4] = 0
        model.blocks[1].experts.up[1] = 0
        model.blocks[1].experts.down[1] = 0
    whole = sum(p.numel() for p in model.parameters())
    plan = sc.plan(model, x, granularity="expert", target={"params": 0.85}, scope="local")
    assert [g["removed"] for g in plan.groups.values()] == [[4], [1]]
    assert plan.cost["params"][1] <= 0.85 * whole
    data = [(x, torch.zeros(len(x), dtype=torch.long))]
    taylor = sc.plan(model, x, granularity="expert", target={"count": 2}, criterion="taylor", data=data)
    assert [len(g["removed"]) for g in taylor.groups.values()] == [1, 1]
    rounded = sc.plan(model, x, granularity="expert", target={"count": 2}, round_to=4)
    assert [len(g["removed"]) for g in rounded.groups.values()] == [2, 2]


def test_blocks_of_other_sizes_lose_their_share(x):
    model = net(Net, 6, 3)
    plan = sc.plan(model, x, granularity="expert", target={"count": 3})
    cut = plan.apply(model)
    assert [block.experts.num_experts for block in cut.blocks] == [4, 2]


def test_logits_of_the_router_are_compared_on_what_stays(x):
    model = net(Telling)
    plan = sc.plan(model, x, granularity="expert", target={"count": 2})
    cut = plan.apply(model)
    assert plan.certificate.outputs == 3
    assert cut(x)[1].shape == (32, E - 1)


def test_what_a_mixture_leaves_on_itself_is_compared_as_it_is(x):
    class Remembering(Dense):
        def forward(self, x):
            self.auxiliary = x.square().mean()
            return super().forward(x)

    model = nn.Sequential(Remembering(), nn.Linear(H, H))
    cut = sc.plan(model, x, granularity="expert", target={"count": 2}).apply(model)
    cut(x)
    assert cut[0].auxiliary == x.square().mean()


def test_all_experts_in_one_product(x):
    torch.manual_seed(0)
    model = nn.Sequential(Dense(), nn.Linear(H, H), Dense())
    plan = sc.plan(model, x, granularity="expert", target={"sparsity": 0.5})
    cut = plan.apply(model)
    assert cut[0].up.shape == (3, H, W)
    assert cut[2].gate.shape == (H, 3)
    assert cut[0].count == 3


def test_experts_whose_weights_live_in_two_modules(x):
    torch.manual_seed(0)
    model = nn.Sequential(Apart(), nn.Linear(H, H), Apart())
    plan = sc.plan(model, x, granularity="expert", target={"count": 4})
    cut = plan.apply(model)
    assert list(plan.groups) == ["0/expert", "2/expert"]
    assert cut[0].inner.weight.shape == (4, W, H)
    assert cut[2].outer.weight.shape == (4, H, W)
    assert cut[2].bias.shape == (1, 4)
    assert cut[2].router.out_features == 4
    assert model[0].bias.isfinite().all()


def test_routers_that_meet_are_refused(x):
    with pytest.raises(UnsupportedError, match="several blocks"):
        sc.plan(net(Stacked), x, granularity="expert", target={"count": 2})


def test_a_float64_certificate(x):
    plan = sc.plan(net(), x, granularity="expert", target={"count": 4}, dtype="float64", tolerance=1e-6)
    plan.certify()
    assert plan.certificate.max_abs_error < 1e-6


def test_protected_blocks_stay_and_shared_counts_are_left_alone(x):
    model = net()
    model.num_experts = E
    plan = sc.plan(model, x, granularity="expert", target={"count": 2}, protect=["blocks.0.experts"])
    cut = plan.apply(model)
    assert [block.experts.num_experts for block in cut.blocks] == [E, E - 2]
    assert cut.num_experts == E


def test_the_router_keeps_as_many_as_it_uses(x):
    model = net(top_k=4)
    with pytest.raises(TargetError, match="4 per token"):
        sc.plan(model, x, granularity="expert", target={"sparsity": 0.5})
    with pytest.raises(TargetError):
        sc.plan(net(), x, granularity="expert", target={"count": 4}, min_keep=5)


@pytest.mark.parametrize("router", [Grouped, Cosine])
def test_routers_that_cannot_be_proved_are_refused(x, router):
    model = net()
    for block in model.blocks:
        block.router = router()
    with pytest.raises(UnsupportedError):
        sc.plan(model, x, granularity="expert", target={"count": 2}).apply(model)


def test_a_count_in_the_code_is_refused_and_nothing_changes(x):
    model = net(experts=Stubborn)
    with pytest.raises(SecateurError):
        sc.plan(model, x, granularity="expert", target={"count": 2}).apply(model, inplace=True)
    assert model.blocks[0].router.weight.shape == (E, H)
    assert model.blocks[0].router.correction_bias.isfinite().all()


def proof(model, x, tamper):
    """Certify a cut of experts after something was done to it."""
    plan = sc.plan(model, x, granularity="expert", target={"count": 2})
    cut = plan.apply(model)
    record = capture(model, x)
    found = structure(model, record)
    mixtures = find_mixtures(model, record, found)
    keep = {found.atoms[n].id: mask.numpy() for n, mask in plan.evidence.keep.items()}
    cuts = tamper(cut, plan.cuts, keep) or plan.cuts
    return certify_experts(model, cut, x, record, mixtures, keep, cuts)


def test_the_certificate_holds_for_the_right_experts_only(x):
    assert proof(net(), x, lambda *_: None).max_abs_error < 1e-5

    def other_mask(cut, cuts, keep):
        for mask in keep.values():
            mask[:] = mask[::-1].copy() if (mask != mask[::-1]).any() else ~mask

    def permuted(cut, cuts, keep):
        cut.blocks[0].experts.down.data = cut.blocks[0].experts.down.data.flip(0)

    def permuted_in_the_plan(cut, cuts, keep):
        flipped = cuts["blocks.0.experts.down"][0].flip(0)
        cut.blocks[0].experts.down.data = cut.blocks[0].experts.down.data.flip(0)
        return {**cuts, "blocks.0.experts.down": {0: flipped}}

    for tamper in (other_mask, permuted, permuted_in_the_plan):
        with pytest.raises(CertificateError):
            proof(net(), x, tamper)


def test_requests_that_make_no_sense(x):
    with pytest.raises(RecipeError, match="does not apply to experts"):
        sc.plan(net(), x, granularity="expert", target={"threshold": 0.1})
    with pytest.raises(RecipeError, match="at least one of"):
        sc.plan(net(), x, granularity="expert", target={})
    with pytest.raises(RecipeError, match="scope"):
        sc.plan(net(), x, granularity="expert", target={"count": 2}, scope="row")
    with pytest.raises(RecipeError):
        sc.plan(net(), x, granularity="expert", target={"count": 2}, expressible=True)
    with pytest.raises(UnsupportedError, match="no experts"):
        sc.plan(nn.Sequential(nn.Linear(H, 8), nn.Linear(8, 2)), x, granularity="expert", target={"count": 2})


def test_scores_are_per_expert(x):
    scores = sc.score(net(), x, granularity="expert")
    assert {name: tuple(score.shape) for name, score in scores.items()} == {
        "blocks.0/expert": (E,),
        "blocks.1/expert": (E,),
    }


@pytest.mark.sampled(2)
@pytest.mark.parametrize("criterion", ["random", "gradient", "fisher", "fpgm"])
def test_criteria_that_see_weights_or_gradients_score_experts(x, criterion):
    data = [(x, torch.zeros(len(x), dtype=torch.long))]
    plan = sc.plan(net(), x, granularity="expert", target={"count": 2}, criterion=criterion, data=data)
    plan.certify()
    assert plan.certificate.max_abs_error < 1e-5


def test_prune_saves_a_folder_that_loads(x, tmp_path):
    recipe = {"granularity": "expert", "target": {"sparsity": 0.3}, "criterion": "magnitude"}
    result = sc.prune(net(), x, recipe=recipe)
    result.save(tmp_path / "out")
    assert torch.equal(sc.load(tmp_path / "out", Net())(x), result.model(x))


def test_given_experts_must_be_as_the_routers_and_the_counts_need_them(x):
    names = list(sc.score(net(), x, granularity="expert"))
    with pytest.raises(InputError, match="one number sizes both"):
        sc.plan(net(), x, granularity="expert", remove={names[0]: [0]})
    with pytest.raises(InputError, match=f"at least {K}"):
        sc.plan(net(), x, granularity="expert", remove={name: list(range(E - 1)) for name in names})
    scores = sc.score(net(), x, granularity="expert")
    with pytest.raises(InputError, match=names[1]):
        sc.plan(net(), x, granularity="expert", scores={names[0]: scores[names[0]]}, target={"count": 2})
    plan = sc.plan(net(), x, granularity="expert", remove={name: [0, 3] for name in names})
    plan.certify()
    assert set(plan.attributes.values()) == {E - 2}


def test_an_expert_that_no_token_reaches_is_compared_all_the_same(x):
    """The router never chooses the last expert, so only its weights can tell that the wrong one was kept."""
    model = net()
    with torch.no_grad():
        for block in model.blocks:
            block.router.weight[E - 1] = 0
            block.router.correction_bias[E - 1] = -1e4
    plan = sc.plan(model, x, granularity="expert", remove={f"blocks.{i}/expert": [0] for i in range(2)})
    proof = plan.evidence.certify
    cut = plan.apply(model)
    proof(model, cut)
    with torch.no_grad():
        cut.blocks[0].experts.up[-1] += 0.5
    assert torch.equal(cut(x), plan.apply(model)(x))
    with pytest.raises(CertificateError, match=r"blocks\.0\.experts\.up"):
        proof(model, cut)
