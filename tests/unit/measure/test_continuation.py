"""How a language model goes on: as far as it was made for, and never at the cost of a run."""

import pytest
import torch
from torch import nn

from secateur.measure.continuation import continuation
from secateur.model.longest import context_length


class Config:
    def __init__(self, longest=None):
        self.eos_token_id = 0
        if longest is not None:
            self.max_position_embeddings = longest


class Writes(nn.Module):
    """Goes on with the next number, at so many positions as it has."""

    def __init__(self, longest=None):
        super().__init__()
        self.weight, self.config = nn.Parameter(torch.zeros(1)), Config(longest)
        self.longest = longest or 100

    def generate(self, ids, *, max_new_tokens, **options):
        for _ in range(max_new_tokens):
            if ids.shape[1] >= self.longest:
                raise IndexError("index out of range in self")
            ids = torch.cat([ids, ids[:, -1:] + 1], 1)
        return ids


@pytest.mark.parametrize(("longest", "written"), [(None, 5), (20, 5), (8, 5), (6, 3), (3, 0), (2, 0)])
def test_it_goes_on_as_far_as_there_is_room(longest, written):
    found = continuation(Writes(longest), torch.tensor([1, 2, 3]), length=5)
    assert (found is None) if written == 0 else found.tolist() == list(range(4, 4 + written))


def test_how_long_a_model_reads_stands_in_its_config():
    class Many:  # of text and images
        def get_text_config(self):
            return Config(77)

    assert [context_length(config) for config in (Config(77), Many(), None, Config())] == [77, 77, None, None]
