"""The folder of a run: the result of each layer or block is a file, so that a killed run resumes after the last one."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchquant._files import read_json, read_saved, write_json, write_whole
from torchquant.errors import ConfigError
from torchquant.ptq.report import StepReport
from torchquant.ptq.stage import Stage
from torchquant.ptq.work import bias_of
from torchquant.qmodule import WeightSlot
from torchquant.qmodule.weight_slots import LayerSlot
from torchquant.quantizers import Quantizer
from torchquant.range_observers._distributed import reduce_max
from torchquant.training.batches import is_first_rank

HEAD = "run.json"
PREFIX = "low_rank."


class Steps:
    """Results by pass and layer. Without a folder nothing is saved."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    @classmethod
    def of(
        cls,
        out: str | os.PathLike[str] | None,
        model: nn.Module,
        stages: Sequence[Stage],
        inputs: Sequence[Any],
        settings: tuple[Any, ...],
    ) -> Steps:
        """Open the folder of a run. Raises ConfigError if the folder is that of another run."""
        if out is None:
            return cls()
        folder = Path(out) if is_first_rank() else Path(out) / f"rank{torch.distributed.get_rank()}"
        folder.mkdir(parents=True, exist_ok=True)
        head = {
            "stages": [stage.spec or type(stage).__name__ for stage in stages],
            "settings": repr(settings),
            "model": digest(model.state_dict()),
            "batches": digest(inputs),
        }
        path = folder / HEAD
        if path.exists():
            found = read_json(path)
            other = [name for name in head if not isinstance(found, Mapping) or found.get(name) != head[name]]
            if other:
                raise ConfigError(
                    f"{folder} holds a run with other {', '.join(other)}; take another folder, or the same model, "
                    "stages and batches to resume it"
                )
        else:
            write_json(path, head)
        return cls(folder)

    def _file(self, n_pass: int, label: str) -> Path | None:
        name = hashlib.sha256(label.encode()).hexdigest()[:16]
        return None if self.folder is None else self.folder / f"{n_pass}-{name}.pt"

    def has(self, n_pass: int, label: str) -> bool:
        """Tell whether the result of the layer or block in this pass is saved, on every rank of a process group."""
        file = self._file(n_pass, label)
        return file is not None and not reduce_max(torch.tensor(not file.exists()))

    def save(self, n_pass: int, label: str, state: Mapping[str, Any], steps: Sequence[StepReport]) -> None:
        """Save the result of a pass at a layer or block: its state, as plain data and tensors, and its steps."""
        file = self._file(n_pass, label)
        if file is not None:
            kept = {**state, "steps": [asdict(step) for step in steps]}
            write_whole(file, lambda temporary: torch.save(kept, temporary))

    def restore(
        self, n_pass: int, label: str, put_back: Callable[[Mapping[str, Any]], None]
    ) -> list[StepReport] | None:
        """Give a saved state to `put_back` and return the steps; None if nothing was saved."""
        if not self.has(n_pass, label):
            return None
        file = self._file(n_pass, label)
        assert file is not None
        kept = read_saved(file)
        put_back(kept)
        return [StepReport(**step) for step in kept["steps"]]


def layer_state(slot: WeightSlot, rounded: Collection[str]) -> dict[str, Any]:
    """Return what stages change in a layer. `rounded`: the labels of rounded weights."""
    quantizer, tensors = _parts(slot)
    kept: dict[str, Any] = {"quantizer": quantizer.state_dict(), "is_rounded": slot.label in rounded}
    if isinstance(slot, LayerSlot) and slot.module.low_rank is not None:
        kept["low_rank"] = slot.module.low_rank.state_dict(prefix=PREFIX)
    return kept | {"tensors": {name: t.detach() for name, t in tensors.items()}}


@torch.no_grad()
def load_layer_state(slot: WeightSlot, kept: Mapping[str, Any], rounded: set[str]) -> None:
    """Set a layer to what `layer_state` returned; the label of a weight that is rounded goes to `rounded`."""
    quantizer, tensors = _parts(slot)
    quantizer.load_state_dict(kept["quantizer"])
    if "low_rank" in kept:
        slot.module.expect_slots(kept["low_rank"], "")
        slot.module.low_rank.load_state_dict({k.removeprefix(PREFIX): v for k, v in kept["low_rank"].items()})
    for name, tensor in tensors.items():
        tensor.copy_(kept["tensors"][name])
    if kept.get("is_rounded", quantizer.is_pinned):  # older files do not say
        rounded.add(slot.label)


def _parts(slot: WeightSlot) -> tuple[Quantizer, dict[str, Tensor]]:
    """Return the quantizer of a layer's weight, and the tensors that stages change."""
    assert slot.quantizer is not None
    held = bias_of(slot)
    return slot.quantizer, {"weight": slot.weight} | ({} if held is None else {"bias": held[0]})


def digest(value: Any) -> str:
    """Compute a fingerprint of all tensors and plain values in a structure."""
    found = hashlib.sha256()
    for leaf in tree_leaves(dict(value) if isinstance(value, Mapping) else value):
        if isinstance(leaf, Tensor):
            found.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            found.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(leaf).encode())
    return found.hexdigest()
