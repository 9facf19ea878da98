"""Layers that AutoQNN leaves float: lookups, recurrent layers and attention, quantized."""

from __future__ import annotations

from torch import nn

from torchquant.compat.autoqnn.modules._layer import Weighted


class Embedding(Weighted):
    """nn.Embedding, quantized."""

    kind = nn.Embedding


class EmbeddingBag(Weighted):
    """nn.EmbeddingBag, quantized."""

    kind = nn.EmbeddingBag


class LSTM(Weighted):
    """nn.LSTM, quantized."""

    kind = nn.LSTM


class GRU(Weighted):
    """nn.GRU, quantized."""

    kind = nn.GRU


class RNN(Weighted):
    """nn.RNN, quantized."""

    kind = nn.RNN


class LSTMCell(Weighted):
    """nn.LSTMCell, quantized."""

    kind = nn.LSTMCell


class GRUCell(Weighted):
    """nn.GRUCell, quantized."""

    kind = nn.GRUCell


class RNNCell(Weighted):
    """nn.RNNCell, quantized."""

    kind = nn.RNNCell


class MultiheadAttention(Weighted):
    """nn.MultiheadAttention, quantized."""

    kind = nn.MultiheadAttention
