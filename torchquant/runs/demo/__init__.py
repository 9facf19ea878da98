"""Run the whole workflow on real data: `torchquant demo`. Needs the extra `demo`."""

from torchquant.runs.demo.results import DemoResult as DemoResult
from torchquant.runs.demo.results import OnnxResult as OnnxResult
from torchquant.runs.demo.results import SchemeResult as SchemeResult
from torchquant.runs.demo.run import run_demo as run_demo
from torchquant.runs.demo.schemes import SCHEMES as SCHEMES
from torchquant.runs.demo.schemes import Scheme as Scheme
from torchquant.runs.demo.settings import DemoConfig as DemoConfig

__all__ = ["SCHEMES", "DemoConfig", "DemoResult", "OnnxResult", "Scheme", "SchemeResult", "run_demo"]
