"""Every flag that names an output is looked at before the work begins, and named where nothing can be written there."""

import json
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from helpers.evaluation import UNTRAINED
from helpers.small_runs import SMALL

import evaluate
import flow
import pretrain
import prototypes
import search
from experiments import compare, figures, scaling, tables, walkers
from experiments.bench import __main__ as bench
from experiments.bench import prototypes as bench_prototypes
from experiments.bench import search as bench_search
from support import classifiers, features, flow_import, flow_info, video_index
from support.errors import BadInput


@pytest.fixture(scope="module")
def given(tiny, tmp_path_factory):
    """What the commands read."""
    root = tmp_path_factory.mktemp("given")
    for axis in "xy":
        (root / "jpegs" / "one").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / "jpegs" / "one" / f"flow_{axis}_00001.jpg"), np.full((16, 16), 128, np.uint8))
    (root / "sets.json").write_text(json.dumps({"a": {"dataset": "folder", "videos": "v", "flow": "f"}}))
    videos, networks = ["--videos", str(tiny.videos)], [*UNTRAINED, "--workers", "0"]
    return SimpleNamespace(root=root, videos=videos, common=[*tiny.common(), *networks], flow=str(tiny.flow), pretrain=[
        *tiny.common(), "--prototypes", str(tiny.prototypes), *SMALL])


def script(module):
    """A command that reads sys.argv."""
    def call(argv, monkeypatch):
        monkeypatch.setattr("sys.argv", ["x", *argv])
        return module.main()
    return call


def evaluation(argv, monkeypatch):
    return evaluate.evaluate(evaluate.arguments(argv))


def pretraining(argv, monkeypatch):
    return pretrain.train(pretrain.arguments(argv))


def main(module):
    return lambda argv, monkeypatch: module.main(argv)


# the command, its arguments of what is `given`, the flag, the work that must not begin
FILES = {
    "bench": (script(bench), lambda g: ["loader"], "--json", (bench.ROWS, "loader")),
    "bench.prototypes": (script(bench_prototypes), lambda g: [], "--json", (bench_prototypes, "measure")),
    "bench.search": (script(bench_search), lambda g: [], "--json", (bench_search, "search")),
    "scaling": (script(scaling), lambda g: [], "--json", (scaling, "record")),
    "walkers": (main(walkers), lambda g: ["--out", str(g.root / "w")], "--sheet", (walkers, "make")),
    "walkers --baselines": (main(walkers), lambda g: ["--out", str(g.root / "w"), "--baselines"], "--json",
                            (walkers, "make")),
    "prototypes": (main(prototypes), lambda g: [], "--out", (prototypes, "construct")),
    "prototypes --force": (main(prototypes), lambda g: ["--force"], "--out", (prototypes, "construct")),
    "evaluate retrieval": (evaluation, lambda g: ["retrieval", *g.common], "--json", (evaluate, "load_network")),
    "evaluate linear": (evaluation, lambda g: ["linear", *g.common], "--json", (evaluate, "load_network")),
    "evaluate export": (evaluation, lambda g: ["export", "--checkpoint", "x"], "--out", (evaluate, "export")),
    "search index": (main(search), lambda g: ["index", "--checkpoint", "x", *g.videos], "--out",
                     (search, "open_network")),
    "search query": (main(search), lambda g: ["query", "film.avi", "--index", "x"], "--json",
                     (search, "load_collection")),
    "search groups": (main(search), lambda g: ["groups", "--num", "2", "--index", "x"], "--json",
                      (search, "load_collection")),
    "figures": (main(figures), lambda g: ["training", "--run", "x"], "--out", (figures, "training")),
    "tables show": (main(tables), lambda g: ["show", "--table", "1", "--results", "x"], "--out", (tables, "cells")),
    "compare draw": (main(compare), lambda g: ["draw", "x.json"], "--out", (compare, "read_experiment")),
    "flow info": (main(flow), lambda g: ["info", g.flow, "--video", "x"], "--picture", (flow_info, "open_any")),
    "video_index": (main(video_index), lambda g: g.videos, "--index", (video_index, "scan")),
}
FOLDERS = {
    "flow": (main(flow), lambda g: g.videos, "--out", (flow, "extract_all")),
    "flow --rgb": (main(flow), lambda g: [*g.videos, "--out", str(g.root / "flow")], "--rgb", (flow, "extract_all")),
    "flow import": (main(flow), lambda g: ["import", "--from", str(g.root / "jpegs"), "--layout", "denseflow"], "--out",
                    (flow_import, "run_in_processes")),
    "pretrain": (pretraining, lambda g: g.pretrain, "--out", (pretrain, "read_data")),
    "evaluate features": (evaluation, lambda g: ["features", *g.common], "--features", (features, "extract_blocks")),
    "evaluate cluster": (evaluation, lambda g: ["cluster", *g.common], "--features", (features, "extract_blocks")),
    "evaluate finetune": (evaluation, lambda g: ["finetune", *g.common, "--views", "flow", "--batch-size", "4"],
                          "--out", (classifiers, "Run")),
    "search page": (main(search), lambda g: ["page", "--index", "x"], "--out", (search, "load_collection")),
    "tables run": (main(tables), lambda g: ["run", "--table", "1", "--sets", str(g.root / "sets.json"), "--pretrain",
                                            "a", "--on", "a"], "--results", (tables, "Driver")),
}


def refused(monkeypatch, given, case, path, words):
    call, arguments, option, (where, work) = case
    change = monkeypatch.setitem if isinstance(where, dict) else monkeypatch.setattr
    change(where, work, lambda *args, **kwargs: pytest.fail(f"{work} began"))
    with pytest.raises(BadInput, match=f"^{option} {path} {words}"):
        call([*arguments(given), option, str(path)], monkeypatch)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_can_not_be_written(given, tmp_path, monkeypatch, name):
    folder = tmp_path / "folder.png"
    folder.mkdir()
    refused(monkeypatch, given, FILES[name], folder, "is a folder; give the name of a file")
    refused(monkeypatch, given, FILES[name], "/proc/x.png", r"can't be written \(.*\); choose a folder that can")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_can_not_be_written(given, tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("")
    refused(monkeypatch, given, FOLDERS[name], tmp_path / "file", "(is a file; give a folder|can't be)")
    refused(monkeypatch, given, FOLDERS[name], "/proc/x", r"can't be written \(.*\); choose a folder that can")
