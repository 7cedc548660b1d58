"""A segmentation U-Net: skip connections tie encoder and decoder together, Taylor says which channels matter.

python examples/unet.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.recover import finetune


def double(inputs: int, outputs: int) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(outputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


class UNet(nn.Module):
    """Two levels down, two up."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = double(1, 8), double(8, 16), double(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)
        self.join2, self.join1 = double(32, 16), double(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        one = self.down1(image)
        two = self.down2(F.max_pool2d(one, 2))
        x = self.bottom(F.max_pool2d(two, 2))
        x = self.join2(torch.cat([two, self.up2(x)], 1))
        return self.out(self.join1(torch.cat([one, self.up1(x)], 1)))


def batches(count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Discs in noise; the target says for every pixel whether it lies in one."""
    random = torch.Generator().manual_seed(seed)
    lines = torch.arange(32.0)
    found = []
    for _ in range(count):
        x, y, radius = (torch.rand(16, 1, 1, generator=random) * s + low for s, low in ((32, 0), (32, 0), (8, 4)))
        inside = (lines[None, None] - x) ** 2 + (lines[None, :, None] - y) ** 2 < radius**2
        found.append((torch.rand(16, 1, 32, 32, generator=random) + inside[:, None], inside.long()))
    return found


def main(steps: int = 60) -> tuple[float, float, float]:
    """Return the share of right pixels before and after, and the share of the parameters that is left."""
    torch.manual_seed(0)
    train, test, model = batches(steps, 1), batches(4, 2), UNet()
    tuning = {"method": "finetune", "epochs": 1, "optimizer": {"name": "adam", "lr": 0.01}}
    finetune(model, train, optimizer=tuning["optimizer"], epochs=1)
    options = {"criterion": "taylor", "target": {"params": 0.5}, "round_to": 2}
    done = sc.prune(model.eval(), data=train, test=test, recover=[{"method": "bn_refresh"}, tuning], **options)
    print(repr(done))
    before, after = done.report.before, done.report.after
    return before.quality["accuracy"], after.quality["accuracy"], after.params / before.params


if __name__ == "__main__":
    main()
