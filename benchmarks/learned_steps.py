"""Compare LSQ with the learned scales of Brevitas: same network, sites, batches and recipe; other quantizers.

    python -m benchmarks.learned_steps --bits 2 --seeds 3

Brevitas' closest quantizers are those with a learned scale, started by its default rule or by its search for the least
squared error; `brevitas_plugin.py` registers them for `torchquant compare`, per tensor like ours here. All learn with
the same optimizer. Needs `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torchquant.runs.compare import Case, Recipe, compare, leaderboard, write_leaderboard

PLUGIN = Path(__file__).with_name("brevitas_plugin.py")


def main() -> None:
    """Run the comparison and write its leaderboard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("learned_steps_out"))
    options = parser.parse_args()
    n = options.bits
    specs = {name: f"{name}:{n}" for name in ("lsq", "lsqplus", "brevitas", "brevitas_mse")}
    specs["minmax"] = f"affine:{n},symmetric=narrow"
    acts = specs | {"minmax": f"affine:{n}"}
    cases = [Case(name, n, specs[name], n, acts[name], seed) for name in specs for seed in range(options.seeds)]
    recipe = Recipe(epochs=options.epochs)
    rows = leaderboard(compare(cases, recipe, options.out, options.jobs, plugins=[PLUGIN]))
    command = f"python -m benchmarks.learned_steps --bits {n} --seeds {options.seeds} --epochs {options.epochs}"
    write_leaderboard(rows, recipe, command, options.out)
    for row in rows:
        print(f"{row.scheme:14s} W{n}A{n}  {row.accuracy:7.2%} +- {row.spread:.2%}")


if __name__ == "__main__":
    main()
