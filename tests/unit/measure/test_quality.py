"""What is measured where the user says nothing, what may be said, and that it is the same for every model."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from secateur.errors import InputError, NonFiniteError
from secateur.measure import yardstick
from secateur.measure.quality import MOST_BATCHES, higher_is_better
from secateur.model.door import Parts


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Mean:
    """A metric of the form that torchmetrics has: the mean over samples of |prediction - target|."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.total, self.count = 0.0, 0

    def update(self, prediction, target):
        self.total += float((prediction[:, 0] - target).abs().sum())
        self.count += len(target)

    def compute(self):
        return torch.tensor(self.total / self.count)


class TopTwo(Mean):
    def update(self, prediction, target):
        self.total += float((prediction.topk(2).indices == target[:, None]).any(1).sum())
        self.count += len(target)


class Both(TopTwo):
    def compute(self):
        return {"one": self.total, "two": self.count}


class CallableMetric(TopTwo):
    """Those of torchmetrics can be called as well, which means to update them."""

    def __call__(self, prediction, target):
        raise AssertionError


X, W = numbers(10, 4), numbers(3, 4, seed=1)
CLASSES = (X @ W.T).argmax(1)
CLASSES[:3] = (CLASSES[:3] + 1) % 3  # three of ten are wrong


def scores():
    model = nn.Linear(4, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(W)
    return model


def cut(x, y, size=4):
    return list(zip(x.split(size), y.split(size), strict=True))


def test_classes_give_accuracy_on_the_whole_test_part():
    found = yardstick(scores(), Parts(train=cut(X[:2], CLASSES[:2]), test=cut(X, CLASSES)))
    assert found.evaluate(scores()) == {"accuracy": 0.7}
    assert (found.on, found.why) == ("the test part", "")


def test_a_regression_gives_the_mean_square_over_samples_not_over_batches():
    y = numbers(10, 3, seed=2)
    found = yardstick(scores(), Parts(test=cut(X, y, 7)))
    expected = np.mean((X.double().numpy() @ W.double().numpy().T - y.double().numpy()) ** 2)
    assert found.evaluate(scores())["mse"] == pytest.approx(expected, rel=1e-6)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 5)

    def forward(self, input_ids, labels=None):
        logits = self.table(input_ids)
        loss = (
            None if labels is None else functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        )
        return {"loss": loss, "logits": logits}


def test_a_model_with_a_loss_of_its_own_gives_that_loss():
    torch.manual_seed(0)
    model, ids = Words().eval(), torch.randint(0, 5, (6, 4))
    data = [{"input_ids": part, "labels": part} for part in ids.split(4)]
    with torch.no_grad():
        table = torch.log_softmax(model.table.weight.double(), 1).numpy()
    expected = -np.mean([table[a, b] for row in ids.tolist() for a, b in pairwise(row)])
    assert yardstick(model, Parts(test=data)).evaluate(model)["loss"] == pytest.approx(expected, rel=1e-6)


def test_mappings_with_labels_that_the_forward_does_not_take_are_measured_too():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = scores()

        def forward(self, pixels):
            return self.inner(pixels)

    data = [{"pixels": x, "labels": y} for x, y in cut(X, CLASSES)]
    assert yardstick(Named(), Parts(test=data)).evaluate(Named()) == {"accuracy": 0.7}


def test_the_loss_of_the_user_is_the_figure_where_there_are_no_classes():
    data = [(X, "a word", torch.ones(3, 2))]
    found = yardstick(scores(), Parts(test=data), loss=lambda model, batch: model(batch[0]).sum())
    assert found.evaluate(scores())["loss"] == pytest.approx(float((X @ W.T).sum()), rel=1e-5)
    classes = yardstick(scores(), Parts(test=cut(X, CLASSES)), loss=lambda model, batch: model(batch[0]).sum())
    assert classes.evaluate(scores()) == {"accuracy": 0.7}


@pytest.mark.parametrize(
    ("parts", "why"),
    [(Parts(), "no data"), (Parts(test=[X]), "no target"), (Parts(test=[(X, torch.ones(10))]), "fit neither")],
)
def test_where_nothing_can_be_measured_the_reason_is_given(parts, why):
    found = yardstick(scores(), parts)
    assert found.evaluate is None
    assert why in found.why


def test_training_data_are_named_and_not_read_to_their_end():
    class Endless:
        read = 0

        def __iter__(self):
            while True:
                self.read += 1
                yield X, CLASSES

    endless = Endless()
    found = yardstick(scores(), Parts(train=endless))
    endless.read = 0
    assert found.evaluate(scores()) == {"accuracy": 0.7}
    assert found.on == f"training data (at most {MOST_BATCHES} batches)"
    assert endless.read == MOST_BATCHES


def test_a_loader_that_shuffles_gives_the_same_batches_to_every_model():
    loader = DataLoader(TensorDataset(numbers(1000, 4), numbers(1000, 3)), batch_size=2, shuffle=True)
    model, state = scores(), torch.get_rng_state()
    found = yardstick(model, Parts(train=loader))
    first = found.evaluate(model)
    assert torch.equal(torch.get_rng_state(), state), "neither a look nor a measurement moves the generator"
    torch.rand(7)
    assert found.evaluate(model) == first  # 128 of 1,000 samples: others give another error
    torch.set_rng_state(state)


def test_metrics_are_fed_with_predictions_and_targets():
    parts = Parts(test=cut(X, CLASSES))
    two = float(((X @ W.T).topk(2).indices == CLASSES[:, None]).any(1).sum()) / 10
    for metric in (TopTwo(), CallableMetric()):
        found = yardstick(scores(), parts, metric)
        name = "top_two" if type(metric) is TopTwo else "callable_metric"
        assert found.evaluate(scores()) == {name: pytest.approx(two)}
        assert found.on == "the test part"
    assert yardstick(scores(), parts, {"top": TopTwo()}).evaluate(scores()) == {"top": pytest.approx(two)}
    several = {"mine": lambda model: 4, "more": lambda model: {"a": 1.0}, "both": Both()}
    found = yardstick(scores(), parts, several)
    for _ in range(2):  # reset before each: the sums do not pile up
        figures = found.evaluate(scores())
        assert figures == {"mine": 4, "more_a": 1, "both_one": pytest.approx(10 * two), "both_two": 10}
    numbers_of = yardstick(nn.Identity(), Parts(test=[(X, X[:, 0] + 2)]), Mean()).evaluate(nn.Identity())
    assert numbers_of == {"mean": pytest.approx(2)}


def test_a_function_is_taken_as_it_is():
    found = yardstick(scores(), Parts(), lambda model: {"perplexity": 12.5})
    assert (found.evaluate(scores()), found.on) == ({"perplexity": 12.5}, "")


@pytest.mark.parametrize(
    ("judge", "parts", "text"),
    [
        (TopTwo(), Parts(), "needs batches with targets"),
        (TopTwo(), Parts(test=[X]), "needs batches with targets"),
        (TopTwo, Parts(test=[(X, CLASSES)]), "the class TopTwo"),
        ({"top": 3}, Parts(test=[(X, CLASSES)]), r"evaluate\['top'\] is a int"),
        (3, Parts(test=[(X, CLASSES)]), "evaluate is a int"),
    ],
)
def test_other_judges_are_refused(judge, parts, text):
    with pytest.raises(InputError, match=text):
        yardstick(scores(), parts, judge)


def test_figures_that_are_no_numbers_are_refused():
    nan = yardstick(scores(), Parts(test=[(X, torch.full((10, 3), float("nan")))]))
    with pytest.raises(NonFiniteError, match="mse"):
        nan.evaluate(scores())


def test_names_tell_which_way_is_better():
    assert [higher_is_better(name) for name in ("accuracy", "f1", "loss", "val_mse", "Perplexity")] == [1, 1, 0, 0, 0]
