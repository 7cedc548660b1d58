"""Gradual pruning in a plain training loop, in twenty lines: 90 % of the weights of a small network on MNIST digits.

python examples/gradual.py
"""

import torch
from torch.nn.functional import cross_entropy

import secateur as sc
from secateur.sources.bundled import load_mnist
from secateur.sources.demo import build_convnet


def main(epochs: int = 8, sparsity: float = 0.9) -> float:
    torch.manual_seed(0)
    data, model = load_mnist(), build_convnet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    pruner = sc.Pruner(model, sparsity=sparsity, end=epochs * len(data.train) * 3 // 4, every=10, optimizer=optimizer)
    for _ in range(epochs):
        for images, labels in data.train:
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            pruner.step()
    pruner.finish().eval()
    return sum(int((model(images).argmax(1) == labels).sum()) for images, labels in data.test) / 1000


if __name__ == "__main__":
    print(f"accuracy {main():.3f} with 90 % of the weights at zero")
