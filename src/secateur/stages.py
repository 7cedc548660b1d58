"""What a run of `prune` has finished, kept in a checkpoint so that it can be taken up; without one nothing is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypedDict, TypeVar

from pydantic import TypeAdapter
from torch import Tensor, nn

from secateur.errors import PlanMismatchError, RecipeError, ResourceError, SecateurError
from secateur.files.checkpoint import EVERY, Checkpoint
from secateur.files.seeds import stable_hash
from secateur.model.generators import drawn, set_drawn
from secateur.model.hashing import hash_model, raw
from secateur.model.tensors import named_tensors
from secateur.planning import Plan
from secateur.recipe import Recipe
from secateur.recover.during import Trained
from secateur.recover.loop import Keeper, KeptState, write_tensors
from secateur.recover.reader import generators_of
from secateur.report.journal import Journal
from secateur.request import Request
from secateur.types import Snapshot, StateDict

SUFFIX = ".unfinished"
_SNAPSHOT: TypeAdapter[Snapshot] = TypeAdapter(Snapshot)
T = TypeVar("T")


class CommandWords(TypedDict, total=False):
    """How a command line named what it worked on; empty for a run of Python's."""

    model: str
    data: str | None
    out: str
    threads: int | None
    force: bool
    metric: list[str]
    device: str | None


@dataclass(frozen=True)
class Unfinished:
    """Where a run keeps what it has done.

    Args:
        folder: made where it is missing; another run's is refused.
        every: seconds between two states within a stage; the end of a stage is always kept.
        words: how the command line named model and data, so that a fresh process finds them again.
    """

    folder: Path
    every: float = EVERY
    words: CommandWords = field(default_factory=CommandWords)

    @classmethod
    def beside(cls, out: Path, words: CommandWords) -> Unfinished:
        """The place that belongs to an output folder."""
        return cls(out.with_name(out.name + SUFFIX), words=words)


class RunStages:
    """The stages of one run: each is done once, by this process or by one before it.

    Args:
        place: where they are kept; None keeps nothing.
        model: as it came.
        recipe: as it was resolved.
        run: the journal, which takes over what an earlier process has written.
        own: whether the run trains by a loop of the user's.
        given: units or scores that the caller gave; None or empty where the recipe decides.
        limit: of a run that finds its amount: how much may be lost.
        data: all that is read; what their own generators draw goes on as without the interrupt.

    Raises:
        FileRefusedError: the folder holds another run, is damaged, or is in use.
    """

    def __init__(
        self,
        place: Unfinished | None,
        model: nn.Module,
        recipe: Recipe,
        run: Journal,
        *,
        own: bool,
        given: Mapping[str, object] | None = None,
        limit: Mapping[str, object] | None = None,
        data: Iterable[object] = (),
    ) -> None:
        self._run, self._checkpoint = run, None
        # A loader that shuffles by a generator of its own moves it each time that it is read, also to measure quality.
        self._held = list({id(one): one for each in data for one in generators_of(each)}.values())
        if place is None:
            return
        # What decides about the result: whoever asks for anything else must not go on from these states.
        about = {
            "what": "prune",
            "model": hash_model(model),
            "recipe": recipe.model_dump(mode="json", by_alias=True, exclude_none=True),
            "train": own,
            "words": dict(place.words),
            **({"given": stable_hash([_plain(given)])} if given else {}),
            **({"limit": dict(limit)} if limit else {}),
        }
        self._checkpoint = Checkpoint(place.folder, about=about, every=place.every)
        journal = self._checkpoint.get("journal")
        if journal is not None:
            run.load_state_dict(journal)

    @property
    def folder(self) -> Path | None:
        """Where the states are; None where nothing is kept."""
        return None if self._checkpoint is None else self._checkpoint.folder

    @property
    def blocks(self) -> Path | None:
        """Where a solver keeps the blocks that it has finished."""
        return None if self._checkpoint is None else self._checkpoint.room("blocks")

    def once(self, name: str, work: Callable[[], T]) -> T:
        """The result of a stage that ends in plain data; kept, and done only where it is not there yet."""
        found = self._found(name)
        if found is not None:
            result: T = found["result"]
            return result
        done = work()
        self._keep(name, {"result": done})
        return done

    def snapshot(self, name: str, work: Callable[[], Snapshot]) -> Snapshot:
        """As `once`, of figures."""
        found = self.once(name, lambda: _SNAPSHOT.dump_python(work(), mode="json"))
        return _SNAPSHOT.validate_python(found)

    def plan(self, make: Callable[[], Plan], again: Callable[[Mapping[str, Tensor]], Plan]) -> Plan:
        """The plan: made, or found again from the units that were kept, without scoring anything.

        Args:
            make: scores and decides.
            again: a plan of exactly these units.

        A plan that holds new weights is not kept: units alone do not give it. Made again it goes on behind the last
        block that its solver has finished, see `blocks`.

        Raises:
            PlanMismatchError: the same units are another plan now.
        """
        found = self._found("plan")
        if found is not None:
            return _restored(again(found["keep"]), found)
        plan = make()
        known = plan.evidence
        if self._checkpoint is not None and known is not None and not plan.weights:
            state = {"keep": dict(known.keep), "scores": dict(known.scores), "request": plan.request.to_data()}
            self._keep("plan", {**state, "decision": _decision(plan)})
        return plan

    def trained(self, work: Callable[[Keeper | None], Trained], done: Callable[[Trained], None]) -> Trained:
        """A training before the plan, on a copy; goes on in its middle where it was interrupted there.

        Args:
            work: does it, with a keeper of its state.
            done: called with the result of this process, before the journal is kept with it.
        """
        found = self._found("trained")
        if found is not None:
            return Trained(found["tensors"], found["keep"], found["masks"], (), found["scores"])
        result = work(self.keeper("training"))
        done(result)
        told = {"tensors": result.tensors, "keep": result.keep, "masks": result.masks, "scores": result.scores}
        self._keep("trained", told, drop=["training"])
        return result

    def training(self, name: str, model: nn.Module, work: Callable[[Keeper | None], None]) -> None:
        """A stage that changes the weights in place; goes on in its middle where it was interrupted there.

        Args:
            name: of the stage.
            model: changed by it.
            work: does it, with a keeper of its state.
        """
        if self._checkpoint is None:
            work(None)
            return
        done: list[str] = [] if (found := self._checkpoint.get("weights")) is None else found["stages"]
        if name in done:
            if name == done[-1]:  # the weights are those after the last one
                write_tensors(model, found["tensors"])
                self._set_drawn(found)
            return
        work(KeptState(self._checkpoint, "training"))
        self._keep("weights", {"stages": [*done, name], "tensors": named_tensors(model)}, drop=["training"])

    def keeper(self, name: str) -> Keeper | None:
        """A keeper under a name of its own, for what is trained beside the pruned model."""
        return None if self._checkpoint is None else KeptState(self._checkpoint, name)

    def stage_ended(self) -> None:
        """Keep the journal: the times of stages that a later process does not repeat."""
        if self._checkpoint is not None:
            self._checkpoint.put("journal", self._run.state_dict())

    def refused(self, error: SecateurError) -> None:
        """Leave no folder of a run that can only be refused again; states are kept where the machine was in the way."""
        checkpoint = self._checkpoint
        if checkpoint is not None and checkpoint.began and not (isinstance(error, ResourceError) and checkpoint.names):
            checkpoint.remove()

    def close(self) -> None:
        """Let other processes have the folder."""
        if self._checkpoint is not None:
            self._checkpoint.close()

    def _found(self, name: str) -> StateDict | None:
        found: StateDict | None = None if self._checkpoint is None else self._checkpoint.get(name)
        if found is not None:
            self._set_drawn(found)
        return found

    def _keep(self, name: str, state: StateDict, drop: Iterable[str] = ()) -> None:
        """Keep the end of a stage and what the journal says of it, and forget the states within it, in one step.

        Apart, a kill between them would lose losses and warnings of the stage, or have them twice, or the next stage
        would go on from states of this one.
        """
        if self._checkpoint is not None:
            put = {name: {**state, **self._drawn()}, "journal": self._run.state_dict()}
            self._checkpoint.exchange(put, drop)

    def _drawn(self) -> StateDict:
        return {"generators": drawn(), "held": [one.get_state() for one in self._held]}

    def _set_drawn(self, found: StateDict) -> None:
        set_drawn(found["generators"])
        for one, state in zip(self._held, found["held"], strict=True):
            one.set_state(state)


def place_of(checkpoint: Unfinished | str | Path | None, every: float) -> Unfinished | None:
    """Where a run keeps its states, as the caller said it.

    Raises:
        RecipeError: a time between states, and no place for them.
    """
    if checkpoint is None:
        if every != EVERY:
            raise RecipeError(
                "every= says how often a checkpoint is written, and there is none", hint="pass checkpoint="
            )
        return None
    return checkpoint if isinstance(checkpoint, Unfinished) else Unfinished(Path(checkpoint), every)


def _plain(value: object) -> object:
    if isinstance(value, Tensor):
        return [str(value.dtype), list(value.shape), hashlib.sha256(raw(value)).hexdigest()]
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return list(value) if isinstance(value, (list, tuple, range)) else value


def _decision(plan: Plan) -> str:
    return stable_hash([plan.fingerprint, plan.groups, sorted(plan.cuts), sorted(plan.masks), plan.units])


def _restored(plan: Plan, found: StateDict) -> Plan:
    if _decision(plan) != found["decision"]:
        raise PlanMismatchError(
            "The plan cannot be found again: the same units are another decision now.",
            why="the model, the example, or the version of secateur or torch is another one",
            hint="Remove the folder of the unfinished run, and start anew.",
        )
    assert plan.evidence is not None
    # The scores of then, for the report: the plan was found again from its units, without any.
    evidence = replace(plan.evidence, scores=found["scores"])
    return replace(plan, request=Request.from_data(found["request"]), evidence=evidence)
