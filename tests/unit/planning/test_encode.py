import json
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import FileRefusedError
from secateur.planning.encode import indices, intervals, pack, unpack


@given(st.sets(st.integers(0, 300)))
def test_intervals_and_back(values):
    wanted = torch.tensor(sorted(values), dtype=torch.int64)
    runs = json.loads(json.dumps(intervals(wanted)))
    assert torch.equal(indices(runs, "x"), wanted)
    covered = [i for a, b in runs for i in range(a, b)]
    assert covered == sorted(values)
    assert all(b < c for (_, b), (c, _) in pairwise(runs)), "runs are maximal"


@pytest.mark.parametrize(
    "runs", [None, [[3]], [[3, 1]], [[0, 5], [4, 6]], [[-1, 2]], [["a", 2]], [[0, 2**60]], [[1.0, 2]], [[True, 3]]]
)
def test_bad_runs_are_refused(runs):
    with pytest.raises(FileRefusedError):
        indices(runs, "x")


@given(st.lists(st.integers(1, 5), max_size=3), st.randoms(use_true_random=False))
def test_masks_and_back(shape, rng):
    size = int(torch.Size(shape).numel())
    mask = torch.tensor([rng.random() < 0.5 for _ in range(size)], dtype=torch.bool).view(shape)
    data = json.loads(json.dumps(pack(mask)))
    assert torch.equal(unpack(data, "w"), mask)
    assert len(data["bits"]) <= 4 * (size // 8 + 2), "one bit an element"


@pytest.mark.parametrize(
    "change",
    [{"shape": [9]}, {"shape": [-8]}, {"bits": "!!"}, {"kept": 3}, {"bits": ""}, {"shape": "x"}, {"shape": [2**40]}],
)
def test_bad_masks_are_refused(change):
    data = pack(torch.tensor([True, False] * 4)) | change
    with pytest.raises(FileRefusedError):
        unpack(data, "w")
