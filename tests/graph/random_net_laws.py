"""What holds for every net: the laws of a quantized model, each against the float model, on nets of random_nets.py."""

from __future__ import annotations

import copy
import pickle
import random
import re
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.graph.random_nets import Net, Spec, draw, fresh, loss_of, make, seed_all, set_flags, smaller, tensors_of
from torchquant import QModuleState, qmodule_state, quantize, set_qmodule_state
from torchquant.errors import ConfigError
from torchquant.utils import qmodules

RULES: dict[str, Any] = {
    "w8a8": "w8a8",
    "w4a4-lsq": "w4a4-lsq",
    "int8-ort": "int8-ort",
    "a list": [
        {"weight": "affine:8/channel", "input": "affine:8", "output": "affine:8"},
        {"position": "last", "output": None},
    ],
}
MAX_ERROR = 0.1
"""Largest power of the error at 8 bits, as a share of the output's."""
LEARNING = 0.05
MISSING = "(missing)"


class Broken(AssertionError):  # noqa: N818 - a law that is broken
    """Where a law does not hold."""


@dataclass(frozen=True)
class Setting:
    """How a net is quantized."""

    rules: str
    example: Any = None

    def quantize(self, model: nn.Module) -> nn.Module:
        example = copy.deepcopy(self.example)
        made = quantize(model, RULES[self.rules], example)
        require(difference(example, self.example, "the example given to quantize"))
        return made

    def __str__(self) -> str:
        return f"{self.rules}, {'no example' if self.example is None else 'an example'}"


@dataclass(frozen=True)
class Failure:
    seed: int
    law: str
    setting: str
    message: str

    @property
    def kind(self) -> str:
        """The message without names and numbers."""
        return re.sub(r"\d+(\.\d+)?(e-\d+)?", "#", self.message.splitlines()[0])[:90]


def settings_of(net: Net) -> list[Setting]:
    r = Random(net.spec.seed)
    return [Setting(r.choice(list(RULES))), Setting(r.choice(list(RULES)), r.choice(net.examples()))]


# Comparing


def difference(found: Any, expected: Any, where: str) -> str | None:
    """The first place where the two differ, or None. Tensors have to be equal bit for bit."""
    if isinstance(expected, Tensor):
        return _tensor_difference(found, expected, where)
    if isinstance(expected, dict) and isinstance(found, dict):
        if list(found) != list(expected):
            return f"{where}: keys {list(found)} instead of {list(expected)}"
        pairs = [(f"{where}[{key!r}]", found[key], expected[key]) for key in expected]
    elif isinstance(expected, tuple | list) and type(found) is type(expected):
        if len(found) != len(expected):
            return f"{where}: {len(found)} parts instead of {len(expected)}"
        pairs = [(f"{where}[{i}]", *parts) for i, parts in enumerate(zip(found, expected, strict=True))]
    else:
        is_same = type(found) is type(expected) and (isinstance(expected, nn.Module) or found == expected)
        return None if is_same else f"{where}: {_words(found)} instead of {_words(expected)}"
    return next((told for place, a, b in pairs if (told := difference(a, b, place)) is not None), None)


def _tensor_difference(found: Any, expected: Tensor, where: str) -> str | None:
    if not isinstance(found, Tensor):
        return f"{where}: {_words(found)} instead of a tensor"
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return f"{where}: {found.dtype} {tuple(found.shape)} instead of {expected.dtype} {tuple(expected.shape)}"
    if found.requires_grad != expected.requires_grad:
        return f"{where}: requires_grad is {found.requires_grad}"
    if torch.equal(found, expected) or torch.equal(found.nan_to_num(1e38), expected.nan_to_num(1e38)):
        return None
    return f"{where}: values differ by {float((found.double() - expected.double()).abs().max()):.2g}"


def _words(value: Any) -> str:
    return "a tensor" if isinstance(value, Tensor) else re.sub(r" at 0x\w+", "", repr(value))[:60]


def require(told: str | None) -> None:
    if told is not None:
        raise Broken(told)


def kept(value: Any) -> Any:
    """The value as it is now, with nothing that may change later; tensors keep whether they require a gradient."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: kept(part) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(kept, value))
    return type(value)(map(kept, value)) if isinstance(value, tuple | list) else value


def random_states() -> dict[str, int]:
    """One number for the state of each generator."""
    _, numbers, position, *_ = np.random.get_state()
    return {
        "torch": zlib.crc32(torch.get_rng_state().numpy().tobytes()),
        "random": hash(random.getstate()),
        "numpy": hash((numbers.tobytes(), position)),
    }


# Observing a run


@dataclass
class Names:
    """What a float net has: the keys of its state, and the attributes of its own classes by module path."""

    state: list[str]
    attributes: dict[str, list[str]]

    @classmethod
    def of(cls, net: Net) -> Names:
        model = net.build()
        own = {path: m for path, m in model.named_modules() if type(m).__module__ == net.module.__name__}
        return cls(
            list(model.state_dict()),
            {path: [k for k in m.__dict__ if k[0] != "_" and k != "training"] for path, m in own.items()},
        )

    def state_of(self, model: nn.Module) -> dict[str, Any]:
        """The parameters and buffers under the keys of the float net."""
        own = model.state_dict(keep_vars=True)
        places = [(key, key) for key in self.state] + list(getattr(model, "float_keys", ()))
        found = {float_key: own[key] for float_key, key in reversed(places) if key in own}
        return {key: found.get(key, MISSING) for key in self.state}

    def attributes_of(self, model: nn.Module) -> dict[str, Any]:
        return {
            f"{path}.{key}": getattr(model.get_submodule(path), key, MISSING)
            for path, keys in self.attributes.items()
            for key in keys
        }


@dataclass
class Observation:
    """All that a run of a model leaves behind."""

    error: str = ""
    output: Any = None
    inputs: Any = None
    aliases: Any = None
    gradients: Any = None
    state: Any = None
    attributes: Any = None
    random: Any = None

    def require_equal(self, expected: Observation, where: str) -> None:
        if self.error and not expected.error:
            raise Broken(f"{where}: {self.error}")
        if self.error and expected.error:  # what fails in the float model may fail in other words
            return
        for part in ("error", "output", "inputs", "aliases", "attributes", "state", "gradients", "random"):
            require(difference(getattr(self, part), getattr(expected, part), f"{where}, {part}"))


def observe(model: nn.Module, call: Any, names: Names, learns: bool = True) -> Observation:
    """Run the model, backward too, with random states of its own."""
    model.zero_grad(set_to_none=True)
    args, kwargs = fresh(call[0]), fresh(call[1])
    given = list(tensors_of([args, kwargs]))
    for t in given:
        t.retain_grad()
    seed_all(7)
    try:
        with torch.set_grad_enabled(learns):
            output = model(*args, **kwargs)
        drawn = random_states()
        attributes = names.attributes_of(model)
        if learns:
            loss = loss_of([output, list(attributes.values())])
            if loss.requires_grad:
                loss.backward()
    except Exception as error:
        return Observation(error=told_by(error))
    state = names.state_of(model)
    gradients = {key: getattr(value, "grad", None) for key, value in state.items()}
    gradients |= {f"input {i}": t.grad for i, t in enumerate(given)}
    pointers = [t.untyped_storage().data_ptr() for t in (*given, *tensors_of(output))]
    found = Observation("", output, (args, kwargs), [pointers.index(p) for p in pointers], gradients, state, attributes)
    return Observation(**{key: kept(value) for key, value in found.__dict__.items() if key != "random"}, random=drawn)


def told_by(error: BaseException) -> str:
    """The error in one line, with the place in the package where it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f"{f.filename.rpartition('torchquant/')[2]}:{f.name}" for f in frames if "/torchquant/" in f.filename]
    line = " ".join(str(error).split())[:170]
    return f"{type(error).__name__}: {line}" + (f" (in {inside[-1]})" if inside else "")


# The laws. Each raises Broken.


@dataclass
class Bench:
    """A net with a way to quantize it, and the pair that the laws work on."""

    net: Net
    setting: Setting
    names: Names
    r: Random
    float_model: nn.Module = field(init=False)
    model: nn.Module = field(init=False)

    def pair(self) -> None:
        self.float_model, self.model = self.net.build(), self.setting.quantize(self.net.build())

    @property
    def both(self) -> tuple[nn.Module, nn.Module]:
        return self.float_model, self.model

    def compare(self, where: str, calls: Iterable[Any] | None = None) -> None:
        for i, call in enumerate(self.net.calls() if calls is None else calls):
            expected, found = (observe(m, call, self.names) for m in self.both)
            found.require_equal(expected, f"{where}, call {i}")

    def paths(self, wanted: Callable[[nn.Module], bool]) -> list[str]:
        return [
            path
            for path, m in self.float_model.named_modules()
            if path and "parametrizations" not in path and wanted(m)
        ]

    def is_own(self, module: nn.Module) -> bool:
        """Whether a class of the net's own source, or a container of torch."""
        return type(module).__module__ == self.net.module.__name__ or isinstance(module, nn.Sequential)


def untouched(b: Bench) -> None:
    """1: the float model is what it was, object for object, and so are the random states."""
    model, twin = b.net.build(), b.net.build()
    if b.r.random() < 0.3:
        for m in (model, twin):
            observe(m.eval(), b.net.calls()[0], b.names, learns=False)
    before = anatomy(model)
    seed_all(3)
    states = random_states()
    b.setting.quantize(model)
    require(difference(random_states(), states, "random states"))
    after = anatomy(model)
    for key in sorted(before.keys() | after.keys()):
        if key not in after or key not in before:
            raise Broken(f"{key}: {'added' if key in after else 'removed'}")
        if after[key][0] is not before[key][0]:
            raise Broken(f"{key}: another object")
        require(difference(after[key][1], before[key][1], key))
    observe(model, b.net.calls()[0], b.names).require_equal(observe(twin, b.net.calls()[0], b.names), "afterwards")


def anatomy(model: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Every object that a model is made of, by place, with its value."""
    found: dict[str, tuple[Any, Any]] = {}

    def note(place: str, value: Any) -> None:
        atom = isinstance(value, int | float | str | bool | type(None))
        found[place] = (None if atom else value, type(value) if isinstance(value, nn.Module) else _plain(value))
        if isinstance(value, dict):
            for key, part in value.items():
                note(f"{place}[{key!r}]", part)

    for path, module in model.named_modules(remove_duplicate=False):
        note(path or "(root)", module)
        for key, value in (item for item in module.__dict__.items() if item[0] != "_flat_weight_refs"):
            note(f"{path}.{key}", value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return list(value)
    return kept(value) if isinstance(value, Tensor | tuple | list) else (value if not callable(value) else id(value))


def in_evaluation(b: Bench) -> None:
    """2.eval: BYPASSED is the float model."""
    for m in b.both:
        m.eval()
    b.compare("eval")


def in_training(b: Bench) -> None:
    """2.train"""
    for m in b.both:
        m.train()
    b.compare("train")


def flags_changed(b: Bench) -> None:
    """2.flags: attributes set after quantize count."""
    if b.net.flags:
        for m in b.both:
            set_flags(m, b.net.flags)
        for training in (False, True):
            for m in b.both:
                m.train(training)
            b.compare(f"flags changed, training={training}", b.net.calls()[:1])


def modes_mixed(b: Bench) -> None:
    """2.mixed: parts in evaluation while the rest trains, and the other way round."""
    wanted: tuple[Callable[[nn.Module], bool], ...] = (
        b.is_own,
        lambda m: not b.is_own(m) and not isinstance(m, nn.ModuleList),
    )
    for kind, choose in zip(("blocks", "layers"), wanted, strict=True):
        paths = b.paths(choose)
        chosen = b.r.sample(paths, (len(paths) + 1) // 2)
        for training in (True, False):
            for m in b.both:
                m.train(training)
                for path in chosen:
                    m.get_submodule(path).train(not training)
            b.compare(f"{kind} in training={not training}, the rest not: {', '.join(chosen)}", b.net.calls()[:1])


def hooks_added(b: Bench) -> None:
    """2.hooks: hooks on blocks, set after quantize."""
    logs: list[list[str]] = [[], []]
    handles = []
    for m, log in zip(b.both, logs, strict=True):
        m.eval()
        for path in ["", *b.paths(b.is_own)]:

            def hook(_: nn.Module, __: Any, output: Any, path: str = path, log: list[str] = log) -> Any:
                log.append(path)
                return output * 0.9 if isinstance(output, Tensor) else None

            handles.append(m.get_submodule(path).register_forward_hook(hook))
    b.compare("hooked", b.net.calls()[:1])
    require(difference(logs[1], logs[0], "calls of hooks"))
    for handle in handles:
        handle.remove()


def replaced(b: Bench) -> None:
    """2.replaced: another module in the place of one, set after quantize, counts or is refused."""
    for kind, wanted in {
        "activation": lambda m: type(m) in (nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.LeakyReLU, nn.Hardswish),
        "layer": lambda m: type(m) in (nn.Linear, nn.Conv2d),
        "block": lambda m: b.is_own(m) and not isinstance(m, nn.Sequential),
    }.items():
        paths = b.paths(wanted)
        if not paths:
            continue
        path = b.r.choice(paths)
        new = nn.Softsign() if kind == "activation" else copy.deepcopy(b.net.build().get_submodule(path))
        with torch.no_grad():
            for p in new.parameters():
                p.add_(0.1)
        owner, _, name = path.rpartition(".")
        try:
            for m in b.both:
                setattr(m.get_submodule(owner), name, copy.deepcopy(new).train(m.training))
        except ConfigError:
            return
        b.compare(f"{kind} {path} replaced", b.net.calls()[:1])


def calibrate(b: Bench) -> None:
    """A pair with the same history: the one has calibrated on all calls, the other has run them."""
    b.pair()
    for m in b.both:
        m.eval()
    run_all(b, b.float_model)
    with qmodule_state(b.model, QModuleState.CALIBRATION):
        run_all(b, b.model)
    set_qmodule_state(b.model, QModuleState.QUANT_EVAL)


@torch.no_grad()
def run_all(b: Bench, model: nn.Module) -> list[Any]:
    outputs = []
    for args, kwargs in b.net.calls():
        seed_all(7)
        outputs.append(kept(model(*kept(args), **kept(kwargs))))
    return outputs


def near(b: Bench) -> None:
    """3.near: at 8 bits the output is near the float one."""
    found, expected = (
        torch.cat([t.flatten() for t in tensors_of(run_all(b, m)) if t.is_floating_point()])
        for m in (b.model, b.float_model)
    )
    if not bool(found.isfinite().all()):
        raise Broken("the quantized output is not finite")
    error = float((found - expected).square().sum() / expected.square().sum())
    if b.net.is_smooth and b.setting.rules != "w4a4-lsq" and error > MAX_ERROR:
        raise Broken(f"error of {error:.2f} of the output's power")


def learns(b: Bench) -> None:
    """3.learns: in QAT every parameter gets a gradient that gets one in the float model, and steps have an effect."""
    start = run_all(b, b.model)
    set_qmodule_state(b.model.train(), QModuleState.QUANT_AWARE_TRAIN)
    b.float_model.train()
    totals: list[dict[str, Tensor]] = [{}, {}]
    for call in b.net.calls():
        for m, total in zip(b.both, totals, strict=True):
            seen = observe(m, call, b.names)
            if seen.error:
                raise Broken(f"training: {seen.error}")
            for key, gradient in seen.gradients.items():
                if gradient is not None:
                    total[key] = total.get(key, 0) + gradient.abs().sum()
    for key, size in totals[0].items():
        if key not in totals[1]:
            raise Broken(f"no gradient for {key}")
        if not bool(totals[1][key].isfinite()):
            raise Broken(f"gradient of {key} is not finite")
        if float(size) > 1e-3 and float(totals[1][key]) == 0 and b.setting.rules != "w4a4-lsq":
            raise Broken(f"gradient of {key} is zero")
    with torch.no_grad():
        for p in b.model.parameters():
            if p.grad is not None:
                p.sub_(LEARNING * p.grad.sign())
    set_qmodule_state(b.model.eval(), QModuleState.QUANT_EVAL)
    if any(float(size) > 0 for size in totals[0].values()) and difference(run_all(b, b.model), start, "") is None:
        raise Broken("a step changed nothing")


def reloads(b: Bench) -> None:
    """4.reload: a state loads into the quantized form of another float model."""
    if "counter_read" in b.net.spec.features():  # numbers of Python are not in a state_dict
        return
    other = b.net.build()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05)
    made = b.setting.quantize(other).eval()
    made.load_state_dict(b.model.state_dict(), strict=True)
    _require_same(b, made)


def copied(b: Bench) -> None:
    """4.deepcopy"""
    _require_same(b, copy.deepcopy(b.model))


def pickled(b: Bench) -> None:
    """4.pickle: if the float model goes through it."""
    try:
        pickle.dumps(b.float_model)
    except Exception:  # parametrizations do not, nor do local functions
        return
    _require_same(b, pickle.loads(pickle.dumps(b.model)))


def _require_same(b: Bench, other: nn.Module) -> None:
    run_all(b, b.float_model)  # the same history
    require(difference(run_all(b, other), run_all(b, b.model), "output"))


def reverts(b: Bench) -> None:
    """4.revert: the float model again, with all that it has learned."""
    quantized = b.model
    model = quantized.plan.revert(quantized)
    types = [{path: type(m).__qualname__ for path, m in each.named_modules()} for each in (model, b.float_model)]
    require(difference(*types, "types"))
    require(difference(*(_learned(kept(dict(m.state_dict()))) for m in (model, b.float_model)), "state"))
    b.model = model
    model.load_state_dict(b.float_model.state_dict())
    for path, module in b.float_model.named_modules():  # and what forwards keep of activations
        for name in [name for name in vars(module) if name.startswith("note")]:
            setattr(model.get_submodule(path), name, copy.deepcopy(kept(vars(module)[name])))
    for training in (False, True):
        for m in b.both:
            m.train(training)
        b.compare(f"training={training}", b.net.calls()[:2])


def _learned(state: dict[str, Any]) -> dict[str, Any]:
    """Without the averages of activations that forwards keep: states that quantize gave them quantized ones."""
    return {key: value for key, value in state.items() if not key.rpartition(".")[2].startswith("stat")}


def told(b: Bench) -> None:
    """5: a weight is quantized at a site of the plan, or the plan names what stays float."""
    model, plan = b.net.build(), b.model.plan
    sites = {site.path for site in plan.sites if site.weight is not None}
    owners: dict[int, set[tuple[str, str]]] = {}
    for key, p in model.named_parameters(remove_duplicate=False):
        path = re.sub(r"\.?parametrizations\.(\w+)\.\w+", r".\1", key).removeprefix(".")
        owner, _, name = path.rpartition(".")
        if p.ndim >= 2:
            owners.setdefault(id(p), set()).add((owner, name))
    for places in owners.values():
        at_site = any(f"{owner}.".startswith(f"{site}.") for owner, _ in places for site in sites)
        if not at_site and not any(_is_named(model, plan.floats, owner, name) for owner, name in places):
            raise Broken(f"nothing is said of the weight {' = '.join(sorted('.'.join(p).lstrip('.') for p in places))}")
    if not list(qmodules(b.model)):
        raise Broken("nothing is quantized")


def _is_named(model: nn.Module, floats: Iterable[Any], owner: str, name: str) -> bool:
    """Whether one of them stands for the parameter: by its module or name, or as an operator of the owner's forward.

    The line for all operators of a forward that is not traced names none of them.
    """
    modules = dict(model.named_modules())
    for left in floats:
        speaks_of_all = left.path in modules and left.why.startswith(("operators between", "its torch.fx graph"))
        by_name = re.search(rf"\b{re.escape(name)}\b", f"{left.path} {left.type} {left.why}") is not None
        is_operator = left.path not in modules and left.path.rpartition(".")[0] == owner
        is_around = type(modules.get(left.path)) is nn.MultiheadAttention and owner.startswith(f"{left.path}.")
        is_own = is_around or left.path == owner
        if (is_own and not speaks_of_all) or (by_name and left.path.startswith(owner)) or is_operator:
            return True
    return False


LAWS: dict[str, tuple[Callable[[Bench], None], Callable[[Bench], None] | None]] = {
    "1.untouched": (untouched, None),
    "5.told": (told, Bench.pair),
    "2.eval": (in_evaluation, Bench.pair),
    "2.train": (in_training, Bench.pair),
    "2.flags": (flags_changed, Bench.pair),
    "2.mixed": (modes_mixed, Bench.pair),
    "2.hooks": (hooks_added, Bench.pair),
    "2.replaced": (replaced, Bench.pair),
    "3.near": (near, calibrate),
    "4.deepcopy": (copied, calibrate),
    "4.pickle": (pickled, calibrate),
    "4.reload": (reloads, calibrate),
    "4.revert": (reverts, calibrate),
    "3.learns": (learns, calibrate),
}
"""Name -> (the law, how its pair is prepared). A pair is used for the next law too, unless this one was broken."""


def check(net: Net, only: tuple[str, ...] = ()) -> list[Failure]:
    """Every law that the net breaks. A net that `quantize` refuses with a ConfigError breaks "0.refused"."""
    found = []
    names = Names.of(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for setting in settings_of(net):
            b = Bench(net, setting, names, Random(net.spec.seed))
            found += [Failure(net.spec.seed, law, str(setting), said) for law, said in _broken(b, only)]
    return found


def _broken(b: Bench, only: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    prepared: Callable[[Bench], None] | None = None
    for law, (run, prepare) in LAWS.items():
        if only and not law.startswith(only):
            continue
        if prepare is not None and prepare is not prepared:
            said = _said(b, prepare)
            if said is not None:
                yield ("0.refused" if said.startswith("ConfigError") else "0.crashed"), said
                return  # what cannot be quantized, or calibrated
        said = _said(b, run)
        prepared = prepare if said is None and law != "4.revert" else None
        if said is not None:
            yield law, said


def _said(b: Bench, run: Callable[[Bench], None]) -> str | None:
    try:
        run(b)
    except Broken as broken:
        return str(broken)
    except Exception as error:
        return told_by(error)
    return None


# Reports


def report(seeds: Iterable[int], only: tuple[str, ...], shrink: bool, source: bool) -> int:
    """Print what was found; the number of nets that break a law, but for what is refused."""
    specs: dict[int, Spec] = {}
    failures: list[Failure] = []
    for seed in seeds:
        specs[seed] = draw(seed)
        failures += check(make(specs[seed]), only)
    wrong = {f.seed for f in failures if f.law != "0.refused"}
    print(
        f"{len(specs)} nets: {len(wrong)} break a law, "
        f"{len({f.seed for f in failures if f.law == '0.refused'})} are refused"
    )
    for law in sorted({f.law for f in failures}):
        of_law = [f for f in failures if f.law == law]
        ways = Counter("an example" in f.setting for f in of_law)
        print(f"\n{law}: {len({f.seed for f in of_law})} nets ({ways[False]} without, {ways[True]} with an example)")
        for kind, n in Counter(f.kind for f in of_law).most_common(8):
            first = next(f for f in of_law if f.kind == kind)
            print(f"  {n:4}  seed {first.seed} ({first.setting}): {first.message[:200]}")
        print(f"        features: {_suspects(specs, {f.seed for f in of_law})}")
        if shrink:
            smallest = min(of_law, key=lambda f: len(make(specs[f.seed]).source))
            print(f"\n{shrunk(specs[smallest.seed], smallest)}")
    if source:
        for seed in sorted(wrong):
            print(f"\n# seed {seed}\n{make(specs[seed]).source}")
    return len(wrong)


def _suspects(specs: dict[int, Spec], seeds: set[int]) -> str:
    """Features whose nets break the law most often: share of its nets that do, of how many."""
    having = Counter(name for spec in specs.values() for name in spec.features())
    broken = Counter(name for seed in seeds for name in specs[seed].features())
    shares = sorted(
        ((broken[name] / n, n, name) for name, n in having.items() if n >= 4 and broken[name] > 1), reverse=True
    )
    return ", ".join(f"{name} {share:.0%} of {n}" for share, n, name in shares[:7])


def shrunk(spec: Spec, failure: Failure) -> str:
    """The source of a part of a net that breaks the same law, and none of whose parts does."""
    from tests.graph.random_nets import runs

    smallest, is_done = (spec, failure), False
    while not is_done:
        is_done = True
        for less in smaller(smallest[0]):
            if not runs(less):
                continue
            only = () if failure.law.startswith("0") else (failure.law,)
            same = [f for f in check(make(less), only) if f.law == failure.law]
            if same:
                smallest, is_done = (less, same[0]), False
                break
    text = make(smallest[0]).source.partition('n_calls", 0) + 1\n')[2].strip()
    return f"# seed {spec.seed}, {failure.law} ({smallest[1].setting}): {smallest[1].message}\n{text}"
