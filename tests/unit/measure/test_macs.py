import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from secateur.errors import ForwardError
from secateur.measure import macs, macs_by_module
from secateur.measure.macs import samples_in


class Run(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.booleans())
@settings(max_examples=25, deadline=None)
def test_convolution_by_the_hand_formula(batch, groups, per_in, per_out, stride, bias):
    c_in, c_out, k, size = groups * per_in, groups * per_out, 3, 9
    conv = nn.Conv2d(c_in, c_out, k, stride=stride, groups=groups, bias=bias)
    side = (size - k) // stride + 1
    assert macs(conv, torch.zeros(batch, c_in, size, size)) == side**2 * c_out * (c_in // groups) * k**2


def test_transposed_convolution():
    conv = nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2)
    assert macs(conv, torch.zeros(2, 4, 7, 7)) == 7 * 7 * 4 * 3 * 9


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 5, 3)])
def test_linear_for_every_number_of_dimensions(shape):
    samples = 1 if len(shape) == 1 else shape[0]  # the only dimension holds the features of one sample
    assert macs(nn.Linear(3, 4), torch.zeros(shape)) == torch.Size(shape).numel() * 4 // samples


def test_attention_is_counted_although_the_kernel_is_fused():
    batch, heads, length, dim = 2, 2, 5, 4
    q = torch.randn(batch, heads, length, dim)
    attend = Run(lambda x: functional.scaled_dot_product_attention(x, x, x))
    assert macs(attend, q) == 2 * heads * length**2 * dim
    width = heads * dim
    layer = nn.MultiheadAttention(width, heads, batch_first=True)
    x = torch.randn(batch, length, width)
    projections = 4 * length * width**2
    assert macs(layer, (x, x, x)) == projections + 2 * heads * length**2 * dim
    encoder = nn.TransformerEncoderLayer(width, heads, 16, batch_first=True)
    assert macs(encoder, x) == macs(layer, (x, x, x)) + 2 * length * width * 16


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers(kind, gates):
    batch, length, width, hidden = 2, 5, 3, 4
    both = kind(width, hidden, batch_first=True, bidirectional=True)
    expected = 2 * length * gates * hidden * (width + hidden)
    assert macs(both, torch.randn(batch, length, width)) == expected


def test_products_without_a_formula_in_torch():
    assert macs(Run(torch.mv), (torch.zeros(4, 3), torch.zeros(3))) == 3  # four rows, one by one
    assert macs(Run(torch.dot), (torch.zeros(3), torch.zeros(3))) == 3
    assert macs(nn.Bilinear(3, 4, 5), (torch.zeros(2, 3), torch.zeros(2, 4))) == 3 * 4 * 5


def test_breakdown_adds_up_and_names_modules():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Flatten(), nn.Linear(18, 4)))
    x = torch.zeros(1, 1, 5, 5)
    assert macs_by_module(model, x) == {"": 162 + 72, "0": 162, "1": 72, "1.1": 72}


def test_a_used_twice_layer_counts_twice():
    layer = nn.Linear(4, 4)
    assert macs(nn.Sequential(layer, layer), torch.zeros(1, 4)) == 32


def test_model_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)).train()
    model[2].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x, fast = torch.randn(2, 1, 5, 5), torch.backends.mha.get_fastpath_enabled()
    state = torch.get_rng_state()
    macs(model, x)
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_failing_forward_is_the_users_error():
    with pytest.raises(ForwardError, match="cannot be multiplied"):
        macs(nn.Linear(3, 4), torch.zeros(1, 5))
    assert torch.backends.mha.get_fastpath_enabled()


class Norm(nn.Module):
    """Mixes the samples of a batch, without any product: each is seen relative to the others."""

    def forward(self, x):
        return x - x.mean(0)


class Fixed(nn.Module):
    """Work that no sample asks for: a product of two weights."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(3, 5)), nn.Parameter(torch.ones(5, 3))

    def forward(self, x):
        return x * (self.a @ self.b).sum()


class Written(nn.Module):
    def forward(self, x):
        return x.view(4, 6) @ torch.ones(6, 2)


class Squeezed(nn.Linear):
    def forward(self, x):
        return super().forward(x).squeeze()


@pytest.mark.parametrize(
    ("model", "shape", "samples"),
    [
        (nn.Linear(3, 4), (6, 3), 6),
        (Squeezed(3, 1), (6, 3), 6),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 1), nn.Flatten(0)), (6, 3, 4), 6),
        (nn.Conv2d(3, 4, 3), (5, 3, 6, 6), 5),
        (nn.Conv2d(3, 4, 3), (3, 6, 6), 1),  # one image without a batch
        (nn.LSTM(3, 4, batch_first=True), (6, 5, 3), 6),
        (nn.LSTM(3, 4), (5, 6, 3), 1),  # time first: a step alone is another step
        (nn.MultiheadAttention(4, 2, batch_first=True), (6, 5, 4), 6),
        (nn.MultiheadAttention(4, 2), (6, 5, 4), 1),  # attention over the first dimension
        (nn.Sequential(nn.Linear(3, 4), Norm()), (6, 3), 1),
        (Fixed(), (6, 3), 1),
        (Written(), (4, 6), 1),
    ],
)
def test_the_leading_dimension_is_samples_only_where_they_do_not_meet(model, shape, samples):
    torch.manual_seed(0)
    x = torch.randn(shape)
    example = (x, x, x) if isinstance(model, nn.MultiheadAttention) else x
    assert samples_in(model, example) == samples


def test_the_figure_does_not_depend_on_the_size_of_the_batch():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Flatten(), nn.Linear(18, 4)))
    one, many = (macs_by_module(model, torch.zeros(size, 1, 5, 5)) for size in (1, 64))
    assert one == many == {"": 162 + 72, "0": 162, "1": 72, "1.1": 72}


def test_a_table_beside_the_batch_is_no_sample():
    """A mask over positions has another length than the batch and stays whole while one sample is counted."""

    class Masked(nn.Module):
        def forward(self, x, mask):
            return functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)

    x, mask = torch.randn(3, 2, 5, 4), torch.zeros(5, 5)
    assert macs(Masked(), (x, mask)) == 2 * 2 * 5 * 5 * 4


def test_a_model_without_numbers_is_judged_by_its_counts():
    model = nn.Linear(3, 4, device="meta")
    assert macs(model, torch.zeros(6, 3, device="meta")) == 12


class Forces(nn.Module):
    """A gradient is taken inside the forward, and a view of a parameter goes through a module."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.query = nn.Linear(4, 6), nn.Linear(6, 1), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.last(self.first(x).tanh())
            (forces,) = torch.autograd.grad(energy.sum(), x)
        return energy, forces, self.first(self.query.unsqueeze(0).expand(len(x), -1, -1))


def test_gradients_inside_a_forward_are_counted_and_views_of_parameters_go_through_modules() -> None:
    found = macs_by_module(Forces().eval(), torch.randn(1, 4))
    # Forwards of both layers, the queries through the first, and a product with each weight on the way back.
    assert found["first"] == 4 * 6 + 5 * 4 * 6
    assert found["last"] == 6
    assert found[""] == found["first"] + found["last"] + 6 + 4 * 6


def test_a_module_that_fails_and_is_caught_does_not_count_what_follows() -> None:
    class Fails(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    class Tries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.other = Fails(), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            try:
                return self.first(x)
            except RuntimeError:
                return self.other(x)

    outer = nn.Sequential(Tries(), nn.Linear(3, 2))
    found = macs_by_module(outer, torch.randn(1, 4))
    assert (found["0"], found["0.other"], found["1"], found[""]) == (12, 12, 6, 18)
