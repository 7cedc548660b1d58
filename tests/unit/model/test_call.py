from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import secateur
from secateur.errors import ForwardError, InputError, UnsupportedError
from secateur.model.call import call, default_loss, outputs, require_reiterable, to_device, to_example, to_target
from secateur.model.guard import evaluating
from secateur.model.samples import with_batch_size
from secateur.structure.capture import capture


class Two(nn.Module):
    def forward(self, a, b):
        return a - b


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 4)

    def forward(self, x):
        return self.inner(x)


def test_three_forms_of_example():
    a, b = torch.tensor(5.0), torch.tensor(2.0)
    assert call(Two(), (a, b)) == 3
    assert call(Two(), [b, a]) == -3
    assert call(Two(), {"b": a, "a": b}) == -3
    assert call(nn.Identity(), a) == 5


def test_forward_error_names_user_error_module_and_line():
    with pytest.raises(ForwardError) as caught:
        call(Broken(), torch.zeros(2, 7))
    text = str(caught.value)
    line = Broken.forward.__code__.co_firstlineno + 1
    assert f"{__file__}:{line}" in text
    assert "'inner'" in text
    assert "float32[2, 7]" in text
    assert "mat1 and mat2 shapes cannot be multiplied" in text


def test_batch_to_example_and_target():
    x, y = torch.zeros(2, 3), torch.ones(2)
    assert to_example((x, y)) is x
    assert to_example([x]) is x
    assert to_example((x, x, y)) == (x, x)
    assert to_example({"input_ids": x, "labels": y}) == {"input_ids": x}
    assert to_target((x, y)) is y
    assert to_target({"input_ids": x, "labels": y}) is y
    assert to_target(x) is None
    assert to_target({"input_ids": x}) is None
    with pytest.raises(InputError, match="str"):
        to_example("text")


def test_outputs_are_flattened_in_order():
    @dataclass
    class Out:
        first: torch.Tensor
        rest: list

    one, two, three = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    found = outputs({"a": Out(one, [two, None, 7]), "b": (three,)})
    assert [tensor.shape[0] for tensor in found] == [1, 2, 3]
    with pytest.raises(UnsupportedError):
        outputs({"loss": None})


def test_batch_size_is_repeated_and_trimmed_only_where_it_is_the_batch():
    example = {"x": torch.arange(6).reshape(3, 2), "scale": torch.ones(5), "n": 4}
    bigger = with_batch_size(example, 4)
    assert bigger["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]
    assert bigger["scale"].shape == (5,)
    assert bigger["n"] == 4
    assert with_batch_size(example, 1)["x"].tolist() == [[0, 1]]


class Counter(nn.Module):
    """Changes a buffer in place, replaces another, and draws random numbers, even in eval mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("last", torch.zeros(2))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        self.seen += 1
        self.last = x.sum(0)
        return nn.functional.dropout(x, 0.5, training=True)


def test_evaluating_puts_back_modes_buffers_and_random_state():
    model = Counter().train()
    model.drop.eval()
    seen, last, state = model.seen, model.last, torch.get_rng_state()
    with evaluating(model):
        assert not model.training
        out = model(torch.ones(3, 2, requires_grad=True))
        assert not out.requires_grad
        assert model.seen.tolist() == [1, 1]
    assert model.training
    assert not model.drop.training
    assert model.seen is seen
    assert seen.tolist() == [0, 0]
    assert model.last is last
    assert last.tolist() == [0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_default_loss_is_cross_entropy_or_squared_error():
    x = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    y = torch.tensor([1, 0])
    by_hand = (torch.logsumexp(x, 1) - x[torch.arange(2), y]).mean()
    assert torch.allclose(default_loss(nn.Identity(), (x, y)), by_hand)
    target = torch.ones(2, 3)
    assert torch.allclose(default_loss(nn.Identity(), (x, target)), ((x - 1) ** 2).mean())


@pytest.mark.parametrize(
    ("target", "text"),
    [
        (torch.tensor([1, 7]), "out of bounds"),
        (torch.tensor([1, 0, 2]), r"int64\[3\]"),
        (torch.ones(2), r"float32\[2\]"),
    ],
)
def test_default_loss_refuses_targets_that_do_not_fit(target, text):
    with pytest.raises(InputError, match=text):
        default_loss(nn.Identity(), (torch.zeros(2, 3), target))


def test_default_loss_needs_a_target_or_a_loss_in_the_output():
    class Hugging(nn.Module):
        def forward(self, x, labels=None):
            return {"loss": ((x - labels) ** 2).sum(), "logits": x}

    x = torch.ones(2)
    assert default_loss(Hugging(), {"x": x, "labels": torch.zeros(2)}) == 2
    with pytest.raises(InputError, match="no target"):
        default_loss(nn.Identity(), x)
    with pytest.raises(InputError, match="no loss"):
        default_loss(_Named(), {"x": x, "labels": x})


class _Named(nn.Module):
    def forward(self, x, labels):
        return {"logits": x}


class Plain(nn.Module):
    """A forward that takes no labels."""

    def forward(self, x):
        return x @ torch.ones(3, 4)


class TakesOne(nn.Module):
    """A forward that takes one mapping, as many detectors do."""

    def forward(self, batch):
        return batch["image"]


class TakesAny(nn.Module):
    def forward(self, **inputs):
        return inputs["x"]


def test_labels_that_the_forward_does_not_take_are_compared_with_its_output():
    x, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0])
    expected = nn.functional.cross_entropy(x @ torch.ones(3, 4), y)
    assert torch.equal(default_loss(Plain(), {"x": x, "labels": y}), expected)
    # A forward that takes any name may swallow the labels.
    assert torch.equal(default_loss(TakesAny(), {"x": x, "labels": x + 2}), torch.tensor(4.0))
    with pytest.raises(InputError, match="the forward of Plain takes no labels"):
        default_loss(Plain(), {"x": x, "labels": y[:2]})
    with pytest.raises(InputError, match="the forward of Plain takes no labels"):
        default_loss(Plain(), {"x": x, "labels": torch.zeros(5)})


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(4, 3)), batch_size=2)


@pytest.mark.parametrize(
    ("model", "example", "error", "text"),
    [
        (nn.Identity(), loader(), InputError, "the example is a DataLoader(.|\n)*next\\(iter\\(loader"),
        (nn.Identity(), iter([1]), InputError, "the example is a list_iterator"),
        (nn.Identity(), (1, 3, 32, 32), InputError, "torch.zeros\\(1, 3, 32, 32\\)"),
        (nn.Identity(), torch.Size([2, 3]), InputError, "torch.zeros\\(2, 3\\)"),
        (
            Plain(),
            {"x": torch.zeros(2, 3), "labels": torch.zeros(2)},
            ForwardError,
            "leave 'labels' out of the example",
        ),
        (Plain(), {"x": torch.zeros(2, 3), "mask": torch.zeros(2)}, ForwardError, "takes x; leave 'mask' out"),
        (TakesOne(), {"image": torch.zeros(2, 3)}, ForwardError, "example=\\(mapping,\\)"),
        (Plain(), torch.zeros(2, 7), ForwardError, "check that model"),
        (TakesAny(), {"y": torch.zeros(2)}, ForwardError, "check that model"),
    ],
)
def test_a_wrong_example_says_what_to_write(model, example, error, text):
    with pytest.raises(error, match=text):
        call(model, example)


def test_unusual_inputs_are_left_to_the_forward():
    class Steps(nn.Module):
        def forward(self, count):
            return torch.zeros(count)

    assert call(Steps(), (3,)).shape == (3,)
    assert call(TakesOne(), ({"image": torch.ones(2)},)).sum() == 2


def test_one_shot_data_is_refused_where_it_is_read_twice():
    require_reiterable([1], "2 epochs")
    with pytest.raises(InputError, match="2 epochs"):
        require_reiterable((batch for batch in [1]), "2 epochs")


def test_an_example_without_a_tensor_is_said_to_be_the_fault_and_not_the_forward():
    with pytest.raises(InputError, match=r"the example is \(3\), with no tensor"):
        secateur.inspect(nn.Linear(3, 4), (3,))
    with pytest.raises(InputError, match=r"torch.zeros\(1, 3\)"):
        secateur.inspect(nn.Linear(3, 4), (1, 3))
    with pytest.raises(InputError, match="give it as data="):
        secateur.inspect(nn.Linear(3, 4), loader())


def test_an_error_while_a_model_is_captured_names_the_line_of_the_model():
    class Fails(torch.nn.Module):
        def forward(self, x):
            return x.gather(1, torch.full((1, 1), 99))

    with pytest.raises(ForwardError, match=r"test_call\.py:\d+"):
        capture(Fails(), torch.zeros(1, 2))


class Pair(NamedTuple):
    x: Tensor
    n: int


def test_lists_and_tuples_stay_what_they_are() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    given = {
        "pair": Pair(torch.ones(4, 2), 3),
        "packed": packed,
        "list": [torch.ones(4)],
        "plain": (torch.ones(4), "w"),
    }
    moved, more = to_device(given, torch.device("cpu")), with_batch_size(given, 6)
    for found in (moved, more):
        assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in given.items()}
        assert found["packed"].batch_sizes.tolist() == [2, 1, 1]
        assert found["packed"].data.shape == (4, 2)
    assert more["pair"].x.shape == (6, 2)
    assert more["list"][0].shape == (6,)
