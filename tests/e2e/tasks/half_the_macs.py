"""Task: "my CNN at half the MACs". Written from README and docs/how-to/prune-your-own-model.md alone."""

import torch
from torch import nn

import secateur as sc
from secateur.measure import macs


class Net(nn.Module):
    """My network; my training stands in `train`."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveMaxPool2d((1, 8)),
        )  # fmt: skip
        self.classifier = nn.Linear(256, 8)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(image).flatten(1))


def my_batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = [(torch.rand(32, 1, 16, 16), torch.randint(0, 8, (32,))) for _ in range(count)]
    for images, labels in found:
        images[torch.arange(32), 0, :, 2 * labels] += 1
    return found


def train(net: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=0.005)
    for images, labels in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizer.step()


torch.manual_seed(0)
model, training, test = Net(), my_batches(30), my_batches(5)
train(model, training)

# what a user adds
result = sc.prune(model.eval(), data=training, test=test, target={"macs": 0.5}, train=lambda net: train(net, training))
result.save("runs/mine")
small = sc.load("runs/mine", model=Net).eval()

images, labels = test[0]
assert macs(small, images) <= macs(model, images) / 2
assert (small(images).argmax(1) == labels).float().mean() > 0.9
assert result.report.after.quality["accuracy"] > 0.9
assert type(small) is Net
