"""What recipes are chosen by: nothing that their recovery trains on, and never the test part."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from secateur.errors import InputError
from secateur.model.door import enter
from secateur.objective.selection import selection_of
from secateur.sources import TensorData


def part(first: int, last: int, **options: object) -> TensorData:
    """Samples that are told apart by their number."""
    numbers = torch.arange(float(first), float(last)).view(-1, 1).repeat(1, 3)
    return TensorData(numbers, torch.arange(first, last) % 2, batch_size=4, **options)  # type: ignore[arg-type]


def numbers(data: object) -> set[float]:
    return {float(row[0]) for x, _ in data for row in x}  # type: ignore[attr-defined]


def test_calibration_data_of_their_own_serve_whole() -> None:
    given = enter(part(0, 40, shuffle=True), calibration=part(40, 52), test=part(60, 64))
    found = selection_of(given)
    assert numbers(found.batches) == set(range(40, 52))
    assert numbers(found.given.train) == set(range(40))


@pytest.mark.parametrize("overlap", [part(38, 50), part(0, 8)])
def test_calibration_data_that_are_trained_on_do_not(overlap: TensorData) -> None:
    found = selection_of(enter(part(0, 40, shuffle=True), calibration=overlap, test=part(60, 64)))
    chosen, trained = numbers(found.batches), numbers(found.given.train)
    assert not chosen & trained
    assert chosen | trained == set(range(40))
    assert 4 <= len(chosen) <= 12
    assert found.given.calibration is overlap, "scores read what they read without a limit"


def test_the_same_text_is_known_whatever_it_is_padded_to() -> None:
    texts = torch.tensor([[5, 6, 7], [8, 9, 0], [3, 0, 0]])
    train = [{"input_ids": torch.nn.functional.pad(texts, (0, 4)), "labels": torch.zeros(3).long()}] * 5
    given = enter(train, calibration=[{"input_ids": texts[2:, :1], "labels": torch.zeros(1).long()}])
    assert "fifth" in selection_of(given).on


def test_looking_for_samples_draws_nothing() -> None:
    rows = torch.arange(40.0).view(-1, 1).repeat(1, 3)
    loader = DataLoader(TensorDataset(rows, torch.zeros(40).long()), batch_size=4, shuffle=True)
    given = enter(loader, calibration=part(40, 52))
    before = torch.get_rng_state()
    assert selection_of(given).batches is given.calibration
    assert torch.equal(torch.get_rng_state(), before), "whoever draws next must not notice"


class Stream(IterableDataset):
    """Samples that have no numbers."""

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((torch.zeros(2), torch.tensor(0)) for _ in range(8))


def test_a_loader_sets_a_fifth_of_its_samples_aside() -> None:
    rows = torch.arange(40.0).view(-1, 1).repeat(1, 3)
    found = selection_of(enter(DataLoader(TensorDataset(rows, torch.zeros(40).long()), batch_size=4, shuffle=True)))
    chosen, trained = numbers(found.batches), numbers(found.given.train)
    assert (len(chosen), chosen & trained, chosen | trained) == (8, set(), set(range(40)))


def test_a_loader_of_a_stream_without_calibration_data_is_refused() -> None:
    with pytest.raises(InputError, match="no data to choose by") as caught:
        selection_of(enter(DataLoader(Stream(), batch_size=4)))
    assert "calibration=" in caught.value.hint


def test_the_test_part_alone_chooses_nothing() -> None:
    with pytest.raises(InputError, match="no data to choose by"):
        selection_of(enter(None, test=part(0, 8)))
