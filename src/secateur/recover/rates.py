"""Learning rates over a training: factors by name or callable, or a scheduler of torch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from secateur.errors import RecipeError
from secateur.recover.optimizers import SCHEDULES, Schedule, rate_factor, resolve_schedule
from secateur.registry import suggestion
from secateur.types import StateDict

ScheduleSpec = str | Schedule | Mapping[str, object]  # a name, a factor, or {"name": of torch's schedulers, options}
# They take callables or other schedulers, which are no data.
_NOT_DATA = {"LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler"}
# What says how long a training is: filled in where it is left out.
_LENGTHS = ("total_steps", "T_max", "total_iters")


class Rates:
    """Sets the learning rate of every step.

    Args:
        optimizer: its groups hold the peak rates.
        schedule: "constant", "linear", "cosine", a callable ``(step, total) -> factor``, or the name of a scheduler of
            ``torch.optim.lr_scheduler`` with its options; ``per: epoch`` steps that one once a pass.
        total: steps in all; 0 where not known.
        passes: passes in all; 0 where not known.
        warmup: steps of linear warm-up.
        skipped: steps (and passes) of the original training that lie before the first one: learning-rate rewinding.

    Raises:
        RecipeError: an unknown schedule or option, or a combination that means nothing.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: ScheduleSpec,
        *,
        total: int,
        passes: int = 0,
        warmup: int = 0,
        skipped: tuple[int, int] = (0, 0),
    ) -> None:
        self._optimizer, self._warmup, self._skipped = optimizer, warmup, skipped[0]
        self._total = total + skipped[0]
        self._base = [float(group["lr"]) for group in optimizer.param_groups]
        self._factor: Schedule | None = None
        self._scheduler: LRScheduler | None = None
        self.per_pass = False
        if isinstance(schedule, str) and schedule not in SCHEDULES and schedule.lower() in schedulers():
            schedule = {"name": schedule}
        if not isinstance(schedule, Mapping):
            self._factor = resolve_schedule(schedule)
            return
        if warmup:
            raise RecipeError(
                "warmup_steps belongs to constant, linear and cosine", hint="leave it out beside a scheduler of torch"
            )
        options = dict(schedule)
        self.per_pass = _per(options) == "epoch"
        length = passes + skipped[1] if self.per_pass else self._total
        self._scheduler = _torch_scheduler(optimizer, options, length)
        with warnings.catch_warnings():
            # Rewound: the steps before were those of another training, so no optimizer has made them.
            warnings.simplefilter("ignore")
            for _ in range(skipped[1] if self.per_pass else skipped[0]):
                self._scheduler.step()

    @property
    def needs_figure(self) -> bool:
        """Whether the scheduler asks for a figure of quality after each pass."""
        return isinstance(self._scheduler, ReduceLROnPlateau)

    def before(self, step: int) -> float:
        """Set the rates of a step; returns that of the first group."""
        if self._factor is not None:
            scale = rate_factor(self._factor, step + self._skipped, self._total, warmup=self._warmup)
            for group, rate in zip(self._optimizer.param_groups, self._base, strict=True):
                group["lr"] = rate * scale
        return float(self._optimizer.param_groups[0]["lr"])

    def after(self) -> None:
        """After a step of the optimizer."""
        if self._scheduler is not None and not self.per_pass:
            self._scheduler.step()

    def pass_ended(self, figure: float | None) -> None:
        """After a pass, with the loss on held-out data where it was measured."""
        if isinstance(self._scheduler, ReduceLROnPlateau):
            assert figure is not None
            self._scheduler.step(figure)
        elif self._scheduler is not None and self.per_pass:
            self._scheduler.step()

    def state_dict(self) -> StateDict:
        """State of the scheduler; factors are computed from the step."""
        return {} if self._scheduler is None else dict(self._scheduler.state_dict())

    def load_state_dict(self, state: StateDict) -> None:
        """Take over `state_dict`."""
        if self._scheduler is not None:
            self._scheduler.load_state_dict(dict(state))


def _per(options: dict[str, object]) -> str:
    plateau = str(options.get("name")).lower() == "reducelronplateau"
    per = str(options.pop("per", "epoch" if plateau else "step"))
    if per not in ("step", "epoch") or (plateau and per != "epoch"):
        raise RecipeError(f"per: {per} is not known for {options.get('name')}", hint="step, or epoch")
    return per


def _torch_scheduler(optimizer: Optimizer, options: dict[str, object], length: int) -> LRScheduler:
    name = str(options.pop("name", ""))
    known = schedulers()
    if name.lower() not in known:
        raise RecipeError(
            f"unknown schedule {name!r}",
            hint=suggestion(name, ["constant", "linear", "cosine", *(k.__name__ for k in known.values())]),
        )
    kind = known[name.lower()]
    names = [key for key in inspect.signature(kind).parameters if key not in ("optimizer", "last_epoch", "verbose")]
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise RecipeError(f"{kind.__name__} has no option {unknown[0]!r}", hint=suggestion(unknown[0], names))
    for key in _LENGTHS:
        if key in names and key not in options and length and "epochs" not in options:
            options[key] = length
    try:
        return kind(optimizer, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"the options of {kind.__name__} are wrong", why=str(error)) from error


def schedulers() -> dict[str, Callable[..., LRScheduler]]:
    """Schedulers of this version of torch that data can describe, by their name in lower case."""
    module = torch.optim.lr_scheduler
    kinds = [value for value in vars(module).values() if isinstance(value, type) and issubclass(value, LRScheduler)]
    return {kind.__name__.lower(): kind for kind in kinds if kind.__name__ not in _NOT_DATA and kind.__name__[0] != "_"}
