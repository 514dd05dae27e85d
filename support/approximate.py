"""Approximate nearest neighbours by FAISS (optional: pip install faiss-cpu), for collections of 10^5 and more.

An inverted file (IVF): vectors in cells about k-means' centres; a search looks into the cells nearest to the query,
here as many as find 95 % of the true ten nearest. Training takes seconds to minutes, so the index is kept on disk.
"""

import importlib.util
import os
import re
from contextlib import suppress
from pathlib import Path

import torch

from support.errors import BadInput
from support.files import atomic
from support.metrics import nearest

RECALL, K, PROBES = 0.95, 10, 200  # of the K nearest; measured on so many rows
POINTS = 64  # rows a cell that k-means learns from, at most: a quarter of FAISS's own number, so a quarter of its work


def installed():
    return importlib.util.find_spec("faiss") is not None


def build(rows):
    """Unit rows float32 [n, D] -> (FAISS index by inner product, its recall of the ten nearest)."""
    import faiss

    x, n = rows.numpy(), len(rows)
    cells = min(round(4 * n**0.5), n // 39)  # FAISS wants 39 rows a cell
    if cells < 16:
        index = faiss.IndexFlatIP(x.shape[1])
        index.add(x)
        return index, 1.0
    index = faiss.index_factory(x.shape[1], f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = POINTS
    index.train(x)
    index.add(x)
    places = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:PROBES]
    exact = nearest(rows[places], rows, K + 1)
    others = exact != places[:, None]  # a row finds itself in any case
    index.nprobe, recall = 1, 0.0
    while True:
        near = torch.from_numpy(index.search(rows[places].numpy(), K + 1)[1])
        recall = (near[:, :, None] == exact[:, None]).any(1)[others].double().mean().item()
        if recall >= RECALL or index.nprobe >= cells:
            return index, recall
        index.nprobe = min(cells, 2 * index.nprobe)


def kept(path, view, rows):
    """FAISS's index of a view of the collection at `path`, kept beside it -> (index, a message where it was made).

    rows: that view. The name of the file says of which state of the collection it is; another is made anew."""
    import faiss

    stem = f"{Path(path).name}.{view}."
    file = Path(path).with_name(f"{stem}{os.stat(path).st_mtime_ns}.faiss")
    with suppress(RuntimeError):  # a file that isn't there, or is cut short
        return faiss.read_index(str(file)), ""
    index, recall = build(rows)
    finds = f"which finds {100 * recall:.0f} % of the ten nearest"
    try:
        for old in file.parent.iterdir():
            if re.fullmatch(rf"{re.escape(stem)}\d+\.faiss", old.name):
                old.unlink()
        with atomic(file) as tmp:
            faiss.write_index(index, str(tmp))
    except (BadInput, OSError, RuntimeError) as e:
        return index, f"FAISS's index, {finds}, is not kept: {e}"
    return index, f"written: {file}, {finds}"
