"""Define settings of runs: fields that become command-line options, checks of type and range, rules by name or file."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from torchquant._arguments import described, fits
from torchquant._files import is_file
from torchquant._registry import did_you_mean, not_one_of
from torchquant._shown import shown
from torchquant.errors import ConfigError
from torchquant.plan import RULE_SETS, QuantPlan, read_yaml
from torchquant.runs.data import DATA

MAX_SEED = 2**32 - 1
MOST_NUMBERS = 1000
"""Largest number of numbers that one range gives."""
HELP = "help"
"""Key in the metadata of a field for its help on the command line."""


def argument(words: str) -> Any:
    """Define a setting without a default, an argument on the command line; `words` is its help."""
    return field(metadata={HELP: words})


def option(default: Any, words: str, **more: Any) -> Any:
    """Define a setting that is an option of the command line; `words` is its help, `more` is further metadata."""
    return field(default=default, metadata={HELP: words, **more})


def model_argument() -> Any:
    """Define the setting `model`, for `build_model`."""
    return argument("demo, a name of torchvision or timm, timm:NAME, or path/to/file.py:function.")


def data_option() -> Any:
    """Define the setting `data`, for `load_data`."""
    return option("digits", "digits, cifar10, or a folder of pictures: train/CLASS/ and test/CLASS/.")


def checkpoint_option() -> Any:
    """Define the setting `checkpoint`, which replaces float training."""
    return option(None, "A float state_dict to start from, instead of float training.")


def weights_option() -> Any:
    """Define the setting `weights`, from which float training starts."""
    return option(None, "Pretrained weights to start from: DEFAULT, a name that torchvision or timm has, or a file.")


def check_start(config: Any) -> None:
    """Raise ConfigError if the settings name both a checkpoint and weights."""
    if config.checkpoint is not None and config.weights is not None:
        raise ConfigError(
            "checkpoint and weights were both given; a checkpoint is the float model itself, float training starts "
            "from weights: give one of them"
        )


def seed_option() -> Any:
    """Define the setting `seed`."""
    return option(0, "Random seed; the same seed gives the same numbers, with the same number of threads.")


def words_of(config: Any) -> list[str]:
    """Return the command-line options for all settings that are not at their default.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Config:
    ...     budget: str = option("", "What the plan may cost.")
    ...     fold_bn: bool = option(False, "Fold.")
    >>> words_of(Config("bits<=3", True))
    ["--budget 'bits<=3'", '--fold-bn']
    """
    words = []
    for entry in fields(config):
        value = getattr(config, entry.name)
        if HELP in entry.metadata and entry.default is not MISSING and value != entry.default:
            flag = f"--{entry.name.replace('_', '-')}"
            words.append(flag if value is True else f"{flag} {shlex.quote(str(value))}")
    return words


def command_line(command: str, config: Any) -> str:
    """Return the command line that runs a command with these settings.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Config:
    ...     model: str = argument("A model.")
    ...     seed: int = seed_option()
    >>> command_line("quantize", Config("my nets.py:net", 3))
    "torchquant quantize 'my nets.py:net' --seed 3"
    """
    given = (entry for entry in fields(config) if HELP in entry.metadata and entry.default is MISSING)
    arguments = [shlex.quote(str(getattr(config, entry.name))) for entry in given]
    return " ".join(["torchquant", command, *arguments, *words_of(config)])


def check_types(instance: Any) -> None:
    """Raise ConfigError that names the first field of a data class whose value does not have the field's type."""
    for name, hint in get_type_hints(type(instance)).items():
        value = getattr(instance, name, None)
        if name in instance.__dataclass_fields__ and not fits(hint, value):
            raise ConfigError(f"{name} must be {described(hint)}, got {shown(value)}")


def check_one_of(instance: Any, **allowed: Iterable[str]) -> None:
    """Raise ConfigError for a field that is not one of the allowed words.

    >>> from types import SimpleNamespace
    >>> check_one_of(SimpleNamespace(mode="qta"), mode=["ptq", "qat"])
    Traceback (most recent call last):
    torchquant.errors.ConfigError: mode must be one of ptq, qat, got 'qta'; did you mean 'qat'?
    """
    for name, words in allowed.items():
        if getattr(instance, name) not in words:
            raise ConfigError(not_one_of(name, getattr(instance, name), words))


def check_at_least(instance: Any, **least: int) -> None:
    """Raise ConfigError for a field below its minimum.

    >>> from types import SimpleNamespace
    >>> check_at_least(SimpleNamespace(epochs=0), epochs=1)
    Traceback (most recent call last):
    torchquant.errors.ConfigError: epochs must be at least 1, got 0
    """
    for name, number in least.items():
        if getattr(instance, name) < number:
            raise ConfigError(f"{name} must be at least {number}, got {getattr(instance, name)}")


def check_above_zero(instance: Any, *names: str) -> None:
    """Raise ConfigError for a field that is neither None nor a finite number above 0."""
    for name in names:
        value = getattr(instance, name)
        if value is not None and not 0.0 < value < math.inf:
            raise ConfigError(f"{name} must be above 0 and finite, got {value}")


def check_seed(seed: int) -> None:
    """Raise ConfigError for a seed that numpy or torch would not take."""
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed must be 0..{MAX_SEED}, got {seed}")


def read_rules(rules: str) -> Any:
    """Return a rule set by name, or the list of rules or the plan in a YAML file. Raises ConfigError."""
    if rules in RULE_SETS:
        return rules
    path = Path(rules)
    if not is_file(rules):
        hint = did_you_mean(rules, RULE_SETS)
        raise ConfigError(
            f"rules must be one of {', '.join(RULE_SETS)}, or a YAML file; there is no file {shown(rules)}"
            f"{hint and ';'}{hint}"
        )
    found = read_yaml(path)
    return QuantPlan.load(path) if isinstance(found, dict) else found


def split_list(text: str) -> list[str]:
    """Split a list of names that are separated by commas; spaces around them do not count.

    >>> split_list("lsq, esb")
    ['lsq', 'esb']
    """
    return [name for part in text.split(",") if (name := part.strip())]


def widths(name: str, text: str) -> list[int]:
    """Parse whole numbers and ranges of them with a hyphen, separated by commas. Raises ConfigError.

    >>> widths("bits", "2-4"), widths("bits", "8, 2"), widths("bits", "2-4,8")
    ([2, 3, 4], [2, 8], [2, 3, 4, 8])
    """
    numbers: set[int] = set()
    try:
        for part in text.split(","):
            low, hyphen, high = part.partition("-")
            found = range(int(low), int(high if hyphen else low) + 1)
            numbers |= set(found[:MOST_NUMBERS])
            if not found:
                raise ValueError("an empty range")
    except ValueError:
        numbers = set()
    if not numbers or min(numbers) < 1:
        raise ConfigError(f"{name} must be whole numbers from 1, such as '4', '2,3,4' or '2-8'; got {shown(text)}")
    return sorted(numbers)


def files_of(data: str, rules: str | None, weights: str | None = None) -> Iterator[str]:
    """Yield the data, the rules and the weights where they are paths and not names."""
    if weights is not None and is_file(weights):
        yield weights
    if data not in DATA:
        yield data
    if rules is not None and rules not in RULE_SETS:
        yield rules
