"""What is given as data is looked at once: parts, whether they can be read again, and what the labels ask for."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from secateur.errors import InputError, RecipeError
from secateur.model.door import Parts, enter, first_batch, task_of
from secateur.sources import DataSet

X, Y = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
BATCHES, OTHER = [(X, Y)], [(X + 1, Y)]


class Unsure:
    """A loader whose length is 0 until it has been read, as those over streams have it: falsy, and not empty."""

    def __len__(self):
        return 0

    def __iter__(self):
        return iter(OTHER)


def test_scoring_has_one_default_by_identity_and_not_by_truth():
    assert enter(BATCHES).scoring is BATCHES
    assert enter(BATCHES, calibration=OTHER).scoring is OTHER
    unsure = Unsure()
    assert not unsure
    assert enter(BATCHES, calibration=unsure).scoring is unsure
    assert enter(BATCHES, calibration=[]).scoring == []


def test_a_mapping_and_a_data_set_name_their_parts():
    test = [(X, Y)]
    for given in (
        {"train": BATCHES, "calibration": OTHER, "test": test},
        DataSet("word", BATCHES, OTHER, test, notes=("split",)),
    ):
        parts = enter(given)
        assert (parts.train, parts.scoring, parts.test) == (BATCHES, OTHER, test)
        assert parts.judging[0] is test
    assert parts.notes == ("split",)


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (Parts(BATCHES, OTHER, [(X, Y)]), "the test part"),
        (Parts(BATCHES, OTHER), "training data"),
        (Parts(None, OTHER), "calibration data"),
    ],
)
def test_what_quality_is_measured_on_is_called_by_its_name(parts, name):
    assert parts.judging[1] == name


def test_the_first_batch_is_the_example():
    assert torch.equal(enter(OTHER).example(), X + 1)
    assert torch.equal(enter(None, calibration=OTHER).example(), X + 1)
    assert torch.equal(enter(BATCHES, calibration=OTHER).example(), X)
    with pytest.raises(InputError, match="hold no batch"):
        enter([]).example()
    with pytest.raises(InputError, match="neither data nor an example"):
        enter(None).example()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (iter(BATCHES), "the data is a list_iterator that can be read only once"),
        ((batch for batch in BATCHES), "generator that can be read only once"),
        ({"train": BATCHES, "test": iter(BATCHES)}, "the test data is a list_iterator that can be read only once"),
        ({"train": BATCHES, "val": OTHER}, "train, calibration, test"),
        ({}, "no key"),
        ({"input_ids": X, "labels": Y}, "put the batch into a list"),
        (X, r"one tensor, float32\[4, 3\](.|\n)*\[tensor\]"),
        (TensorDataset(X, Y), "DataLoader\\(dataset"),
        ("npz:file.npz", "a str, no iterable"),
        (3, "a int, no iterable"),
    ],
)
def test_what_cannot_be_read_again_and_again_as_batches_is_refused(given, text):
    with pytest.raises(InputError, match=text):
        enter(given)


def test_loaders_of_torch_and_parts_that_are_given_twice():
    loader = DataLoader(TensorDataset(X, Y), batch_size=2)
    assert enter(loader).train is loader
    with pytest.raises(RecipeError, match="calibration is given twice"):
        enter({"train": BATCHES, "calibration": OTHER}, calibration=OTHER)
    with pytest.raises(InputError, match="the calibration data is a list_iterator"):
        enter(BATCHES, calibration=iter(OTHER))


class Own(nn.Module):
    """A model with a loss of its own, as those of Hugging Face have it."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, input_ids, labels=None):
        out = {"logits": torch.zeros(self.shape)}
        return out if labels is None else {"loss": torch.tensor(1.0), **out}


class Plain(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return torch.zeros(self.shape)


def ints(*shape):
    return torch.zeros(shape, dtype=torch.int64)


@pytest.mark.parametrize(
    ("model", "batch", "kind"),
    [
        (Plain((4, 3)), (X, Y), "classification"),
        (Plain((4, 3, 5, 5)), (X, ints(4, 5, 5)), "classification"),  # a class for each pixel
        (Plain((4, 3)), {"x": X, "label": Y}, "classification"),  # its forward takes no label
        (Own((4, 3)), {"input_ids": X, "labels": Y}, "classification"),  # of sequences: a figure that people know
        (Plain((4, 1)), (X, torch.zeros(4, 1)), "regression"),
        (Plain((4, 3)), (X, torch.zeros(4, 3)), "regression"),
        (Plain((4, 1)), {"x": X, "y": torch.zeros(4, 1)}, "regression"),
        (Own((4, 6, 9)), {"input_ids": ints(4, 6), "labels": ints(4, 6)}, "own loss"),  # words
        (Own((4, 6, 6)), {"input_ids": ints(4, 6), "labels": ints(4, 6)}, "own loss"),  # as many words as tokens
        (Own((4, 1)), {"input_ids": X, "labels": torch.zeros(4)}, "own loss"),
        (Plain((4, 3)), X, "none"),
        (Plain((4, 1)), (X, Y), "none"),  # argmax over one number is always 0
        (Plain((4,)), (X, Y), "none"),
        (Plain((4, 3)), (X, torch.zeros(4)), "none"),
        (Plain((4, 3)), (X, ints(4, 3)), "none"),
        (Plain((4, 6, 9)), {"x": X, "labels": ints(4, 6)}, "none"),  # words, and no loss that shifts them
        (nn.Linear(7, 2), (X, Y), "none"),
    ],
)
def test_the_task_follows_from_targets_and_outputs(model, batch, kind):
    task = task_of(model, batch)
    assert task.kind == kind
    assert bool(task.why) == (kind == "none")


def test_reasons_name_the_shapes_and_leave_the_model_alone():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).train()
    before = model[0].running_mean.clone()
    assert task_of(model, (X, Y)).why == (
        "the target int64[4] and the output float32[4, 1] show no classes to choose from"
    )
    assert "no target (the first is float32[4, 3])" in task_of(model, X).why
    assert "does not run on the first batch" in task_of(nn.Linear(7, 2), (X, Y)).why
    assert model.training
    assert torch.equal(model[0].running_mean, before)


def test_the_first_batch_of_nothing():
    assert first_batch([1, 2]) == 1
    with pytest.raises(InputError, match="empty or used up"):
        first_batch([])
