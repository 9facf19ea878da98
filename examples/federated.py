"""Federated learning on the digits with low-bit updates: `python examples/federated.py`; needs torchquant[demo,flower].

Ten clients hold pictures of about four digits each, and Flower averages what they learn. In both directions only
packed changes of the network are sent; error feedback adds what rounding took from an update to the next one.
"""

import copy

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from sklearn.datasets import load_digits
from torch import nn

import torchquant as tq
from torchquant.integrations.flower import LocalGrid, PackedStrategy, PackedUpdates

N_CLIENTS, N_ROUNDS, N_EPOCHS = 10, 10, 2
torch.manual_seed(0)
images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
order = torch.randperm(len(labels))
images, labels = images.float().div(16.0).view(-1, 1, 8, 8)[order], labels[order]
test = [(images[-450:], labels[-450:])]
images, labels = images[:-450], labels[:-450]
start = nn.Sequential(
    *(nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(256, 10)),
)
shards = labels.argsort(stable=True).chunk(4 * N_CLIENTS)  # each of one digit or two; a client has four of them
parts = [torch.cat(shards[i::N_CLIENTS]) for i in range(N_CLIENTS)]


def learn(message: Message, context: Context) -> Message:
    """Train on the pictures of this client."""
    net = copy.deepcopy(start)
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    mine = parts[context.node_config["partition-id"]]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    order = torch.cat([torch.randperm(len(mine)) for _ in range(N_EPOCHS)])
    for batch in mine[order].split(16):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
    content = {"arrays": ArrayRecord(net.state_dict()), "metrics": MetricRecord({"num-examples": len(mine)})}
    return Message(RecordDict(content), reply_to=message)


def accuracy(arrays: ArrayRecord) -> float:
    net = copy.deepcopy(start)
    net.load_state_dict(arrays.to_torch_state_dict())
    return tq.evaluate(net, test)


def trained(spec: str | None, error_feedback: bool = True) -> tuple[float, float]:
    """Return the accuracy of the average after all rounds, and how many times fewer bytes the last round took."""
    torch.manual_seed(1)
    strategy = FedAvg(fraction_evaluate=0.0)
    app = ClientApp(mods=[PackedUpdates(spec, error_feedback)] if spec else [])
    app.train()(learn)
    used = PackedStrategy(strategy, spec) if spec else strategy
    result = used.start(LocalGrid(app, N_CLIENTS), ArrayRecord(start.state_dict()), num_rounds=N_ROUNDS)
    return accuracy(result.arrays), used.traffic[-1].ratio if spec else 1.0


found = {
    "float32": trained(None),
    "8 bits": trained("affine:8,symmetric=narrow/channel"),
    "4 bits": trained("affine:4,symmetric=narrow/channel"),
    "4 bits, no feedback": trained("affine:4,symmetric=narrow/channel", error_feedback=False),
    "2 bits": trained("ternary/channel"),
    "2 bits, no feedback": trained("ternary/channel", error_feedback=False),
}
for name, (share, ratio) in found.items():
    print(f"{name:20} accuracy {share:.2%}, {ratio:.1f}x fewer bytes a round")

assert found["8 bits"][1] > 3.5
assert found["4 bits"][1] > 7.0
assert found["4 bits"][0] > found["float32"][0] - 0.02
