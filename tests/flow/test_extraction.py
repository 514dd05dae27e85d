"""Stage 1: the flow is right, the store is whole whatever happens, and bad videos cost themselves only."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers.containers import encode
from helpers.flow import QUICK, built, command, extract, film, make_set, moving, tree
from helpers.paths import ROOT
from helpers.tvl1 import LIKE, SAME

import flow
import goca
import tvl1
from support import flow_methods, flow_pipeline, videos
from support.avi import AviReader, write_avi
from support.errors import BadInput
from support.flow_methods import OURS, backends_agree, choose_backend
from support.stores import FlowStore, dequantise, open_store
from support.videos import VIDEO_SUFFIXES, find_videos

# ---------------------------------------------------------------------------------------------------------------------
# One video
# ---------------------------------------------------------------------------------------------------------------------
BACKENDS = ["opencv", pytest.param("goca", marks=built)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("u", "v"), [(2, -1), (-3, 0), (0, 2)])
def test_translation(u, v, backend):
    (field,) = flow_methods.fields(moving(2, 64, 80, u, v), flow_methods.make_settings(backend=backend))
    assert field.shape == (64, 80, 2) and field.dtype == np.float32
    inner = field[8:-8, 8:-8].reshape(-1, 2)  # what leaves the picture has no match
    assert np.abs(inner - (u, v)).mean() < 0.1


def test_defaults_are_opencvs():
    solver = cv2.optflow.DualTVL1OpticalFlow_create()
    assert {name: getattr(solver, f"get{name}")() for name in flow_methods.TVL1} == flow_methods.TVL1
    assert not solver.getUseInitialFlow()
    assert {k: v for k, v in flow_methods.make_settings().items() if k in flow_methods.TVL1} == flow_methods.TVL1
    assert {theirs: tvl1.DEFAULTS[ours] for theirs, ours in OURS.items()} | {"Gamma": 0.0} == flow_methods.TVL1


@pytest.mark.parametrize("backend", BACKENDS)
def test_params_reach_the_solver(backend):
    frames = moving(2, 48, 48, 3, 1)
    (default,), (crude,) = (flow_methods.fields(frames, flow_methods.make_settings(backend=backend, **params))
                            for params in ({}, {"WarpingsNumber": 1, "Epsilon": 0.1}))
    expected = cv2.optflow.DualTVL1OpticalFlow_create(warps=1, epsilon=0.1).calc(*frames, None)
    assert np.linalg.norm(crude - expected, axis=-1).mean() < SAME
    assert np.linalg.norm(crude - default, axis=-1).mean() > 2 * SAME, "degenerate: defaults would pass"


def test_auto_takes_the_own_flow_where_it_is_that_of_opencv(monkeypatch):
    choose = choose_backend
    if goca._goca is not None:
        assert choose() == choose("goca") == choose(WarpingsNumber=1, Epsilon=0.03) == "goca"
        honest = tvl1.flow
        monkeypatch.setattr(tvl1, "flow", lambda pairs, **params: honest(pairs, **params) + 0.1)
        backends_agree.cache_clear()
        assert choose() == "opencv" and choose("goca") == "goca"
        backends_agree.cache_clear()
    monkeypatch.setattr(goca, "_goca", None)
    assert choose() == choose("opencv") == "opencv"
    with pytest.raises(BadInput, match=r"--backend goca needs the extension; build it with: .*setup\.py"):
        choose("goca")


@built
def test_backends_do_not_mix(five, tmp_path, capsys):
    """Their stores are the same to a step of 8 bits, and their headers keep them apart."""
    stores = {}
    for backend in ("goca", "opencv"):
        assert command(five / "videos", tmp_path / backend, "--backend", backend, "--warps", "2") == 0
        assert f"TV-L1 of {backend} on " in capsys.readouterr().out
        stores[backend] = FlowStore(tmp_path / backend)
        assert stores[backend].header["backend"] == backend and stores[backend].header["WarpingsNumber"] == 2
    steps = np.concatenate([np.abs(np.int32(stores["goca"].open(name).read(range(3)))
                                   - stores["opencv"].open(name).read(range(3))).ravel()
                            for name in find_videos(five / "videos")])
    assert (steps <= 1).mean() > 0.99
    with pytest.raises(BadInput, match="backend is goca there and opencv now"):
        command(five / "videos", tmp_path / "goca", "--backend", "opencv", "--warps", "2")


def test_u_stands_over_v(tmp_path):
    film(tmp_path / "v.avi", moving(4, 48, 64, 2, -1))
    about = extract(tmp_path / "v.avi", tmp_path / "flow.avi", short_side=0)
    reader = AviReader(tmp_path / "flow.avi")
    assert len(reader) == 3 and reader.header == {**about, "device": "cpu", "frames": 3,
                                                  "crc32": reader.header["crc32"]}
    assert about == {"source": "v.avi", "source_bytes": (tmp_path / "v.avi").stat().st_size, "source_size": [64, 48],
                     "source_declared": 4, "source_frames": 4, "source_fps": 25.0}
    for plane in reader.read([0, 1, 2]):
        assert plane.shape == (96, 64)
        u, v = np.split(dequantise(plane), 2)
        assert abs(np.median(u) - 2) < 0.1 and abs(np.median(v) + 1) < 0.1


def test_a_player_shows_the_flow(tmp_path):
    film(tmp_path / "v.avi", moving(4, 48, 64, 2, -1))
    extract(tmp_path / "v.avi", tmp_path / "flow.avi", short_side=0)
    shown = [cv2.cvtColor(f, cv2.COLOR_BGR2GRAY).astype(int) for f in videos.decode(tmp_path / "flow.avi")]
    read = AviReader(tmp_path / "flow.avi").read([0, 1, 2])
    assert len(shown) == 3 and max(np.abs(a - b).max() for a, b in zip(shown, read, strict=True)) <= 2


def test_clipped_at_the_bound(tmp_path, monkeypatch):
    """Constant planes survive JPEG exactly, so the bytes are those of the quantiser: 128 + 127 / 20 a pixel."""
    constants = [(500.0, -500.0), (20.0, -20.0), (0.0, 10.0), (-10.0, 0.1)]
    fields = (np.full((16, 16, 2), c, np.float32) for c in constants)
    monkeypatch.setattr(flow_pipeline, "fields", lambda frames, settings: (
        f for f, _ in zip(fields, itertools.pairwise(frames), strict=True)))
    film(tmp_path / "v.avi", moving(5, 16, 16, 1, 1))
    extract(tmp_path / "v.avi", tmp_path / "flow.avi", quality=100)
    planes = AviReader(tmp_path / "flow.avi").read(range(4))
    assert [(p[0, 0], p[-1, -1]) for p in planes] == [(255, 1), (255, 1), (128, 192), (64, 129)]
    assert all((p[:16] == p[0, 0]).all() and (p[16:] == p[-1, -1]).all() for p in planes)


@pytest.mark.parametrize(("short_side", "size"), [(0, (33, 47)), (16, (16, 23)), (45, (45, 64))])
def test_odd_sizes(tmp_path, short_side, size):
    write_avi(tmp_path / "v.avi", moving(2, 33, 47, 1, 0), {}, quality=100)  # OpenCV writes even sizes only
    about = extract(tmp_path / "v.avi", tmp_path / "flow.avi", short_side=short_side)
    assert about["source_size"] == [47, 33]
    (plane,) = AviReader(tmp_path / "flow.avi").read([0])
    assert plane.shape == (2 * size[0], size[1])
    expected = size[0] / 33  # u is in pixels of the store
    assert abs(np.median(dequantise(plane[:size[0]])) - expected) < 0.15


def test_size_changes(tmp_path):
    wide, high = ([np.dstack([f] * 3) for f in moving(4, h, w, 1, 0)] for h, w in ((48, 64), (64, 48)))
    joined = encode(wide, "mpegts") + encode(high, "mpegts")
    (tmp_path / "joined.ts").write_bytes(joined)
    with pytest.raises(BadInput, match=r"joined\.ts changes its size from 64x48 to 48x64"):
        extract(tmp_path / "joined.ts", tmp_path / "flow.avi")
    assert [p.name for p in tmp_path.iterdir()] == ["joined.ts"]


def test_a_folder_of_images_is_extracted_as_a_video(tmp_path):
    folder = tmp_path / "v" / "run" / "one"
    folder.mkdir(parents=True)
    for t, frame in enumerate(moving(5, 48, 64, 2, -1)):
        cv2.imwrite(str(folder / f"{t + 1:05d}.png"), frame)
    assert command(tmp_path / "v", tmp_path / "s") == 0
    reader = FlowStore(tmp_path / "s").open("run/one")
    assert len(reader) == 4 and reader.header["source_frames"] == 5 and reader.header["source_size"] == [64, 48]
    field = dequantise(reader.read([1])[0])
    assert abs(np.median(field[:48]) - 2) < 0.15 and abs(np.median(field[48:]) + 1) < 0.15
    assert not missing(tmp_path)  # nothing is left to do
    shutil.copy(folder / "00005.png", folder / "00006.png")
    assert missing(tmp_path) == {"run/one"}  # one more image: another video


def missing(root):
    """Names of the videos below root/v whose flow in root/s is not there or of another video."""
    jobs, _ = flow.missing_jobs(find_videos(root / "v"), [FlowStore(root / "s"), None], (root / "s", None),
                                flow.Remarks(False))
    return set(jobs)


def test_missing_optflow(tmp_path, monkeypatch):
    make_set(tmp_path / "v", 1)
    monkeypatch.delattr(cv2, "optflow")
    with pytest.raises(BadInput, match=r"no cv2\.optflow.*pip install opencv-contrib-python"):
        command(tmp_path / "v", tmp_path / "s")
    assert not (tmp_path / "s").exists()
    if goca._goca is not None:
        assert command(tmp_path / "v", tmp_path / "s", "--backend", "goca") == 0


# ---------------------------------------------------------------------------------------------------------------------
# A folder of videos
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """A folder of five videos and the store of one uninterrupted run on it."""
    root = tmp_path_factory.mktemp("five")
    make_set(root / "videos", 5)
    assert command(root / "videos", root / "store") == 0
    return root


def test_store(five):
    store = FlowStore(five / "store")
    assert store.header == {"kind": "flow", "version": 1, **flow_methods.make_settings(short_side=0)}
    assert store.header["opencv"] == cv2.__version__ and store.header["backend"] in ("goca", "opencv")
    assert sorted(tree(five / "store")) == [*(f"a/v{k}.avi" for k in range(5)), "header.json"]
    for name in find_videos(five / "videos"):
        assert name in store and len(store.open(name)) == 3


def test_again_does_nothing(five, capsys):
    before = {p: p.stat().st_mtime_ns for p in (five / "store").rglob("*")}
    assert command(five / "videos", five / "store") == 0
    assert {p: p.stat().st_mtime_ns for p in (five / "store").rglob("*")} == before
    assert "0 to do" in capsys.readouterr().out


def test_shards(five, tmp_path):
    whole, seen = tree(five / "store"), []
    for i in (2, 3, 1):
        assert command(five / "videos", tmp_path / f"s{i}", "--shard", f"{i}/3") == 0
        assert command(five / "videos", tmp_path / "s", "--shard", f"{i}/3", "--workers", "1") == 0
        seen += [name for name in tree(tmp_path / f"s{i}") if name != "header.json"]
    assert sorted(seen) == sorted(whole.keys() - {"header.json"})  # disjoint and complete
    assert tree(tmp_path / "s") == whole  # bit for bit


@pytest.mark.parametrize("shard", ["0/3", "4/3", "1", "a/b", "-1/2", "1/0"])
def test_bad_shard(five, tmp_path, shard):
    with pytest.raises(BadInput, match=f"--shard takes i/n.* not {shard}"):
        command(five / "videos", tmp_path / "s", f"--shard={shard}")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("option", ["--short-side=-1", "--quality=0", "--workers=0", "--warps=0", "--epsilon=-1"])
def test_bad_option(five, tmp_path, option):
    with pytest.raises(BadInput, match=option.split("=")[0]):
        command(five / "videos", tmp_path / "s", option)


def test_interrupted(tmp_path):
    """Stopped in the middle, twice, the store shows whole files only; the same command then completes it."""
    make_set(tmp_path / "videos", 12, frames=40, size=32)
    assert command(tmp_path / "videos", tmp_path / "whole") == 0
    whole, store = tree(tmp_path / "whole"), tmp_path / "s"
    arguments = ["--videos", str(tmp_path / "videos"), "--out", str(store), *QUICK]
    for sign, status in [(signal.SIGKILL, -9), (signal.SIGINT, 130)]:
        had = len(list(store.rglob("v*.avi")))
        process = subprocess.Popen(  # Ctrl-C as in a terminal, also where the tests run in the background of a shell
            [sys.executable, ROOT / "flow.py", *arguments], stderr=subprocess.PIPE, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        while len(list(store.rglob("v*.avi"))) == had:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(sign)
        error = process.communicate()[1]  # ends when the workers have ended too: they share the pipe
        assert process.returncode == status and "Traceback" not in error, error
        begun = {name: content for name, content in tree(store).items() if not Path(name).name.startswith(".tmp-")}
        assert had + 2 <= len(begun) < 13 and begun.items() <= whole.items()
    assert flow.main(arguments) == 0
    assert {name: content for name, content in tree(store).items() if not Path(name).name.startswith(".tmp-")} == whole


def test_leftovers_of_killed_runs(five, tmp_path):
    """A temporary file a day old is nobody's; a fresh one may be another shard's."""
    command(five / "videos", tmp_path / "s")
    old, fresh = tmp_path / "s" / "a" / ".tmp-old.avi", tmp_path / "s" / ".tmp-fresh.avi"
    old.touch(), fresh.touch()
    os.utime(old, (time.time() - 100_000,) * 2)
    command(five / "videos", tmp_path / "s")
    assert fresh.exists() and not old.exists()


def test_damaged_or_outdated_flow_is_made_again(tmp_path):
    make_set(tmp_path / "v", 2)
    command(tmp_path / "v", tmp_path / "s")
    damaged, outdated = tmp_path / "s" / "a" / "v0.avi", tmp_path / "s" / "a" / "v1.avi"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-100])
    film(tmp_path / "v" / "a" / "v1.avi", moving(6, 24, 24, 1, 1))
    command(tmp_path / "v", tmp_path / "s")
    assert damaged.read_bytes() == whole and len(AviReader(outdated)) == 5


def test_other_settings_are_refused(five, tmp_path):
    before = tree(five / "store")
    with pytest.raises(BadInput, match="short_side is 0 there and 32 now, quality is 95 there and 80 now"):
        command(five / "videos", five / "store", "--short-side", "32", "--quality", "80")
    assert tree(five / "store") == before
    header = json.loads(before["header.json"])
    (tmp_path / "header.json").write_text(json.dumps({**header, "opencv": "4.8.0"}))
    with pytest.raises(BadInput, match=rf"opencv is 4\.8\.0 there and {cv2.__version__} now"):
        command(five / "videos", tmp_path)


def test_shards_that_start_together_agree(tmp_path):
    """Whoever writes the header first, everyone with other settings is refused."""
    settings = [flow_methods.make_settings(short_side=s) for s in (0, 32)]
    for attempt in range(20):
        results, gate = [], threading.Barrier(6)

        def shard(k, root=tmp_path / str(attempt), results=results, gate=gate):
            gate.wait()
            try:
                store = open_store(FlowStore, root, settings[k % 2])
                results.append((store.header["short_side"], k % 2 * 32))
            except BadInput as e:
                assert "other settings" in str(e)

        threads = [threading.Thread(target=shard, args=(k,)) for k in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        (winner,) = set(results)
        assert winner[0] == winner[1] and len(results) == 3
        assert list(tree(tmp_path / str(attempt))) == ["header.json"]


def test_names(tmp_path):
    """Any Unicode, spaces and points; the key is the path without suffix."""
    names = ["Größe/видео 日本.clip", "a b", "x..x", "sub.avi/y"]
    for name in names:
        film(tmp_path / "v" / f"{name}.avi", moving(2, 16, 16, 1, 0))
    os.replace(tmp_path / "v" / "a b.avi", tmp_path / "v" / "a b.AVI")
    os.replace(tmp_path / "v" / "x..x.avi", os.fsencode(tmp_path / "v") + b"/\xff.avi")  # no Unicode at all
    assert command(tmp_path / "v", tmp_path / "s") == 0
    store = FlowStore(tmp_path / "s")
    assert all(name in store for name in names if name != "x..x")


def test_one_name_twice(tmp_path):
    for suffix in ("avi", "mkv"):
        film(tmp_path / "v" / f"a.{suffix}", moving(2, 16, 16, 1, 0))
    with pytest.raises(BadInput, match=r"a\.avi.*a\.mkv|a\.mkv.*a\.avi"):
        command(tmp_path / "v", tmp_path / "s")


def test_never_writes_among_videos(five, tmp_path):
    before = tree(five / "videos")
    for out in (five / "videos", five / "videos" / "flow", five):
        with pytest.raises(BadInput, match=r"--out .* is (inside )?--videos|--videos .* inside --out"):
            command(five / "videos", out)
    assert tree(five / "videos") == before


# ---------------------------------------------------------------------------------------------------------------------
# Real videos
# ---------------------------------------------------------------------------------------------------------------------
def clips(folder, n):
    return sorted(p for p in (folder / "videos").rglob("*") if p.suffix in VIDEO_SUFFIXES)[:n]


@pytest.mark.parametrize("dataset", ["ucf101", "hmdb51", "kinetics400"])
def test_real_video(dataset, real_clips, tmp_path, monkeypatch):
    decode = videos.decode
    monkeypatch.setattr(flow_pipeline, "decode", lambda path, fps: itertools.islice(decode(path, fps), 3))
    for path in clips(real_clips / dataset, 3):
        extract(path, tmp_path / "flow.avi", short_side=64)
        planes = AviReader(tmp_path / "flow.avi").read([0, 1])
        w, h = AviReader(tmp_path / "flow.avi").header["source_size"]
        assert planes[0].shape == (128, round(w * 64 / h))
        greys = [cv2.resize(cv2.cvtColor(f, cv2.COLOR_BGR2GRAY), (round(w * 64 / h), 64), interpolation=cv2.INTER_AREA)
                 for f in itertools.islice(decode(path), 3)]
        solver = cv2.optflow.DualTVL1OpticalFlow_create()
        for plane, pair in zip(planes, itertools.pairwise(greys), strict=True):
            expected = np.clip(solver.calc(*pair, None), -20, 20)
            stored = np.stack(np.split(dequantise(plane), 2), axis=-1)
            assert np.abs(stored - expected).mean() < 0.04 + LIKE  # quantiser 0.039, JPEG the rest


@pytest.mark.parametrize("dataset", ["ucf101", "hmdb51", "kinetics400"])
def test_real_video_counts_what_decodes(dataset, real_clips, tmp_path, monkeypatch):
    """HMDB51's container declares a frame more than it has: the flow has one less than decode, and it is no fault."""
    monkeypatch.setattr(flow_pipeline, "fields", lambda frames, settings: (
        np.zeros((*b.shape, 2), np.float32) for _, b in itertools.pairwise(frames)))
    for path in clips(real_clips / dataset, 2):
        about = extract(path, tmp_path / "flow.avi", short_side=16)
        assert len(AviReader(tmp_path / "flow.avi")) == sum(1 for _ in videos.decode(path)) - 1
        assert flow_pipeline.cut_short_message(path, about) is None
        if dataset == "hmdb51":
            assert about["source_declared"] == about["source_frames"] + 1 == 75
