"""Batches over several passes, with a place to go on from: what was read, and what it was drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

import torch

from secateur.errors import InputError
from secateur.model.call import require_reiterable, tensors_in
from secateur.model.generators import Drawn, Stream
from secateur.types import Batch, Data


class _Start(TypedDict):
    """Where a pass began: the random streams of the data, and the states of generators that a loader holds."""

    stream: Drawn
    own: list[torch.Tensor]


class ReaderState(TypedDict):
    """Where a reading stands: the pass, batches of it that were read, how it began, and a mark of the last batch."""

    epoch: int
    place: int
    start: _Start
    seen: str


class Reader:
    """Reads data pass by pass.

    The data draw from random streams of their own, which start where the generators stand now: what a model draws
    (dropout) changes neither order nor augmentation, so that two models see the same batches, and a pass can be read
    again up to any place.

    Args:
        data: batches. Where it has ``set_epoch``, that is called before each pass.
        passes: how many; None = without end.
    """

    def __init__(self, data: Data, passes: int | None) -> None:
        self.data, self.passes = data, passes
        self.epoch, self.place = 0, 0
        self._stream, self._batches = Stream(), None
        self._last: Batch = None
        self._set_epoch, self._before = getattr(data, "set_epoch", None), getattr(data, "epoch", 0)
        self._start: _Start | None = None

    def read(self, count: int = 1) -> list[Batch]:
        """The next batches of one pass, at most so many; none at the end of a pass, which `turn` follows."""
        if self._batches is None:
            self._begin()
        found: list[Batch] = []
        while len(found) < count and (batch := self._next()) is not _END:
            found.append(batch)
        if not found and self.place == 0:
            why = "" if self.epoch == 0 else f"pass {self.epoch + 1} gave no batch, though the first did"
            raise InputError("the data holds no batch", why=why, hint="is the loader empty or used up?")
        self.place += len(found)
        return found

    def turn(self) -> bool:
        """Go to the next pass; False where there is none."""
        self._batches, self.place, self.epoch = None, 0, self.epoch + 1
        return self.passes is None or self.epoch < self.passes

    def close(self) -> None:
        """Give the data their epoch back."""
        # A generator of the data's is closed now, not when the garbage is taken.
        close = getattr(self._batches, "close", None)
        if callable(close):
            close()
        self._batches = None
        if callable(self._set_epoch):
            self._set_epoch(self._before)

    # -- going on ---------------------------------------------------------------------------------------------

    def state_dict(self) -> ReaderState:
        """Where the reading stands; before the first batch of a pass, where the pass will begin."""
        start = self._now() if self._batches is None or self._start is None else self._start
        seen = _fingerprint(self._last) if self.place else ""
        return {"epoch": self.epoch, "place": self.place, "start": start, "seen": seen}

    def load_state_dict(self, state: ReaderState) -> None:
        """Begin the pass anew, and read up to the place where it was left.

        Raises:
            InputError: the data give other batches than they did.
        """
        self._batches, self.epoch, self.place = None, state["epoch"], 0
        self._stream.state = state["start"]["stream"]
        for generator, before in zip(generators_of(self.data), state["start"]["own"], strict=True):
            generator.set_state(before)
        while self.place < state["place"] and self.read():
            pass
        if self.place != state["place"] or (self.place and _fingerprint(self._last) != state["seen"]):
            raise InputError(
                "the data do not give the batches that they gave before the interrupt",
                why=f"batch {state['place']} of pass {self.epoch + 1} is another one",
                hint="give the same data; loaders that shuffle by something else than the global generators or their "
                "own torch.Generator need set_epoch",
            )

    def _begin(self) -> None:
        if self.epoch:
            require_reiterable(self.data, f"pass {self.epoch + 1}")
        self._start = self._now()
        if callable(self._set_epoch):
            self._set_epoch(self.epoch)
        with self._stream.on():
            self._batches = iter(self.data)

    def _next(self) -> Batch:
        assert self._batches is not None
        with self._stream.on():
            batch = next(self._batches, _END)
        if batch is not _END:
            self._last = batch
        return batch

    def _now(self) -> _Start:
        return {"stream": self._stream.state, "own": [generator.get_state() for generator in generators_of(self.data)]}

    _batches: Iterator[Batch] | None


class Apart:
    """The same data in an order of its own, always the same; whoever reads the data besides notices nothing.

    Args:
        data: batches.
        seed: of the generators that a loader holds.
    """

    def __init__(self, data: Data, seed: int) -> None:
        self.data, self._seed = data, seed

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        held = generators_of(self.data)
        before = [generator.get_state() for generator in held]
        try:
            for generator in held:
                generator.manual_seed(self._seed)
            yield from self.data
        finally:
            for generator, state in zip(held, before, strict=True):
                generator.set_state(state)


_END = object()


def generators_of(data: object) -> list[torch.Generator]:
    """Generators that a loader of torch and its samplers hold, each once."""
    batches = getattr(data, "batch_sampler", None)
    holders = (data, getattr(data, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def _fingerprint(batch: Batch) -> str:
    """A cheap mark of a batch: shapes and sums, the same for the same bits."""
    sums = [(tensor.shape, tensor.dtype, tensor.detach().double().sum().item()) for tensor in tensors_in(batch)]
    return ";".join(f"{tuple(shape)}:{dtype}:{value!r}" for shape, dtype, value in sums)
