"""CIFAR-10 in the memory of a device, and a resumable training loop for it; shared by the benchmarks of retraining."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import secateur as sc
from secateur.files import load_tensors, save_tensors
from secateur.files.states import load_state, save_state
from secateur.sources import resolve_data

EVERY = 10  # epochs between two states that a killed run goes on from; the last one is kept as well
EDGE = 4  # pixels around each image that random crops may show
VGG = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]
# Called as attach(model, optimizer, steps, state): what prunes or pays while the loop trains. `state` is that of an
# interrupted pruner, or None.
Attach = Callable[[nn.Module, torch.optim.Optimizer, int, Mapping[str, Any] | None], Any]


def vgg16(divided: int = 1) -> nn.Module:
    """VGG-16 for small images: 13 convolutions with batch norm and one linear layer, all widths divided by a number."""
    layers: list[nn.Module] = []
    inputs = 3
    for step in VGG:
        if isinstance(step, str):
            layers.append(nn.MaxPool2d(2))
            continue
        outputs = step // divided
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def decode(folder: str, path: Path) -> None:
    """Write all images and labels of a folder of parquet files as one file of uint8 tensors."""
    data = resolve_data(f"parquet:{folder}")
    parts = {"train": data.train, "test": data.test}
    images = {name: part.inputs.contiguous() for name, part in parts.items()}
    labels = {f"{name}_labels": part.targets for name, part in parts.items()}
    mean, std = data.train.normalize
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, {**images, **labels, "mean": torch.tensor(mean), "std": torch.tensor(std)})


class Images:
    """All images on the device; a whole epoch of mirrored and shifted ones is made at once."""

    def __init__(self, path: Path, device: torch.device, limit: int | None = None) -> None:
        stored = {name: tensor.to(device) for name, tensor in load_tensors(path).items()}
        mean, std = (stored[name][:, None, None] for name in ("mean", "std"))
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

        def ready(name: str) -> Tensor:  # [samples, 3, 32, 32] of bytes -> [samples, 32, 32, 3], normalised
            images = (stored[name][:limit].float() / 255 - mean) / std
            return images.permute(0, 2, 3, 1).to(dtype).contiguous()

        self.device = device
        self.train = pad(ready("train"), (0, 0, EDGE, EDGE, EDGE, EDGE))
        self.test = ready("test")
        self.labels, self.test_labels = stored["train_labels"][:limit], stored["test_labels"][:limit]

    def steps(self, batch: int) -> int:
        """Whole batches of one pass."""
        return max(1, len(self.train) // batch)

    def epoch(self, seed: int, number: int, batch: int) -> Iterator[Batch]:
        """Whole batches of one pass, the same for the same seed and number."""
        device = self.device
        generator = torch.Generator(device).manual_seed(1_000_003 * seed + number)
        order = torch.randperm(len(self.train), device=device, generator=generator)[: self.steps(batch) * batch]
        top, left = torch.randint(2 * EDGE + 1, (2, len(order)), device=device, generator=generator)
        mirrored = torch.rand(len(order), device=device, generator=generator) < 0.5
        line = torch.arange(32, device=device)
        rows = top[:, None] + line
        columns = left[:, None] + torch.where(mirrored[:, None], 31 - line, line)
        images = self.train[order[:, None, None], rows[:, :, None], columns[:, None, :]]
        # A view with channels first of memory with channels last, as convolutions like it.
        return zip(images.permute(0, 3, 1, 2).split(batch), self.labels[order].split(batch), strict=True)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Percent of the test images that are told right."""
        model.eval()
        right = torch.zeros((), device=self.device)
        for images, labels in zip(self.test.split(1000), self.test_labels.split(1000), strict=True):
            with precision(self.device):
                right += (model(images.permute(0, 3, 1, 2)).argmax(1) == labels).sum()
        model.train()
        return 100 * float(right) / len(self.test)


def precision(device: torch.device, *, bfloat16: bool = False) -> torch.autocast:
    """bfloat16 on a GPU and where it is asked for, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=bfloat16 or device.type == "cuda")


def of_labels(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy."""
    return cross_entropy(model(batch[0]), batch[1])


def factor(share: float) -> float:
    """Of the highest learning rate, after a share of the steps: a warm-up of a tenth, then half a cosine down to 0."""
    return 0.1 + 9 * share if share < 0.1 else 0.5 + 0.5 * math.cos(math.pi * (share - 0.1) / 0.9)


class OutOfTimeError(Exception):
    """The minutes are over; what was reached is kept."""


@dataclass(frozen=True)
class Training:
    """Nesterov momentum with one cycle of the learning rate; goes on where an interrupted one was.

    Args:
        data: images.
        seed: of data order and augmentation.
        batch: images per step.
        until: `time.time()` at which it stops at the end of an epoch.
        bfloat16: multiply in it on a processor too, which takes half the time where there are instructions for it.
        every: epochs between two states.
    """

    data: Images
    seed: int
    batch: int
    until: float = math.inf
    bfloat16: bool = False
    every: int = EVERY

    def run(
        self,
        model: nn.Module,
        path: Path,
        epochs: int,
        rate: float,
        *,
        loss: Loss = of_labels,
        attach: Attach | None = None,
    ) -> tuple[Any, float]:
        """Train in place, or bring the model to the end of a training that is done.

        Args:
            model: on the device of the data.
            path: where the state is kept on the way.
            epochs: in all.
            rate: highest learning rate.
            loss: ``loss(model, batch)``.
            attach: what prunes or pays.

        Returns:
            what `attach` gave, and the seconds that it took.

        Raises:
            OutOfTimeError: call it again.
        """
        state = load_state(path) if path.exists() else {"epoch": 0, "seconds": 0.0}
        steps, step = epochs * self.data.steps(self.batch), state["epoch"] * self.data.steps(self.batch)
        model.to(memory_format=torch.channels_last).train()
        if "model" in state:
            model.load_state_dict(state["model"])
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
        attached = attach(model, optimizer, steps, state.get("pruner")) if attach else None
        pruner = attached if isinstance(attached, sc.Pruner) else None
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        began = time.perf_counter() - state["seconds"]
        for epoch in range(state["epoch"], epochs):
            for batch in self.data.epoch(self.seed, epoch, self.batch):
                optimizer.param_groups[0]["lr"] = rate * factor(step / steps)
                optimizer.zero_grad(set_to_none=True)
                with precision(self.data.device, bfloat16=self.bfloat16):
                    value = loss(model, batch)
                value.backward()
                optimizer.step()
                step += 1
                if pruner is not None:
                    pruner.step()
            over, left = time.time() > self.until, epochs - epoch - 1
            if over or left == 0 or (epoch + 1) % self.every == 0:
                parts = {"model": model, "optimizer": optimizer} | ({"pruner": pruner} if pruner else {})
                kept = {name: part.state_dict() for name, part in parts.items()}  # copied, so all kernels are done
                save_state(path, {**kept, "epoch": epoch + 1, "seconds": time.perf_counter() - began})
            if over and left:
                raise OutOfTimeError(f"{path.stem}: {epoch + 1} of {epochs} epochs are done")
        if pruner is not None:
            pruner.finish()
        return attached, time.perf_counter() - began
