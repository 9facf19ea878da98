"""Distillation: a model also learns the predictions and the features of a teacher, such as its own float model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from torchquant._arguments import checked, explained
from torchquant._modes import in_mode
from torchquant._registry import did_you_mean
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.graph.recording import call_with

Lesson = Callable[[Tensor, Any, Any], Tensor]
"""(loss on the targets, outputs, inputs) -> the loss with what the teacher adds."""


@explained
def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Compute `T**2 KL(softmax(teacher / T) || softmax(student / T))`, the mean over all but the classes; ().

    student, teacher: (N, classes, ...) scores. The gradient of the scores of a sample is `T (p_student - p_teacher)`,
    whatever the constant of the teacher. Source: Hinton et al. 2015, arXiv:1503.02531. Raises ConfigError.

    >>> distillation_loss(torch.tensor([[1.5, 0.7, -0.2]]), torch.tensor([[2.0, 0.5, -1.0]]))
    tensor(0.1361)
    """
    if not 0.0 < temperature < float("inf"):
        raise ConfigError(f"temperature must be above 0 and finite, got {temperature!r}")
    _check_alike(student, teacher, 2)
    ours, theirs = (F.log_softmax(scores / temperature, 1) for scores in (student, teacher))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1).mean() * temperature**2


@explained
def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of two features of the same shape; (). Romero et al. 2014, arXiv:1412.6550.

    >>> feature_loss(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    tensor(2.)
    """
    _check_alike(student, teacher, 1)
    return (student - teacher).square().mean()


@explained
def attention_map_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compare where two features are large: the mean over samples of `||A_s / ||A_s|| - A_t / ||A_t|| ||**2`; ().

    student, teacher: (N, channels, ...), each with any number of channels; the attention map A is the mean of squares
    over the channels. Source: Zagoruyko & Komodakis 2017, arXiv:1612.03928, eq. 2. Deviation: the squared norm, which
    has a gradient where the maps are equal.

    >>> x = torch.rand(2, 3, 4, 4)
    >>> float(attention_map_loss(x, 2 * x)) < 1e-12
    True
    """
    if min(student.ndim, teacher.ndim) < 3:
        raise ConfigError(
            f"an attention map needs features of shape (N, channels, ...), with positions; got {shown(student)} and "
            f"{shown(teacher)}"
        )
    ours, theirs = (F.normalize(x.square().mean(1).flatten(1), dim=1) for x in (student, teacher))
    _check_alike(ours, theirs, 2)
    return (ours - theirs).square().sum(1).mean()


def _check_alike(student: Tensor, teacher: Tensor, least: int) -> None:
    if student.shape != teacher.shape or student.ndim < least:
        raise ConfigError(
            f"the student and the teacher must give tensors of one shape, of {least} dimensions at least; got "
            f"{shown(student)} and {shown(teacher)}"
        )


@checked
class Distillation:
    """What a model learns from a teacher during `fit(..., teacher=...)`.

    The loss is `(1 - share) * loss on the targets + share * distillation_loss + feature_weight * (losses of features)`.
    `features`, `attention_maps`: path of a module of the student -> path of the teacher's, whose outputs are compared
    with `feature_loss` or `attention_map_loss`. `scores`: a function that takes the scores out of what a model returns;
    None: it returns them. The teacher is run in eval mode, without gradients, on the inputs of the student.
    Raises ConfigError.

    >>> from torchquant.training import fit
    >>> student, teacher = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
    >>> data = [(torch.randn(6, 4), torch.zeros(6, dtype=torch.int64))]
    >>> fit(student, data, 1, 1e-3, teacher=Distillation(teacher, share=0.9, features={"1": "1"}))
    """

    def __init__(
        self,
        teacher: nn.Module,
        share: float = 0.5,
        temperature: float = 4.0,
        features: Mapping[str, str] | None = None,
        attention_maps: Mapping[str, str] | None = None,
        feature_weight: float = 1.0,
        scores: Callable[[Any], Tensor] | None = None,
    ) -> None:
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"share must be in [0, 1], got {share!r}")
        if not 0.0 <= feature_weight < float("inf"):
            raise ConfigError(f"feature_weight must be at least 0 and finite, got {feature_weight!r}")
        self.teacher = teacher
        self.share = share
        self.temperature = temperature
        self.feature_weight = feature_weight
        self.scores = scores
        pairs = [(features or {}, feature_loss), (attention_maps or {}, attention_map_loss)]
        self.compared = [(ours, theirs, loss) for named, loss in pairs for ours, theirs in named.items()]

    @contextmanager
    def teaching(self, student: nn.Module) -> Iterator[Lesson]:
        """Yield the function that adds what the teacher says to a loss; the student is watched within the context."""
        of_student: dict[str, Tensor] = {}
        of_teacher: dict[str, Tensor] = {}
        watched = [(student, "student", {ours for ours, _, _ in self.compared}, of_student)]
        watched += [(self.teacher, "teacher", {theirs for _, theirs, _ in self.compared}, of_teacher)]
        hooks = [
            _found(model, path, who).register_forward_hook(partial(_keep, kept, path))
            for model, who, paths, kept in watched
            for path in sorted(paths)
        ]

        def lesson(value: Tensor, outputs: Any, inputs: Any) -> Tensor:
            with torch.no_grad(), in_mode(False, self.teacher):
                wanted = call_with(self.teacher, inputs, "a batch")
            total = value
            if self.share:
                learned = distillation_loss(self._scores(outputs), self._scores(wanted), self.temperature)
                total = (1.0 - self.share) * value + self.share * learned
            for ours, theirs, loss in self.compared:
                total = total + self.feature_weight * loss(_seen(of_student, ours), _seen(of_teacher, theirs))
            of_student.clear()
            of_teacher.clear()
            return total

        try:
            yield lesson
        finally:
            for hook in hooks:
                hook.remove()

    def _scores(self, outputs: Any) -> Tensor:
        found = outputs if self.scores is None else self.scores(outputs)
        if not isinstance(found, Tensor):
            raise ConfigError(
                f"the scores of a model must be a tensor, got {shown(found)}; give Distillation scores=, a function "
                "that takes them out of what the model returns"
            )
        return found


def teaching(student: nn.Module, teacher: nn.Module | Distillation | None, device: torch.device | None) -> Any:
    """Return the context of `Distillation.teaching` on a device; without a teacher a loss stays as it is."""
    if teacher is None:
        return nullcontext(lambda value, outputs, inputs: value)
    made = teacher if isinstance(teacher, Distillation) else Distillation(teacher)
    if device is not None:
        made.teacher.to(device)
    return made.teaching(student)


def _found(model: nn.Module, path: str, who: str) -> nn.Module:
    modules = dict(model.named_modules())
    if path not in modules:
        raise ConfigError(f"the {who} has no module {path!r};{did_you_mean(path, modules)} see its named_modules()")
    return modules[path]


def _keep(kept: dict[str, Tensor], path: str, module: nn.Module, args: Any, output: Any) -> None:
    tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if tensors:
        kept[path] = tensors[0]


def _seen(kept: Mapping[str, Tensor], path: str) -> Tensor:
    if path not in kept:
        raise ConfigError(f"the module {path!r} gave no tensor in this batch, so that there is no feature to compare")
    return kept[path]
