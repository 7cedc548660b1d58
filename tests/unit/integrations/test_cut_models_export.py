"""Cut models are ordinary modules: torch.export, torch.compile and ONNX take them, with the same outputs."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur.deployment import export_onnx
from secateur.sources.demo import build_convnet


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.gate, self.down = nn.Linear(width, 48), nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + self.out(mixed.reshape(batch, length, self.heads * self.head_dim))
        hidden = self.norm2(x)
        return x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class Transformer(nn.Module):
    def __init__(self, depth: int = 3, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, width)
        self.layers = nn.ModuleList(Layer(width, 4) for _ in range(depth))
        self.head = nn.Linear(width, 5)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def cut_convnet():
    model, x = build_convnet().eval(), torch.randn(2, 1, 28, 28)
    return sc.plan(model, x, target={"macs": 0.5}).apply(model), x


def cut_transformer(granularity):
    torch.manual_seed(0)
    model, ids = Transformer().eval(), torch.randint(0, 30, (2, 7))
    return sc.plan(model, ids, granularity=granularity, target={"sparsity": 0.4}).apply(model), ids


MAKERS = {
    "convnet": cut_convnet,
    "neurons": lambda: cut_transformer("neuron"),
    "heads": lambda: cut_transformer("head"),
    "layers": lambda: cut_transformer("layer"),
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("neurons", "layers")]


@pytest.fixture(scope="module", params=["convnet", "heads", *SLOW])
def cut(request):
    model, x = MAKERS[request.param]()
    with torch.no_grad():
        return model, x, model(x)


def test_export(cut):
    model, x, expected = cut
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert torch.allclose(program.module()(x), expected, atol=1e-6)
    more = torch.cat([x, x[:1]])
    assert program.module()(more).shape == (3, *expected.shape[1:])
    shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert {name: tuple(program.state_dict[name].shape) for name in shapes} == shapes


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_compile_in_one_graph_and_train(cut, backend):
    model, x, expected = cut
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        found = compiled(x)
        found.sum().backward()
    assert torch.allclose(found, expected, atol=1e-6)
    eager = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).sum().backward()
    assert eager.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    assert all(torch.allclose(p.grad, eager[n], atol=1e-5) for n, p in model.named_parameters() if n in eager)
    model.zero_grad()


@pytest.mark.slow
def test_onnx(cut, tmp_path):
    pytest.importorskip("onnxruntime")
    import onnx

    model, x, _ = cut
    report = export_onnx(model, x, tmp_path / "cut.onnx")
    assert report.max_abs_error <= 1e-4
    stored = [tuple(t.dims) for t in onnx.load(report.path).graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    held = sum(p.numel() for p in (*model.parameters(), *model.buffers()))
    assert sum(torch.Size(dims).numel() for dims in stored) <= held + 10
