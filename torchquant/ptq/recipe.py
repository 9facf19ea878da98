"""Recipes: a plan and its stages, as one line, as a YAML file, or by the name of a built-in recipe."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from torchquant._arguments import Bounds, Count, checked, described, fits
from torchquant._files import is_file
from torchquant._registry import did_you_mean
from torchquant._shown import shown
from torchquant._units import bytes_of
from torchquant.errors import ConfigError
from torchquant.plan import read_yaml
from torchquant.ptq.stage import PTQ, Stage, make_stage
from torchquant.qmodule.weighted import EXPERTS

FORMAT = 1
DATA_KEYS: Mapping[str, Any] = {"source": str, "samples": Count, "batch": Count, "seed": Annotated[int, Bounds(0)]}
"""The keys of `data` in a recipe, and their types: the data by name or folder, how many, and the seed of the order."""


@checked
@dataclass(frozen=True)
class Recipe:
    """A recipe: rules for the plan, and stages. `names`, `skip`, `keep` as in `run`. Raises ConfigError.

    `data`: what the command takes for the batches, by `DATA_KEYS`: `source`, `samples`, `batch`, `seed`. `cache`:
    `bytes`, as `cache_bytes` of `run`, a number or a text such as "2GB".

    >>> Recipe.parse("gptq:damp=0.05,act_order,bias_correction").stages
    ('gptq:damp=0.05,act_order', 'bias_correction')
    """

    stages: tuple[Any, ...]
    rules: Any = None
    keep: str = "best"
    names: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_keys("data", self.data, DATA_KEYS)
        _check_keys("cache", self.cache, ("bytes",))
        for name, hint in DATA_KEYS.items():
            if name in self.data and not fits(hint, self.data[name]):
                raise ConfigError(f"data: {name} must be {described(hint)}, got {shown(self.data[name])}")
        if self.data.get("samples", 0) % self.data.get("batch", 1):
            raise ConfigError(
                f"data: samples must be whole batches, got {self.data['samples']} samples in batches of "
                f"{self.data['batch']}"
            )
        _ = self.cache_bytes

    @property
    def cache_bytes(self) -> int | None:
        """Return the limit of memory for waiting inputs, None without one."""
        return bytes_of(self.cache["bytes"], "cache: bytes") if "bytes" in self.cache else None

    @property
    def made(self) -> list[Stage]:
        """Make the stages."""
        return [make_stage(stage) for stage in self.stages]

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Read stages from one line: names separated by commas; options, separated by commas too, after a colon."""
        stages: list[str] = []
        for item in (part.strip() for part in text.split(",")):
            is_stage = item.partition(":")[0] in PTQ
            if stages and not is_stage and ":" in stages[-1]:
                stages[-1] += f",{item}"
            else:
                stages.append(item)
        recipe = cls(tuple(stages))
        _ = recipe.made
        return recipe

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a YAML file: `stages`, and optionally `plan`, `keep`, `names`, `skip`, `data`, `cache`."""
        found = read_yaml(path)
        more_keys = ("keep", "names", "skip", "data", "cache")
        allowed = ("torchquant_ptq", "plan", "stages", *more_keys)
        if not isinstance(found, Mapping) or found.get("torchquant_ptq") != FORMAT:
            raise ConfigError(f"{path} is not a recipe: its first line must be 'torchquant_ptq: {FORMAT}'")
        if unknown := [str(key) for key in found if key not in allowed]:
            raise ConfigError(f"{path}: no {', '.join(unknown)} in a recipe; it has {', '.join(allowed)}")
        stages = found.get("stages")
        if not isinstance(stages, list) or not stages:
            raise ConfigError(f"{path}: stages must be a list of names, got {shown(stages)}")
        more = {name: found[name] for name in more_keys if name in found}
        more |= {name: tuple(more[name]) for name in ("names", "skip") if isinstance(more.get(name), list)}
        recipe = cls(tuple(stages), found.get("plan"), **more)
        _ = recipe.made
        return recipe


def _check_keys(what: str, given: Mapping[str, Any], allowed: Iterable[str]) -> None:
    if unknown := [str(key) for key in given if key not in allowed]:
        raise ConfigError(f"{what} of a recipe has no {', '.join(unknown)}; it has {', '.join(allowed)}")


RECIPES: dict[str, Recipe] = {
    "cnn-w8a8": Recipe(("calibrate", "nearest", "bias_correction"), "w8a8"),
    "cnn-w4a8": Recipe(("calibrate", "gptq:act_order", "descent", "bias_correction"), "w4a8"),
    "cnn-w4a4": Recipe(("calibrate", "gptq:act_order", "descent", "refit", "calibrate", "bias_correction"), "w4a4-lsq"),
    "dfq": Recipe(
        ("fold_bn", "cle", "absorb", "bn_ranges", "analytic_bias"),
        ({"weight": "affine:8,symmetric=narrow", "input": "affine:8", "output": "affine:8", "fold_bn": True},),
    ),
    "transformer-w4a8": Recipe(("calibrate", "gptq:act_order", "descent", "bias_correction"), "w4a8-transformer"),
    "llm-w4a8-rotate": Recipe(("rotate", "gptq:act_order", "descent", "bias_correction"), "w4a8-transformer"),
    "llm-w4-gptq": Recipe(
        ("gptq:act_order",), ({"types": ["Linear", "Conv1D", EXPERTS], "weight": "affine:4/group=128"},)
    ),
}
"""Built-in recipes by name."""


@checked
def find_recipe(name: str) -> Recipe:
    """Return a recipe from the name of a built-in one, a YAML file, or stages in one line. Raises ConfigError."""
    if name in RECIPES:
        return RECIPES[name]
    if is_file(name):
        return Recipe.load(name)
    if name.partition(",")[0].partition(":")[0].strip() in PTQ:
        return Recipe.parse(name)
    hint = did_you_mean(name, [*RECIPES, *PTQ])
    raise ConfigError(
        f"a recipe is one of {', '.join(RECIPES)}, a YAML file, or stages such as 'gptq,bias_correction'; there is no "
        f"{shown(name)}.{hint}"
    )
