"""The sweep of docs/searching.md, by Ray Tune itself."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests import ROOT

ray = pytest.importorskip("ray", reason="ray is large and not among the libraries of the tests")


@pytest.mark.filterwarnings("ignore")
def test_the_sweep_of_the_page_finds_the_best_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "searching.md").read_text(encoding="utf-8")
    code = text.partition("test_ray_tune.py runs it -->\n```python\n")[2].partition("\n```")[0]
    environment = {"env_vars": {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=1, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    try:
        page: Any = ModuleType("sweep_of_the_page")
        exec(compile(code, "docs/searching.md", "exec"), page.__dict__)
    finally:
        ray.shutdown()
    found = {result.config["weight"]: result.metrics for result in page.results}
    assert len(found) == 3
    assert [result for result in page.results if result.error] == []
    assert found["affine:8/channel"]["bytes"] > found["affine:3/channel"]["bytes"] > found["ternary/channel"]["bytes"]
    best = page.results.get_best_result()
    assert best.metrics["accuracy"] == max(metrics["accuracy"] for metrics in found.values()) > 0.5
