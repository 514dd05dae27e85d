"""search.py index and query, called as the tests of search call them, and an index of made-up rows."""

import json

import numpy as np

import search
from support.collection_index import Collection, save_collection

NAMES = ("a", "b/c", "b/d", "e", "<script>alert(1)<")  # of the films of the fixture `films`


def index(films, out, *more, videos=None, checkpoint=None):
    return search.main(["index", "--checkpoint", str(checkpoint or films / "run"), "--videos",
                        str(videos or films / "films"), "--out", str(out), "--workers", "0", *more])


def query(path, video, tmp_path, *more):
    assert search.main(["query", "--index", str(path), str(video), "--json", str(tmp_path / "q.json"), *more]) == 0
    out = json.loads((tmp_path / "q.json").read_text())
    assert out["query"] == str(video)
    return out["results"]


def made_up(path, values, **header):
    """An index of made-up rows {view: [n, D]}."""
    n = len(next(iter(values.values())))
    values = {v: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for v, x in values.items()}
    header = {"videos": "/films", "views": list(values), "segment": None, "flow": None, **header}
    save_collection(path, Collection(header, np.array([f"{i:04d}.avi" for i in range(n)]),
                                     np.tile([0.0, 2.0], (n, 1)), np.zeros((n, 2), np.int64),
                                     np.zeros((n, 4), np.int64), values))
    return path
