"""The VGG experiment of NNI's BNN quantizer: binary weights and activations on CIFAR-10.

    python examples/bnn_cifar10.py --out bnn_out

It downloads CIFAR-10 through torchvision, shows its progress, and resumes where it was stopped. NNI reports 86.93 %
after 400 epochs; use a GPU. `--data digits --width 8 --epochs 3` runs the same experiment in half a minute. Needs
torchquant[demo].
"""

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import torchquant as tq
from torchquant._files import write_json, write_whole
from torchquant.compat.nni import BNNQuantizer
from torchquant.runs.console import Terminal
from torchquant.runs.data import load_data
from torchquant.runs.folder import output_folder

SIDE = 32


class VGG_Cifar10(nn.Module):  # noqa: N801 - the document's name
    """Six binary convolutions and three linear layers. (B, 3, 32, 32) -> (B, classes)."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()

        def block(n_in: int, n_out: int, pool: bool) -> list[nn.Module]:
            pooling = [nn.MaxPool2d(2)] if pool else []
            return [nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), *pooling, nn.BatchNorm2d(n_out), nn.Hardtanh()]

        w = width
        self.features = nn.Sequential(
            *block(3, w, False),
            *block(w, w, True),
            *block(w, 2 * w, False),
            *block(2 * w, 2 * w, True),
            *block(2 * w, 4 * w, False),
            *block(4 * w, 4 * w, True),
        )
        self.classifier = nn.Sequential(
            *(nn.Linear(4 * w * 16, 8 * w, bias=False), nn.BatchNorm1d(8 * w), nn.Hardtanh()),
            *(nn.Linear(8 * w, 8 * w, bias=False), nn.BatchNorm1d(8 * w), nn.Hardtanh()),
            *(nn.Linear(8 * w, num_classes), nn.BatchNorm1d(num_classes, affine=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


CONFIG = [
    {
        "quant_bits": 1,
        "quant_types": ["weight"],
        "op_types": ["Conv2d", "Linear"],
        "op_names": [f"features.{i}" for i in (0, 3, 7, 10, 14, 17)] + ["classifier.0", "classifier.3"],
    },
    {
        "quant_bits": 1,
        "quant_types": ["output"],
        "op_types": ["Hardtanh"],
        "op_names": [f"features.{i}" for i in (6, 9, 13, 16, 20)] + ["classifier.2", "classifier.5"],
    },
]


def pictures(x: Tensor, device: torch.device) -> Tensor:
    """Convert pictures to the network's input: three channels, 32 x 32."""
    x = x.to(device).expand(-1, 3, -1, -1)
    return x if x.shape[-1] == SIDE else F.interpolate(x, size=(SIDE, SIDE), mode="nearest")


def main(
    data: Annotated[str, typer.Option(help="cifar10, digits, or a folder of pictures.")] = "cifar10",
    epochs: Annotated[int, typer.Option(help="NNI trains for 400.")] = 400,
    width: Annotated[int, typer.Option(help="Channels of the first convolution.")] = 128,
    learning_rate: float = 5e-3,
    seed: int = 0,
    out: Annotated[Path, typer.Option(help="Folder for checkpoint and result.")] = Path("bnn_out"),
) -> None:
    """Train the binary VGG, or resume its training."""
    folder = output_folder(out)
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    source = load_data(data, seed)
    model = VGG_Cifar10(source.n_classes, width).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    quantizer = BNNQuantizer(model, CONFIG, optimizer)
    model = quantizer.compress()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    batches = torch.Generator().manual_seed(seed)
    path, first, history = folder / "checkpoint.pt", 1, []
    if path.exists():
        saved = torch.load(path, weights_only=True)
        if saved["epochs"] != epochs:
            raise SystemExit(f"{folder} holds a training of {saved['epochs']} epochs; choose another --out")
        quantizer.load_state_dict(saved["quantizer"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        batches.set_state(saved["batches"])
        first, history = int(saved["epoch"]) + 1, list(saved["history"])
    with Terminal() as shown:
        shown.start(epochs)
        shown.advance(first - 1, "resuming" if first > 1 else "training")
        for epoch in range(first, epochs + 1):
            model.train()
            for x, labels in source.train_batches(batches, 256):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(pictures(x, device)), labels.to(device))
                loss.backward()
                optimizer.step()
            schedule.step()
            parts = zip(source.test_images.split(256), source.test_labels.split(256), strict=True)
            history.append(tq.evaluate(model, ((pictures(x, device), y) for x, y in parts), show_progress=False))
            state = {"quantizer": quantizer.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
            state |= {"schedule": schedule.state_dict(), "batches": batches.get_state(), "history": history}
            write_whole(path, partial(torch.save, state | {"epochs": epochs}))
            shown.message(f"epoch {epoch}: accuracy {history[-1]:.2%}")
            shown.advance(1, f"epoch {epoch} of {epochs}")
    quantizer.export_model(folder / "binary.pth", folder / "calibration.pth")
    write_json(folder / "result.json", {"data": data, "epochs": epochs, "width": width, "accuracy": history})
    print(json.dumps({"accuracy": history[-1], "best": max(history)}))


if __name__ == "__main__":
    typer.run(main)
