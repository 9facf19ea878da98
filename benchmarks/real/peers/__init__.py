"""Ways to quantize a network: the rule sets of torchquant, and other tools on the same calibration inputs."""

from benchmarks.real.peers import brevitas, nncf, ort, ours, torchao

OURS = ours.PEERS
OTHERS = {**ort.PEERS, **nncf.PEERS, **torchao.PEERS, **brevitas.PEERS}
PEERS = {**OURS, **OTHERS}
"""Name -> way, ours first."""
