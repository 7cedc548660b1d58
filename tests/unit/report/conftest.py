from collections.abc import Callable

import pytest
import torch

from secateur import report as R
from secateur import types as T

Make = Callable[..., R.Record]
HOSTILE = (
    '</script><img src=x onerror="alert(\'1\')"><b>b</b><a href="https://evil.test">a</a>\x1b[31m\u202e{{7*7}}[red]'
)


@pytest.fixture
def hostile() -> str:
    return HOSTILE


@pytest.fixture
def snapshot() -> Callable[..., T.Snapshot]:
    def build(params=1000, *, macs=2000, size=4000, latency=None, quality=None, nonzero=None):
        timing = None if latency is None else T.Latency(*latency)
        return T.Snapshot(params, params if nonzero is None else nonzero, macs, size, timing, quality or {})

    return build


@pytest.fixture
def make(snapshot) -> Make:
    def build(*, before=None, after=None, name="conv1", **changes):
        torch.manual_seed(0)
        weight, scores = torch.randn(8, 4, 3, 3), torch.arange(8.0)
        layer = R.Layer.measure(name, weight, params_after=144, scores=scores, keep=scores >= 4)
        parts = {
            "applied": "cut",
            "units": R.Units(removed=4, total=8, what="channels"),
            "criterion": R.Choice(name="magnitude", options={"p": 2}),
            "granularity": R.Choice(name="channel"),
            "scope": "global",
            "allocation": R.Choice(name="global"),
            "environment": R.environment(seed=3),
            "fingerprint": "sha256:00ff",
            "certificate": T.Certificate(1e-7, 1e-5, "float32"),
            "layers": [layer],
            "seconds": {"score": 1.5},
        }
        return R.build(
            "demo:digits",
            before=before or snapshot(),
            after=after or snapshot(500, macs=1000, size=2000),
            **parts | changes,
        )

    return build
