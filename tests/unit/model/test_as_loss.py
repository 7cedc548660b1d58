"""PyTorch's own criteria as losses: every entry that takes a loss calls them with prediction and target."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import secateur as sc
from secateur.errors import InputError
from secateur.model.call import as_loss
from secateur.recover import finetune, train_step

X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def written_out(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.3)


CRITERION = nn.CrossEntropyLoss(label_smoothing=0.3)
QUIET = {"recover": [], "overrides": ["measure.latency=false"]}
ASK = {"granularity": "neuron", "criterion": {"name": "taylor"}, "data": [(X, Y)]}


def of_score(loss):
    return sc.score(net(), X, loss=loss, **ASK)["0"]


def of_plan(loss):
    return torch.tensor(sc.plan(net(), X, loss=loss, target={"count": 3}, **ASK).groups["0"]["removed"])


def of_prune(loss):
    plan = sc.prune(net(), X, loss=loss, target={"count": 3}, **QUIET, **ASK).plan
    return torch.tensor(plan.groups["0"]["removed"])


def of_pruner(loss):
    pruner = sc.Pruner(net(), sparsity=0.5, schedule="one_shot", criterion="taylor", data=[(X, Y)], loss=loss)
    return torch.cat([mask.flatten() for mask in pruner.masks.values()])


def of_finetune(loss):
    model = net()
    finetune(model, [(X, Y)], loss, steps=2, optimizer={"name": "SGD", "lr": 0.1})
    return model[0].weight.detach()


def of_step(loss):
    model = net()
    return torch.tensor(train_step(model, (X, Y), loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)))


@pytest.mark.parametrize("entry", [of_score, of_plan, of_prune, of_pruner, of_finetune, of_step])
def test_a_criterion_is_taken_as_if_it_were_written_out(entry):
    assert torch.equal(entry(CRITERION), entry(written_out))
    if entry in (of_score, of_finetune, of_step):
        assert not torch.equal(entry(CRITERION), entry(None))  # the default has no smoothing


@pytest.mark.parametrize("criterion", [functional.cross_entropy, nn.CrossEntropyLoss()])
def test_a_function_of_pytorch_is_a_criterion(criterion):
    assert as_loss(criterion)(net(), (X, Y)) == functional.cross_entropy(net()(X), Y)


def test_a_mapping_brings_its_labels_and_an_output_its_logits():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = net()

        def forward(self, x):
            return {"hidden": x, "logits": self.fc(x)}

    model = Named()
    assert as_loss(nn.CrossEntropyLoss())(model, {"x": X, "labels": Y}) == functional.cross_entropy(model.fc(X), Y)


def test_what_is_no_loss_is_refused_in_words():
    with pytest.raises(InputError, match="loss is cross_entropy"):
        as_loss("cross_entropy")
    with pytest.raises(InputError, match="holds no target for the loss CrossEntropyLoss"):
        as_loss(nn.CrossEntropyLoss())(net(), X)
    assert as_loss(None) is None
    assert as_loss(written_out) is written_out


@pytest.mark.parametrize(("granularity", "gone"), [("2:4", 0.5), ({"name": "n:m", "n": 1, "m": 4}, 0.75), ("4:8", 0.5)])
def test_a_pattern_needs_no_target(granularity, gone):
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8))
    asked = {"granularity": granularity, "criterion": "magnitude"}
    assert sc.plan(model, **asked).units["sparsity"] == gone
    assert sc.plan(model, **asked).masks.keys() == sc.plan(model, target={"sparsity": gone}, **asked).masks.keys()
    result = sc.prune(model, torch.ones(1, 16), **QUIET, **asked)
    assert result.plan.units["sparsity"] == gone
