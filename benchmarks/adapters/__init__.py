"""The measured libraries. To add a library, write one file with one class, and one line here."""

from benchmarks.adapters.base import Adapter
from benchmarks.adapters.brevitas_adapter import BrevitasAdapter
from benchmarks.adapters.plain_ste import PlainSteAdapter
from benchmarks.adapters.torch_native import TorchNativeAdapter
from benchmarks.adapters.torchquant_adapter import TorchquantAdapter

ADAPTERS: dict[str, Adapter] = {
    "torchquant": TorchquantAdapter(),
    "plain": PlainSteAdapter(),
    "torch": TorchNativeAdapter(),
    "brevitas": BrevitasAdapter(),
}
