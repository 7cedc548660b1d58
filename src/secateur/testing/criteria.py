"""The contract that every criterion keeps, as a list of named checks.

Run all of them with `check_criterion`, or parametrise a test over `CHECKS`:

    @pytest.mark.parametrize("check", CHECKS, ids=str)
    def test_contract(check):
        check(MyCriterion)
"""

from __future__ import annotations

import copy

import torch

from secateur.criteria.base import DOCUMENTED, NEEDS, PROMISES, STATED, get, names
from secateur.criteria.docstrings import section
from secateur.errors import InputError, NonFiniteError, RecipeError, SecateurError
from secateur.registry import build
from secateur.testing.scenes import SceneMaker, TinyNet, groups_of, tiny_scene
from secateur.testing.stage import CHECKS, KINDS, Factory, Stage, check
from secateur.testing.tools import (
    erase_unit,
    expect_error,
    expect_same,
    reorder_units,
    require,
)
from secateur.types import Group, Span


def check_criterion(
    factory: Factory, *, make_scene: SceneMaker = tiny_scene, kinds: tuple[str, ...] = KINDS
) -> dict[str, str]:
    """Run every check.

    Args:
        factory: makes the criterion; its class will do where every option has a default.
        make_scene: granularity -> fresh scene, for criteria that need a model of their own.
        kinds: granularities that `make_scene` knows.

    Returns:
        name of the check -> "" where it holds, or why it says nothing about this criterion.

    Raises:
        AssertionError: names every check that fails, and how.

    Example:
        >>> from secateur.criteria import Magnitude
        >>> check_criterion(Magnitude)["scores are finite"]
        ''
    """
    results, failures = {}, []
    for each in CHECKS:
        try:
            results[each.name] = each(factory, make_scene=make_scene, kinds=kinds)
        except (AssertionError, SecateurError, RuntimeError, TypeError, ValueError, LookupError) as error:
            failures.append(f"{each.name}: {type(error).__name__}: {error}")
    require(not failures, f"{len(failures)} of {len(CHECKS)} checks fail\n" + "\n".join(failures))
    return results


# Description and options


@check("metadata is complete")
def _metadata(stage: Stage) -> None:
    c = stage.criterion
    for attribute in STATED:
        require(bool(getattr(c, attribute, "").strip()), f"{attribute} is empty")
    require(bool(c.granularities), "granularities is empty")
    require(c.needs <= NEEDS, f"needs {set(c.needs)}")
    require(c.promises <= PROMISES, f"promises {set(c.promises)}")
    require(bool((type(c).__doc__ or "").strip()), "no docstring")
    for title in DOCUMENTED:
        require(bool(section(type(c), title)), f"the docstring has no section {title!r}")


@check("a registered name gives this class")
def _registered(stage: Stage) -> None:
    stage.only_if(stage.criterion.name in names(), "not registered")
    require(isinstance(get(stage.criterion.name), type(stage.criterion)), "another class has this name")


@check("an object is taken as it is")
def _object(stage: Stage) -> None:
    require(get(stage.criterion) is stage.criterion, "get(criterion) is another object")


@check("options rebuild the criterion")
def _options(stage: Stage) -> None:
    options = stage.criterion.options()
    rebuilt = build(type(stage.criterion), "criterion", options)
    require(rebuilt.options() == options, f"{rebuilt.options()} is not {options}")
    expect_same(rebuilt.score(stage.main.context()), stage.score(stage.main))


@check("an unknown option is refused")
def _unknown_option(stage: Stage) -> None:
    expect_error(
        RecipeError, lambda: build(type(stage.criterion), "criterion", {**stage.criterion.options(), "nrom": 1}), "nrom"
    )


@check("scoring leaves the options alone")
def _stateless(stage: Stage) -> None:
    before = copy.deepcopy(stage.criterion.options())
    stage.criterion.score(stage.main.context())
    require(stage.criterion.options() == before, "options changed")


# Form of the scores


@check("every group gets one score and nothing else does")
def _names(stage: Stage) -> None:
    for _, scene, scores in stage.scores():
        require(list(scores) == [g.name for g in scene.groups], f"scores of {list(scores)}")


@check("scores have the shape of the group")
def _shape(stage: Stage) -> None:
    for _, scene, scores in stage.scores():
        for group in scene.groups:
            require(tuple(scores[group.name].shape) == group.shape, f"{group.name}: {scores[group.name].shape}")


@check("scores are float32")
def _float32(stage: Stage) -> None:
    for *_, scores in stage.scores():
        require(all(s.dtype == torch.float32 for s in scores.values()), "another dtype")


@check("scores are finite")
def _finite(stage: Stage) -> None:
    for *_, scores in stage.scores():
        require(all(bool(s.isfinite().all()) for s in scores.values()), "NaN or Inf")


@check("scores are detached and contiguous")
def _detached(stage: Stage) -> None:
    for *_, scores in stage.scores():
        require(not any(s.requires_grad for s in scores.values()), "a score requires grad")
        require(all(s.is_contiguous() for s in scores.values()), "a score is a strided view")


@check("scores share no memory with the model")
def _own_memory(stage: Stage) -> None:
    for _, scene, scores in stage.scores():
        owned = {p.untyped_storage().data_ptr() for p in scene.model.parameters()}
        require(not any(s.untyped_storage().data_ptr() in owned for s in scores.values()), "a score is a weight")


@check("no groups give no scores")
def _no_groups(stage: Stage) -> None:
    require(stage.score(stage.main, groups=[]) == {}, "scores without groups")


@check("a group of one unit is scored")
def _one_unit(stage: Stage) -> None:
    scene = stage.main
    for group in scene.groups:
        first = [Span(s.tensor, s.index.where(s.index < 1, -1), s.role) for s in group.spans if s.index is not None]
        stage.only_if(bool(first), "units are elements")
        one = Group(group.name, group.granularity, (1,), tuple(first), attributes=group.attributes)
        require(tuple(stage.score(scene, groups=[one])[group.name].shape) == (1,), "not one score")


@check("the order of the groups does not matter")
def _order(stage: Stage) -> None:
    scene = stage.main
    expect_same(stage.score(scene), stage.score(scene, groups=scene.groups[::-1]))


# The same in, the same out


@check("the same seed gives the same bits")
def _deterministic(stage: Stage) -> None:
    expect_same(stage.score(stage.main), stage.score(stage.main), exact=True)


@check("the callers' random state does not matter")
def _global_rng(stage: Stage) -> None:
    first = stage.score(stage.main)
    with torch.random.fork_rng(devices=[]):
        torch.rand(7)
        expect_same(first, stage.score(stage.main), exact=True)


@check("train or eval mode of the model does not matter")
def _mode(stage: Stage) -> None:
    training = stage.main
    training.model.train()
    expect_same(stage.score(stage.main), stage.score(training))


@check("works inside no_grad and inference_mode")
def _no_grad(stage: Stage) -> None:
    expected = stage.score(stage.main)
    with torch.no_grad():
        expect_same(expected, stage.score(stage.main))
    scene = stage.main
    with torch.inference_mode():
        expect_same(expected, stage.score(scene))


@check("reordered units keep their scores")
def _permutation(stage: Stage) -> None:
    stage.only_if("permutation" in stage.criterion.promises, "not promised")
    stage.only_if(isinstance(stage.main.model, TinyNet), "written for TinyNet")
    for kind in (scored for scored in stage.scored if scored not in ("block", "n:m", "expert", "layer")):
        scene, turned = stage.scene(kind), stage.scene(kind)
        unit = groups_of(turned.model, "neuron" if kind == "neuron" else "channel")[0]
        order = torch.arange(unit.size).roll(1)
        reorder_units(turned.model, unit, order)
        name = scene.groups[0].name
        expect_same({name: stage.score(scene)[name][order]}, {name: stage.score(turned)[name]})


@check("the split into batches does not matter")
def _batches(stage: Stage) -> None:
    stage.only_if("batch_split" in stage.criterion.promises, "not promised")
    scene = stage.main
    singles = [(x[i : i + 1], y[i : i + 1]) for x, y in scene.data for i in range(len(x))]
    x, y = (torch.cat(part) for part in zip(*scene.data, strict=True))
    uneven = [(x[:3], y[:3]), (x[3:], y[3:])]
    for data in (singles, uneven, [(x, y)]):
        expect_same(stage.score(scene), stage.score(scene, data=data))


@check("nothing scores below a unit of zeros")
def _zero_unit(stage: Stage) -> None:
    stage.only_if("zero_lowest" in stage.criterion.promises, "not promised")
    for kind in stage.scored:
        scene = stage.scene(kind)
        group = scene.groups[0]
        erase_unit(scene.model, group, unit=1)
        scores = stage.score(scene)[group.name].flatten()
        require(bool((scores >= scores[1]).all()), f"{kind}: zeros score {scores[1]}, the lowest is {scores.min()}")


# Refusals


@check("NaN in a weight is refused by name and index")
def _nan(stage: Stage) -> None:
    _poison(stage, float("nan"))


@check("Inf in a weight is refused by name and index")
def _inf(stage: Stage) -> None:
    _poison(stage, float("inf"))


@check("an unknown tensor is refused")
def _unknown_tensor(stage: Stage) -> None:
    scene = stage.main
    group = Group("g", scene.groups[0].granularity, (1,), (Span("conv9.weight", torch.zeros(1).long(), "out"),))
    expect_error(InputError, lambda: stage.score(scene, groups=[group]), "conv9.weight")


@check("a granularity that is not listed is refused")
def _granularity(stage: Stage) -> None:
    stage.only_if("any" not in stage.criterion.granularities, "scores any granularity")
    scene = stage.main
    group = scene.groups[0]
    alien = Group(group.name, "no such granularity", group.shape, group.spans)
    expect_error(RecipeError, lambda: stage.score(scene, groups=[alien]), "no such granularity")


@check("missing data is refused")
def _no_data(stage: Stage) -> None:
    stage.only_if(stage.needs("data") or stage.needs("labels"), "reads no data")
    expect_error(RecipeError, lambda: stage.score(stage.main, data=None), "data")


@check("without a loss that of the labels is taken")
def _default_loss(stage: Stage) -> None:
    stage.only_if(stage.needs("labels"), "uses no labels")
    stage.only_if(isinstance(stage.main.model, TinyNet), "written for TinyNet")
    expect_same(stage.score(stage.main), stage.score(stage.main, loss=None))


@check("without a loss and labels it is refused")
def _no_labels(stage: Stage) -> None:
    stage.only_if(stage.needs("labels"), "uses no labels")
    scene = stage.main
    expect_error(SecateurError, lambda: stage.score(scene, data=[x for x, _ in scene.data], loss=None), "")


@check("empty data is refused")
def _empty_data(stage: Stage) -> None:
    stage.only_if(stage.needs("data"), "reads no data")
    expect_error(SecateurError, lambda: stage.score(stage.main, data=[]), "")


@check("progress counts up to its total")
def _progress(stage: Stage) -> None:
    seen: list[tuple[int, int]] = []
    stage.score(stage.main, progress=lambda done, total: seen.append((done, total)))
    stage.only_if(bool(seen), "reports no progress")
    require(all(0 <= d <= t or t == 0 for d, t in seen), f"progress {seen}")


def _poison(stage: Stage, value: float) -> None:
    scene = stage.main
    span = next(s for s in scene.groups[0].spans if s.role in ("out", "self"))
    weight = scene.model.get_parameter(span.tensor)
    index = (1,) + (0,) * (weight.dim() - 1)
    weight.data[index] = value
    expect_error(NonFiniteError, lambda: stage.score(scene), span.tensor)
    expect_error(NonFiniteError, lambda: stage.score(scene), str(index))
