"""AutoQNN's layers: `Conv2d(3, 8, 3, weight_quant=..., act_quant=...)`.

Each is a QWrapper, or a QWeights, with its activation quantizer at the input; it quantizes as its train and eval modes
say: in training it observes and quantizes, in evaluation it quantizes. `layer` is the torch layer inside.
"""

from torch import nn

from torchquant.compat.autoqnn.modules._layer import QuantLayer as QuantLayer
from torchquant.compat.autoqnn.modules._layer import Weighted as Weighted
from torchquant.compat.autoqnn.modules._layer import Wrapped as Wrapped
from torchquant.compat.autoqnn.modules.conv import Conv1d as Conv1d
from torchquant.compat.autoqnn.modules.conv import Conv2d as Conv2d
from torchquant.compat.autoqnn.modules.conv import Conv3d as Conv3d
from torchquant.compat.autoqnn.modules.conv import ConvTranspose1d as ConvTranspose1d
from torchquant.compat.autoqnn.modules.conv import ConvTranspose2d as ConvTranspose2d
from torchquant.compat.autoqnn.modules.conv import ConvTranspose3d as ConvTranspose3d
from torchquant.compat.autoqnn.modules.linear import Bilinear as Bilinear
from torchquant.compat.autoqnn.modules.linear import Linear as Linear
from torchquant.compat.autoqnn.modules.several import GRU as GRU
from torchquant.compat.autoqnn.modules.several import LSTM as LSTM
from torchquant.compat.autoqnn.modules.several import RNN as RNN
from torchquant.compat.autoqnn.modules.several import Embedding as Embedding
from torchquant.compat.autoqnn.modules.several import EmbeddingBag as EmbeddingBag
from torchquant.compat.autoqnn.modules.several import GRUCell as GRUCell
from torchquant.compat.autoqnn.modules.several import LSTMCell as LSTMCell
from torchquant.compat.autoqnn.modules.several import MultiheadAttention as MultiheadAttention
from torchquant.compat.autoqnn.modules.several import RNNCell as RNNCell
from torchquant.qmodule.patterns import LayerPattern, row_of, stock_type

LAYERS: tuple[type[QuantLayer], ...] = (
    *(Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d),
    *(Linear, Bilinear),
)
"""AutoQNN's layers."""
MORE_LAYERS: tuple[type[QuantLayer], ...] = (
    *(Embedding, EmbeddingBag, MultiheadAttention),
    *(LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell),
)
"""Layers that AutoQNN leaves float."""


def layer_class(held: nn.Module) -> type[QuantLayer]:
    """Return the class for a QModule: that of the torch layer inside, else one for its number of weights."""
    kind = stock_type(held.layer)  # type: ignore[arg-type]
    general: type[QuantLayer] = Wrapped if isinstance(row_of(held.layer), LayerPattern) else Weighted  # type: ignore[arg-type]
    return next((layer for layer in (*LAYERS, *MORE_LAYERS) if layer.kind is kind), general)
