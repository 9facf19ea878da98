"""Random small nets: a seed gives the Python source of a module, its inputs, and what may be changed on it later.

    python -m tests.graph.random_nets --seeds 0:200           how many nets break which law, by feature
    python -m tests.graph.random_nets --seeds 17 --shrink     the smallest part of net 17 that still breaks its laws
    python -m tests.graph.random_nets --seeds 17 --source     the net as Python

The laws themselves: random_net_laws.py.
"""

from __future__ import annotations

import argparse
import linecache
import random
import sys
import types
import zlib
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.graph.random_net_features import ARGUMENTS, DOMAINS, FEATURES, SHARP, VALUES, Block

MAX_ATTEMPTS = 200
HEADER = """\
import random
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

Answer = namedtuple("Answer", ["scores", "features"])


class Positions(nn.Embedding):
    pass


class Halved(nn.Module):
    def forward(self, weight):
        return 0.5 * weight


def scale_output(module, args, output):
    return output * 0.9


def shift_input(module, args):
    return (args[0] + 0.1, *args[1:])


def count_calls(module, args, output):
    module.n_calls = getattr(module, "n_calls", 0) + 1
"""
OUTPUTS = {
    "plain": ("return {0}",),
    "tuple": ("return {0}, {1}",),
    "with None": ("return {0}, None",),
    "dict": ('return {{"scores": {0}, "features": {1}, "n": {1}.shape[0]}}',),
    "list": ("return [{0}, [{1}]]",),
    "named": ("return Answer({0}, {1})",),
    "other in training": ("if self.training:", "    return {0}, {1}.square().mean()", "return {0}"),
    "twice": ("return {0}, {0}",),
}
INPUTS = {"one": ("x", "x"), "two": ("x, y", "x, y"), "dict": ("batch", '{"x": x, "y": y}')}
"""Name -> (the parameters, the arguments)."""


@dataclass
class Item:
    """A feature, or a block of its own, drawn with a seed of its own, so that the others can be left out."""

    kind: str
    seed: int
    block: Body | None = None


@dataclass
class Body:
    """What a block is made of."""

    items: list[Item]
    arguments: list[str] = field(default_factory=list)
    output: str = "plain"

    def bodies(self) -> Iterator[Body]:
        yield self
        for item in self.items:
            if item.block is not None:
                yield from item.block.bodies()


@dataclass
class Spec:
    """A net before it is text."""

    seed: int
    domain: str
    inputs: str
    body: Body

    def features(self) -> set[str]:
        found = {f"input: {self.inputs}", self.domain}
        for body in self.body.bodies():
            found |= {item.kind for item in body.items} | {f"argument: {name}" for name in body.arguments}
            found |= {f"output: {body.output}"}
        return found


def draw(seed: int) -> Spec:
    """The first net drawn for a seed that runs as a float model. It has the feature of that number, going round."""
    for attempt in range(MAX_ATTEMPTS):
        r = Random(f"{seed}.{attempt}")
        body = _body(r, r.choice([0, 0, 1, 1, 1, 2, 3]))
        body.items.insert(
            r.randrange(len(body.items) + 1), Item(list(FEATURES)[seed % len(FEATURES)], r.randrange(10**6))
        )
        spec = Spec(seed, r.choice(list(DOMAINS)), r.choice(["one", "one", "two", "dict"]), body)
        if runs(spec):
            return spec
    raise AssertionError(f"no net of seed {seed} runs")


def _body(r: Random, depth: int, top: bool = True) -> Body:
    kinds, weights = list(FEATURES), [weight for weight, _ in FEATURES.values()]
    items = [Item(r.choices(kinds, weights)[0], r.randrange(10**6)) for _ in range(r.randint(1, 4))]
    for _ in range(r.choice([1, 1, 2]) if depth else 0):
        items.insert(r.randrange(len(items) + 1), Item("block", r.randrange(10**6), _body(r, depth - 1, False)))
    arguments = [name for name in ARGUMENTS if r.random() < 0.15]
    outputs = list(OUTPUTS) if top else ["plain", "tuple", "other in training"]
    return Body(items, arguments, r.choice(outputs) if r.random() < 0.5 else "plain")


class _Text:
    """Writes the classes of a spec."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.classes, self.flags = spec, [HEADER], list[tuple[str, str, str]]()
        self.count = 0

    def render(self) -> str:
        domain = DOMAINS[self.spec.domain]
        block = Block("Net", domain, ["x"], answer=OUTPUTS[self.spec.body.output])
        if self.spec.inputs == "dict":
            block.say('x = batch["x"]')
        if self.spec.inputs != "one":
            block.let('x + 0.5 * batch["y"]' if self.spec.inputs == "dict" else "x + y")
        self._fill(block, self.spec.body)
        pooled = f"{block.live[-1]}.mean({domain.inner})" if domain.inner else block.live[-1]
        head = block.attribute("head", f"nn.Linear({domain.channels}, 5)")
        block.say(f"scores = {head}({pooled})")
        self._finish(block, self.spec.body, INPUTS[self.spec.inputs][0], "scores", block.live[-1])
        self.classes.append(self._calls(domain.shape))
        return "\n\n".join(self.classes)

    def _fill(self, block: Block, body: Body) -> None:
        for name in body.arguments:
            block.say(*ARGUMENTS[name][1])
        for item in body.items:
            if item.block is None:
                FEATURES[item.kind][1](block, Random(item.seed))
            else:
                self._child(block, item, item.block)
        unread = [name for name in block.live[1:-1] if name not in block.used]
        if unread:
            block.let(" + ".join([block.live[-1], *(f"0.3 * {name}" for name in unread)]))

    def _child(self, parent: Block, item: Item, body: Body) -> None:
        self.count += 1
        child = Block(f"Block{self.count}", parent.domain, ["x"], answer=OUTPUTS[body.output])
        r = Random(item.seed)
        self._fill(child, body)
        self._finish(child, body, "x", child.live[-1], child.live[0])
        value, path = parent.pick(r), parent.attribute("block", f"{child.name}()")
        given, by_position = [], True
        for name in body.arguments:
            if name in ("more", "options"):
                given.append(value if name == "more" and by_position else "scale=0.5")
            elif r.random() < 0.6:
                text = {"mask": f"torch.sigmoid({value})"}.get(name, VALUES.get(name, ""))
                by_position = by_position and r.random() < 0.5
                given.append(text if by_position else f"{name}={text}")
            else:
                by_position = False
        if "options" not in body.arguments:
            given = [text for text in given if text != "scale=0.5"]
        call = f"{path}({', '.join([value, *dict.fromkeys(given)])})"
        if body.output == "tuple":
            other = parent.new("extra")
            result = parent.new("v")
            parent.say(f"{result}, {other} = {call}")
            parent.let(f"{result} + 0.1 * {other}")
        elif body.output == "other in training":
            result = parent.let(call)
            parent.init.append(f"{path}_loss = None")
            parent.say("if self.training:", f"    {result}, {path}_loss = {result}")
        else:
            parent.let(call)

    def _finish(self, block: Block, body: Body, inputs: str, result: str, other: str) -> None:
        block.finish(result, other)
        signature = ", ".join(["self", inputs, *(ARGUMENTS[name][0] for name in body.arguments)])
        lines = [f"class {block.name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in block.init]
        lines += [f"    {line}" for line in block.methods]
        lines += [f"    def forward({signature}):", *(f"        {line}" for line in block.forward)]
        self.classes.append("\n".join(lines))
        self.flags += [(block.name, name, other) for name, other in block.flags]

    def _calls(self, shape: str) -> str:
        """The function that makes the calls: the plainest one, then with each optional argument."""
        plain = INPUTS[self.spec.inputs][1]
        calls, names = [f"(({plain},), {{}})"], [n for n in self.spec.body.arguments if n in VALUES]
        calls += [f'(({plain},), {{"{name}": {VALUES[name]}}})' for name in names]
        if len(names) == len([n for n in VALUES if n in self.spec.body.arguments]) and names:
            calls.append(f"(({plain}, {', '.join(VALUES[name] for name in names)},), {{}})")
            if "more" in self.spec.body.arguments:
                calls.append(f"(({plain}, {', '.join(VALUES[name] for name in names)}, x * 0.5), {{}})")
        elif "more" in self.spec.body.arguments:
            calls.append(f"(({plain}, x * 0.5, x.tanh()), {{}})")
        if "options" in self.spec.body.arguments:
            calls.append(f'(({plain},), {{"scale": 0.5}})')
        lines = ["def calls(n=3):", "    g = torch.Generator().manual_seed(0)"]
        lines += [f"    {name} = torch.randn(3, {shape}, generator=g)[:n]" for name in ("x", "y")]
        lines += [f"    mask = torch.rand(3, {shape}, generator=g)[:n]", f"    return [{', '.join(calls)}]"]
        return "\n".join(lines) + "\n"


@dataclass
class Net:
    """A net as text and as a module that can be imported, copied and pickled."""

    spec: Spec
    source: str
    module: types.ModuleType
    flags: list[tuple[str, str, str]]
    """(class, attribute, another value as Python text; "not" for the opposite)."""

    def build(self) -> nn.Module:
        """The same net, with the same weights, each time."""
        seed_all(self.spec.seed)
        return self.module.Net()

    def calls(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """(args, kwargs) of each way to call the net; the last one has another batch size."""
        return [*self.module.calls(), self.module.calls(2)[0]]

    def examples(self) -> list[Any]:
        """What `quantize` can be given of the calls."""
        forms = []
        for args, kwargs in self.module.calls():
            if not kwargs:
                forms.append(args if len(args) > 1 or isinstance(args[0], dict) else args[0])
            elif self.spec.inputs == "one":
                forms.append({"x": args[0], **kwargs})
        return forms

    @property
    def is_smooth(self) -> bool:
        """Whether a small error inside stays small."""
        return not self.spec.features() & SHARP


def make(spec: Spec) -> Net:
    text = _Text(spec)
    source = text.render()
    name = f"random_net_{spec.seed}_{zlib.crc32(source.encode()):08x}"
    module = types.ModuleType(name)
    module.__file__ = f"<{name}>"
    linecache.cache[module.__file__] = (len(source), None, source.splitlines(keepends=True), module.__file__)
    sys.modules[name] = module
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return Net(spec, source, module, text.flags)


def seed_all(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 5 ms, for all accelerators
    random.seed(seed)
    np.random.seed(seed)


def tensors_of(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(part)


def loss_of(output: Any) -> Tensor:
    """A number that depends on every real element, on each another way."""
    total = torch.zeros(())
    for t in tensors_of(output):
        if t.is_floating_point():
            total = total + (t * torch.arange(1.0, 1.0 + t.numel()).cos().view(t.shape)).sum()
    return total


def runs(spec: Spec) -> bool:
    """Whether the float net runs and learns in either mode, whatever call, with finite numbers."""
    net = make(spec)
    for flagged in ([], net.flags) if net.flags else ([],):
        model = net.build()
        set_flags(model, flagged)
        for training in (False, True):
            for args, kwargs in net.calls():
                seed_all(0)
                try:
                    loss = loss_of(model.train(training)(*fresh(args), **fresh(kwargs)))
                    loss.backward()
                except RuntimeError:  # an in-place write to what the backward pass needs
                    return False
                if not bool(loss.isfinite()) or float(loss.detach().abs()) > 1e4:
                    return False
    return True


def fresh(value: Any) -> Any:
    """Arguments of their own: tensors made from leaves that take a gradient, so that they may be written in place."""
    if isinstance(value, Tensor):
        return value.clone().requires_grad_().clone()
    if isinstance(value, dict):
        return {key: fresh(part) for key, part in value.items()}
    return tuple(fresh(part) for part in value) if isinstance(value, tuple) else value


def set_flags(model: nn.Module, flags: list[tuple[str, str, str]]) -> None:
    """Change attributes that forwards read."""
    for module in model.modules():
        names = {kind.__name__ for kind in type(module).__mro__}
        for kind, name, other in flags:
            if kind in names:
                setattr(module, name, not getattr(module, name) if other == "not" else eval(other))


def smaller(spec: Spec) -> Iterator[Spec]:
    """The specs with one thing less."""
    for at, body in enumerate(spec.body.bodies()):
        for i in range(len(body.items)):
            less = deepcopy(spec)
            del list(less.body.bodies())[at].items[i]
            yield less
        for i in range(len(body.arguments)):
            less = deepcopy(spec)
            del list(less.body.bodies())[at].arguments[i]
            yield less
        if body.output != "plain":
            less = deepcopy(spec)
            list(less.body.bodies())[at].output = "plain"
            yield less
    if spec.inputs != "one":
        less = deepcopy(spec)
        less.inputs = "one"
        yield less


def main() -> None:
    from tests.graph.random_net_laws import report

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:40", help="one seed, or first:last+1")
    parser.add_argument("--laws", default="", help="only laws that begin with one of these, such as '2,4.pickle'")
    parser.add_argument("--shrink", action="store_true", help="print the smallest net for each law that is broken")
    parser.add_argument("--source", action="store_true", help="print the nets that break a law")
    given = parser.parse_args()
    first, _, last = given.seeds.partition(":")
    seeds = range(int(first), int(last) if last else int(first) + 1)
    laws = tuple(given.laws.split(",")) if given.laws else ()
    sys.exit(report(seeds, laws, given.shrink, given.source))


if __name__ == "__main__":
    main()
