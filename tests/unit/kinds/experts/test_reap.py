"""REAP against sums over tokens and experts written out, with the router's choice read off the router."""

import pytest
import torch
from mixtures import Apart, Dense, E, Fused, H, K, net
from torch import nn

import secateur as sc
from secateur.criteria import Reap
from secateur.errors import NonFiniteError, RecipeError, SecateurError, UnsupportedError


def outputs(block, inputs):
    """[tokens, experts, width] of every expert, and the weights [tokens, experts] with which they count; float64."""
    with torch.no_grad():
        _, weights, chosen = block.router(inputs)
        gates = torch.zeros(len(inputs), E, dtype=torch.float64).scatter(1, chosen, weights.double())
        used = torch.zeros(len(inputs), E, dtype=torch.bool).scatter(1, chosen, True)
        own = {name: value.double() for name, value in block.experts.named_parameters()}
        inner = torch.einsum("th,ewh->tew", inputs.double(), own["up"]) + own["up_bias"]
        return torch.einsum("tew,ehw->teh", inner.relu(), own["down"]), gates, used


def expected(model, inputs, *, gated=True, average="routed"):
    found = {}
    with torch.no_grad():
        for name, block in model.blocks.named_children():
            values, gates, used = outputs(block, inputs)
            size = values.norm(dim=-1) * used * (gates if gated else 1)
            tokens = used.sum(0).clamp(min=1) if average == "routed" else len(inputs)
            found[f"blocks.{name}/expert"] = size.sum(0) / tokens
            inputs = block(inputs)[0]
    return found


def check(scores, wanted):
    assert list(scores) == list(wanted)
    for name, score in scores.items():
        torch.testing.assert_close(score.double(), wanted[name], rtol=1e-4, atol=1e-6)


class Hidden(Fused):
    """Expects exactly K experts per token, so that it cannot be called with one."""

    def forward(self, x, weights, chosen):
        if chosen.shape[1] != K:
            raise ValueError("as many experts as configured, please")
        return super().forward(x, weights, chosen)


@pytest.mark.parametrize("experts", [Fused, Hidden])
@pytest.mark.parametrize("average", ["routed", "all"])
def test_scores_are_those_of_the_formula(x, experts, average):
    model = net(experts=experts)
    scores = sc.score(model, x, criterion=Reap(average=average), granularity="expert", data=[x[:20], x[20:]])
    check(scores, expected(model, x, average=average))


def test_without_the_gate(x):
    model = net()
    scores = sc.score(model, x, criterion={"name": "reap", "gated": False}, granularity="expert", data=[x])
    check(scores, expected(model, x, gated=False))
    with pytest.raises(UnsupportedError, match="not to be seen"):
        sc.score(net(experts=Hidden), x, criterion=Reap(gated=False), granularity="expert", data=[x])


def test_router_and_experts_in_one_module(x):
    torch.manual_seed(0)
    model = nn.Sequential(Dense())
    block = model[0]
    with torch.no_grad():
        values, chosen = (x.double() @ block.gate.double()).softmax(-1).topk(K, -1)
        inner = torch.einsum("nh,ehw->enw", x.double(), block.up.double()).relu()
        size = torch.einsum("enw,ewh->neh", inner, block.down.double()).norm(dim=-1)
    used = torch.zeros(len(x), E, dtype=torch.bool).scatter(1, chosen, True)
    gates = torch.zeros(len(x), E, dtype=torch.float64).scatter(1, chosen, values)
    scores = sc.score(model, x, criterion="reap", granularity="expert", data=[x])
    check(scores, {"0/expert": (size * gates).sum(0) / used.sum(0).clamp(min=1)})


def test_weights_in_two_modules(x):
    torch.manual_seed(0)
    model = nn.Sequential(Apart())
    block = model[0]
    with torch.no_grad():
        scores = block.router(x).sigmoid()
        chosen = (scores + block.bias).topk(K, -1).indices
        inner = torch.einsum("th,ewh->tew", x, block.inner.weight).relu()
        size = torch.einsum("tew,ehw->teh", inner, block.outer.weight).norm(dim=-1)
    used = torch.zeros(len(x), E, dtype=torch.bool).scatter(1, chosen, True)
    wanted = (size * scores * used).sum(0).double() / used.sum(0).clamp(min=1)
    check(sc.score(model, x, criterion="reap", granularity="expert", data=[x]), {"0/expert": wanted.detach()})


def test_experts_that_no_token_reaches_go_first(x):
    model = net()
    with torch.no_grad():
        for block in model.blocks:
            block.router.correction_bias.zero_()[3] = -100
    plan = sc.plan(model, x, criterion="reap", granularity="expert", data=[x], target={"count": 2})
    assert [group["removed"] for group in plan.groups.values()] == [[3], [3]]
    torch.testing.assert_close(plan.apply(model)(x), model(x))


def test_reordered_experts_keep_their_scores(x):
    model, turned, order = net(), net(), torch.tensor([2, 0, 1, 5, 3, 4])
    for block in turned.blocks:
        for tensor in (*block.router.parameters(), *block.router.buffers(), *block.experts.parameters()):
            tensor.data = tensor.data[order]
    first, second = (sc.score(m, x, criterion="reap", granularity="expert", data=[x]) for m in (model, turned))
    for name in first:
        torch.testing.assert_close(first[name][order], second[name])


class Bent(Apart):
    """What the experts add is bent afterwards, so their parts do not add up."""

    def forward(self, x):
        return (super().forward(x) - x).tanh() + x


def test_parts_that_do_not_add_up_are_refused(x):
    torch.manual_seed(0)
    model = nn.Sequential(Bent())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match="told apart"):
        sc.score(model, x, criterion="reap", granularity="expert", data=[x])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_bad_requests(x):
    with pytest.raises(RecipeError, match="cannot score"):
        sc.score(nn.Sequential(nn.Linear(H, 8), nn.ReLU(), nn.Linear(8, 2)), x, criterion="reap", data=[x])
    with pytest.raises(RecipeError, match="needs data"):
        sc.score(net(), x, criterion="reap", granularity="expert")
    with pytest.raises(RecipeError, match="average"):
        Reap(average="some")
    with pytest.raises(NonFiniteError):
        sc.score(net(), x, criterion="reap", granularity="expert", data=[x / 0])
    with pytest.raises(SecateurError, match="no batch"):
        sc.score(net(), x, criterion="reap", granularity="expert", data=[])
