"""Code that all loops over batches share: reading a batch, devices, limits, and the progress bar."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from torchquant._arguments import fits
from torchquant._shown import shown
from torchquant.errors import ConfigError, MissingDependencyError, one_line, require

OnBatch = Callable[[int], object]
"""Called after each batch with the number of finished batches."""


def check_batches(batches: object, max_batches: int | None) -> None:
    """Raise ConfigError for a single batch in place of several, and for a limit below 1."""
    if isinstance(batches, Tensor | Mapping | nn.Module):
        raise ConfigError(f"batches must be an iterable of batches, got {shown(batches)}; put a single batch in a list")
    if max_batches is not None and max_batches < 1:
        raise ConfigError(f"max_batches must be at least 1, or None for all, got {max_batches}")


def count(batches: object, max_batches: int | None) -> int | None:
    """Return the number of batches of one pass; None if it is unknown."""
    n_batches = len(batches) if isinstance(batches, Sized) else None
    return min((n for n in (n_batches, max_batches) if n is not None), default=None)


def usable_device(device: str | torch.device) -> torch.device:
    """Return the device of that name. Raises ConfigError for one that this machine does not have."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"the device {str(device)!r} cannot be used: {one_line(error)}") from error


def place(model: nn.Module, device: str | torch.device | None) -> torch.device | None:
    """Move the model to a device, if one is named; return the device for its batches, None for a model on several."""
    if device is not None:
        found = usable_device(device)
        model.to(found)
        return found
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def taken(
    batches: Iterable[Any],
    max_batches: int | None,
    device: torch.device | None,
    on_batch: OnBatch | None = None,
) -> Iterator[Any]:
    """Yield the first `max_batches` batches, with their tensors on the device; call `on_batch` after each."""
    for done, batch in enumerate(itertools.islice(batches, max_batches), 1):
        yield batch if device is None else _moved(batch, device)
        if on_batch is not None:
            on_batch(done)


def _moved(batch: Any, device: torch.device) -> Any:
    try:
        return tree_map_only(Tensor, lambda x: x.to(device), batch)
    except RecursionError:
        raise ConfigError(f"a batch must be tensors, in structures that end; got {shown(batch)}") from None


def pair_of(batch: object, i: int) -> tuple[Any, Any]:
    """Return the inputs and targets of batch `i`. Raises ConfigError for a batch that is not a pair."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ConfigError(f"batch {i} must be (inputs, targets), got {shown(batch)}")
    return batch[0], batch[1]


def inputs_of(model: nn.Module, batch: Any, i: int, with_targets: bool | None) -> Any:
    """Return the inputs in batch `i`: the batch itself, or the first element of an (inputs, targets) pair.

    `with_targets`: which of the two; None: a tuple of two is a pair if the forward of the model does not take two
    arguments. Raises ConfigError if it can be either.
    """
    if with_targets:
        return pair_of(batch, i)[0]
    if with_targets is False or not isinstance(batch, tuple | list) or len(batch) != 2:
        return batch
    if isinstance(batch[0], tuple | list | Mapping):
        return batch[0]
    inner = model.module if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) else model
    takes_one, takes_both = fits(Callable[[Any], Any], inner), fits(Callable[[Any, Any], Any], inner)
    if takes_one and takes_both:
        raise ConfigError(
            f"batch {i} can be (inputs, targets) or two arguments, since the forward of {type(model).__name__} takes "
            "one argument or two; say which: with_targets=True or with_targets=False"
        )
    return batch[0] if takes_one else batch


def split_batch(model: nn.Module, batch: Any, i: int, with_targets: bool | None) -> tuple[Any, Any]:
    """Return the inputs and the targets in batch `i`, None without targets; the arguments are those of `inputs_of`."""
    inputs = inputs_of(model, batch, i, with_targets)
    return inputs, None if inputs is batch else batch[1]


def is_first_rank() -> bool:
    """Tell whether this process is the one that writes files and shows progress."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


@contextmanager
def progress_bar(
    doing: str, total: int | None, show: bool | None, callback: object = None
) -> Iterator[Callable[[], None]]:
    """Show a progress bar and return a function that advances it by one; off a terminal nothing is shown.

    `show`: whether there is a bar; None: if there is no callback and rich is installed. Raises MissingDependencyError
    if a bar is requested without rich.
    """
    wanted = show if show is not None else callback is None and is_first_rank()
    try:
        console = require("rich", "cli").get_console() if wanted else None  # which a table beside the bar shares
    except MissingDependencyError:
        if show:
            raise
        console = None
    if console is None or not console.is_terminal:
        yield lambda: None
        return
    with make_bar(console) as bar:
        task = bar.add_task(doing, total=total)
        yield lambda: bar.advance(task)


def make_bar(console: Any, above: Callable[[], Iterable[Any]] = tuple) -> Any:
    """Make a rich progress bar below the renderables of `above`; off a terminal nothing is shown."""
    rich = require("rich.progress", "cli")

    class Bar(rich.Progress):  # type: ignore[misc, name-defined]
        def get_renderables(self) -> Iterator[Any]:
            yield from above()
            yield self.make_tasks_table(self.tasks)

    return Bar(
        rich.SpinnerColumn(),
        rich.TextColumn("[progress.description]{task.description}"),
        rich.BarColumn(),
        rich.TextColumn("[progress.percentage]{task.percentage:>3.0f}%"),
        rich.TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
