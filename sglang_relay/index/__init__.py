"""Content index: which spans of earlier requests stand in a prompt, and how approximate the KV on a path is."""

from .content import ContentIndex
from .depth import Approximation, DepthMap
from .match import Run
from .spans import Donor
from .warm import warm_up

__all__ = ["Approximation", "ContentIndex", "DepthMap", "Donor", "Run", "warm_up"]
