"""Movement pruning: scores that are trained with the weights say which of them stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from secateur.amounts import select
from secateur.errors import InputError, RecipeError
from secateur.kinds.weights.granularity import STRUCTURAL
from secateur.masks import MaskHandle
from secateur.model.admit import admit
from secateur.model.call import device_of
from secateur.model.protect import patterns_of
from secateur.planning.averages import Averages
from secateur.planning.build import GranularityLike, grouped
from secateur.registry import one_of, real_number
from secateur.request import SCOPE
from secateur.training.earlier import EarlierZeros
from secateur.training.held_units import Held
from secateur.training.settings import Optimizers, ScheduleLike, clock, listed_optimizers
from secateur.training.together import Together
from secateur.training.unit_sums import unit_sums
from secateur.types import Example, Group, Kept, Protect, StateDict
from secateur.words import spoken

Form = Literal["hard", "soft"]
Freeze = Literal["none", "masks", "weights"]
WEIGHTS = frozenset({"self", "out", "in", "bias", "scale"})  # all that goes with a unit
CONTROL, LEAP = 1.05, 2.0  # by how much the controller moves the strength for a step of the optimizer; at most at once


class MovementPruner:
    """Prunes by trained scores while your loop fine-tunes: what moves away from zero stays.

    Forward and backward run with masked weights. The score of a unit falls by g'w, with g' the gradient of the *masked*
    weight and w the weight without mask: a masked weight that should be there comes back, with the value that it had.
    Call `step` after every step of the optimizer. A bad choice without fine-tuning, and below about 70 % sparsity,
    where magnitude is as good.

    Args:
        model: trained by your loop, masked in place.
        example: what one forward takes; needed for granularity head and the like.
        sparsity: share of the units that goes in the end; met exactly, by both forms.
        end: optimizer step at which it is reached.
        begin: optimizer step of the first update. Scores are trained from the first step on.
        every: optimizer steps between updates of the masks; scores move at every step.
        initial: share that goes at `begin`.
        schedule: as for `Pruner`.
        optimizer: what moves the weights.
        granularity: "element", {"name": "block", "shape": [32, 32]}, "head" and whatever else has units.
        form: "hard" keeps the top units at every update. "soft" keeps those with sigmoid(score) above `threshold`,
            under a penalty on sigmoid(score) whose strength is steered so that sparsity follows the schedule; `finish`
            then takes the top.
        threshold: of the soft form.
        strength: of the soft form's penalty at the beginning.
        scope: "global" or "local".
        scores: learning rate of the scores (Adam), or a callable parameters -> optimizer.
        start: where scores start: 0 as in the paper, else `start` times the norm of the unit over the root mean square
            of these norms in its group. Magnitude then decides until movement has overruled it; without it the first
            removals of a short training are chance.
        freeze: "masks" stay as they are from `end` on; "weights" are not trained at all, only scores; "none".
        fill: at `finish`, units of this coarser granularity of which something is left come back whole, for example
            "head" after blocks: what is not empty costs the same full.
        protect: as for `secateur.plan`.
        seed: of the structure engine.
        ema: averaged weights, which follow.
        distributed: as for `Pruner`.
        state: of a checkpoint (`state_dict`), to go on from it.

    Attributes:
        model: the model.
        done: optimizer steps so far.

    Raises:
        RecipeError: an unknown word, or a number out of range.
        InputError: no optimizer, or one that moves no parameter of the model.

    Cost:
        Memory for the scores and their optimizer (for single weights three times the masked weights), for the values
        under the masks, and a copy of the masked weights. One product per weight and step.

    Source:
        Sanh, Wolf, Rush, "Movement Pruning", 2020 (hard and soft); blocks, heads and filling: Lagunas, Charlaix, Sanh,
        Rush, "Block Pruning For Faster Transformers", 2021.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = MovementPruner(model, sparsity=0.5, end=5, optimizer=optimizer)
        >>> for _ in range(6):
        ...     model(torch.ones(1, 4)).square().sum().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     changed = pruner.step()
        >>> int((pruner.finish().weight == 0).sum())
        4
    """

    @spoken()
    def __init__(
        self,
        model: nn.Module,
        example: Example = None,
        *,
        sparsity: float,
        end: int,
        optimizer: Optimizers,
        begin: int = 0,
        every: int = 1,
        initial: float = 0.0,
        schedule: ScheduleLike = "cubic",
        granularity: GranularityLike = "element",
        form: Form = "hard",
        threshold: float = 0.1,
        strength: float = 1.0,
        scope: str = SCOPE,
        scores: float | Callable[[list[nn.Parameter]], Optimizer] = 1e-2,
        start: float = 0.0,
        freeze: Freeze = "none",
        fill: GranularityLike | None = None,
        protect: Protect = (),
        seed: int = 0,
        ema: Averages | None = None,
        distributed: bool | None = None,
        state: StateDict | None = None,
    ) -> None:
        numbers = {"sparsity": sparsity, "strength": strength, "start": start}
        real = {name: real_number(name, value) for name, value in numbers.items()}
        _check_words(form, freeze, scope, threshold)
        came, self.model = model, admit(model)
        optimizers = listed_optimizers(optimizer)
        if not optimizers:
            raise InputError("movement needs the optimizer of your loop", hint="pass optimizer=")
        self.schedule = clock(schedule, final=sparsity, begin=begin, end=end, every=every, initial=initial)
        self.form, self.threshold, self.scope, self.freeze = form, threshold, scope, freeze
        self.strength = real["strength"]
        kept_whole = patterns_of(self.model, protect)
        groups, _ = grouped(self.model, example, granularity, kept_whole)
        if any(group.granularity in ("n:m", "layer", "sub_block", "expert") for group in groups):
            raise RecipeError(
                f"movement has no form for {groups[0].granularity!r}.",
                hint="Use element, block, vector, head, channel.",
            )
        # Found now: a word that nobody knows must not end a long training at its last line.
        self._coarse = [] if fill is None else grouped(self.model, example, fill, kept_whole)[0]
        self._together = Together.of(came, distributed, device_of(self.model))
        self.scores: dict[str, nn.Parameter] = {
            group.name: nn.Parameter(torch.zeros(group.shape, device=device_of(self.model))) for group in groups
        }
        # Every step writes the gradients of all scores anew, so none is left over from the one before.
        self._moves = _moved_by(scores, list(self.scores.values()))
        # Beside the scores once and for all: blocks and heads have an index per weight, dear to send at every step.
        self._summed = [_beside(group, device_of(self.model)) for group in groups]
        self.done, self._moved = 0, False
        self._parameters = dict(self.model.named_parameters())
        self._touched = {
            s.tensor for g in groups for s in g.spans if s.role in WEIGHTS and s.tensor in self._parameters
        }
        self._begin(groups, optimizers, ema, real["start"], state)

    def _begin(
        self,
        groups: Sequence[Group],
        optimizers: Sequence[Optimizer],
        ema: Averages | None,
        start: float,
        state: StateDict | None,
    ) -> None:
        """Listen to the optimizers, and begin or go on; one that cannot begin leaves them as they were."""
        # Before the masks are held: what they set to 0 is read first.
        self._hooks = [hook for each in optimizers for hook in self._listen(each)]
        try:
            self._held = Held(self.model, groups, optimizers, ema, keep_originals=True)
            if start > 0:
                self._start_with_sizes(start)
            if state is not None:
                self.load_state_dict(state)
        except BaseException:
            self._deafen()
            raise
        EarlierZeros(self.model).hold(optimizers)

    # -- in the loop ------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """To be called after the optimizer's step; calls without one do not count.

        Returns:
            whether masks changed.
        """
        if not self._moved:
            return False
        self._moved = False
        self._held.enforce_unheld()
        self.done += 1
        return self._update()

    @property
    def sparsity(self) -> float:
        """Share of the units that is gone now."""
        gone, total = self._held.removed()
        return gone / total

    @property
    def handle(self) -> MaskHandle:
        """The owner of the masks."""
        return self._held.handle

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool tensor, True = keep."""
        return self._held.handle.masks

    @property
    def keep(self) -> Kept:
        """Group name -> bool tensor, True = the unit stays: for structures what ``secateur.plan(keep=...)`` takes."""
        return Kept({n: mask.cpu() for n, mask in self._held.keep.items()}, tuple(self._held.groups.values()))

    def finish(self) -> nn.Module:
        """Bring sparsity to the exact amount, fill where asked, and let the loop go; masks stay held.

        Returns:
            the masked model.
        """
        if self.freeze != "masks" or self.done < self.schedule.end or self.form == "soft":
            self._hold(self._top(self.schedule.final))
        self._deafen()
        if self._coarse:
            self._fill_up()
        self._held.enforce()
        return self.model

    # -- checkpoints ------------------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """Everything that a checkpoint needs beside the model's and the optimizer's own state."""
        return {
            "done": self.done,
            "strength": self.strength,
            "scores": {name: score.detach().clone() for name, score in self.scores.items()},
            "moves": self._moves.state_dict(),
            "held": self._held.state_dict(),
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Go on from a checkpoint, before or after the model's own state is loaded.

        Raises:
            InputError: it is no state of such a pruner.
        """
        scores = state.get("scores")
        if not isinstance(scores, Mapping) or scores.keys() != self.scores.keys() or "done" not in state:
            raise InputError("this is no state of a movement pruner", hint="give what pruner.state_dict() returned")
        self._held.load_state_dict(state["held"])
        with torch.no_grad():
            for name, score in scores.items():
                self.scores[name].copy_(score)
        self._moves.load_state_dict(state["moves"])
        self.done, self.strength, self._moved = int(state["done"]), float(state["strength"]), False

    # -- inside -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _start_with_sizes(self, start: float) -> None:
        squares = {name: self._parameters[name].detach().float().square() for name in self._touched}
        for group in self._summed:
            size = unit_sums(squares, group, WEIGHTS).sqrt()
            usual = size.square().mean().sqrt()
            # A group of zeros has no sizes to tell apart.
            self.scores[group.name].copy_(start * size / torch.where(usual > 0, usual, 1.0))

    def _listen(self, optimizer: Optimizer) -> list[RemovableHandle]:
        def after(*_: object) -> None:
            self._moved = True

        return [optimizer.register_step_pre_hook(self._learn), optimizer.register_step_post_hook(after)]

    def _deafen(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def _frozen(self) -> bool:
        return self.freeze == "masks" and self.done >= self.schedule.end

    @torch.no_grad()
    def _learn(self, *_: object) -> None:
        """Move the scores by the gradients that the loop has just computed."""
        if not self._frozen:
            masked = self.handle.masks.keys()
            products = {name: self._product(name, name in masked) for name in self._touched}
            seen = {name: value for name, value in products.items() if value is not None}
            units = sum(score.numel() for score in self.scores.values())
            for group in self._summed:
                score = self.scores[group.name]
                if any(span.tensor in seen for span in group.spans):
                    score.grad = unit_sums(seen, group, WEIGHTS).to(score)
                    if self.form == "soft":
                        s = torch.sigmoid(score)
                        # The slope of the penalty, which is the mean of the sigmoids.
                        score.grad += self.strength * s * (1 - s) / units
            self._moves.step()
        if self.freeze == "weights":
            for name in self._touched:
                # Without a gradient an optimizer leaves a weight alone, decay and momentum included.
                self._parameters[name].grad = None

    def _product(self, name: str, masked: bool) -> Tensor | None:
        parameter = self._parameters[name]
        if parameter.grad is None:
            return None
        # Masked weights count with the value that they would have: so they can earn their way back.
        weight = self.handle.unmasked(name) if masked else parameter.detach()
        return parameter.grad.detach().float() * weight.float()

    def _update(self) -> bool:
        if not self.schedule.begin <= self.done or (self._frozen and self.done > self.schedule.end):
            return False
        late = self.done > self.schedule.end and (self.done - self.schedule.begin) % self.schedule.every == 0
        if not self.schedule.due(self.done) and not late:
            return False
        wanted = self.schedule.at(self.done)
        self._hold(self._top(wanted) if self.form == "hard" else self._above(wanted))
        return True

    def _hold(self, keep: Mapping[str, Tensor]) -> None:
        self._held.hold(self._together.same(keep), back=True)

    def _top(self, sparsity: float) -> dict[str, Tensor]:
        scores = {name: score.detach() for name, score in self.scores.items()}
        structural = {group.granularity for group in self._held.groups.values()} & set(STRUCTURAL)
        groups = list(self._held.groups.values())
        return select(scores, sparsity=sparsity, scope=self.scope, groups=groups, min_keep=1 if structural else 0)

    def _above(self, wanted: float) -> dict[str, Tensor]:
        """Units above the threshold; the strength is steered by how far sparsity is from what is wanted."""
        keep = {name: torch.sigmoid(score.detach()) > self.threshold for name, score in self.scores.items()}
        gone = sum(mask.numel() - int(mask.sum()) for mask in keep.values())
        total = sum(mask.numel() for mask in keep.values())
        factor = min(CONTROL**self.schedule.every, LEAP)
        self.strength *= factor if gone < wanted * total else 1 / factor
        return keep

    def _fill_up(self) -> None:
        """Give back what lies in coarser units that are not empty."""
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        for group in self._coarse:
            mine = [span for span in group.spans if span.tensor in masks and span.role in WEIGHTS]
            if not mine:
                continue
            alive = unit_sums({name: mask.float() for name, mask in masks.items()}, group, WEIGHTS) > 0
            for span in mine:
                masks[span.tensor] |= _alive(alive, span.index, masks[span.tensor].shape)
        self._held.hold_masks(masks, back=True)
        # What came back counts as there: sparsity and keep say what the masks are.
        filled = {name: mask.float() for name, mask in masks.items()}
        self._held.keep = {group.name: unit_sums(filled, group, WEIGHTS) > 0 for group in self._summed}


def _check_words(form: str, freeze: str, scope: str, threshold: float) -> None:
    one_of("form", form, ("hard", "soft"))
    one_of("freeze", freeze, ("none", "masks", "weights"))
    one_of("scope", scope, ("global", "local"))
    if not 0 < real_number("threshold", threshold) < 1:
        raise RecipeError(f"threshold={threshold!r} of a sigmoid", hint="a number in (0, 1), for example 0.1")


def _moved_by(scores: object, trained: list[nn.Parameter]) -> Optimizer:
    """The optimizer of the scores, of what users give for it."""
    if not callable(scores):
        return torch.optim.Adam(trained, lr=real_number("scores", scores))
    made = scores(trained)
    if not isinstance(made, Optimizer):
        raise RecipeError(f"scores= made a {type(made).__name__}", hint="a callable of parameters returns an optimizer")
    return made


def _beside(group: Group, device: torch.device) -> Group:
    """A group whose indices lie on a device."""
    spans = (replace(s, index=None if s.index is None else s.index.to(device)) for s in group.spans)
    return replace(group, spans=tuple(spans))


def _alive(alive: Tensor, index: Tensor | None, shape: torch.Size) -> Tensor:
    """True for elements of units that are alive; False where no unit owns them."""
    if index is None:
        return alive.view(shape)
    padded = torch.cat([alive.flatten(), alive.new_zeros(1)])
    return padded[index.to(alive.device)].expand(shape)
