"""The distribution of a truncated draw by definition, and a chi-square test of counts."""

import math

import torch
from torch import Tensor


def allowed(p: Tensor, top_k: int, top_p: float, min_p: float) -> Tensor:
    """Return p (V,) after top-k, then top-p of the rest, then min-p, normalised to 1."""
    order = p.argsort(descending=True)
    keep = order[: top_k or len(p)]
    mass = p[keep] / p[keep].sum()
    keep = keep[: int((mass.cumsum(0) - mass < top_p).sum())]
    keep = keep[p[keep] >= min_p * p.max()]
    q = torch.zeros_like(p)
    q[keep] = p[keep]
    return q / q.sum()


def assert_drawn_from(counts: Tensor, expected: Tensor) -> None:
    """Assert by a chi-square test that each token was drawn as often as expected; both (V,)."""
    assert counts[expected == 0].sum() == 0
    rare = expected < 10  # pooled, since the chi-square test needs cells of a minimum size
    cells = [*zip(counts[~rare], expected[~rare], strict=True)]
    if expected[rare].sum() >= 10:
        cells.append((counts[rare].sum(), expected[rare].sum()))
    chi2 = float(sum((c - e) ** 2 / e for c, e in cells))
    degrees = len(cells) - 1
    assert chi2 < degrees + 4 * math.sqrt(2 * degrees)  # 4 sigma; the draws are fixed
