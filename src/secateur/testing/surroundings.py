"""Checks of what stands around the scores: the model is given back as it was, and scored in any layout and dtype."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import InputError, SecateurError
from secateur.testing.scenes import TinyNet, groups_of
from secateur.testing.stage import Stage, check
from secateur.testing.tools import copy_of, expect_error, expect_same, mark, require, state_of
from secateur.types import Span

# The model is given back as it was found


@check("weights keep their bits")
def _weights(stage: Stage) -> None:
    _unchanged(stage, lambda model: {n: p.detach().clone() for n, p in model.named_parameters()})


@check("buffers keep their bits, also in train mode")
def _buffers(stage: Stage) -> None:
    _unchanged(stage, lambda model: {n: b.detach().clone() for n, b in model.named_buffers()}, train=True)


@check("parameters keep their identity and requires_grad")
def _identity(stage: Stage) -> None:
    for freeze in (False, True):
        _unchanged(stage, lambda model: [(id(p), p.requires_grad) for p in model.parameters()], freeze=freeze)


@check("training flags are restored one by one")
def _flags(stage: Stage) -> None:
    _unchanged(stage, lambda model: [m.training for m in model.modules()], train=True)


@check("gradients are left alone")
def _grads(stage: Stage) -> None:
    _unchanged(stage, lambda model: {n: copy_of(p.grad) for n, p in model.named_parameters()})


@check("hooks are left alone and none stays behind")
def _hooks(stage: Stage) -> None:
    _unchanged(stage, lambda model: [list(m._forward_hooks) + list(m._backward_hooks) for m in model.modules()])


@check("random states are restored")
def _rng(stage: Stage) -> None:
    _unchanged(stage, lambda _: (random.getstate(), str(np.random.get_state()), torch.get_rng_state()))  # noqa: NPY002


@check("a failure half way leaves no trace")
def _failure(stage: Stage) -> None:
    stage.only_if(stage.needs("data"), "reads no data")
    scene = stage.main
    mark(scene.model)
    before = state_of(scene.model)

    class Broken:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            yield scene.data[0]
            raise OSError("the disk is gone")

    with suppress(OSError, SecateurError):
        stage.score(scene, data=Broken())
        require(False, "the failure was swallowed")
    expect_same(before, state_of(scene.model), exact=True)


# Layouts and dtypes


@check("bfloat16 models are scored")
def _bfloat16(stage: Stage) -> None:
    _dtype(stage, torch.bfloat16)


@check("float16 models are scored")
def _float16(stage: Stage) -> None:
    _dtype(stage, torch.float16)


@check("float64 models score as float32 ones")
def _float64(stage: Stage) -> None:
    expect_same(stage.score(stage.main), _dtype(stage, torch.float64), tolerance=1e-3)


@check("channels_last weights score the same")
def _channels_last(stage: Stage) -> None:
    scene = stage.main
    scene.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    expect_same(stage.score(stage.main), stage.score(scene))


@check("non-contiguous weights score the same")
def _strided(stage: Stage) -> None:
    scene = stage.main
    for parameter in scene.model.parameters():
        parameter.data = torch.stack([parameter.data, parameter.data + 1], -1)[..., 0]
    expect_same(stage.score(stage.main), stage.score(scene))


@check("frozen parameters are scored or refused, never guessed")
def _frozen(stage: Stage) -> None:
    scene = stage.main
    scene.model.requires_grad_(False)
    with suppress(SecateurError):
        expect_same(stage.score(stage.main), stage.score(scene))
    require(not any(p.requires_grad for p in scene.model.parameters()), "a parameter was left unfrozen")


@check("tied weights are scored under their first name")
def _tied(stage: Stage) -> None:
    stage.only_if("element" in list(stage.scored), "does not score elements")
    scene = stage.scene("element")
    stage.only_if(isinstance(scene.model, TinyNet), "written for TinyNet")
    scene.model.add_module("alias", scene.model.get_submodule("fc2"))
    scores = stage.score(scene, groups=groups_of(scene.model, "element"))
    require("fc2.weight" in scores and "alias.weight" not in scores, f"scores of {list(scores)}")


@check("buffers beside the weights do not count")
def _only_weights(stage: Stage) -> None:
    kinds = [kind for kind in stage.scored if kind != "element"]  # an element has no other places
    stage.only_if(bool(kinds), "scores elements only")
    alone, beside = stage.scene(kinds[0]), stage.scene(kinds[0])
    group = beside.groups[0]
    number = torch.arange(group.size)
    tables = {"out": number.float() * 100, "in": number, "scale": number > 0}
    for role, table in tables.items():
        beside.model.register_buffer(f"table_{role}", table)
    more = tuple(Span(f"table_{role}", number, role) for role in tables)
    groups = [replace(group, spans=(*more, *group.spans)), *beside.groups[1:]]
    expect_same(stage.score(alone), stage.score(beside, groups=groups), exact=True)


@check("a model without values is scored or refused by name")
def _meta(stage: Stage) -> None:
    whole, scene = stage.main, stage.main
    scene.model.to("meta")
    if stage.criterion.reads == "nothing":
        expect_same(stage.score(whole), stage.score(scene), exact=True)
    else:
        expect_error(InputError, lambda: stage.score(scene), "has no values yet")


@check("a GPU gives the scores of the CPU")
def _gpu(stage: Stage) -> None:
    stage.only_if(torch.cuda.is_available(), "no CUDA device here")
    for kind in stage.scored:
        here, there = stage.scene(kind), stage.scene(kind)
        # In float64, since convolutions of a GPU may round float32 to TF32.
        expected = stage.score(replace(here, model=here.model.double(), data=[(x.double(), y) for x, y in here.data]))
        data = [(x.double().cuda(), y.cuda()) for x, y in there.data]
        found = stage.score(replace(there, model=there.model.double().cuda(), data=data))
        expect_same(expected, {name: score.cpu() for name, score in found.items()})


def _dtype(stage: Stage, dtype: torch.dtype) -> dict[str, Tensor]:
    scene = stage.main
    data = [(x.to(dtype), y) for x, y in scene.data]
    scores = stage.score(replace(scene, model=scene.model.to(dtype), data=data))
    require(all(s.dtype == torch.float32 and bool(s.isfinite().all()) for s in scores.values()), f"{scores}")
    return scores


def _unchanged(stage: Stage, look: Callable[[nn.Module], Any], *, train: bool = False, freeze: bool = False) -> None:
    scene = stage.main
    if train:
        scene.model.train()
    mark(scene.model, freeze=freeze)
    before = look(scene.model)
    with suppress(SecateurError) if freeze else nullcontext():  # frozen parameters may be refused
        stage.score(scene)
    after = look(scene.model)
    if not isinstance(before, dict):
        before, after = dict(enumerate(before)), dict(enumerate(after))
    expect_same(before, after, exact=True)
