"""The one owner of masks: zeros written in place, held, changed, counted, and taken back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import InputError
from secateur.masks.hidden import put, take
from secateur.masks.hold import Dropped, Hold, forget, mask_gradients, mask_weights, moved_by
from secateur.masks.sparsity import Sparsity, masked_elements, sparsity_of
from secateur.masks.units import Masks, check, expand, first_names, resolve
from secateur.model.admit import admit
from secateur.registry import suggestion
from secateur.types import Group

# Weakly both: neither a model nor the owner of its masks lives longer for being known here.
HANDLES: WeakKeyDictionary[nn.Module, WeakSet[MaskHandle]] = WeakKeyDictionary()
_MASK, _HIDDEN = "mask.", "hidden."  # what names in `state_dict` begin with


def mask_model(
    model: nn.Module, masks: Masks, *, groups: Sequence[Group] = (), keep_originals: bool = True
) -> MaskHandle:
    """Write +0.0 where a mask is False, in place, until the handle's ``remove()``.

    Parameters keep their identity, so optimizers and hooks go on; a tied parameter is masked once, under any
    of its names. An optimizer step would move the zeros again: ``handle.hold(optimizer)`` keeps them. Expect no
    speed from zeros: dense kernels multiply them like other numbers. Masks put on top of each other are removed
    in reverse order.

    Args:
        model: changed in place.
        masks: parameter name -> bool tensor of its shape (or of size 1 in dimensions where all entries are
            equal), True = keep. They are held, not copied: change them by ``handle.update``, not in place.
        groups: where `masks` are decisions about units (rows, blocks, channels), the groups they were made for; what
            `select` made of `score` knows them.
        keep_originals: False where nobody takes the masks back: the hidden values are not stored then, and
            ``remove()`` is refused.

    Returns:
        The owner of the masks.

    Raises:
        InputError: an unknown name, or a mask of wrong shape or dtype; the model is unchanged then.
        UnsupportedError: the model is of a kind whose weights cannot be set to zero (quantised, sharded, scripted).

    Cost:
        One pass over the masked parameters. Memory: the values that are hidden, and for a moment a byte per element
        of one parameter.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> with mask_model(layer, {"weight": torch.tensor([[True, False]])}):
        ...     layer.weight[0, 1].item()
        0.0
    """
    handle = MaskHandle(admit(model, prepared=True), keep_originals=keep_originals)
    known = tuple(groups) or getattr(masks, "groups", ())  # `select` hands its groups on
    handle.update(expand(known, masks) if known else masks)
    return handle


class _Masked:
    """One masked parameter: itself, its mask, and the values under the mask (None where they are not stored)."""

    def __init__(self, parameter: nn.Parameter, keep: Tensor, hidden: Tensor | None) -> None:
        self.parameter, self.hidden = parameter, hidden
        # Tensors of inference mode do not count how often they are written to, which `version` watches: the mask is
        # the caller's, and written to in place it would no longer tell how many values are hidden.
        self.keep = keep.clone() if keep.is_inference() else keep
        self.version = self.keep._version
        self._spread: Tensor | None = None

    def drop(self) -> Tensor:
        """True at the masked places; of size 1 in dimensions where the mask is."""
        if self.keep.device != self.parameter.device:  # the model has moved
            self.keep = self.keep.to(self.parameter.device)
            self.version = self.keep._version
        return ~self.keep

    def spread(self) -> Tensor:
        """The hidden values at their places and 0 elsewhere; made once, for neither they nor the mask change."""
        assert self.hidden is not None
        found = self._spread
        if found is None or found.device != self.parameter.device or found.dtype != self.parameter.dtype:
            found = torch.zeros_like(self.parameter.detach())
            put(found, self.drop(), self.hidden.to(found))
            self._spread = found
        return found


class MaskHandle:
    """Owns the masks of a model; made by `mask_model`.

    Used as a context manager it removes the masks on exit.

    Attributes:
        model: the masked model.
        keep_originals: whether the values under the masks are stored.
    """

    def __init__(self, model: nn.Module, *, keep_originals: bool = True) -> None:
        self.model = model
        self.keep_originals = keep_originals
        self._held: dict[str, _Masked] = {}
        # Weakly: a handle that outlives a training must not keep its optimizer's moments in memory.
        self._holds: WeakKeyDictionary[Optimizer, Hold] = WeakKeyDictionary()
        self._removed = False
        HANDLES.setdefault(model, WeakSet()).add(self)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool tensor of its shape, True = keep; views, not to be written to."""
        return {name: held.keep.expand(held.parameter.shape) for name, held in self._held.items()}

    @property
    def is_held(self) -> bool:
        """Whether steps of some optimizer keep the masks."""
        return any(hold.active for hold in self._holds.values())

    def dropped(self) -> Iterator[Dropped]:
        """Masked parameters, each with a bool tensor that is True at the masked places.

        Raises:
            InputError: the masks were removed or written to, or a parameter was replaced or cut since: its masks
                would be held in vain. Raised before the first one is given.
        """
        self._require_there()
        # One after the other: all of them together would be a quarter of the weights.
        return ((held.parameter, held.drop()) for held in self._held.values())

    def _require_there(self) -> None:
        if self._removed:
            raise InputError("these masks were removed", hint="mask the model again")
        for name, held in self._held.items():
            if _parameter(self.model, name) is not held.parameter:
                raise InputError(f"{name!r} is not the parameter that was masked", hint="mask the model again")
            check(name, held.keep, tuple(held.parameter.shape))
            if held.keep._version != held.version:
                raise InputError(f"the mask of {name!r} was written to", hint="change masks by handle.update(masks)")

    # -- holding ----------------------------------------------------------------------------------------------

    def hold(self, optimizer: Optimizer) -> Hold:
        """Hold the masks through every step of an optimizer, in a training loop of your own.

        After each step masked weights are +0.0 and masked state (momentum, moments) is 0; before it, and after each
        call of a closure, masked gradients are 0. Gradients are not touched before the step: clip them after
        ``mask_gradients()``, or masked ones count in their norm. Call it once for each of several optimizers.

        Args:
            optimizer: moves masked parameters. State that is not stored per parameter in the parameter's shape
                (factored moments, compressed state) is left as it is.

        Returns:
            The hold: ``remove()`` ends it, and so does ``remove()`` of the handle. Usable in a ``with`` block.

        Raises:
            InputError: it moves no parameter of the model, so it was made for another one.

        Cost:
            One pass over masked weights, gradients and state per step.

        Example:
            >>> layer = nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
            >>> hold = mask_model(layer, {"weight": torch.tensor([[True, False]])}).hold(optimizer)
            >>> layer(torch.ones(1, 2)).sum().backward()
            >>> optimizer.step()
            >>> layer.weight[0, 1].item()
            0.0
        """
        self._require_there()
        moved = moved_by(optimizer)
        # Not "none of the masked ones": an optimizer of the norms alone is a fair choice, and may get more later.
        if not any(id(parameter) in moved for parameter in self.model.parameters()):
            raise InputError(
                "the optimizer moves no parameter of the masked model",
                hint="build it from the parameters of this model itself, not of a copy",
            )
        mask_weights(self.dropped())
        forget(optimizer, self.dropped())
        if optimizer in self._holds:  # once is enough, and the newer one is in the caller's hands
            self._holds[optimizer].remove()
        self._holds[optimizer] = Hold(self, optimizer)
        return self._holds[optimizer]

    def enforce(self) -> None:
        """Write the zeros again, after something has changed the weights."""
        mask_weights(self.dropped())

    def mask_gradients(self) -> None:
        """Write 0 into the masked gradients, for example before they are clipped by their norm."""
        mask_gradients(self.dropped())

    def unmasked(self, name: str) -> Tensor:
        """A copy of a masked parameter in which the hidden values stand at their places.

        Args:
            name: one of `masks`.

        Raises:
            InputError: no mask has this name, or the hidden values were not stored.

        Cost:
            One copy of the parameter, and another that is kept until its mask changes, so that asking at every step of
            a training is cheap.
        """
        if name not in self._held:
            raise InputError(f"no mask is called {name!r}", hint=suggestion(name, self._held))
        self._require_originals()
        held = self._held[name]
        return torch.where(held.drop(), held.spread(), held.parameter.detach())

    # -- changing ---------------------------------------------------------------------------------------------

    def update(self, masks: Masks, *, regrow: Literal["remembered", "zero"] = "remembered") -> None:
        """Replace masks. Parameters that are not named keep theirs.

        Newly masked values are remembered and become +0.0. What optimizers that are held remember of a place that
        changes sides becomes 0, so that a weight that comes back is moved by new gradients only. Moments of Adam
        that start from 0 late are not corrected for it: the first steps of such a weight are larger.

        Args:
            masks: as for `mask_model`; a mask of all True gives a parameter back.
            regrow: what newly kept weights become: "remembered", the bits that they had when they were masked, or
                "zero".

        Raises:
            InputError: as `mask_model`, or weights are to come back whose values were not stored; nothing is changed.

        Cost:
            One pass over the named parameters, and for a moment a copy of one of them.
        """
        if regrow not in ("remembered", "zero"):
            raise InputError(f"regrow={regrow!r} is not known", hint='"remembered" or "zero"')
        self._require_there()
        found = resolve(self.model, masks)
        if not self.keep_originals and regrow == "remembered":
            for name, (_, keep) in found.items():
                if name in self._held and bool((self._held[name].drop() & keep).any()):
                    raise InputError(
                        f"weights of {name!r} are to come back, but the values under the masks were not stored",
                        hint='pass regrow="zero", or mask the model with keep_originals=True',
                    )
        for name, (parameter, keep) in found.items():
            before = self._held.get(name)
            self._held[name] = _Masked(parameter, keep, self._exchange(parameter, before, ~keep, regrow))
            self._forget(parameter, before, self._held[name])

    def _exchange(self, parameter: nn.Parameter, before: _Masked | None, drop: Tensor, regrow: str) -> Tensor | None:
        """Bring one parameter from its old to its new mask; returns the values that the new one hides."""
        hidden = None
        with torch.no_grad():
            if before is not None and before.hidden is not None:
                # As if nothing had been masked: the values of then at the masked places, those of now at the others.
                full = parameter.detach().clone()
                put(full, before.drop(), before.hidden.to(full))
                hidden = take(full, drop)
                if regrow == "remembered":
                    parameter.copy_(full)
            elif self.keep_originals:
                hidden = take(parameter, drop)
            mask_weights([(parameter, drop)])
        return hidden

    def _forget(self, parameter: nn.Parameter, before: _Masked | None, after: _Masked) -> None:
        """What optimizers remember of places that were or are masked becomes 0."""
        either = after.drop() if before is None else after.drop() | before.drop()
        for optimizer, hold in self._holds.items():
            if hold.active:
                forget(optimizer, [(parameter, either)])

    def remove(self) -> None:
        """Put back the original bits of every masked element, and let optimizers move them again.

        Kept elements stay as they are now. Calling it again does nothing.

        Raises:
            InputError: the values under the masks were not stored.
        """
        self._require_originals()
        if self._removed:
            return
        self._require_there()
        for hold in self._holds.values():
            hold.remove()
        for held in self._held.values():
            assert held.hidden is not None
            put(held.parameter, held.drop(), held.hidden.to(held.parameter))
        self._held.clear()
        self._removed = True

    # -- counting, saving -------------------------------------------------------------------------------------

    def sparsity(self) -> Sparsity:
        """Zeros of the masked parameters and of the whole model, counted now."""
        return sparsity_of(self.model, {name: held.keep for name, held in self._held.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """Masks and hidden values under flat names, to be saved beside the model's own state; not copied."""
        state = {_MASK + name: held.keep for name, held in self._held.items()}
        hidden = {_HIDDEN + name: held.hidden for name, held in self._held.items() if held.hidden is not None}
        return state | hidden

    def load_state_dict(self, state: Masks) -> None:
        """Take over masks and hidden values from `state_dict`; masked weights become +0.0, the others stay.

        Load the model's own state first. Optimizers that are held follow as in `update`.

        Args:
            state: from `state_dict`, also of another handle, for a model of the same parameters.

        Raises:
            InputError: an unknown name, another shape or dtype, a mask without its hidden values, or no mask for a
                parameter that this handle masks; nothing is changed.
        """
        masks = {key.removeprefix(_MASK): value for key, value in state.items() if key.startswith(_MASK)}
        values = {key.removeprefix(_HIDDEN): value for key, value in state.items() if key.startswith(_HIDDEN)}
        if len(masks) + len(values) < len(state) or not values.keys() <= masks.keys():
            raise InputError("this is not the state of masks", hint="pass what handle.state_dict() gave")
        self._require_there()
        # Another model may tie the same parameters in another order, and know them under another name.
        first = first_names(self.model)
        values = {first.get(name, name): value for name, value in values.items()}
        found = resolve(self.model, masks)
        missing = sorted(self._held.keys() - found.keys())
        if missing:
            raise InputError(f"the state has no mask for {missing[0]!r}")
        loaded = {}
        for name, (parameter, keep) in found.items():
            # Copied: the state may be loaded into several models, or be written to.
            loaded[name] = _Masked(
                parameter, keep.clone(), self._loaded_values(name, parameter, keep, values.get(name))
            )
        for name, held in loaded.items():
            before = self._held.get(name)
            self._held[name] = held
            mask_weights([(held.parameter, held.drop())])
            self._forget(held.parameter, before, held)

    def _loaded_values(self, name: str, parameter: nn.Parameter, keep: Tensor, values: Tensor | None) -> Tensor | None:
        if not self.keep_originals:
            return None
        wanted = masked_elements(keep, parameter)
        if values is None or values.dtype != parameter.dtype or tuple(values.shape) != (wanted,):
            found = "none" if values is None else f"{values.dtype}{list(values.shape)}"
            raise InputError(
                f"the hidden values of {name!r} do not fit: {found}, not {parameter.dtype}[{wanted}]",
                hint="for masks that nobody takes back, pass keep_originals=False to mask_model",
            )
        return values.detach().to(parameter.device).clone()

    # -- context ----------------------------------------------------------------------------------------------

    def __enter__(self) -> MaskHandle:
        self._require_originals()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _require_originals(self) -> None:
        if not self.keep_originals:
            raise InputError(
                "the values under the masks were not stored, so they cannot be put back",
                hint="mask the model with keep_originals=True",
            )


def _parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """What stands under a name now; None where the module or the parameter is gone."""
    path, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(path)._parameters.get(leaf)
    except AttributeError:
        return None
