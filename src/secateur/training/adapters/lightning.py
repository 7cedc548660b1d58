"""Pruning inside a Lightning trainer."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule, Trainer

from secateur.training.adapters.times import AnyPruner, Make, check_settings, made
from secateur.training.pruner import Pruner
from secateur.types import StateDict


class LightningPruningCallback(Callback):
    """Prunes a LightningModule while it trains; checkpoints of the trainer hold the state of the pruner as well.

    Unlike Lightning's own ModelPruning the amount is that of the whole run, and met exactly. Units that are cut change
    the shapes of the weights: before resuming call ``Pruner.restore_shapes(module, state)`` with the state that the
    checkpoint holds under "callbacks".

    Args:
        kind: `Pruner` or `MovementPruner`.
        **settings: theirs, without model and optimizer. begin, end and every may be shares of the training, as floats.

    Attributes:
        pruner: there from the beginning of the training on.
    """

    def __init__(self, kind: Make = Pruner, **settings: object) -> None:
        super().__init__()
        check_settings(kind, settings)
        self.kind, self.settings = kind, settings
        self.pruner: AnyPruner | None = None
        self._loaded: StateDict | None = None

    # The names of these methods and of their arguments are Lightning's.

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the pruner, or take it up again."""
        optimizers = list(trainer.optimizers)
        total = trainer.estimated_stepping_batches
        total = int(total) if total != float("inf") else 0
        together = trainer.world_size > 1
        self.pruner = made(
            self.kind, pl_module, optimizers, self.settings, total=total, together=together, state=self._loaded
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """After a batch; it counts where the optimizer has stepped."""
        assert self.pruner is not None
        self.pruner.step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reach the amount exactly."""
        assert self.pruner is not None
        self.pruner.finish()

    def state_dict(self) -> StateDict:
        """For Lightning's checkpoints."""
        return {} if self.pruner is None else self.pruner.state_dict()

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Kept until the optimizers are there."""
        self._loaded = state_dict or None
