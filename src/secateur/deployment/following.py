"""What directly and solely takes the output of a convolution: read off the graph of a run, and never guessed.

A norm goes into the convolution in front of it only if nothing else reads what lies between them. Known is what the run
on the examples shows, and other branches that a capture looks at (`secateur.structure.capture`); where the code around
could go another way that was not seen, norm and ReLU stay.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from secateur.deployment.convolution import folded
from secateur.deployment.packed import install
from secateur.deployment.reaching import Places, is_hooked, places_of
from secateur.errors import SecateurError
from secateur.model.call import call
from secateur.model.guard import evaluating
from secateur.structure.capture import capture
from secateur.structure.conditions import SEEN
from secateur.structure.trace import Step, Trace, numbers_in
from secateur.types import Example

_CONVOLUTION = torch.ops.aten.convolution.default
_NORM = torch.ops.aten.native_batch_norm.default
_RELUS = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)


@dataclass(frozen=True)
class Behind:
    """What a packed convolution may do besides, by name of the module; "" = nothing.

    Args:
        norm: an evaluation-mode `nn.BatchNorm2d`.
        relu: an `nn.ReLU`, behind the norm or, where no norm follows, behind the convolution itself.
        stays: why a norm that follows is not among them, in words.
    """

    norm: str = ""
    relu: str = ""
    stays: str = ""


def behind(model: nn.Module, names: Collection[str], examples: Sequence[Example]) -> dict[str, Behind]:
    """What follows some convolutions of a model.

    Args:
        model: left as it is.
        names: of the convolutions.
        examples: what forwards take.

    Cost: one capture on all examples, and two forward passes on the first.
    """
    if not names:
        return {}
    try:
        trace = capture(model, examples[0], examples=examples[1:])
    except SecateurError as error:
        return {name: Behind(stays=f"the graph of the model is not known ({error.what})") for name in names}
    modules, places = dict(model.named_modules()), places_of(model)
    graph = _Graph(trace, modules, places)
    chains = {name: graph.behind(name) for name in names}
    kept = _kept(model, {each for name, one in chains.items() for each in (name, one.norm) if each}, examples[0])
    found = {name: graph.without(name, one, kept) for name, one in chains.items()}
    problem = _missed(model, [each for one in found.values() for each in (one.norm, one.relu) if each], examples[0])
    if problem:
        return {name: Behind(stays=problem if one.norm else one.stays) for name, one in found.items()}
    return found


class _Graph:
    """The runs of a capture, asked for pairs of modules that nothing stands between."""

    def __init__(self, trace: Trace, modules: dict[str, nn.Module], places: Places) -> None:
        self.modules, self.places = modules, places
        self.conditions = [each for each in trace.conditions if each.where and not each.text.endswith(SEEN)]
        self.first = _Run(trace)
        self.runs = [self.first, *map(_Run, (*trace.further, *trace.beside))]

    def behind(self, name: str) -> Behind:
        """What follows a convolution, as far as the runs tell."""
        steps = self.first.at.get(name, [])
        if len(steps) != 1 or steps[0].func is not _CONVOLUTION or self._elsewhere(self.modules[name]):
            return Behind()
        step = steps[0]
        norm, stays = self._next(step, nn.BatchNorm2d), ""
        if norm:
            stays = self._stays(name, norm)
            if stays:
                return Behind(stays=stays)
            [step] = [each for each in self.first.at[norm] if each.func is _NORM]
        relu = self._next(step, nn.ReLU)
        if relu and not self._relu_goes(norm or name, relu):
            relu = ""
        return Behind(norm, relu)

    def without(self, name: str, found: Behind, kept: Collection[str]) -> Behind:
        """The same without what reads outputs that the forward keeps for others."""
        if found.norm and name in kept:
            return Behind(stays="what lies between them is kept by the forward")
        if not found.relu or (found.norm or name) not in kept or self._in_place(found.relu):
            return found
        return Behind(found.norm)

    def _next(self, step: Step, kind: type[nn.Module]) -> str:
        """The module of a class that takes the first result of a step first; "" = something else does, or nothing."""
        user = next(iter(self.first.uses.get(step.outputs[0], [])), None)
        name = user.place.module if user is not None else ""
        return name if type(self.modules.get(name)) is kind else ""

    def _stays(self, name: str, norm: str) -> str:
        layer, module = self.modules[name], self.modules[norm]
        assert isinstance(layer, nn.Conv2d)
        assert isinstance(module, nn.BatchNorm2d)
        if module.training:
            return "it is in training mode"
        if module.running_mean is None or module.running_var is None:
            return "it has no running statistics"
        if is_hooked(module):
            return "hooks are registered on it"
        if self._elsewhere(module):
            return "it, or a tensor of it, stands in another place too"
        tensors = [each for each in (*module.parameters(), *module.buffers()) if each.is_floating_point()]
        if any(each.dtype != torch.float32 or each.device.type != "cpu" for each in tensors):
            return "it is not of float32 on the CPU"
        if sum(each.func is _NORM for each in self.first.at[norm]) != 1:
            return "it is called more than once"
        if not all(run.pair(name, norm) and run.own(name) and run.own(norm) for run in self.runs):
            return "something else reads what lies between them, or its tensors"
        if not all(bool(each.isfinite().all()) for each in folded(layer, module)):
            return "with it the weights would not be finite"
        return self._other_ways(name, norm)

    def _relu_goes(self, name: str, relu: str) -> bool:
        module, steps = self.modules[relu], self.first.at[relu]
        fits = len(steps) == 1 and steps[0].func in _RELUS and not is_hooked(module) and not self._elsewhere(module)
        return fits and all(run.pair(name, relu) for run in self.runs) and not self._other_ways(name, relu)

    def _in_place(self, relu: str) -> bool:
        return self.first.at[relu][0].func is _RELUS[1]

    def _elsewhere(self, module: nn.Module) -> bool:
        """Whether a module or a tensor of it stands in two places."""
        own = (module, *module._parameters.values(), *module._buffers.values())
        return any(each is not None and len(self.places[id(each)]) > 1 for each in own)

    def _other_ways(self, *names: str) -> str:
        """Where the code that hands one's output to the other could go ways that were not seen, in words."""
        paths = [name.split(".") for name in names]
        shared = 0
        while shared < min(map(len, paths)) and len({path[shared] for path in paths}) == 1:
            shared += 1
        around = {".".join(path[:end]) for path in paths for end in range(shared, len(path))}
        for each in self.conditions:
            if each.module in around:
                return f"the code around them could go another way: {each}"
        return ""


class _Run:
    """One run: which steps read a tensor, and which steps are those of a module."""

    def __init__(self, trace: Trace) -> None:
        self.outputs = set(trace.outputs)
        self.names = trace.names
        self.uses: dict[int, list[Step]] = {}
        self.at: dict[str, list[Step]] = {}
        for step in trace.steps:
            self.at.setdefault(step.place.module, []).append(step)
            for number in dict.fromkeys((*numbers_in(step.args), *numbers_in(step.kwargs))):
                self.uses.setdefault(number, []).append(step)

    def pair(self, before: str, after: str) -> bool:
        """Whether what one module makes goes to the other alone, and this takes nothing else."""
        made = {number for step in self.at.get(before, []) for number in step.outputs}
        if not all(self._goes_to(number, before, after) for number in made):
            return False
        known = set(made)
        for step in self.at.get(after, []):
            for number in (*numbers_in(step.args), *numbers_in(step.kwargs)):
                if number not in known and not self.names.get(number, "").startswith(f"{after}."):
                    return False
            known.update(step.outputs)  # only now: what is written in place was somebody's before
        return True

    def _goes_to(self, number: int, before: str, after: str) -> bool:
        if self.names.get(number, "").startswith(f"{before}."):
            return True  # its own, which it writes to
        for step in self.uses.get(number, []):
            if step.place.module == after and number in step.outputs:
                return True  # overwritten: from here on it is what the other module makes
            if step.place.module not in (before, after):
                return False
        return number not in self.outputs

    def own(self, name: str) -> bool:
        """Whether the tensors of a module are read by it alone."""
        numbers = [number for number, each in self.names.items() if each.rpartition(".")[0] == name]
        others = (step for number in numbers for step in self.uses.get(number, []) if step.place.module != name)
        return not self.outputs.intersection(numbers) and next(others, None) is None


def _kept(model: nn.Module, names: Collection[str], example: Example) -> set[str]:
    """Modules whose outputs are still there when the forward has ended: an attribute, a list or a closure has them."""
    seen: list[tuple[str, weakref.ref[Tensor]]] = []
    handles = [model.get_submodule(name).register_forward_hook(_watcher(name, seen)) for name in names]
    try:
        with evaluating(model, example=example):
            call(model, example)
            return {name for name, one in seen if one() is not None}
    finally:
        for handle in handles:
            handle.remove()


def _missed(model: nn.Module, names: Collection[str], example: Example) -> str:
    """Whether the forward asks modules for more than outputs (a dtype, a width), in words: identities have none."""
    originals = install(model, {name: nn.Identity() for name in names})
    try:
        with evaluating(model, example=example):
            call(model, example)
    except Exception as error:
        return f"the forward fails with identities in the places of norms and ReLUs ({type(error).__name__}: {error})"
    finally:
        install(model, originals)
    return ""


def _watcher(name: str, seen: list[tuple[str, weakref.ref[Tensor]]]) -> Callable[..., None]:
    def watch(module: nn.Module, args: object, output: object) -> None:
        if isinstance(output, Tensor):
            seen.append((name, weakref.ref(output)))

    return watch
