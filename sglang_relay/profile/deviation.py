"""How far reused values are from those of full prefill, per token and layer (the paper's section on its profiler)."""

from __future__ import annotations

import numpy as np


def deviation(reused: np.ndarray, full: np.ndarray) -> np.ndarray:
    """``d[j, l] = 1 - mean_h cos(v_reused[h, j, l], v_full[h, j, l])``, float32 [tokens, layers], in [0, 2].

    Both arguments: values, any float dtype, [layers, tokens, heads, head_dim]. Two vectors without length agree; one
    without length is orthogonal to all others. ValueError for shapes that differ.
    """
    if reused.shape != full.shape or reused.ndim != 4:
        raise ValueError(
            f"values of shapes {reused.shape} and {full.shape}: expected [layers, tokens, heads, head_dim]"
        )
    layers = [_one_layer(a.astype(np.float64), b.astype(np.float64)) for a, b in zip(reused, full, strict=True)]
    return np.stack(layers, axis=1).astype(np.float32)


def _one_layer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[tokens, heads, head_dim] -> [tokens]."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    dots = np.einsum("thd,thd->th", a, b)
    cosines = np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)
    cosines[(np.abs(a).max(axis=-1) == 0) & (np.abs(b).max(axis=-1) == 0)] = 1.0
    return 1.0 - np.clip(cosines, -1.0, 1.0).mean(axis=-1)


def rank_correlations(field: np.ndarray) -> np.ndarray:
    """``rho[l]``: Spearman's correlation of the tokens' deviations at layer ``l`` with those at ``l - 1``.

    field: [tokens, layers]. Returns float64 [layers]; ``rho[0]`` is NaN. A layer whose tokens all deviate alike (the
    first one of most models: its values do not depend on the prefix) ranks nothing, and correlates with 0.
    """
    from scipy.stats import rankdata

    ranks = rankdata(field, axis=0)
    ranks = ranks - ranks.mean(axis=0)
    lengths = np.linalg.norm(ranks, axis=0)
    products = np.einsum("tl,tl->l", ranks[:, 1:], ranks[:, :-1])
    scale = lengths[1:] * lengths[:-1]
    rho = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return np.concatenate([[np.nan], rho])
