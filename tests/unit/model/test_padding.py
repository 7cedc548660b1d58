"""Padding: which tokens are real, and rows without the others."""

import pytest
import torch

from secateur.errors import InputError
from secateur.model.padding import real_tokens, without_padding

MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])
IDS = torch.zeros(2, 3, dtype=torch.long)


def test_the_mask_says_which_tokens_are_real():
    assert real_tokens({"input_ids": IDS, "attention_mask": MASK}).tolist() == [[True, True, False], [True] * 3]


@pytest.mark.parametrize(
    "example",
    [
        IDS,
        (IDS, MASK),
        {"input_ids": IDS},
        {"input_ids": IDS, "attention_mask": torch.ones(2, 3)},
        {"input_ids": IDS, "attention_mask": torch.zeros(2, 1, 3, 3)},  # a mask of attention, of whatever meaning
        {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS},  # rows of which of the two?
    ],
)
def test_nothing_is_padding_where_nothing_says_so(example):
    assert real_tokens(example) is None


def test_a_batch_of_nothing_but_padding_is_refused():
    with pytest.raises(InputError, match=r"attention_mask \[2, 3\] leaves out every token"):
        real_tokens({"input_ids": IDS, "attention_mask": torch.zeros(2, 3)})


def test_a_decoder_of_another_length_is_told_apart_by_it():
    example = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :2]}
    real = real_tokens(example)
    assert real is not None
    decoder = torch.randn(2, 2, 5)
    assert without_padding(decoder, real) is decoder


def test_rows_of_real_tokens_in_their_order():
    value, real = torch.arange(24.0).view(2, 3, 4), MASK != 0
    wanted = [value[0, 0], value[0, 1], value[1, 0], value[1, 1], value[1, 2]]
    torch.testing.assert_close(without_padding(value, real), torch.stack(wanted))
    torch.testing.assert_close(without_padding(value.view(6, 4), real), torch.stack(wanted))


@pytest.mark.parametrize("shape", [(2, 4), (2, 5, 3), (2, 3, 4, 4), (5, 4), (6,)])
def test_what_has_no_row_for_each_token_stays_whole(shape):
    value = torch.randn(shape)
    assert without_padding(value, MASK != 0) is value
