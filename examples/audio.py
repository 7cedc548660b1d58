"""Keyword spotting on raw sound: a spectrogram inside of the model, convolutions, and a GRU.

python examples/audio.py
"""

import torch
from torch import Tensor, nn

import secateur as sc
from secateur.recover import finetune


class Spotter(nn.Module):
    """Short-time Fourier transform, two convolutions over time, a recurrent layer."""

    def __init__(self, classes: int = 6) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(128), persistent=False)
        self.body = nn.Sequential(nn.Conv1d(65, 48, 3), nn.ReLU(), nn.Conv1d(48, 48, 3, stride=2), nn.ReLU())
        self.gru = nn.GRU(48, 48, batch_first=True)
        self.head = nn.Linear(48, classes)

    def forward(self, sound: Tensor) -> Tensor:
        """``[batch, samples]`` -> ``[batch, classes]``."""
        spectrum = torch.stft(sound, 128, hop_length=64, window=self.window, return_complex=True)
        frames = self.body(spectrum.abs().add(1e-3).log())
        return self.head(self.gru(frames.transpose(1, 2))[0][:, -1])


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Words are two tones, one after the other, in noise."""
    random = torch.Generator().manual_seed(seed)
    tones = torch.tensor([[0.1, 0.2], [0.2, 0.1], [0.1, 0.4], [0.4, 0.1], [0.2, 0.4], [0.4, 0.2]])
    time = torch.arange(1000.0)
    found = []
    for _ in range(count):
        labels = torch.randint(0, 6, (32,), generator=random)
        pitch = (tones[labels] * (0.95 + 0.1 * torch.rand(32, 1, generator=random))).repeat_interleave(1000, 1)
        noise = torch.randn(32, 2000, generator=random)
        found.append((torch.sin(2 * torch.pi * pitch * torch.cat([time, time])) + 0.5 * noise, labels))
    return found


def main(steps: int = 60) -> tuple[float, float, float]:
    """Return the accuracy before and after, and the share of the multiply-accumulates that is left."""
    torch.manual_seed(0)
    train, test, model = batches(steps, 1), batches(4, 2), Spotter()
    tuning = {"method": "finetune", "epochs": 1, "optimizer": {"name": "adam", "lr": 0.005}}
    finetune(model, train, optimizer=tuning["optimizer"], epochs=1)
    result = sc.prune(model.eval(), data=train, test=test, target={"macs": 0.4}, recover=tuning)
    print(repr(result))
    before, after = result.report.before, result.report.after
    return before.quality["accuracy"], after.quality["accuracy"], after.macs / before.macs


if __name__ == "__main__":
    main()
