"""Which weights of a model masks can cover, and which are left out, each with its reason.

Covered is every floating-point parameter of two or more dimensions that takes part in a product. Of torch's own layers
the class says so; of parameters that user code holds itself, the recorded run on the example does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.kinds.weights.weight import Weight
from secateur.model.carried import parametrizations, refuse_carried_masks
from secateur.model.protect import protected
from secateur.model.tensors import require_shapes
from secateur.statistics.activations.observe import Flow
from secateur.structure import rules
from secateur.structure.capture import capture
from secateur.structure.rules.base import base_name
from secateur.structure.trace import Step, Trace
from secateur.types import Example, LeftOut

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
CELL_WEIGHTS = ("weight_ih", "weight_hh")
CONVOLUTIONS = frozenset(["convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution"])
LOOKED_UP = frozenset(["embedding", "_embedding_bag"])
# Calls of torch's older interface that compute a weight in a hook before every forward.
HOOKS = {"WeightNorm": "torch.nn.utils.remove_weight_norm", "SpectralNorm": "torch.nn.utils.remove_spectral_norm"}


@dataclass(frozen=True, eq=False)
class Found:
    """Weights of a model, sorted by what masks can do with them.

    Args:
        weights: those that are split into units.
        left_out: all others of two or more dimensions that are not protected.
    """

    weights: tuple[Weight, ...]
    left_out: tuple[LeftOut, ...]


def find_weights(
    model: nn.Module, protect: Collection[str] = (), *, example: Example = None, embeddings: bool = False
) -> Found:
    """Sort the parameters of two or more dimensions.

    Args:
        model: left as it is.
        protect: names or patterns that stay whole; they are named nowhere.
        example: what one forward takes: shows what becomes of parameters that no layer of torch holds.
        embeddings: whether tables of embeddings, and weights that are tied to them, are covered.

    Raises:
        RecipeError: a pattern of `protect` matches nothing.
        InputError: a weight of a lazy module that has no shape yet.
        UnsupportedError: the model carries masks of torch; see `secateur.import_masks`.

    Cost: no weight is read. One capture of the forward where the model holds parameters by itself and an example is
        given.
    """
    # A weight that torch masks is no parameter, and its layer would be left out without a word.
    refuse_carried_masks(model)
    require_shapes(model)
    sorting = _Sorting(model, protect, embeddings=embeddings)
    for module in model.modules():
        sorting.sort(module)
    rest = sorting.rest()
    if rest and example is not None:
        sorting.by_use(rest, capture(model, example))
    else:
        for name, parameter in rest.items():
            sorting.leave(name, parameter, "no layer of torch holds it, and only a run shows whether it is multiplied",
                          "give an example of the forward's inputs", wanted=not _is_vector(parameter))  # fmt: skip
    return sorting.found()


class _Sorting:
    """The parameters of a model on their way into `Found`."""

    def __init__(self, model: nn.Module, protect: Collection[str], *, embeddings: bool) -> None:
        self.model, self.embeddings = model, embeddings
        self.names: dict[int, str] = {}
        self.order: dict[str, int] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), name)
            self.order.setdefault(name, len(self.order))
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.tables = {id(m.weight) for m in model.modules() if isinstance(m, EMBEDDINGS)}
        self.done: set[int] = set(protected(model, protect))
        self.weights: dict[str, Weight] = {}
        self.left: dict[str, LeftOut] = {}

    def found(self) -> Found:
        return Found(
            tuple(self.weights.values()), tuple(sorted(self.left.values(), key=lambda one: self.order.get(one.name, 0)))
        )

    def rest(self) -> dict[str, nn.Parameter]:
        """What nothing has decided about: parameters that user code holds itself."""
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if id(parameter) not in self.done and _is_matrix(parameter)
        }

    def take(self, parameter: nn.Parameter, *, transposed: bool = False, matrix: bool = True,
             dims: tuple[int, int] | None = (0, 1)) -> None:  # fmt: skip
        """Cover a parameter, unless it is spared or known already."""
        if id(parameter) in self.done or not _is_matrix(parameter):
            return
        self.done.add(id(parameter))
        name = self.names[id(parameter)]
        self.weights[name] = Weight(name, tuple(parameter.shape), transposed, matrix, dims)

    def leave(self, name: str, parameter: Tensor, why: str, hint: str = "", *, wanted: bool = False) -> None:
        """Leave a parameter out, and say why."""
        if id(parameter) not in self.done:
            self.done.add(id(parameter))
            self.left[name] = LeftOut(name, parameter.numel(), why, hint, wanted)

    # -- by the class of the module ----------------------------------------------------------------------------

    def sort(self, module: nn.Module) -> None:
        """What a module says about its own parameters."""
        self._computed(module)
        # By class name: transformers need not be installed, and older versions keep the class elsewhere.
        conv1d = any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers") for c in type(module).__mro__)
        for parameter in _weights_of(module, conv1d=conv1d):
            if id(parameter) in self.tables:
                continue
            self.take(parameter, transposed=conv1d or isinstance(module, TRANSPOSED))
        bilinear = module._parameters.get("weight") if isinstance(module, nn.Bilinear) else None
        if bilinear is not None:
            self.take(bilinear, matrix=False, dims=None)
        if isinstance(module, EMBEDDINGS):
            table = module._parameters.get("weight")
            if table is not None:
                self._table(table)
        elif _is_norm(module):
            for held in module._parameters.values():
                if held is not None and _is_matrix(held):
                    self.leave(self.names[id(held)], held, "it scales or shifts, and takes part in no product")

    def _table(self, weight: nn.Parameter) -> None:
        if self.embeddings:
            self.take(weight)
        else:
            self.leave(
                self.names[id(weight)],
                weight,
                "it is the table of an embedding" + self._tied(weight),
                'ask for it: granularity={"name": ..., "embeddings": True}',
            )

    def _tied(self, weight: nn.Parameter) -> str:
        own = self.names[id(weight)]
        named = self.model.named_parameters(remove_duplicate=False)
        others = [name for name, parameter in named if parameter is weight and name != own]
        return f", tied to {others[0]}" if others else ""

    def _computed(self, module: nn.Module) -> None:
        """Parameters that a weight is computed from: their zeros are not those of the weight."""
        path = self.paths[id(module)]
        if parametrize.is_parametrized(module):
            for attribute, steps in parametrizations(module).items():
                kinds = ", ".join(dict.fromkeys(type(step).__name__ for step in steps))
                hint = f"torch.nn.utils.parametrize.remove_parametrizations(model.{path or '...'}, {attribute!r})"
                self._hidden(f"{path}.{attribute}".lstrip("."), list(steps.parameters()), kinds, hint)
        for hook in module._forward_pre_hooks.values():
            kind = type(hook).__name__
            if kind in HOOKS and type(hook).__module__.startswith("torch.nn.utils."):
                attribute = str(vars(hook)["name"])
                owned = [p for n, p in module._parameters.items() if p is not None and n.startswith(f"{attribute}_")]
                hint = f"{HOOKS[kind]}(model.{path or '...'}, {attribute!r})"
                self._hidden(f"{path}.{attribute}".lstrip("."), owned, kind, hint)

    def _hidden(self, name: str, parameters: list[nn.Parameter], kinds: str, remove: str) -> None:
        mine = [p for p in parameters if id(p) not in self.done]
        self.done.update(map(id, mine))
        if any(map(_is_matrix, mine)):
            self.order.setdefault(name, self.order[self.names[id(mine[0])]])
            self.left[name] = LeftOut(
                name,
                max(p.numel() for p in mine),
                f"it is computed anew in every forward ({kinds}), from parameters whose zeros are not its own",
                f"make it an ordinary weight first: {remove}",
                wanted=True,
            )

    # -- by what a run does with it ----------------------------------------------------------------------------

    def by_use(self, rest: Mapping[str, nn.Parameter], trace: Trace) -> None:
        """Decide about parameters that user code holds itself by the calls that read them."""
        flow = Flow(trace)
        products: dict[str, tuple[Step, int]] = {}
        others: dict[str, list[Step]] = {}
        for step in trace.steps:
            made = {n for n, *_ in step.contracted if any(m in flow.activations for m, *_ in step.contracted)}
            for number in Flow.read(step):
                name = "" if number in flow.activations else flow.source(number)[0]
                if name not in rest or flow.moves(step):
                    continue
                if number in made:
                    products.setdefault(name, (step, number))
                else:
                    others.setdefault(name, []).append(step)
        for name, parameter in rest.items():
            if name in products:
                self._multiplied(parameter, flow, *products[name])
            elif self.embeddings and any(base_name(step.func) in LOOKED_UP for step in others.get(name, [])):
                self.take(parameter)
            else:
                self._otherwise(name, parameter, others.get(name, []))

    def _multiplied(self, parameter: nn.Parameter, flow: Flow, step: Step, number: int) -> None:
        summed = next(d for n, d, _ in step.contracted if n == number)
        if base_name(step.func) in CONVOLUTIONS:
            self.take(parameter, transposed=summed == 0)
            return
        dims = _layout(parameter, flow, number, summed)
        if parameter.dim() == 2 and dims is not None:
            self.take(parameter, transposed=dims[1] == 0)
        else:
            self.take(parameter, matrix=False, dims=dims)

    def _otherwise(self, name: str, parameter: nn.Parameter, steps: list[Step]) -> None:
        strange = [step for step in steps if not rules.known(step.func)]
        if strange:
            self.leave(name, parameter, f"{base_name(strange[0].func)} reads it, an operator that nobody here knows",
                       "protect it, or use it in a matrix product", wanted=True)  # fmt: skip
        elif not steps:
            self.leave(name, parameter, "the forward does not reach it on the example",
                       "give an example that does", wanted=not _is_vector(parameter))  # fmt: skip
        else:
            used = ", ".join(dict.fromkeys(base_name(step.func) for step in steps[:3]))
            self.leave(name, parameter, f"it takes part in no product (it is read by {used})")


def _weights_of(module: nn.Module, *, conv1d: bool) -> Iterator[nn.Parameter]:
    if isinstance(module, nn.MultiheadAttention):
        attributes: tuple[str, ...] = ATTENTION_WEIGHTS
    elif isinstance(module, nn.RNNBase):
        attributes = tuple(name for name in module._parameters if name.startswith("weight_"))
    elif isinstance(module, nn.RNNCellBase):
        attributes = CELL_WEIGHTS
    else:
        attributes = ("weight",) if conv1d or isinstance(module, LAYERS) else ()
    for attribute in attributes:
        parameter = module._parameters.get(attribute)
        if parameter is not None:
            yield parameter


def _is_matrix(parameter: Tensor | None) -> bool:
    return parameter is not None and parameter.dim() > 1 and (parameter.is_floating_point() or parameter.is_complex())


def _is_vector(parameter: Tensor) -> bool:
    """Whether all dimensions but one are 1: a token, a scale, a shift."""
    return sum(size > 1 for size in parameter.shape) < 2


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase))


def _layout(parameter: Tensor, flow: Flow, number: int, summed: int) -> tuple[int, int] | None:
    """(output, input) dimension of a parameter, told by the strides with which a product reads it; None: not told.

    Args:
        parameter: the parameter.
        flow: of the run.
        number: of the operand.
        summed: its dimension that the product sums over.
    """
    # On the meta device: views are made, and nothing is copied. Whatever copies makes strides of its own.
    seen = torch.empty_strided(parameter.shape, parameter.stride(), device="meta", dtype=parameter.dtype)
    base, read = seen, seen
    for call, position in flow.source(number)[1]:
        result = call.func(read, *call.args[1:], **call.kwargs)
        read = result if isinstance(result, Tensor) else result[position]
    if read._base is not base and read is not base:
        return None
    free = read.dim() - 1 if summed % read.dim() != read.dim() - 1 else read.dim() - 2
    places = {stride: d for d, (size, stride) in enumerate(zip(base.shape, base.stride(), strict=True)) if size > 1}
    into, out = places.get(read.stride(summed)), places.get(read.stride(free))
    return None if into is None or out is None or into == out else (out, into)
