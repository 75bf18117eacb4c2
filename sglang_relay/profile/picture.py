"""A profile as a picture and as a table."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sglang_relay.profile.file import Profile, ProfileError

LEAST = 1e-4
"""Deviation at which the colours of the heat map begin."""


def draw(profile: Profile, file: Path) -> None:
    """Write a PNG: deviation by layer and position in the segment, the mean similarity and the rank correlations.

    Raises ProfileError without matplotlib.
    """
    try:
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise ProfileError("a picture needs matplotlib: pip install 'sglang-relay[plot]'") from error
    figure = Figure(figsize=(9, 9), layout="constrained")
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 2))
    layers = np.arange(len(profile.similarity))

    heat = np.maximum(np.asarray(profile.heat), 1e-6)
    image = top.imshow(
        heat, aspect="auto", origin="lower", norm=LogNorm(max(heat.min(), 1e-4), heat.max()), cmap="magma"
    )
    top.set(ylabel="position in the segment", yticks=range(len(profile.edges)), yticklabels=_bins(profile))
    figure.colorbar(image, ax=top, label="deviation, 1 - cos")
    middle.plot(layers, profile.similarity, marker="o", markersize=3)
    middle.set_ylabel("similarity of values, mean")
    bottom.plot(layers, [np.nan if rho is None else rho for rho in profile.rank_correlation], marker="o", markersize=3)
    bottom.set(ylabel="rank correlation\nwith the layer before", xlabel="layer")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (top, middle, bottom):
        marks = ((profile.start, "start", "--"), (profile.detect, "detect", ":"), (profile.end, "end", "-."))
        for layer, name, style in marks:
            axes.axvline(layer, color="tab:green", linestyle=style, label=f"{name} {layer}")
    middle.legend(loc="best")
    figure.suptitle(
        f"{profile.identity.model}, {profile.identity.dtype}: {profile.texts} texts, {profile.tokens} tokens"
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def table(profile: Profile) -> str:
    """One line per layer: its curves, its mean deviation by position, and where the range begins, selects and ends."""
    names = _bins(profile)
    head = ["layer", "similarity", "rank corr.", "curvature", *names, ""]
    rows = [
        [
            str(layer),
            f"{similarity:.4f}",
            _optional(profile.rank_correlation[layer], ".3f"),
            _optional(profile.curvature[layer], "+.3f"),
            *(f"{row[layer]:.4f}" for row in profile.heat),
            " ".join(n for n, at in zip(("start", "detect", "end"), _range(profile), strict=True) if at == layer),
        ]
        for layer, similarity in enumerate(profile.similarity)
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    found = [
        f"layer range {profile.layers} (start,detect,end; layers count from 0)",
        f"  start   {profile.reasons.start}",
        f"  detect  {profile.reasons.detect}",
        f"  end     {profile.reasons.end}",
    ]
    return "\n".join(
        [_about(profile), *found, "", "mean deviation by position in the segment, from the fifth column on", *lines]
    )


def _about(profile: Profile) -> str:
    return f"{profile.identity.model}, {profile.identity.dtype}: {profile.texts} texts, {profile.tokens} tokens"


def _range(profile: Profile) -> tuple[int, int, int]:
    return profile.start, profile.detect, profile.end


def _bins(profile: Profile) -> list[str]:
    """``0-3``, ``4-15``, ... and the last one open; the edges of the bins that hold tokens follow one another."""
    ends = [f"-{b - 1}" for b in profile.edges[1:]] + ["+"]
    return [f"{a}{end}" for a, end in zip(profile.edges, ends, strict=True)]


def _optional(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
