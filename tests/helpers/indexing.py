"""search.py index and query, called as the tests of search call them."""

import json

import search

NAMES = ("a", "b/c", "b/d", "e", "<script>alert(1)<")  # of the films of the fixture `films`


def index(films, out, *more, videos=None, checkpoint=None):
    return search.main(["index", "--checkpoint", str(checkpoint or films / "run"), "--videos",
                        str(videos or films / "films"), "--out", str(out), "--workers", "0", *more])


def query(path, video, tmp_path, *more):
    assert search.main(["query", "--index", str(path), str(video), "--json", str(tmp_path / "q.json"), *more]) == 0
    out = json.loads((tmp_path / "q.json").read_text())
    assert out["query"] == str(video)
    return out["results"]
