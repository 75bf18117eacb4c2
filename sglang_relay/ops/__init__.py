"""What a relay forward does on the device beside the model and its attention: copy, measure, score."""

from sglang_relay.ops.base import Copier, Deviation, Ops, ProbeQueries, ProbeScorer, ProbeScores
from sglang_relay.ops.choice import Pool, choose_ops, working_kernels
from sglang_relay.ops.torch_ops import TorchCopier, TorchDeviation, TorchProbe

__all__ = [
    "Copier",
    "Deviation",
    "Ops",
    "Pool",
    "ProbeQueries",
    "ProbeScorer",
    "ProbeScores",
    "TorchCopier",
    "TorchDeviation",
    "TorchProbe",
    "choose_ops",
    "working_kernels",
]
