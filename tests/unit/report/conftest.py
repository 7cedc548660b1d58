from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from secateur import report as R
from secateur import types as T
from secateur.report.layers import measure_layer

Make = Callable[..., R.Report]
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
        layer = measure_layer(name, weight, params_after=144, scores=scores, keep=scores >= 4)
        parts = {
            "title": "demo:digits",
            "fingerprint": "sha256:00ff",
            "environment": R.environment(seed=3),
            "criterion": R.Choice(name="magnitude", options={"p": 2}),
            "granularity": R.Choice(name="channel"),
            "scope": "global",
            "allocation": R.Choice(name="global"),
            "before": before or snapshot(),
            "after": after or snapshot(500, macs=1000, size=2000),
            "applied": "cut",
            "units": R.UnitCount(removed=4, total=8, what="channels"),
            "certificate": T.Certificate(1e-7, 1e-5, "float32", "replay"),
            "layers": [layer],
            "seconds": {"score": 1.5},
        } | changes

        def of(record):
            return record(**{f.name: parts.pop(f.name) for f in fields(record) if f.name in parts})

        records = of(R.Origin), of(R.Method), of(R.Effect)
        return R.build(*records, goal=of(R.Goal), events=of(R.Events), **parts)

    return build
