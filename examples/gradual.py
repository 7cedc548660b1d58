"""Gradual pruning in a plain training loop: 90 % of the weights of a small network, along a cubic schedule.

python examples/gradual.py
"""

import torch
from torch.nn.functional import cross_entropy

import secateur as sc
from secateur.sources.bundled import load_mnist
from secateur.sources.demo import build_convnet


def main(epochs: int = 8, sparsity: float = 0.9) -> float:
    """Train, prune on the way, and return the accuracy on the test images."""
    torch.manual_seed(0)
    data, model = load_mnist(), build_convnet()
    steps = epochs * len(data.train)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pruner = sc.Pruner(model, sparsity=sparsity, begin=steps // 4, end=3 * steps // 4, every=10, optimizer=optimizer)
    for _ in range(epochs):
        for images, labels in data.train:
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
            pruner.step()
    pruner.finish().eval()
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data.test)
    print(f"sparsity {pruner.sparsity:.4f}, {right} of 1000 right")
    return right / 1000


if __name__ == "__main__":
    main()
