"""reduce_spans against brute force, the registry, and that scoring leaves no trace."""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.criteria import Context, Criterion, Magnitude, get, names, reduce_spans, register
from secateur.criteria.docstrings import first_sentence, section
from secateur.errors import InputError, NonFiniteError, RecipeError
from secateur.registry import suggestion
from secateur.testing import tiny_scene
from secateur.types import Group, Span


def brute_force(values, group, how):
    owned = {unit: [] for unit in range(group.size)}
    for span in group.spans:
        value = values[span.tensor].numpy().astype(np.float64)
        index = np.broadcast_to(span.index.numpy(), value.shape)
        for place in itertools.product(*map(range, value.shape)):
            if index[place] >= 0:
                owned[index[place]].append(value[place])
    join = {"sum": sum, "mean": np.mean, "max": max}[how]
    return np.array([join(v) if v else 0.0 for v in owned.values()]).reshape(group.shape)


@st.composite
def groups_with_values(draw):
    units = draw(st.integers(1, 5))
    spans, values = [], {}
    for number in range(draw(st.integers(1, 3))):
        shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        thin = [size if draw(st.booleans()) else 1 for size in shape]
        seed = draw(st.integers(0, 2**16))
        generator = torch.Generator().manual_seed(seed)
        index = torch.randint(-1, units, thin, generator=generator)
        values[f"t{number}"] = torch.randn(shape, generator=generator)
        spans.append(Span(f"t{number}", index, draw(st.sampled_from(["out", "in", "bias"]))))
    return Group("g", "channel", (units,), tuple(spans)), values


@settings(max_examples=150, deadline=None)
@given(groups_with_values(), st.sampled_from(["sum", "mean", "max"]))
def test_reduce_spans_is_brute_force(case, how):
    group, values = case
    np.testing.assert_allclose(reduce_spans(values, group, how).numpy(), brute_force(values, group, how), atol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e22])  # squares that float32 cannot hold, and plain ones
@pytest.mark.parametrize("shape", [(300, 500), (7, 5, 3, 2), (4, 6, 1, 1), (90_000, 2)])
@pytest.mark.parametrize("along", [0, 1])
def test_sums_of_squares_are_those_of_float64(scale, shape, along):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * scale
    units = shape[along]
    place = [1] * len(shape)
    place[along] = units
    span = Span("w", torch.arange(units).view(place), "in" if along else "out")
    group = Group("g", "channel", (units,), (span,))
    others = tuple(d for d in range(len(shape)) if d != along)
    exact = (weight.numpy().astype(np.float64) ** 2).sum(others)
    for laid_out in (weight, weight.transpose(0, 1).contiguous().transpose(0, 1)):
        found = reduce_spans({"w": laid_out}, group, squared=True)
        np.testing.assert_allclose(found.numpy(), exact, rtol=2e-6)


def test_roles_choose_what_counts():
    group = Group(
        "g",
        "channel",
        (2,),
        (
            Span("a", torch.tensor([[0], [1]]), "out"),
            Span("b", torch.tensor([0, 1]), "scale"),
            Span("s", torch.tensor([0, 1]), "state"),
        ),
    )
    values = {"a": torch.ones(2, 3), "b": torch.tensor([10.0, 20.0]), "s": torch.full((2,), 100.0)}
    assert reduce_spans(values, group).tolist() == [13, 23]
    assert reduce_spans(values, group, roles=frozenset({"out"})).tolist() == [3, 3]
    assert reduce_spans(values, group, "mean").tolist() == [13 / 4, 23 / 4]
    with pytest.raises(InputError, match="no tensor of group 'g'"):
        reduce_spans({}, group)


def test_elements_are_taken_as_they_are():
    value = torch.randn(2, 3)
    group = Group("w", "element", (2, 3), (Span("w", None, "self"),))
    assert torch.equal(reduce_spans({"w": value}, group), value)


def test_sums_do_not_lose_small_terms():
    value = torch.cat([torch.tensor([1e8]), torch.full((1000,), 1.0)]).view(1, -1)
    group = Group("w", "vector", (1,), (Span("w", torch.zeros(1, 1, dtype=torch.long), "self"),))
    assert reduce_spans({"w": value}, group).item() == 1e8 + 1000


def test_registry_suggests_the_nearest():
    assert "magnitude" in names()
    assert get("magnitude") == Magnitude()
    assert get("magnitude", {"norm": "l1"}) == Magnitude(norm="l1")
    with pytest.raises(RecipeError, match="did you mean 'magnitude'"):
        get("magnitud")
    with pytest.raises(RecipeError, match="did you mean 'norm'"):
        get("magnitude", {"nrom": "l1"})
    with pytest.raises(RecipeError, match="not with an object"):
        get(Magnitude(), {"norm": "l1"})
    assert suggestion("zzz", ["a", "b"]) == "known: 'a', 'b'"


def test_register_refuses_incomplete_and_double_names():
    @dataclass(frozen=True, kw_only=True)
    class Impostor(Magnitude):
        name: ClassVar[str] = "magnitude"

    with pytest.raises(TypeError, match="two criteria"):
        register(Impostor)

    class Nameless(Criterion):
        pass

    with pytest.raises(TypeError, match="name is empty"):
        register(Nameless)

    class Costless(Criterion):
        """Says where it comes from, and not what it costs.

        Source:
            Nobody, 2020.
        """

        name, summary, speed, best_for = "costless", "-", "-", "-"

    with pytest.raises(TypeError, match="docstring of Costless has no section 'Cost'"):
        register(Costless)
    assert "costless" not in names()
    assert get("magnitude").__class__ is Magnitude


def test_a_criterion_without_a_body_says_so():
    class Empty(Criterion):
        name = "empty"

    scene = tiny_scene("element")
    with pytest.raises(TypeError, match="neither contributions nor _score"):
        Empty().score(scene.context())


def test_seed_decides_what_is_random():
    class Noise(Criterion):
        name = "noise"

        def contributions(self, context):
            return {n: torch.rand(w.shape) for n, w in self.weights(context).items()}

    scene = tiny_scene("element")
    first, again, other = (Noise().score(scene.context(seed=s))["fc2.weight"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_score_checks_shape_and_finiteness():
    class Wrong(Criterion):
        name = "wrong"

        def _score(self, context):
            return {g.name: torch.zeros(1) for g in context.groups}

    class Overflow(Criterion):
        name = "overflow"

        def _score(self, context):
            return {g.name: torch.full(g.shape, 1e300, dtype=torch.float64) for g in context.groups}

    scene = tiny_scene("channel")
    with pytest.raises(TypeError, match="not \\(4,\\)"):
        Wrong().score(scene.context())
    with pytest.raises(NonFiniteError, match="overflow"):
        Overflow().score(scene.context())


def test_context_is_small_by_default():
    context = Context(nn.Linear(1, 1), [])
    assert context.data is None
    assert Magnitude().score(context) == {}


def test_sections_of_a_docstring():
    class Sample:
        """One line: with a colon.

        Args:
            cost: what Cost: means.

        Cost:
            One pass over
            the weights (Li et al. 2017). No data.

        Source: Han et al., 2015, section 3.1.

        Example:
            >>> 1
            1
        """

    assert section(Sample, "Cost") == "One pass over the weights (Li et al. 2017). No data."
    assert section(Sample, "Source") == "Han et al., 2015, section 3.1."
    assert section(Sample, "Raises") == ""
    assert first_sentence(section(Sample, "Cost")) == "One pass over the weights (Li et al. 2017)"
    assert first_sentence(section(Sample, "Source")) == "Han et al., 2015, section 3.1"
