import sys

import numpy as np
import pytest
import torch
from torch import nn

from secateur.deployment import export_onnx
from secateur.errors import CertificateError, FileRefusedError, ForwardError, UnsupportedError

runtime = pytest.importorskip("onnxruntime")


class Two(nn.Module):
    """A batch norm, two inputs, two outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))

    def forward(self, left, right):
        hidden = self.layer(left) + self.layer(right)
        return {"sum": hidden, "parts": (hidden.relu(),)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "deep" / "model.onnx"
    model = Two().train()
    model.layer[1].running_mean.fill_(0.3)
    return model, path, export_onnx(model, {"left": torch.ones(1, 3), "right": torch.zeros(1, 3)}, path)


def test_file_runs_alone_with_any_batch_size(exported):
    model, path, _ = exported
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in (1, 5):
        left, right = torch.randn(size, 3), torch.randn(size, 3)
        found = session.run(None, {"left": left.numpy(), "right": right.numpy()})
        model.eval()
        with torch.no_grad():
            expected = model(left, right)
        model.train()
        np.testing.assert_allclose(found[0], expected["sum"].numpy(), atol=1e-5)
        np.testing.assert_allclose(found[1], expected["parts"][0].numpy(), atol=1e-5)


def test_report_and_model_state(exported):
    model, path, report = exported
    assert report.max_abs_error <= report.tolerance
    assert report.size_bytes == path.stat().st_size
    assert report.inputs == ("left", "right")
    assert report.batch_sizes == (2, 3)
    assert model.training
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]


def test_existing_file_is_not_replaced(exported):
    _, path, _ = exported
    before = path.read_bytes()
    with pytest.raises(FileRefusedError, match="exists"):
        export_onnx(nn.Linear(2, 2), torch.ones(1, 2), path)
    assert path.read_bytes() == before


def test_disagreement_leaves_no_file(tmp_path, monkeypatch):
    class Shifted:
        def __init__(self, *args, **options):
            self.session = session(*args, **options)

        def get_inputs(self):
            return self.session.get_inputs()

        def run(self, names, feeds):
            return [value + 0.01 for value in self.session.run(names, feeds)]

    session = runtime.InferenceSession
    monkeypatch.setattr(runtime, "InferenceSession", Shifted)
    with pytest.raises(CertificateError, match=r"differs by 0\.01"):
        export_onnx(nn.Linear(2, 2), torch.ones(1, 2), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_models_that_cannot_be_exported_are_refused(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x + 1 if float(x.sum()) > 0 else x

    with pytest.raises(UnsupportedError, match="Branch"):
        export_onnx(Branch(), torch.ones(1, 2), tmp_path / "m.onnx")
    with pytest.raises(ForwardError):
        export_onnx(nn.Linear(3, 3), torch.ones(1, 2), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UnsupportedError, match=r"secateur\[onnx\]"):
        export_onnx(nn.Linear(2, 2), torch.ones(1, 2), tmp_path / "m.onnx")
