"""Pruning inside `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.errors import InputError
from secateur.files.states import load_state, save_state
from secateur.training.adapters.times import AnyPruner, Make, check_settings, made
from secateur.training.pruner import Pruner
from secateur.types import StateDict

FILE = "secateur.safetensors"


class TrainerPruningCallback(TrainerCallback):
    """Prunes the model of a Trainer while it trains.

    Checkpoints of the Trainer hold the state of the pruner as well, and ``trainer.train(resume_from_checkpoint=...)``
    takes it up again from ``args.output_dir``. Units that are cut change the shapes of the weights: call
    ``callback.restore(model, checkpoint)`` before the Trainer is made, so that they fit.

    Args:
        kind: `Pruner` or `MovementPruner`.
        **settings: theirs, without model and optimizer. begin, end and every may be shares of the training, as floats.

    Attributes:
        pruner: there from the beginning of the training on.
    """

    def __init__(self, kind: Make = Pruner, **settings: object) -> None:
        check_settings(kind, settings)
        self.kind, self.settings = kind, settings
        self.pruner: AnyPruner | None = None
        self._restored: StateDict | None = None

    def restore(self, model: nn.Module, checkpoint: str | Path) -> None:
        """Bring a model to the shapes of a checkpoint.

        Args:
            model: as it came, cut in place.
            checkpoint: folder that the Trainer has written.

        Raises:
            InputError: the folder holds no state of a pruner.
        """
        path = Path(checkpoint) / FILE
        if not path.is_file():
            raise InputError(f"{checkpoint} holds no state of a pruner", hint=f"a file {FILE} is expected")
        self._restored = load_state(path)
        Pruner.restore_shapes(model, self._restored)

    # The names of these methods and of their arguments are the Trainer's.

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Make the pruner, or take it up again."""
        model, optimizer = cast(nn.Module, kwargs["model"]), cast(Optimizer, kwargs["optimizer"])
        together = int(getattr(args, "world_size", 1)) > 1
        before = (self._restored or self._saved(args, state)) if state.global_step > 0 else None
        total = int(state.max_steps)
        self.pruner = made(self.kind, model, optimizer, self.settings, total=total, together=together, state=before)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """After a step of the optimizer."""
        assert self.pruner is not None
        self.pruner.step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Beside the weights of a checkpoint."""
        if self.pruner is not None and state.is_world_process_zero:
            save_state(_folder(args, state) / FILE, self.pruner.state_dict())

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Reach the amount exactly."""
        assert self.pruner is not None
        self.pruner.finish()

    def _saved(self, args: TrainingArguments, state: TrainerState) -> StateDict:
        path = _folder(args, state) / FILE
        if not path.is_file():
            raise InputError(
                f"the checkpoint {path.parent} holds no state of a pruner",
                hint="resume from a checkpoint in args.output_dir, or call callback.restore(model, checkpoint) before",
            )
        return load_state(path)


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
