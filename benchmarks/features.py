"""What each library does with models that were not written for it: `python -m benchmarks.features`.

Every cell is tried, on the libraries that are installed: 8 bits by the call that the library's own guide gives,
calibrated on one batch. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata

import torch
import torchvision
from torch import Tensor, nn


class Recurrent(nn.Module):
    """An LSTM whose last output is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Branching(nn.Module):
    """A forward that branches on data, which torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(torch.relu(-y if y.mean() > 100 else y))


def torchquant(net: nn.Module, x: Tensor) -> nn.Module:
    import torchquant as tq

    model = tq.quantize(net, "w8a8", x)
    tq.calibrate(model, [x])
    return model


def brevitas(net: nn.Module, x: Tensor) -> nn.Module:
    from brevitas.graph.calibrate import calibration_mode
    from brevitas.graph.quantize import preprocess_for_quantize, quantize

    model = quantize(preprocess_for_quantize(copy.deepcopy(net), trace_model=True))
    with torch.no_grad(), calibration_mode(model):
        model(x)
    return model


def torchao(net: nn.Module, x: Tensor) -> nn.Module:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(net)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def nncf(net: nn.Module, x: Tensor) -> nn.Module:
    import nncf as library

    return library.quantize(copy.deepcopy(net), library.Dataset([x]), subset_size=1)


Quantize = Callable[[nn.Module, Tensor], nn.Module]
LIBRARIES: dict[str, Quantize] = {f.__name__: f for f in (torchquant, brevitas, torchao, nncf)}


def trains(quantize: Quantize, net: nn.Module, x: Tensor) -> bool:
    """Tell whether the quantized model has as many weights with a gradient as the float one has layers."""
    model = quantize(net, x).train()
    model(x).square().sum().backward()
    n_layers = sum(isinstance(m, nn.Conv2d | nn.Linear | nn.LSTM) for m in net.modules())
    return sum(p.grad is not None and p.ndim > 1 for p in model.parameters()) >= n_layers


def compiles(quantize: Quantize, net: nn.Module, x: Tensor) -> bool:
    """Tell whether a step of training is one graph for torch.compile."""
    torch._dynamo.reset()
    torch.compile(quantize(net, x).train(), fullgraph=True, backend="aot_eager")(x).sum().backward()
    return True


def reloads(quantize: Quantize, net: nn.Module, x: Tensor) -> bool:
    """Tell whether a state dict loads strictly into the model calibrated on other data, with equal outputs."""
    saved, fresh = quantize(net, x).eval(), quantize(net, torch.randn_like(x)).eval()
    fresh.load_state_dict(saved.state_dict())
    with torch.no_grad():
        return torch.equal(fresh(x), saved(x))


def takes_float(quantize: Quantize, net: nn.Module, x: Tensor) -> bool:
    """Tell whether a float checkpoint loads strictly into the quantized model."""
    quantize(net, x).load_state_dict(net.state_dict())
    return True


Check = Callable[[Quantize, nn.Module, Tensor], bool]


def cases() -> list[tuple[str, Check, nn.Module, Tensor]]:
    torch.manual_seed(0)
    resnet, images = torchvision.models.resnet18(num_classes=10).eval(), torch.randn(4, 3, 64, 64)
    words, numbers = torch.randn(4, 6, 8), torch.randn(4, 8)
    return [
        ("resnet18, unedited: is prepared and trains", trains, resnet, images),
        ("an LSTM: is prepared and trains", trains, Recurrent().eval(), words),
        ("a forward that branches on data: is prepared and trains", trains, Branching().eval(), numbers),
        ("resnet18: a training step is one graph for torch.compile", compiles, resnet, images),
        ("resnet18: the quantized state dict loads strictly, with equal outputs", reloads, resnet, images),
        ("resnet18: a float checkpoint loads strictly", takes_float, resnet, images),
    ]


def tried(check: Check, quantize: Quantize, net: nn.Module, x: Tensor) -> str:
    try:
        return "yes" if check(quantize, copy.deepcopy(net), x) else "no"
    except Exception as error:  # whatever another library raises is its answer
        return f"no ({type(error).__name__})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--libraries", nargs="+", choices=LIBRARIES, default=list(LIBRARIES))
    wanted = parser.parse_args(arguments).libraries
    found = [name for name in wanted if importlib.util.find_spec(name) is not None]
    print(f"| | {' | '.join(f'{name} {metadata.version(name)}' for name in found)} |")
    print(f"|---|{'---|' * len(found)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for title, check, net, x in cases():
            print(f"| {title} | {' | '.join(tried(check, LIBRARIES[name], net, x) for name in found)} |", flush=True)


if __name__ == "__main__":
    main()
