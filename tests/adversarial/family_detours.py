"""Values leave the graph and come back: lists, numpy, strings, files, threads."""

from __future__ import annotations

import ctypes
import io
import json
import math
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import dlpack

from .cases import ROWS, Family, floats
from .nets import Mid

family = Family("detours", targets=(0.3, 0.5))
X = floats(*ROWS)


def mid(name: str, middle: Any, **options: Any) -> None:
    options.setdefault("must", "fc1.weight")
    family.add(name, lambda: Mid(middle), X, **options)


def numpy_of(h: Tensor) -> np.ndarray:
    return h.detach().numpy()


def through_a_file(h: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save(h.detach().cumsum(1), file)
    file.seek(0)
    return torch.load(file)


def in_a_thread(h: Tensor) -> Tensor:
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(h.detach().cumsum(1)))
    thread.start()
    thread.join()
    return h + found[0]


def by_pointer(h: Tensor) -> float:
    h = h.detach().contiguous()
    return ctypes.cast(h.data_ptr(), ctypes.POINTER(ctypes.c_float))[5]


mid("tolist_weighs_channels", lambda m, h: h * sum(i * v for i, v in enumerate(h.mean(0).tolist())))
mid("tolist_and_back", lambda m, h: torch.tensor([row[::-1] for row in h.tolist()]))
mid("item_of_a_channel", lambda m, h: h * (1 + h[:, 5].mean().item()))
mid("float_of_a_sum", lambda m, h: h * float(h.sum(1).mean()))
mid("loudest_channel_picks_a_scale", lambda m, h: h * (1 + int(h.mean(0).argmax())))
mid("numpy_roll", lambda m, h: torch.from_numpy(np.roll(numpy_of(h), 2, axis=1).copy()))
mid("numpy_array_of_tensor", lambda m, h: h + torch.as_tensor(np.asarray(h.detach()).cumsum(1)))
mid("numpy_function_on_tensor", lambda m, h: h * float(np.median(np.array(h.detach()), axis=1).sum()))
mid("dlpack", lambda m, h: h + torch.as_tensor(np.from_dlpack(h.detach().contiguous()).cumsum(1)))
mid("dlpack_capsule", lambda m, h: h + dlpack.from_dlpack(dlpack.to_dlpack(h.detach())).flip(1))
mid("storage_read", lambda m, h: h * (1 + h.detach().contiguous().untyped_storage()[7]))
mid("pointer_read", lambda m, h: h * (1 + by_pointer(h)))
mid("printed_and_parsed", lambda m, h: h * (1 + float(f"{h[:, 3].mean():.4f}")))
mid("length_of_its_repr", lambda m, h: h * (1 + len(repr(h[0].detach())) / 100))
mid("json", lambda m, h: torch.tensor(json.loads(json.dumps(h.tolist()))) + h.flip(1))
mid("saved_and_loaded", lambda m, h: h + through_a_file(h))
mid("in_a_thread", lambda m, h: in_a_thread(h))
mid("weights_as_a_list", lambda m, h: h * sum(i * r[0] for i, r in enumerate(m.fc1.weight.tolist())))
mid("weights_as_numpy", lambda m, h: h * float((m.fc1.weight.detach().numpy().sum(1) * range(len(m.fc1.weight))).sum()))
mid("bias_by_item", lambda m, h: h * (1 + m.fc1.bias[3].item()))
mid("loop_with_index", lambda m, h: torch.stack([h[:, i] * (i + 1) for i in range(h.shape[1])], 1))
mid("loop_over_unbind", lambda m, h: torch.stack([c * (i + 1) for i, c in enumerate(h.unbind(1))], 1))
mid("loop_over_rows_of_transpose", lambda m, h: torch.stack([c / (i + 2) for i, c in enumerate(h.T)], 1))
mid("zip_with_constants", lambda m, h: sum(c * k for c, k in zip(h.T, range(1, 99), strict=False))[:, None] + h)
mid("neighbours_in_a_loop", lambda m, h: torch.stack([h[:, i] - h[:, i - 1] for i in range(h.shape[1])], 1))
mid("applied_in_place", lambda m, h: h.detach().clone().apply_(lambda v: math.sin(v)))
mid("map_in_numpy", lambda m, h: h + torch.from_numpy(np.apply_along_axis(np.sort, 1, numpy_of(h))))
mid("argsort_in_numpy", lambda m, h: h[:, np.argsort(numpy_of(h).mean(0))])
mid("set_of_large_ones", lambda m, h: h * len({i for i, v in enumerate(h.mean(0)) if v > 0.4}))
mid("index_of_maximum_as_list", lambda m, h: h + h[:, [h.mean(0).tolist().index(max(h.mean(0).tolist()))]])
mid("numpy_alone_is_pointwise", lambda m, h: torch.from_numpy(np.tanh(numpy_of(h))))
mid("memoryview", lambda m, h: h * (1 + memoryview(numpy_of(h[0].contiguous()))[4]))
mid("copy_through_numpy_out", lambda m, h: h + torch.from_numpy(np.add.accumulate(numpy_of(h), axis=1)))
mid("set_data", lambda m, h: _set_data(h))
mid("numpy_shares_memory", lambda m, h: _in_place(h))
mid("complex_number", lambda m, h: h * abs(complex(h[0, 0].item(), h[0, 1].item())))


def _set_data(h: Tensor) -> Tensor:
    y = torch.zeros_like(h)
    y.data = h.data.flip(1)
    return y


def _in_place(h: Tensor) -> Tensor:
    h = h.detach().clone()
    values = h.numpy()
    values *= np.arange(1, values.shape[1] + 1, dtype=np.float32)
    return h


class _Numpy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return torch.from_numpy(np.cumsum(h.detach().numpy(), 1))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.flip(1).cumsum(1).flip(1)


mid("own_function_in_numpy", lambda m, h: _Numpy.apply(h))


@family.case(X)
class GreedyOrder(nn.Module):
    """Greedy matching, written as a Python loop over similarities."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.out = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        free, order = set(range(h.shape[1])), []
        for row in (h.T @ h).tolist():
            best = max(free, key=lambda j, row=row: row[j])
            free.remove(best)
            order.append(best)
        return self.out(h[:, order])
