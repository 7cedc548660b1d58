"""Every door out of the graph: what leaves it is locked with the line that read it, or the cut is right anyway."""

from __future__ import annotations

import ctypes
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from independent import holds, locked
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import dlpack

import secateur as sc
from secateur.structure.capture import capture
from secateur.structure.watched import WatchedList

WIDTH = 32


class Net(nn.Module):
    """A hidden state goes through `door`, which gives a factor for the output."""

    def __init__(self, door: Callable[[Net, Tensor], Any]) -> None:
        super().__init__()
        self.door = door
        self.fc1, self.fc2 = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)
        self.scales = [float(i + 1) for i in range(WIDTH + 1)]
        self.pair = tuple(self.scales)
        self.table = {i: float(i + 1) for i in range(WIDTH + 1)}
        self.limit = 20
        self.choices = nn.ModuleList([nn.Identity(), nn.Softsign()])
        self.numbers = nn.ParameterList([torch.ones(4), torch.arange(4.0)])

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.fc1(x))
        return self.fc2(h) * self.door(self, h)


def at(memory: int, count: int) -> float:
    return float(sum(i * v for i, v in enumerate(np.ctypeslib.as_array((ctypes.c_float * count).from_address(memory)))))


def weighed(values: Any) -> float:
    """A number that depends on what stands where."""
    return float(sum((i + 1) * float(v) for i, v in enumerate(values)))


VALUES: dict[str, Callable[[Net, Tensor], Any]] = {
    "tolist": lambda m, h: weighed(h.sum(0).tolist()),
    "tolist of positions": lambda m, h: m.scales[h.max(1).indices.tolist()[0]],
    "item of a position": lambda m, h: m.scales[int(h.argmax(1)[0].item())],
    "position as an index": lambda m, h: m.scales[h.sum(0).argmax()],
    "int of a position": lambda m, h: m.scales[int(h[0].argmax())],
    "position of a pair": lambda m, h: m.scales[int(h.sum(0).max(0).indices)],
    "sorted": lambda m, h: weighed(sorted(range(h.shape[1]), key=h[0].tolist().__getitem__)),
    "numpy": lambda m, h: weighed(h.numpy()[0]),
    "numpy of a view": lambda m, h: weighed(h.t().contiguous().numpy()[:, 0]),
    "asarray": lambda m, h: weighed(np.asarray(h)[0]),
    "__array__": lambda m, h: weighed(h.__array__()[0]),
    "from_dlpack": lambda m, h: weighed(np.from_dlpack(h)[0]),
    "to_dlpack": lambda m, h: weighed(dlpack.from_dlpack(dlpack.to_dlpack(h))[0].numpy()),
    "data_ptr": lambda m, h: at(h.data_ptr(), h.numel()),
    "storage": lambda m, h: weighed(h.untyped_storage().tolist()),
    "typed storage": lambda m, h: weighed(list(h.storage())),
    "text": lambda m, h: float(str(h).find(".", 20)),
    "format": lambda m, h: float(len(f"{h}") % 7),
    "repr": lambda m, h: float(sum(map(ord, repr(h.sum(0)))) % 11),
    "iteration": lambda m, h: weighed(v.item() for v in h[0]),
    "nonzero": lambda m, h: float(h[0].nonzero().sum()),
    "weights as numpy": lambda m, h: weighed(m.fc1.weight.detach().numpy()[:, 0]),
    "weights as a list": lambda m, h: weighed(m.fc2.weight[0].tolist()),
    "data of the weights": lambda m, h: weighed(m.fc1.weight.data.tolist()[0][:2]) + weighed(m.fc1.bias.tolist()),
}


@pytest.mark.sampled(2)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", VALUES)
def test_values_that_leave_lock_what_was_read(name: str) -> None:
    torch.manual_seed(0)
    model, x = Net(VALUES[name]).eval(), torch.randn(3, 8)
    reasons = [reason for group in locked(model, x).values() for reason in group]
    assert any("test_doors.py" in reason for reason in reasons)
    assert holds(model, x, [torch.randn(2, 8)]) is None


LITERALS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "numpy integer": lambda m, h: h[:, : np.int64(16)],
    "numpy from the end": lambda m, h: h[:, np.int32(-16) :],
    "buffer": lambda m, h: h[:, : torch.tensor(16)],
    "operator.index": lambda m, h: h[:, : operator.index(np.uint8(16))],
    "half, through numpy": lambda m, h: h[:, : np.int64(h.shape[1] // 2)],
    "half, through a tensor": lambda m, h: h[:, : torch.tensor(h.shape)[1] // 2],
    "half, through text": lambda m, h: h[:, : int(f"{h.shape[1]}") // 2],
    "half, through a float": lambda m, h: h[:, : int(h.shape[1] / 2)],
    "half, through int": lambda m, h: h[:, : int(h.shape[1]) // 2],
    "half, through a product": lambda m, h: h[:, : round(h.shape[1] * 0.5)],
    "half, shifted": lambda m, h: h[:, : h.shape[1] >> 1],
    "half, from the end": lambda m, h: h[:, -h.shape[1] // 2 :],
    "half, with a remainder": lambda m, h: h[:, : divmod(h.shape[1], 2)[0]],
    "half, negated twice": lambda m, h: h[:, : -(-h.shape[1] // 2)],
    "half, rounded up": lambda m, h: h[:, : math.ceil(h.shape[1] / 2)],
    "half, by a power": lambda m, h: h[:, : int(h.shape[1] ** 0.8)],
    "half, by numpy's product": lambda m, h: h[:, : np.prod(h.shape) // len(h) // 2],
    "narrow": lambda m, h: h.narrow(1, np.int64(0), np.int64(16)),
    "narrow by a tensor": lambda m, h: torch.narrow(h, 1, torch.tensor(0), 16),
    "split": lambda m, h: h.split([np.int64(16), np.int64(16)], 1)[0],
    "view": lambda m, h: h.view(-1, np.int64(2), np.int64(16))[:, 0],
    "counted weights": lambda m, h: h[:, : len(m.fc1.weight) // 2],
    "elements": lambda m, h: h[:, : h.numel() // h.shape[0] // 2],
}


class Part(Net):
    """Relu on the first channels only: the example shows no difference, as all of them are positive."""

    def __init__(self, door: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__(door)
        nn.init.uniform_(self.fc1.bias, 0.5, 0.6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        part = self.door(self, h)
        n = int(part.shape[1])
        return self.fc2(torch.cat([part.relu(), h[:, n:]] if part.data_ptr() == h.data_ptr() else [h[:, :-n], part], 1))


class Half(Part):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        part = self.door(self, h)
        return self.fc2(torch.cat([part.relu(), h[:, 16:]], 1) if part.shape[1] == 16 else h)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LITERALS)
def test_what_serves_as_an_integer_bounds_like_a_literal(name: str) -> None:
    torch.manual_seed(0)
    model = Half(LITERALS[name]).eval()
    holds(model, torch.zeros(4, 8), [torch.randn(5, 8) * 3])


SIZES: dict[str, Callable[[Net, Tensor], Any]] = {
    "key": lambda m, h: m.table[h.shape[1]],
    "key with a default": lambda m, h: m.table.get(h.shape[1], 0.5),
    "member of a set": lambda m, h: 2.0 if h.shape[1] in {WIDTH, 5} else 1.0,
    "member of a list": lambda m, h: 2.0 if h.shape[1] in [5, WIDTH] else 1.0,
    "index": lambda m, h: m.scales[h.shape[1]],
    "index from the end": lambda m, h: m.scales[-h.shape[1]],
    "index of a tuple": lambda m, h: m.pair[h.shape[1] - 1],
    "text": lambda m, h: float(f"1.{h.shape[1]}"),
    "str": lambda m, h: float(len(str(h.shape[1]))) + int(str(h.shape[1])),
    "format": lambda m, h: float(f"{h.shape[1]:>3}"),
    "tensor of the sizes": lambda m, h: torch.tensor(h.shape).sum() / 7,
    "tensor of one size": lambda m, h: torch.as_tensor(h.shape[1]) / 5,
    "length of a loop": lambda m, h: float(sum(0.5 * i for i in range(h.shape[1]))),
    "bounds of a loop": lambda m, h: float(sum(1 for _ in range(2, h.size(1), 3))),
    "greater": lambda m, h: 2.0 if h.shape[1] > 20 else 1.0,
    "at least": lambda m, h: 2.0 if h.shape[1] >= WIDTH else 1.0,
    "less, turned round": lambda m, h: 1.0 if h.shape[1] < 20 else 2.0,
    "attribute": lambda m, h: 2.0 if m.limit < h.size(-1) else 1.0,
    "smaller of two": lambda m, h: min(h.shape[1], 31) / torch.ones(()),
    "remainder": lambda m, h: 2.0 if h.shape[1] % WIDTH == 0 else 1.0,
    "truth of a remainder": lambda m, h: 1.0 if h.shape[1] % WIDTH else 2.0,
    "size of the weight": lambda m, h: 2.0 if m.fc1.weight.shape[0] > 20 else 1.0,
    "elements": lambda m, h: 2.0 if m.fc1.weight.numel() > 200 else 1.0,
    "module by a size": lambda m, h: m.choices[h.shape[1] // 20](torch.ones(4)),
    "parameter by a size": lambda m, h: m.numbers[h.shape[1] // 20],
    "stride": lambda m, h: 2.0 if h.stride(0) > 20 else 1.0,
    "strides": lambda m, h: 2.0 if h.stride()[0] > 20 else 1.0,
    "strides of a turned one": lambda m, h: 2.0 if h.t().stride(1) > 20 else 1.0,
    "bytes": lambda m, h: 2.0 if m.fc1.bias.nbytes > 80 else 1.0,
    "counted": lambda m, h: m.scales[1] if len(m.fc1.weight) > 20 else 1.0,
    "triangle": lambda m, h: m.scales[int(torch.ones(h.shape[1], 3).tril().sum()) % 7],
    "counted as a factor": lambda m, h: 0.1 * len(m.fc1.weight),
    "flip of the wide": lambda m, h: 1.0 if h.shape[1] <= 20 else torch.arange(4.0),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("amount", [0.1, 0.6])
def test_a_size_that_decides_something_stays_on_its_side(name: str, amount: float) -> None:
    torch.manual_seed(0)
    holds(Net(SIZES[name]).eval(), torch.randn(3, 8), [torch.randn(2, 8)], target={"sparsity": amount})


@pytest.mark.parametrize("name", ["key", "index", "text", "tensor of the sizes", "length of a loop", "greater"])
def test_the_lock_names_the_door_and_the_line(name: str) -> None:
    (reason, *_) = locked(Net(SIZES[name]).eval(), torch.randn(3, 8))["fc1"]
    assert "size computed in the code" in reason
    assert "test_doors.py" in reason


class Mixed(nn.Module):
    """Returns numbers beside tensors."""

    def __init__(self, given: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.given, self.fc1, self.fc2 = given, nn.Linear(8, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        h = F.relu(self.fc1(x))
        return {"logits": self.fc2(h), "more": self.given(h)}


GIVEN: dict[str, Callable[[Tensor], Any]] = {
    "a size": lambda h: h.shape[1],
    "all sizes": lambda h: h.shape,
    "a list with a size": lambda h: [1, (h.shape[1] // 2,)],
    "text": lambda h: f"{h.shape[1]} channels",
    "an array": lambda h: h.numpy(),
    "a list": lambda h: h.tolist(),
    "a position": lambda h: int(h[0].argmax()),
    "a key": lambda h: {h.shape[1]: 1},
}


@pytest.mark.parametrize("name", GIVEN)
def test_outputs_that_are_no_tensors_are_protected_like_tensors(name: str) -> None:
    model, x = Mixed(GIVEN[name]).eval(), torch.randn(3, 8)
    assert any("test_doors.py" in r or "size computed" in r for r in locked(model, x)["fc1"])


@pytest.mark.parametrize("given", [lambda h: float(h.sum()), lambda h: "text", lambda h: None, lambda h: 7])
def test_outputs_that_say_nothing_of_the_width_lock_nothing(given: Callable[[Tensor], Any]) -> None:
    assert holds(Mixed(given), torch.randn(3, 8), [torch.randn(2, 8)]) is not None


def test_only_what_was_read_is_locked() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.b(F.relu(self.a(x))))
            return self.d(F.relu(self.c(h))) * weighed(h.sum(0).tolist())

    model, x = Two(), torch.randn(3, 8)
    assert {g.name for g in sc.inspect(model, x).groups} == {"a", "c"}


def test_loops_and_lists_are_as_before_after_a_capture() -> None:
    class Looks(Net):
        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(range(3), range)
            assert isinstance(self.scales, list)
            assert list(range(self.limit))[-1] == 19
            self.scales.append(1.0)
            return super().forward(x)

    kept, picked = range, nn.ModuleList.__getitem__
    model = Looks(lambda m, h: m.scales[2])
    capture(model.eval(), torch.randn(2, 8))
    assert range is kept
    assert nn.ModuleList.__getitem__ is picked
    assert type(model.scales) is list
    assert type(model.scales) is not WatchedList
    assert len(model.scales) == WIDTH + 1
    assert type(model.pair) is tuple
    assert type(model.training) is bool


def test_a_failing_forward_gives_everything_back() -> None:
    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("on purpose")

    kept, model = range, Fails(lambda m, h: 1.0).eval()
    with pytest.raises(sc.errors.ForwardError):
        capture(model, torch.randn(2, 8))
    assert range is kept
    assert type(model.scales) is list
    assert type(model.training) is bool
