"""What a loop over blocks changes from block to block beside the hidden state is said of plans that take some out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import secateur as sc


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        return x + torch.tanh(self.inner(x) + bias)


class Pair(Block):
    def forward(self, x: Tensor, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        return super().forward(x, bias), x


class Net(nn.Module):
    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor], block: type[Block] = Block) -> None:
        super().__init__()
        self.run = run
        self.blocks = nn.ModuleList(block() for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def said(model: nn.Module) -> list[str]:
    plan = sc.plan(model.eval(), torch.randn(3, 6), granularity="layer", remove={"blocks": [2]})
    return [each.text for each in plan.conditions if "changes from block to block" in each.text]


def flipped(self, x):
    biases = torch.zeros(2, 6)
    for block in self.blocks:
        x = block(x, biases[0])
        biases = biases.flip(0)
    return x


def halved(self, x):
    bias = torch.zeros(6)
    for block in self.blocks:
        x = block(x, bias)
        bias *= 0.5
    return x


def leaking(self, x):
    share = x.new_zeros(())
    for block in self.blocks:
        x = block(x) + share * torch.relu(x - 50)
        share = share + 0.1
    return x


def by_number(self, x):
    far = torch.zeros(6)
    for i in range(len(self.blocks)):
        x = self.blocks[i](x, torch.relu(far - 1e4))
        far = far + x.abs().sum(0)
    return x


def averaged(self, x):
    mean = x * 0
    for block in self.blocks:
        x = block(x)
        mean = 0.5 * mean + 0.5 * x
    return x + torch.relu(mean - 50)


def third_last(self, x):
    states = []
    for block in self.blocks:
        states.append(x)
        x = block(x)
    return x + torch.relu(states[-3] - 50)


def second_of_a_tuple(self, x):
    states = ()
    for block in self.blocks:
        states = states + (x,)  # noqa: RUF005 - as users write it
        x = block(x)
    return x + torch.relu(states[1] - 50)


@pytest.mark.parametrize("run", [flipped, halved, leaking, by_number, averaged, third_last, second_of_a_tuple])
def test_a_tensor_that_the_loop_changes_is_said(run):
    torch.manual_seed(0)
    assert len(said(Net(run))) == 1


def plain(self, x):
    for block in self.blocks:
        x = block(x)
    return x


def checkpointed(self, x):
    for block in self.blocks:
        x = checkpoint(block, x, use_reentrant=False)
    return x


def numbered(self, x):
    for i in range(len(self.blocks)):
        x = self.blocks[i](x)
    return x


def with_a_bias_for_all(self, x):
    bias = torch.zeros(6)
    for block in self.blocks:
        x = block(x, bias)
    return x


@pytest.mark.parametrize("run", [plain, checkpointed, numbered, with_a_bias_for_all])
def test_the_hidden_state_is_no_such_thing(run):
    torch.manual_seed(0)
    assert said(Net(run)) == []


def of_pairs(self, x):
    for block in self.blocks:
        outputs = block(x)
        x = outputs[0]
    return x


def test_nor_what_is_taken_out_of_the_outputs_of_a_block():
    torch.manual_seed(0)
    assert said(Net(of_pairs, Pair)) == []
