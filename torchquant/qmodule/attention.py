"""QAttention: scaled dot-product attention whose probabilities are quantized between its two products."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchquant.qmodule.op import QOp
from torchquant.quantizers import Quantizer


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    probabilities: Callable[[Tensor], Tensor],
) -> Tensor:
    """Compute `F.scaled_dot_product_attention` product by product, with a function of the probabilities between.

    query: (..., n, k). key: (..., m, k). value: (..., m, v). probabilities: (..., n, m) -> the same shape, before the
    dropout. A query that may look at nothing has probabilities of 0.

    >>> q, k, v = torch.randn(3, 2, 5, 4).unbind()
    >>> y = attention(q, k, v, probabilities=lambda p: p)
    >>> torch.allclose(y, F.scaled_dot_product_attention(q, k, v), atol=1e-6)
    True
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    scores = torch.matmul(query, key.transpose(-2, -1)) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        allowed = attn_mask if attn_mask.dtype == torch.bool else None
        scores = scores + attn_mask if allowed is None else scores.masked_fill(allowed.logical_not(), -math.inf)
    weights = torch.softmax(scores, -1)
    if attn_mask is not None:
        weights = weights.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
    weights = probabilities(weights)
    return torch.matmul(F.dropout(weights, dropout_p) if dropout_p > 0.0 else weights, value)


class QAttention(QOp):
    """Runs `F.scaled_dot_product_attention`; quantizes the probabilities inside, and the result.

    Where a state quantizes activations it is computed product by product; elsewhere it is torch's own function.

    >>> from torchquant.qmodule import QModuleState
    >>> from torchquant.quantizers import DoReFaQuantizer
    >>> op = QAttention(F.scaled_dot_product_attention, DoReFaQuantizer(8, activation=True))
    >>> op(*torch.randn(3, 2, 5, 4)).shape
    torch.Size([2, 5, 4])
    """

    def __init__(
        self,
        op: Callable[..., Tensor],
        probabilities_quantizer: Quantizer | None = None,
        acts_quantizer: Quantizer | None = None,
        activation: nn.Module | None = None,
        input_quantizer: Quantizer | None = None,
    ) -> None:
        super().__init__(op, acts_quantizer, activation, input_quantizer)
        self.probabilities_quantizer = probabilities_quantizer

    def compute(self, *args: Any, **kwargs: Any) -> Tensor:
        quantizer, state = self.probabilities_quantizer, self.state
        observes = state.is_act_observed and quantizer is not None and not quantizer.is_pinned
        if quantizer is None or not (state.is_act_quantized or observes):
            return self.op(*args, **kwargs)

        def probabilities(weights: Tensor) -> Tensor:
            return self._run_acts_quantizer("probabilities", quantizer, weights)

        y = attention(*args, probabilities=probabilities, **kwargs)
        return y if state.is_act_quantized else self.op(*args, **kwargs)
