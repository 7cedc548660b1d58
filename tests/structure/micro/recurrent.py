"""Recurrent layers: several layers, both directions, projections; and cells unrolled by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from micro.base import case, floats, tokens


class Last(nn.Module):
    """Takes the sequence of a recurrent layer."""

    def forward(self, pair: tuple[Tensor, object]) -> Tensor:
        return pair[0]


@case(floats(2, 5, 6), free="0 1.weight_ih_l0", share=0.4, zeroing=False, double=True)
def lstm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 10), nn.LSTM(10, 12, batch_first=True), Last(), nn.Linear(12, 4))


@case(floats(5, 2, 6), free="0.weight_ih_l0", share=0.4, zeroing=False)
def lstm_of_two_layers() -> nn.Module:
    """One attribute sizes both layers and both directions: a unit is the same number in all of them."""
    return nn.Sequential(nn.LSTM(6, 10, num_layers=2), Last(), nn.Linear(10, 4))


@case(floats(5, 2, 6), free="0.weight_ih_l0", share=0.3, zeroing=False)
def lstm_both_directions() -> nn.Module:
    return nn.Sequential(nn.LSTM(6, 10, bidirectional=True), Last(), nn.Linear(20, 4))


@case(floats(5, 2, 6), free="0.weight_ih_l0 0.weight_hr_l0", share=0.3, zeroing=False)
def lstm_projected() -> nn.Module:
    return nn.Sequential(nn.LSTM(6, 12, proj_size=8), Last(), nn.Linear(8, 4))


@case(floats(2, 5, 6), free="0.weight_ih_l0", share=0.3, zeroing=False)
def gru() -> nn.Module:
    return nn.Sequential(nn.GRU(6, 12, batch_first=True), Last(), nn.Linear(12, 4))


@case(floats(2, 5, 6), free="0.weight_ih_l0", share=0.3, zeroing=False)
def gru_both_directions_two_layers() -> nn.Module:
    return nn.Sequential(nn.GRU(6, 8, 2, bidirectional=True, batch_first=True), Last(), nn.Linear(16, 4))


@case(floats(2, 5, 6), free="0.weight_ih_l0", share=0.3)
def elman() -> nn.Module:
    return nn.Sequential(nn.RNN(6, 12, batch_first=True, nonlinearity="relu"), Last(), nn.Linear(12, 4))


@case(tokens(2, 5), free="embed lstm.weight_ih_l0 fc", share=0.3, zeroing=False)
class TextClassifier(nn.Module):
    """Embedding, LSTM, the last hidden state, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(20, 10), nn.LSTM(10, 12, batch_first=True)
        self.fc, self.out = nn.Linear(12, 14), nn.Linear(14, 3)

    def forward(self, ids: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.embed(ids))
        return self.out(F.relu(self.fc(hidden[-1])))


@case(floats(2, 5, 6), free="cell.weight_hh", share=0.3, zeroing=False)
class UnrolledLSTMCell(nn.Module):
    """nn.LSTMCell called step by step, with a first state made from an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = 10
        self.cell, self.out = nn.LSTMCell(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], self.hidden)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return self.out(h)


@case(floats(2, 5, 6), free="cell.weight_ih", share=0.3, zeroing=False)
class UnrolledGRUCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], self.cell.hidden_size)
        for step in x.unbind(1):
            h = self.cell(step, h)
        return self.out(h)


@case(floats(2, 5, 6), free="gates", share=0.3, zeroing=False)
class HandWrittenLSTM(nn.Module):
    """Four gates by chunk from one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 8
        self.gates, self.out = nn.Linear(6 + 8, 32), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros(x.shape[0], self.size)
        for step in x.unbind(1):
            i, f, g, o = self.gates(torch.cat([step, h], 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.out(h)


@case(floats(2, 6, 4, 4), free="conv lstm.weight_ih_l0 fc", share=0.2, zeroing=False)
class ConvolutionsIntoLSTM(nn.Module):
    """TinyNN's issue 65: convolution, 3-D view into an LSTM, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.lstm = nn.Conv2d(6, 8, 3, padding=1), nn.LSTM(32, 9, batch_first=True)
        self.fc, self.out = nn.Linear(9, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        y = y.permute(0, 3, 1, 2).reshape(y.shape[0], y.shape[3], -1)
        return self.out(F.relu(self.fc(self.lstm(y)[0])))


@case(floats(2, 5, 6), free="embed lstm.weight_ih_l0", share=0.4, zeroing=False)
class PackedSequences(nn.Module):
    """Sequences of unequal length, packed for the LSTM and padded again."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.out = nn.Linear(6, 10), nn.LSTM(10, 12, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(self.embed(x), torch.tensor([5, 3]), batch_first=True)
        y, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.out(y)
