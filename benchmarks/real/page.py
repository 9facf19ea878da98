"""The results as a page of Markdown, from what the JSON file holds alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

AHEAD_DB = 0.3
"""What another tool may be ahead by at the same bits."""
SLOWER = 1.05
"""What our file may take, over the one of the runtime's own tool."""
GOALS = {"ema": 1.15, "minmax": 1.15, "running": 1.15, "histogram": 1.5, "mse": 1.5, "percentile": 1.5, "entropy": 1.5}
"""Observer -> what its calibration may take, over the float model on the same batches."""
COST = " cost"
"""What the cell of a choice's calibration time is called, after the name of the choice."""
SAME_BITS = 0.95
"""The least share of the weights quantized by us that a tool must quantize to be called equal in bits."""
PARTLY, TABLES = "\\*", "°"

Cell = Mapping[str, Any]
Cells = Mapping[str, Cell]

INTRO = """# Real networks with real weights

Written by `python -m benchmarks.real_networks` from `{json}`; do not edit it by hand. How to run it again, and what is
measured how, stands in [benchmarks/README.md](../benchmarks/README.md).

Networks are those of `benchmarks/real/networks.py`: weights that packages ship, and inputs that were not calibrated on.
dB are power of the float output over power of the difference to it, over all test inputs: 6 dB more is one bit more.
"""


def page(results: Mapping[str, Any], json_name: str) -> str:
    """The whole page. results: what `Results` writes."""
    cells = results["cells"]
    parts = [
        INTRO.format(json=json_name),
        *_runs(results["runs"], results["versions"]),
        *(f"{note}\n" for note in results.get("notes", ())),
        *_peers(results),
        *_missed(results),
        *_files(cells.get("files", {})),
        *_calibration(cells.get("calibration", {})),
        *_defaults(cells.get("defaults", {}), results["factors"]),
        *_failures(cells),
    ]
    return "\n".join(parts).rstrip() + "\n"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|---" * len(header) + "|"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _runs(runs: Sequence[Cell], versions: Mapping[str, str]) -> Iterator[str]:
    for run in runs:
        machine = run["machine"]
        yield f"`{run['command']}`, {machine['date'][:10]}, {machine['cpu']}, {machine['threads']} threads."
    yield "\n" + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".\n"


# --------------------------------------------------------------------- peers
@dataclass(frozen=True)
class Standing:
    """The ways of one network beside each other. `ways` -> cell; `ours`, `dynamic`: names of ways."""

    cells: Cells
    ours: Sequence[str]
    dynamic: Sequence[str]

    def best(self, names: Iterable[str]) -> tuple[str, float] | None:
        """The way of these with the most dB; None where none ran."""
        found = [(self.cells[name]["db"], name) for name in names if "db" in self.cells.get(name, {})]
        return None if not found else (max(found)[1], max(found)[0])

    @property
    def own(self) -> tuple[str, float] | None:
        """The best of ours with the same bits."""
        return self.best(name for name in self.equal if name in self.ours)

    @property
    def others(self) -> list[str]:
        return [name for name in self.cells if name not in self.ours]

    @property
    def equal(self) -> list[str]:
        """The ways that quantize as much of the network as any of ours does."""
        least = SAME_BITS * max((self.cells[n]["share"] for n in self.ours if "db" in self.cells.get(n, {})), default=0)
        return [name for name, cell in self.cells.items() if cell.get("share", -1.0) >= least]

    def ahead(self, is_dynamic: bool) -> tuple[str, float] | None:
        """The best other tool with the same bits, and by how many dB it is ahead of the best of ours."""
        equal = [name for name in self.others if name in self.equal]
        top, own = self.best(name for name in equal if (name in self.dynamic) == is_dynamic), self.own
        return None if top is None or own is None else (top[0], top[1] - own[1])


def _peers(results: Mapping[str, Any]) -> Iterator[str]:
    networks, ways = results["cells"].get("peers", {}), results["ways"]
    if not networks:
        return
    standings = {net: Standing(cells, results["ours"], results["dynamic"]) for net, cells in networks.items()}
    yield "## Beside other tools\n"
    yield (
        f"SQNR in dB at 8 bits of weights and activations. {PARTLY} less than {SAME_BITS:.0%} of what the most "
        "thorough of ours quantizes of the weights that are multiplied is quantized, in numbers or in layers, so the "
        "bits are not the same; the share stands behind it. "
        f"{TABLES} tables of embeddings stay float. Bold: the best with the same bits. No sum of a "
        "tool saturates.\n"
    )
    used = [way for way in ways if any(way in cells for cells in networks.values())]
    rows = [[way, *(_peer_cell(standing, way) for standing in standings.values())] for way in used]
    yield from table(["", *standings], rows)
    header = ["network", "best of ours", "best other", "ahead by", "best dynamic", "ahead by", "best of all others"]
    yield from table(header, [_summary(net, standing) for net, standing in standings.items()])
    yield '"best other" and "best dynamic" have the same bits; dynamic: ranges of activations are those of each call.\n'
    yield from table(["", "what it is"], [[way, ways[way]] for way in used])


def _peer_cell(standing: Standing, way: str) -> str:
    cell = standing.cells.get(way)
    if cell is None:
        return ""
    if "db" not in cell:
        return "fails"
    top = standing.best(standing.equal)
    text = f"{cell['db']:.1f}"
    if top is not None and top[0] == way:
        text = f"**{text}**"
    if way not in standing.equal:
        text += f"{PARTLY} {cell['share']:.0%}"
    is_float = cell.get("tables") is not None and cell["tables"] < SAME_BITS
    return text + (f" {TABLES}" if is_float else "")


def _summary(net: str, standing: Standing) -> list[str]:
    row = [net, _named(standing.own)]
    for is_dynamic in (False, True):
        found = standing.ahead(is_dynamic)
        if found is None:
            row += ["", ""]
        else:
            text = f"{found[1]:+.1f}"
            text = f"**{text}**" if found[1] > AHEAD_DB else text
            row += [_named((found[0], standing.cells[found[0]]["db"])), text]
    every = standing.best(standing.others)
    share = "" if every is None else f", {standing.cells[every[0]]['share']:.0%} of weights"
    return [*row, _named(every) + share]


def _named(found: tuple[str, float] | None) -> str:
    return "none" if found is None else f"{found[1]:.1f} {found[0]}"


# -------------------------------------------------------------------- missed
def missed(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(network, goal, figure) of every goal that is not met."""
    found = []
    for net, cells in results["cells"].get("peers", {}).items():
        standing = Standing(cells, results["ours"], results["dynamic"])
        if standing.own is None:
            found.append((net, "accuracy", "none of the rule sets runs"))
        for goal, is_dynamic in (("accuracy", False), ("accuracy, dynamic", True)):
            top = standing.ahead(is_dynamic)
            if top is not None and top[1] > AHEAD_DB:
                found.append((net, goal, f"{top[0]} is ahead by {top[1]:.1f} dB"))
        found += [(net, "export", f"{way} fails") for way in standing.ours if "fails" in cells.get(way, {})]
    for net, parts in results["cells"].get("files", {}).items():
        times, said = parts.get("times", {}), parts.get("certificate", {})
        for mode in ("", " exact"):
            ratio = times.get(f"over theirs{mode}")
            if ratio is not None and times["valid"] and ratio > SLOWER:
                how = ", with exact sums" if mode else ""
                found.append((net, "speed", f"{ratio:.2f} of the time of ONNX Runtime's own file{how}"))
        if said.get("passed") is False:
            found.append((net, "certificate", said["failures"][0]))
    for net, cells in results["cells"].get("calibration", {}).items():
        over = [(name, cells[name]["cost"]) for name in GOALS if _is_over(cells.get(name, {}), name)]
        if over:
            found.append((net, "calibration", ", ".join(f"{name} {cost:.2f}" for name, cost in over)))
    return found


def _is_over(cell: Cell, observer: str) -> bool:
    return bool(cell.get("valid")) and round(cell["cost"], 2) > GOALS[observer]


def _missed(results: Mapping[str, Any]) -> Iterator[str]:
    yield "## Goals that are missed\n"
    yield (
        f"The goals: no tool is ahead by more than {AHEAD_DB} dB at the same bits, the file takes at most {SLOWER} of "
        f"the time of ONNX Runtime's own, its certificate passes, and a calibration takes at most {GOALS['ema']} of "
        f"the time of the float model by minima and maxima, {GOALS['mse']} by other observers.\n"
    )
    remarks = results["remarks"]
    rows = [[net, goal, figure, remarks.get(f"{net}: {goal}", "not known")] for net, goal, figure in missed(results)]
    if rows:
        yield from table(["network", "goal", "figure", "cause, and next step"], rows)
    else:
        yield "None is missed.\n"


# --------------------------------------------------------------------- files
def _files(networks: Mapping[str, Cells]) -> Iterator[str]:
    if not networks:
        return
    yield "## Exported files\n"
    yield (
        'The file of `"int8-ort"` and the one of `quantize_static`, both in ONNX Runtime. "over theirs": time of a '
        "call on a batch of the test inputs, median of the ratios of the rounds; exact: with sums that cannot saturate "
        '(`session.x64quantprecision=1`). Sizes are over that of the float file. "codes": how many the certificate '
        "compared, and how many of them differ.\n"
    )
    header = [
        "network",
        "over theirs",
        "exact",
        "over float",
        "noise",
        "size",
        "theirs",
        "certificate",
        "codes",
        "differ",
    ]
    rows = []
    for net, parts in networks.items():
        times, sizes, said = (parts.get(name, {}) for name in ("times", "sizes", "certificate"))
        rows.append([net, *_times(times), *_sizes(sizes), *_said(said)])
    yield from table(header, rows)


def _times(times: Cell) -> list[str]:
    if "noise" not in times:
        return ["fails" if times else "", "", "", ""]
    mark = "" if times["valid"] else " void"
    keys = ("over theirs", "over theirs exact", "over float")
    return [*(f"{times[key]:.2f}{mark}" for key in keys), f"{times['noise']:.0%}"]


def _sizes(sizes: Cell) -> list[str]:
    if "float" not in sizes:
        return ["fails" if sizes else "", ""]
    return [f"{sizes[side] / sizes['float']:.2f}" for side in ("ours", "theirs")]


def _said(said: Cell) -> list[str]:
    if "passed" not in said:
        return ["fails" if said else "", "", ""]
    return ["passed" if said["passed"] else "FAILED", f"{said['compared']:,}", f"{said['differ']:,}"]


# --------------------------------------------------------------- calibration
def _calibration(networks: Mapping[str, Cells]) -> Iterator[str]:
    if not networks:
        return
    yield "## Time of a calibration\n"
    yield (
        'Over that of the float model on the same batches, for `"w8a8"` with each observer of activations; weights, '
        "searches and the changes of state included. Median of the ratios of the rounds; in brackets the ratio of the "
        "two fastest rounds. Bold: over the goal. void: the control of the measurement failed.\n"
    )
    yield from table(
        ["network", *GOALS],
        [[net, *(_cost(cells.get(name, {}), name) for name in GOALS)] for net, cells in networks.items()],
    )
    yield from table(["goal", *GOALS], [["at most", *(f"{goal:.2f}" for goal in GOALS.values())]])


def _cost(cell: Cell, observer: str) -> str:
    if "cost" not in cell:
        return "fails" if cell else ""
    if not cell["valid"]:
        return "void"
    text = f"{cell['cost']:.2f}"
    return f"{f'**{text}**' if _is_over(cell, observer) else text} ({cell['minima']:.2f})"


# ------------------------------------------------------------------ defaults
def _defaults(networks: Mapping[str, Cells], factors: Mapping[str, Sequence[str]]) -> Iterator[str]:
    if not networks:
        return
    yield "## What the defaults were chosen from\n"
    yield (
        "A rule set with one thing set by hand, everything else as it is; of activations the observer, of weights the "
        "rule and the granularity. Behind the dB: time of the calibration over that of the float model on the same "
        'inputs. Bold: the best of the row. "mean rank": 1 is the best; "mean loss": dB behind the best of the row, '
        "what fails left out.\n"
    )
    for rules in dict.fromkeys(name.split(" ", 1)[0] for cells in networks.values() for name in cells):
        for factor, values in factors.items():
            rows = {net: _choices(cells, f"{rules} {factor}=", values) for net, cells in networks.items()}
            rows = {net: row for net, row in rows.items() if row}
            if rows:
                yield f"### {rules}: {factor}\n"
                yield from table(["network", *values], [*_choice_rows(rows, values), *_summaries(rows, values)])


def _choices(cells: Cells, before: str, values: Sequence[str]) -> dict[str, Cell]:
    """Value -> its cell and that of its cost in one."""
    return {
        value: {**cells.get(f"{before}{value}{COST}", {}), **cells[f"{before}{value}"]}
        for value in values
        if f"{before}{value}" in cells
    }


def _choice_rows(rows: Mapping[str, Cells], values: Sequence[str]) -> Iterator[list[str]]:
    for net, row in rows.items():
        top = max((round(cell["db"], 1) for cell in row.values() if "db" in cell), default=None)
        yield [net, *(_choice_cell(row[value], top) if value in row else "" for value in values)]


def _choice_cell(cell: Cell, top: float | None) -> str:
    if "db" not in cell:
        return "fails"
    text = f"{cell['db']:.1f}"
    text = f"**{text}**" if round(cell["db"], 1) == top else text
    if "cost" in cell:
        text += f", {cell['cost']:.2f}x" if cell["valid"] else ", void"
    return text


def _summaries(rows: Mapping[str, Cells], values: Sequence[str]) -> Iterator[list[str]]:
    """Mean rank, mean loss and the largest cost of each value."""
    ranks: dict[str, list[float]] = {value: [] for value in values}
    losses: dict[str, list[float]] = {value: [] for value in values}
    costs: dict[str, list[float]] = {value: [] for value in values}
    for row in rows.values():
        reached = {value: cell["db"] for value, cell in row.items() if "db" in cell}
        for value, db in reached.items():
            ranks[value].append(1 + sum(other > db for other in reached.values()))
            losses[value].append(max(reached.values()) - db)
            if row[value].get("valid"):
                costs[value].append(row[value]["cost"])
    yield ["mean rank", *(f"{statistics.mean(ranks[v]):.1f}" if ranks[v] else "" for v in values)]
    yield ["mean loss", *(f"{statistics.mean(losses[v]):.2f} dB" if losses[v] else "" for v in values)]
    if any(costs.values()):
        yield ["largest cost", *(f"{max(costs[v]):.2f}x" if costs[v] else "" for v in values)]


# ------------------------------------------------------------------ failures
def _failures(cells: Mapping[str, Any]) -> Iterator[str]:
    found = [
        f"- {name}, {net}, {cell}: {given['fails']}"
        for name, networks in cells.items()
        for net, row in networks.items()
        for cell, given in row.items()
        if "fails" in given
    ]
    if found:
        yield "## What fails, and what it says\n"
        yield from found
        yield ""
