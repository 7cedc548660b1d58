"""Examples come in any form, and everything that changes their tensors keeps it."""

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from secateur.model.agreement import doubled
from secateur.model.call import inputs, to_device
from secateur.model.samples import pick_sample, with_batch_size
from secateur.statistics.activations.streams import few_samples
from secateur.statistics.gradients.functional import per_sample_leaves, samples_of

Pair = namedtuple("Pair", "x mask")


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(6.0).view(3, 2), torch.ones(5, dtype=torch.long)


FORMS = {
    "tuple": lambda x, mask: (x, mask, 7),
    "list": lambda x, mask: [x, [mask], None],
    "named tuple": lambda x, mask: (Pair(x, mask),),
    "mapping of a library": lambda x, mask: UserDict(x=x, inner={"mask": mask}),
    "packed sequence": lambda x, mask: (x, mask, nn.utils.rnn.pack_sequence([torch.zeros(2), torch.zeros(1)])),
}
WALKS = {
    "device": lambda example: to_device(example, torch.device("cpu")),
    "double": doubled,
    "another batch": lambda example: with_batch_size(example, 5),
    "one sample": lambda example: pick_sample(example, 1),
    "few samples": lambda example: few_samples(example, 3),
    "leaves and back": lambda example: per_sample_leaves(example, 3)[1](per_sample_leaves(example, 3)[0]),
    "some samples": lambda example: samples_of(example, 3, [0, 2]),
}
ROWS = {"another batch": [0, 1, 2, 0, 1], "one sample": [1], "few samples": [0, 1], "some samples": [0, 2]}


def form(value: object) -> object:
    """Which containers hold which tensors; mappings are all alike to a call with keywords."""
    if isinstance(value, (dict, UserDict)):
        return {key: form(item) for key, item in value.items()}
    return [type(value), *map(form, value)] if isinstance(value, (tuple, list)) else type(value)


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_an_example_keeps_its_form_and_what_is_no_batch_whatever_changes_its_tensors(make, walk):
    x, mask = tensors()
    found = WALKS[walk](make(x, mask))
    assert form(found) == form(make(x, mask))
    first, second, *rest = inputs(found)
    assert torch.equal(first, x[ROWS.get(walk, [0, 1, 2])].to(first.dtype))
    assert torch.equal(second, mask)
    assert (first.dtype == torch.float64) == (walk == "double")
    for tensor, before in zip(rest, inputs(make(x, mask))[2:], strict=True):
        assert torch.equal(tensor, before.to(tensor.dtype))


def test_a_packed_sequence_moves_to_another_device():
    (found,) = to_device((nn.utils.rnn.pack_sequence([torch.zeros(2), torch.zeros(1)]),), torch.device("meta"))
    assert found.data.is_meta
    assert found.batch_sizes.tolist() == [2, 1]
