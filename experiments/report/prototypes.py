"""How far prototypes lie from each other, drawn at random and after Eq. 11, as HTML."""

import numpy as np
import torch
import torch.nn.functional as F

from experiments.report.charts import Mark, bars, text
from prototypes import blocks
from support.errors import BadInput
from support.files import load_arrays
from support.page import Section

BINS = 32


def cosines(prototypes):
    """Unit rows [N, d] -> cosine of each and its nearest [N], and how many pairs have which cosine [200] in -1..1."""
    nearest, pairs = [], torch.zeros(200)
    for _, omega in blocks(prototypes):
        nearest.append(omega.amax(dim=1))
        pairs += torch.histc(omega, 200, -1, 1)
        pairs[0] -= len(omega)  # blocks() puts -1 where a prototype meets itself
    return torch.cat(nearest).numpy(), pairs.numpy() / 2


def _nearest_bars(every, bound):
    values = np.concatenate([nearest for _, nearest, _ in every.values()])
    edges = np.linspace(values.min() - 0.01, values.max() + 0.01, BINS + 1)
    groups = [(name, kind, [*zip(edges[:-1], edges[1:], np.histogram(nearest, edges)[0].tolist(), strict=True)])
              for name, (kind, nearest, _) in every.items()]
    marks = [Mark(bound, "bound")] if bound and edges[0] < bound < edges[-1] else []
    return bars("Cosine of each to its nearest", groups, "cosine", marks)


def _pair_bars(every):
    """In the range that holds pairs, BINS bins at most."""
    held = np.nonzero(sum(pairs for *_, pairs in every.values()))[0]
    step = -(-(held[-1] + 1 - held[0]) // BINS)
    starts = range(held[0], held[-1] + 1, step)
    groups = [(name, kind, [(i / 100 - 1, (i + step) / 100 - 1, int(pairs[i:i + step].sum())) for i in starts])
              for name, (kind, _, pairs) in every.items()]
    return bars("Cosines of all pairs", groups, "cosine")


def prototypes_section(path):
    """-> [Section], [why there is none]. path: file of prototypes.py."""
    try:
        header, arrays = load_arrays(path, "prototypes", "python prototypes.py --out FILE")
    except BadInput as e:
        return [], [f"no prototypes are shown: {e}"]
    fitted = torch.from_numpy(arrays["prototypes"])
    if len(fitted) < 2:
        return [], []
    random = F.normalize(torch.randn(fitted.shape, generator=torch.Generator().manual_seed(0)), dim=1)
    every = {"at random": ("two", *cosines(random)), "after Eq. 11": ("one", *cosines(fitted))}
    said = "; ".join(f'<span class="key {kind}"></span> {name}: mean {nearest.mean():.4f}, greatest '
                     f"{nearest.max():.4f}" for name, (kind, nearest, _) in every.items())
    hint = (f'<p class="hint">{len(fitted)} prototypes of {fitted.shape[1]} dimensions in {text(path)}. Cosine to the '
            f"nearest, {said}.</p>")
    drawn = _nearest_bars(every, header.get("bound")) + _pair_bars(every)
    return [Section("Prototypes", f'{hint}<div class="charts">{drawn}</div>')], []
