"""How far prototypes lie from each other, drawn at random and after Eq. 11, as HTML."""

import numpy as np
import torch
import torch.nn.functional as F

from experiments.report.charts import Mark, bars, scatter, text
from prototypes import blocks
from support.errors import BadInput
from support.files import load_arrays
from support.page import Section
from support.projection import flat_map

MANY = 1000  # prototypes: a map of more takes too long


def nearest_cosines(prototypes):
    """Cosine of each prototype and its nearest: unit rows [N, d] -> float32 [N]."""
    return torch.cat([omega.amax(dim=1) for _, omega in blocks(prototypes)]).numpy()


def prototypes_section(path):
    """-> [Section], [why there is none]. path: file of prototypes.py."""
    try:
        header, arrays = load_arrays(path, "prototypes", "python prototypes.py --out FILE")
    except BadInput as e:
        return [], [f"no prototypes are shown: {e}"]
    fitted = torch.from_numpy(arrays["prototypes"])
    random = F.normalize(torch.randn(fitted.shape, generator=torch.Generator().manual_seed(0)), dim=1)
    every = {"at random": ("two", random), "after Eq. 11": ("one", fitted)}
    cosines = {name: nearest_cosines(x) for name, (_, x) in every.items()}
    low, high = min(c.min() for c in cosines.values()), max(c.max() for c in cosines.values())
    edges = np.linspace(low - 0.01, high + 0.01, 33)
    groups = [(name, every[name][0], [*zip(edges[:-1], edges[1:], np.histogram(c, edges)[0].tolist(), strict=True)])
              for name, c in cosines.items()]
    bound = header.get("bound")
    drawn = bars("Cosine of each to its nearest", groups, "cosine",
                 [Mark(bound, "bound")] if bound and edges[0] < bound < edges[-1] else [])
    if len(fitted) <= MANY:
        drawn += "".join(scatter(f"{name} (t-SNE)", flat_map(x.numpy())[0], kind) for name, (kind, x) in every.items())
    said = "; ".join(f'<span class="key {kind}"></span> {name}: mean {cosines[name].mean():.4f}, greatest '
                     f"{cosines[name].max():.4f}" for name, (kind, _) in every.items())
    hint = (f'<p class="hint">{len(fitted)} prototypes of {fitted.shape[1]} dimensions in {text(path)}. Cosine to the '
            f"nearest, {said}.</p>")
    return [Section("Prototypes", f'{hint}<div class="charts">{drawn}</div>')], []
