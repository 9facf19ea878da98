"""MixtureQuantizer: many quantizers at one search point, mixed by learned shares, in one convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchquant._tensors import constant
from torchquant.errors import ConfigError
from torchquant.graph.sites import make_for_slot
from torchquant.quantizers import Quantizer
from torchquant.quantizers_functional._gradient import Clamp
from torchquant.quantizers_functional._row_statistics import shared_sums
from torchquant.search.learning.mixing import mix
from torchquant.search.learning.width_gradient import FORMS, MIXING_FORMS, attach_width_gradient

FLOAT = -1
"""The value of `forced` that leaves the tensor unquantized."""


class MixtureQuantizer(Quantizer):
    """Computes `sum_o share_o Q_o(x)` over the options of one point; in eval mode the best option alone quantizes.

    `rows`: one entry per scheme, width -> spec string or quantizer, as `Candidates.rows` returns them, or a list of
    spec strings. An option is a scheme at a width. `theta` (K,) are the logits; their shares in train mode are
    `softmax((theta + gumbel) / temperature)`; `hard` rounds them to one scheme in forward only (Jang et al. 2017,
    arXiv:1611.01144). `float_bitwidth` () is the width of all schemes with a width to learn; `form` chooses its
    gradient: "interp" mixes the two nearest widths in proportion to their distance (BitPruning, Nikolic et al.
    2020), "secant" mixes them at random, "step" and "stat" quantize at the rounded width and differentiate the step
    (docs/algorithms.md F3, docs/decisions/0014).

    More options make only this quantizer slower. Gradients reach x, `theta`, `float_bitwidth` and the parameters of the
    options. Raises ConfigError.

    >>> mixture = MixtureQuantizer(["clipq:2/channel", "esb:2,k=0/channel"])
    >>> weight = torch.randn(4, 9)
    >>> mixture.pre_observe(weight)
    >>> torch.equal(mixture.eval()(weight), mixture.options[0](weight))
    True
    """

    fuses_clamp = True
    temperature: Tensor

    def __init__(
        self, rows: Sequence[str | Mapping[int | None, str | Quantizer]], site: str = "weight", form: str = "interp"
    ) -> None:
        super().__init__()
        if form not in FORMS:
            raise ConfigError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
        made: list[Mapping[int | None, str | Quantizer]]
        made = [{None: row} if isinstance(row, str) else row for row in rows]
        self.form = form
        given = [option for row in made for option in row.values()]
        self.specs = [o if isinstance(o, str) else f"{type(o).__name__}:{o.n_bits}" for o in given]
        self.options = nn.ModuleList(make_for_slot(o, site) if isinstance(o, str) else o for o in given)
        share_observers(self.options)
        widths = sorted({n for row in made for n in row if n is not None})
        self.widths = tuple(widths)
        self.n_rows = len(made)
        # option -> its scheme, and its column among the widths; an option with a fixed width has the last column
        self._rows = [i for i, row in enumerate(made) for _ in row]
        self._columns = [len(widths) if n is None else widths.index(n) for row in made for n in row]
        self._row_of: Tensor
        self._column_of: Tensor
        self.register_buffer("_row_of", torch.tensor(self._rows), persistent=False)
        self.register_buffer("_column_of", torch.tensor(self._columns), persistent=False)
        self.theta = nn.Parameter(torch.zeros(len(made))) if len(made) > 1 else None
        self.float_bitwidth = nn.Parameter(torch.tensor(float(widths[-1]))) if len(widths) > 1 else None
        self.register_buffer("temperature", torch.ones(()))
        self.hard = False
        self.learns = True
        self.forced: int | None = None
        self.narrow = True
        self.active: tuple[int, ...] = ()
        self.refresh()

    @property
    def n_bits(self) -> int:  # type: ignore[override]
        """The bits of the option that would be chosen now."""
        return self.option_bits[self.best_option()]

    @property
    def option_rows(self) -> list[int]:
        """The index of the scheme of each option."""
        return list(self._rows)

    @property
    def option_bits(self) -> list[int]:
        """The bits of each option."""
        return [option.n_bits for option in self.options]  # type: ignore[misc]

    def _numbers_of(self, weight: Tensor) -> dict[str, Tensor]:
        raise ConfigError("a mixture cannot be pinned: it has no one grid. Let the search choose, and pin its choice")

    @property
    def is_ready(self) -> bool:
        return self.forced == FLOAT or all(self.options[i].is_ready for i in self.active)

    @property
    def is_memoryless(self) -> bool:
        return all(option.is_memoryless for option in self.options)

    def allocate_for(self, weight: Tensor) -> None:
        for option in self.options:
            option.allocate_for(weight)  # type: ignore[operator]

    def pre_observe(self, x: Tensor, clamp: Clamp | None = None) -> None:
        """Let options that take part or must not miss a batch observe x or `x.clamp(*clamp)`; each observer once."""
        seen: set[int] = set()
        shown = set(self.active)
        if self.form == "stat" and self.float_bitwidth is not None:
            shown |= {self._beside(i) for i in self.active}  # the steps of neighbouring widths are compared
        clamped = x if clamp is None else x.detach().clamp(*clamp)
        with shared_sums():
            for i, option in enumerate(self.options):
                if i in shown or not (option.is_ready and option.is_memoryless):
                    observer = id(getattr(option, "observer", option))
                    if observer not in seen:
                        seen.add(observer)
                        option.pre_observe(clamped)  # type: ignore[operator]

    def quantize(self, x: Tensor, clamp: Clamp | None = None) -> Tensor:
        """Mix the options' values of x, or of `x.clamp(*clamp)` in the same pass."""
        if self.forced == FLOAT:
            return x if clamp is None else x.clamp(*clamp)
        active, forced = list(self.active), self.forced
        if forced is None and not self.training and not torch.compiler.is_compiling():
            forced = self.best_option()
        if forced is not None:
            active = [forced]
        chosen: list[Any] = [self.options[i] for i in active]
        if forced is not None or (self.theta is None and self.float_bitwidth is None):
            return mix(x, chosen, self.temperature.new_ones(1), clamp)
        rows, columns = self._row_shares(), self._column_shares()
        taken = constant(active, torch.int64, rows.device)
        shares = rows[self._row_of[taken]] * columns[self._column_of[taken]]
        y = mix(x, chosen, shares, clamp)
        if self.float_bitwidth is None or self.form in MIXING_FORMS or not (self.training and self.learns):
            return y
        x = x if clamp is None else x.detach().clamp(*clamp)
        return attach_width_gradient(y, x, self.float_bitwidth, self._neighbours(active), shares, self.form)

    def _row_shares(self) -> Tensor:
        """Compute the shares of the schemes in this forward, (K,)."""
        if self.theta is None:
            return torch.ones(1, device=self.temperature.device)
        if not self.training:
            return nn.functional.one_hot(self.theta.argmax(), self.n_rows).to(self.theta.dtype)
        theta = self.theta if self.learns else self.theta.detach()
        gumbel = -torch.empty_like(theta).exponential_().log()
        soft = torch.softmax((theta + gumbel) / self.temperature, 0)
        if not self.hard:
            return soft
        return nn.functional.one_hot(soft.argmax(), self.n_rows) + (soft - soft.detach())

    def _column_shares(self) -> Tensor:
        """Compute the shares of the widths in this forward, and 1 for options with a fixed width, (W + 1,)."""
        if self.float_bitwidth is None:
            return torch.ones(len(self.widths) + 1, device=self.temperature.device)
        width = self.float_bitwidth if self.learns else self.float_bitwidth.detach()
        if self.training and self.form in MIXING_FORMS:
            return self._hat(width, torch.rand_like(width) if self.form == "secant" else None)
        return self._hat(torch.round(width.detach().clamp(self.widths[0], self.widths[-1])))

    def _hat(self, width: Tensor, share: Tensor | None = None) -> Tensor:
        """Share a width between its two neighbours, followed by a 1. The gradient is defined at whole numbers too.

        `share`: the share of the wider one, in place of the proportional share.
        """
        low, high = self.widths[0], self.widths[-1]
        bounded = width + (width.clamp(low, high) - width).detach()
        below = bounded.detach().floor().clamp(low, high - 1)
        part = bounded - below
        part = part if share is None else share + (part - part.detach())
        index = (below - low).to(torch.int64)
        one = nn.functional.one_hot(torch.stack([index, index + 1]), len(self.widths)).to(width.dtype)
        return torch.cat([one[0] * (1 - part) + one[1] * part, torch.ones_like(part)[None]])

    def expected_shares(self) -> Tensor:
        """Compute the shares of all options without noise, (O,), differentiable in `theta` and `float_bitwidth`."""
        rows = torch.ones(1, device=self.temperature.device) if self.theta is None else torch.softmax(self.theta, 0)
        if self.float_bitwidth is None:
            columns = torch.ones(len(self.widths) + 1, device=self.temperature.device)
        else:
            columns = self._hat(self.float_bitwidth)
        return rows[self._row_of] * columns[self._column_of]

    @torch.no_grad()
    def best_option(self) -> int:
        """Return the option with the largest logit, at the rounded width."""
        row = 0 if self.theta is None else int(self.theta.argmax())
        columns = {c: i for i, (r, c) in enumerate(zip(self._rows, self._columns, strict=True)) if r == row}
        if len(columns) == 1:
            return next(iter(columns.values()))
        return columns[self.widths.index(round(self.bitwidth()))]

    @torch.no_grad()
    def bitwidth(self) -> float:
        """Return `float_bitwidth` within its bounds; if no width is learned, the width of the option chosen now."""
        if self.float_bitwidth is None:
            return float(self.option_bits[self.best_option()])
        return float(self.float_bitwidth.clamp(self.widths[0], self.widths[-1]))

    @torch.no_grad()
    def entropy(self) -> float:
        """Compute the entropy of the schemes' shares relative to its maximum: 1 is undecided, 0 decided."""
        if self.theta is None:
            return 0.0
        shares = torch.softmax(self.theta, 0)
        return float(-(shares * shares.clamp_min(1e-30).log()).sum() / torch.tensor(float(self.n_rows)).log())

    @torch.no_grad()
    def start_at(self, width: float | None) -> None:
        """Set the width, if one is learned; None: to the widest."""
        if self.float_bitwidth is not None:
            self.float_bitwidth.fill_(self.widths[-1] if width is None else width)
            self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Clamp the width to its bounds and select the widths around it; call it when the width has changed.

        With `narrow` off all widths take part, some with a share of 0, so that compiled code stays valid when widths
        move.
        """
        if self.float_bitwidth is None:
            self.active = tuple(range(len(self.specs)))
            return
        self.float_bitwidth.clamp_(self.widths[0], self.widths[-1])
        if not self.narrow:
            self.active = tuple(range(len(self.specs)))
            return
        width = float(self.float_bitwidth)
        below = min(int(width), self.widths[-1] - 1)
        near = {round(width), below, below + 1} if self.form in MIXING_FORMS else {round(width)}
        columns = {self.widths.index(n) for n in near} | {len(self.widths)}
        self.active = tuple(i for i, column in enumerate(self._columns) if column in columns)

    def _neighbours(self, active: list[int]) -> list[tuple[Quantizer, Quantizer, int]]:
        """Return each active option with the next wider (at the end: narrower) option of its scheme, and its width."""
        bits = self.option_bits
        return [(self.options[i], self.options[self._beside(i)], bits[i]) for i in active]  # type: ignore[misc]

    def _beside(self, option: int) -> int:
        """Return the option at the next width of the same scheme, wider if possible; itself if its width is fixed."""
        column = self._columns[option]
        if column == len(self.widths) or len(self.widths) == 1:
            return option
        return option + 1 if column + 1 < len(self.widths) else option - 1

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.refresh()

    def extra_repr(self) -> str:
        width = "" if self.float_bitwidth is None else f", bitwidth={self.bitwidth():.2f}"
        return f"best={self.specs[self.best_option()]!r}, entropy={self.entropy():.2f}{width}"


def share_observers(options: Sequence[Any] | nn.ModuleList) -> None:
    """Let options with equal observers share one observer, so that it measures once."""
    known: dict[tuple[Any, ...], nn.Module] = {}
    for option in options:
        observer = getattr(option, "observer", None)
        if isinstance(observer, nn.Module):
            settings = {
                name: value
                for name, value in vars(observer).items()
                if not name.startswith("_") and isinstance(value, int | float | str | bool | type(None))
            }
            key = (type(observer), tuple(sorted(settings.items(), key=lambda item: item[0])))
            option.observer = known.setdefault(key, observer)
