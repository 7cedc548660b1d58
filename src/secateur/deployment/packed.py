"""What every packed layer has, whatever it computes: a record, tensors that hold its weight, a way back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from secateur.errors import InputError, UnsupportedError


class PackedRecord(BaseModel, ABC):
    """What stands in a file about a packed layer beside its tensors: all that rebuilds it in the place of a dense one.

    Args:
        format: how its weight is packed; tells the kinds of layers apart.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    format: str

    @property
    @abstractmethod
    def parts(self) -> tuple[str, ...]:
        """Names of the tensors that hold the weight."""

    @property
    @abstractmethod
    def beside(self) -> tuple[str, ...]:
        """Names of the tensors that the layer has besides."""

    @abstractmethod
    def require(self, model: nn.Module, name: str) -> None:
        """Refuse a model that has no such layer there.

        Raises:
            PlanMismatchError: names the layer and what it is not.
        """

    @abstractmethod
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts of a weight that `PackedLayer.unpacked` gave.

        Raises:
            InputError: it is no weight of this layer.
        """

    @abstractmethod
    def build(self, tensors: Mapping[str, Tensor]) -> PackedLayer:
        """The layer around its tensors, by name.

        Raises:
            InputError: they are not what packing writes.
        """

    def layer(self, name: str, tensors: Mapping[str, Tensor]) -> PackedLayer:
        """The layer of that name from the tensors of a whole model, checked before a kernel can follow them.

        Raises:
            InputError: one is missing or damaged.
        """
        wanted = {part: joined(name, part) for part in (*self.parts, *self.beside)}
        missing = [each for each in wanted.values() if each not in tensors]
        if missing:
            raise InputError(
                f"the file has no tensor {missing[0]!a}", why=f"the layer {name!a} is packed as {self.format}"
            )
        found = self.build({part: tensors[each] for part, each in wanted.items()})
        found.check()
        return found


class PackedLayer(nn.Module, ABC):
    """A layer for inference whose weight is packed into buffers, named by its record.

    So `state_dict`, `copy.deepcopy`, safetensors, `torch.compile` and `torch.export` treat it as any other, and what
    `load_state_dict` brings is checked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_check_loaded)  # type: ignore[no-untyped-call]

    @abstractmethod
    def record(self) -> PackedRecord:
        """What a file says of it."""

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The weight as a dense layer has it, put together anew each time: for code that looks at it."""

    @property
    @abstractmethod
    def unpacked(self) -> Tensor:
        """The weight as it is stored, in one tensor: what an archive holds, and `PackedRecord.pack` takes."""

    @abstractmethod
    def check(self) -> None:
        """Refuse tensors that packing cannot have written: kernels follow them without looking.

        Raises:
            InputError: names what is damaged.
        """

    @abstractmethod
    def densify(self) -> nn.Module:
        """An ordinary layer with the same weight."""

    def absorbed(self) -> dict[str, nn.Module]:
        """Modules of the model whose work it does, by name, as they would be made anew: identities in their places.

        An `nn.Identity` stands for one that cannot be made anew, since its numbers are in the weight.
        """
        return {}

    def size_bytes(self) -> int:
        """Bytes of everything that is stored."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())


def _check_loaded(module: nn.Module, keys: object) -> None:
    assert isinstance(module, PackedLayer)
    module.check()


def joined(name: str, part: str) -> str:
    """The name of a tensor or module of a module; that of the whole model is ""."""
    return f"{name}.{part}" if name else part


def place_of(model: nn.Module, name: str) -> nn.Module | None:
    """The module of that name; None where there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The packed layers of a model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}


def install(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put modules into their places.

    Returns:
        what stood there.
    """
    before = {}
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        holder = model.get_submodule(parent)
        before[name] = getattr(holder, last)
        # In the mode of the place, so that an eval model does not get a layer that trains.
        setattr(holder, last, layer.train(before[name].training))
    return before


def in_places(layers: Mapping[str, PackedLayer]) -> dict[str, nn.Module]:
    """Packed layers, and identities in the places of modules whose work they do: what `install` takes."""
    gone: dict[str, nn.Module] = {name: nn.Identity() for layer in layers.values() for name in layer.absorbed()}
    return {**layers, **gone}


def require_absorbed(model: nn.Module) -> None:
    """Refuse a part of a model whose packed layers do the work of modules that stand elsewhere.

    Raises:
        UnsupportedError: names the layer and the module.
    """
    for name, layer in packed_layers(model).items():
        for each in layer.absorbed():
            if type(place_of(model, each)) is not nn.Identity:
                raise UnsupportedError(
                    f"the packed layer {name!a} does the work of {each!a}, which has no place in this model",
                    why="it was deployed in another model, of which this is a part or which is a part of this",
                    hint="give the model that deploy() returned",
                )


def densify(model: nn.Module) -> nn.Module:
    """Make every packed layer of a model an ordinary one again, in place.

    A norm that was folded into a layer stays in its weight and bias, and an identity in the place of the norm; a ReLU
    that the layer computed comes back to its place.

    Returns:
        the model.

    Raises:
        UnsupportedError: the model is a part of the deployed one, and lacks places of modules whose work it does.
    """
    require_absorbed(model)
    for layer in packed_layers(model).values():
        for name, module in layer.absorbed().items():
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.train(layer.training))
    for holder in list(model.modules()):
        for name, child in list(holder.named_children()):
            if isinstance(child, PackedLayer):
                setattr(holder, name, child.densify())
    return model.densify() if isinstance(model, PackedLayer) else model
