"""The dialect of AutoQNN: `import torchquant.compat.autoqnn as autoqnn`."""

from torchquant.compat.autoqnn import quantizers as quantizers

__all__ = ["quantizers"]
