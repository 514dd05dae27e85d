"""Stage 1 on many videos: batches on a device, RGB from the same pass, other methods, shares, plans, faults, info."""

import io
import json
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from helpers.flow import built, command, film, make_set, moving, tree

import flow
import goca
from support import flow_gpu, flow_methods, flow_pipeline, flow_progress, videos
from support.avi import AviReader
from support.errors import BadInput
from support.flow_info import colours
from support.flow_progress import Progress
from support.stores import FlowStore, RgbStore, rgb_settings
from support.videos import find_videos

gpu = pytest.mark.skipif(not torch.cuda.is_available() or goca._goca is None or not goca._goca.cuda,
                         reason="no GPU, or the extension is built without CUDA kernels")
TRIAL = ["--warps", "1", "--epsilon", "0.1"]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Videos of two sizes and several lengths, one of them longer than a chunk, and two that can't be used; their
    stores of one run in processes: root/videos, root/flow, root/rgb."""
    root = tmp_path_factory.mktemp("films")
    make_set(root / "videos", 3)
    film(root / "videos" / "b" / "long.avi", moving(flow_gpu.CHUNK_PAIRS + 6, 24, 24, 1, 0))
    film(root / "videos" / "b" / "wide.avi", moving(7, 24, 40, 0, 1))
    film(root / "videos" / "b" / "one.avi", moving(1, 24, 24, 1, 0))
    (root / "videos" / "b" / "text.mp4").write_text("not a video\n" * 100)
    assert command(root / "videos", root / "flow", "--rgb", str(root / "rgb"), *TRIAL) == 0
    return root


def both(films, tmp_path, *more):
    """Run with --rgb -> the status."""
    return command(films / "videos", tmp_path / "flow", "--rgb", str(tmp_path / "rgb"), *TRIAL, *more)


def same(films, tmp_path):
    return all(tree(films / kind) == tree(tmp_path / kind) for kind in ("flow", "rgb"))


# ---------------------------------------------------------------------------------------------------------------------
# Batches of pairs of many videos
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch", [1, 10, 1000])
def test_batches_write_what_processes_write(films, tmp_path, capsys, batch):
    """The pipeline of a GPU, on the CPU: smaller than a chunk, larger than all; the same bytes, the same messages."""
    assert both(films, tmp_path, "--batch", str(batch)) == 0
    assert f"on cpu, {batch} pairs at once" in (said := capsys.readouterr().out)
    assert "5 videos written (flow of 5, RGB of 5), 52 pairs" in said and "2 skipped" in said
    assert same(films, tmp_path) and (tmp_path / "flow" / "skipped.json").exists()


@built
def test_out_of_memory_halves_the_batch(films, tmp_path, monkeypatch, capsys):
    honest, sizes = flow_methods.make_solver, []

    def small(settings, most=5):
        def solve(pairs):
            sizes.append(len(pairs))
            if len(pairs) > most or pairs.shape[3] > 32:
                raise torch.OutOfMemoryError("the GPU is full")
            return honest(settings)(pairs)
        return solve

    monkeypatch.setattr(flow_gpu, "make_solver", small)
    assert command(films / "videos", tmp_path / "flow", *TRIAL, "--batch", "32") == 0
    said = capsys.readouterr().out
    for pairs in (16, 8, 4):  # once each, though 8 are tried again
        assert said.count(f"out of memory on cpu: {pairs} pairs of 24x24 px at once") == 1
    assert max(sizes[sizes.index(4):]) <= 8  # what is left when more are tried hangs on the order of decoders
    listed = json.loads((tmp_path / "flow" / "skipped.json").read_text())["skipped"]
    assert listed.keys() == {"b/one", "b/text", "b/wide"}  # the wide one does not even fit alone
    assert "wide.avi has frames too large for the memory of cpu (40x24 px)" in listed["b/wide"]
    whole, got = tree(films / "flow"), tree(tmp_path / "flow")
    assert {n for n in whole if n not in got} == {"b/wide.avi"} and max(sizes) <= 64
    assert all(got[name] == whole[name] for name in got if name != "skipped.json")


def test_a_fault_of_the_solver_costs_the_videos_of_its_batch(films, tmp_path, monkeypatch):
    honest = flow_methods.make_solver

    def faulty(settings):
        def solve(pairs):
            if pairs.shape[3] == 40:
                raise cv2.error("assertion failed\nsomewhere")
            return honest(settings)(pairs)
        return solve

    monkeypatch.setattr(flow_gpu, "make_solver", faulty)
    assert command(films / "videos", tmp_path / "flow", *TRIAL, "--batch", "8") == 0
    listed = json.loads((tmp_path / "flow" / "skipped.json").read_text())["skipped"]
    assert listed.keys() == {"b/one", "b/text", "b/wide"}
    assert listed["b/wide"].endswith("wide.avi failed: error assertion failed somewhere")


@gpu
def test_stores_of_gpu_and_cpu_are_one(films, tmp_path):
    """The device is no setting: to the tolerance asked for, and the store goes on where the other began it."""
    assert command(films / "videos", tmp_path / "flow", *TRIAL, "--device", "cuda") == 0
    whole, ours = FlowStore(films / "flow"), FlowStore(tmp_path / "flow")
    assert whole.header == ours.header
    names = [name for name in find_videos(films / "videos") if name in whole]
    assert ours.open(names[0]).header["device"] == torch.cuda.get_device_name(0) != "cpu"
    pairs = [(np.int32(a), np.int32(b)) for name in names for a, b in zip(
        *(store.open(name).read(range(len(whole.open(name)))) for store in (whole, ours)), strict=True)]
    assert np.mean([(np.abs(a - b) <= 1).mean() for a, b in pairs]) > 0.99
    ours.path(names[0]).unlink()
    assert command(films / "videos", tmp_path / "flow", *TRIAL, "--device", "cpu") == 0
    assert ours.open(names[0]).header["device"] == "cpu"


def test_a_gpu_is_taken_where_it_agrees(monkeypatch):
    """With a stand-in for the GPU: what it computes, and what is missing, decides."""
    settings = {"method": "TV-L1", "backend": "goca"}
    choose = flow_methods.choose_device
    assert choose("cpu", settings) == (torch.device("cpu"), None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose("auto", settings) == (torch.device("cpu"), None)
    with pytest.raises(BadInput, match="--device cuda can't be used: torch sees no GPU"):
        choose("cuda", settings)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(goca, "_goca", SimpleNamespace(cuda=False))
    assert "has no CUDA kernels; build them with" in choose("auto", settings)[1]
    monkeypatch.setattr(goca, "_goca", SimpleNamespace(cuda=True))
    assert "process 2 of this machine has no GPU" in choose("auto", settings, 2)[1]
    assert "runs on the CPU alone" in choose("auto", {**settings, "backend": "opencv"})[1]

    monkeypatch.setattr(flow_methods, "generated_pair", lambda: SimpleNamespace(to=lambda device: device))
    flows = {"gpu": torch.zeros(1, 2, 4, 4), "cpu": torch.zeros(1, 2, 4, 4)}
    monkeypatch.setattr(flow_methods, "make_solver", lambda settings: lambda pairs: flows[
        "gpu" if isinstance(pairs, torch.device) else "cpu"])
    assert choose("auto", settings, 1) == choose("cuda", settings, 1) == (torch.device("cuda", 1), None)
    flows["gpu"] = flows["gpu"] + 0.02
    assert choose("auto", settings) == (torch.device("cpu"), "a GPU gives another flow than the CPU")
    with pytest.raises(BadInput, match="--device cuda can't be used: a GPU gives another flow"):
        choose("cuda", settings)


def test_shares_of_torchrun(films, tmp_path, monkeypatch):
    """Processes divide a shard; their parts are disjoint and complete."""
    whole, seen = tree(films / "flow"), []
    monkeypatch.setenv("WORLD_SIZE", "2")
    for shard in (1, 2):
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            assert flow.parse_shard(f"{shard}/2") == (2 * shard + rank - 1, 4)
            out = tmp_path / f"{shard}-{rank}"
            assert command(films / "videos", out, *TRIAL, "--shard", f"{shard}/2", "--workers", "1") == 0
            seen += [name for name in tree(out) if name.endswith(".avi")]
    assert sorted(seen) == sorted(name for name in whole if name.endswith(".avi"))
    with pytest.raises(BadInput, match="--strict doesn't go with torchrun"):
        command(films / "videos", tmp_path / "s", "--strict")


# ---------------------------------------------------------------------------------------------------------------------
# RGB from the same pass
# ---------------------------------------------------------------------------------------------------------------------
def test_rgb_store(films):
    """All frames, as decoded and shrunk, to the errors of JPEG; what gave no flow gave no RGB."""
    store, header = RgbStore(films / "rgb"), FlowStore(films / "flow").open("b/long").header
    assert store.header == {"kind": "rgb", "version": 1, **rgb_settings()}
    assert {name for name in find_videos(films / "videos") if name in store} == {
        "a/v0", "a/v1", "a/v2", "b/long", "b/wide"}
    reader, plain = store.open("b/long"), list(videos.decode(films / "videos" / "b" / "long.avi"))
    assert len(reader) == len(plain) == flow_gpu.CHUNK_PAIRS + 6
    assert {k: reader.header[k] for k in ("source", "source_bytes", "source_frames", "source_size")} == {
        k: header[k] for k in ("source", "source_bytes", "source_frames", "source_size")}
    for a, b in zip(reader.read(range(len(plain))), plain, strict=True):
        assert a.shape == b.shape and np.abs(np.int32(a) - b).mean() < 4


def test_one_decode_for_both_and_shrunk(tmp_path, monkeypatch):
    film(tmp_path / "v.avi", moving(3, 64, 80, 1, 0))
    decode, times = videos.decode, []
    monkeypatch.setattr(flow_pipeline, "decode", lambda path, fps: times.append(path) or decode(path, fps))
    settings = flow_pipeline.Settings(flow_methods.make_settings(short_side=0), rgb_settings(short_side=32))
    flow_pipeline.extract_video(flow_pipeline.Job(tmp_path / "v.avi", tmp_path / "f.avi", tmp_path / "r.avi"), settings)
    (frame,) = AviReader(tmp_path / "r.avi").read([2])
    assert len(times) == 1 and frame.shape == (32, 40, 3)
    expected = cv2.resize(list(decode(tmp_path / "v.avi"))[2], (40, 32), interpolation=cv2.INTER_AREA)
    assert np.abs(np.int32(frame) - expected).mean() < 4


@pytest.mark.parametrize("more", [[], ["--batch", "8"]], ids=["processes", "batches"])
def test_only_what_is_missing_is_made(films, tmp_path, capsys, more):
    assert command(films / "videos", tmp_path / "flow", *TRIAL) == 0  # the flow first, the RGB later
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "flow").rglob("*.avi")}
    capsys.readouterr()
    assert both(films, tmp_path, *more) == 0 and same(films, tmp_path)
    assert "\n5 videos written (flow of 0, RGB of 5); 2 skipped" in (said := capsys.readouterr().out)
    assert "pairs/s" not in said  # none was computed
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "flow").rglob("*.avi")} == before
    (tmp_path / "flow" / "b" / "wide.avi").unlink()
    (tmp_path / "rgb" / "a" / "v1.avi").write_bytes(b"damaged")
    capsys.readouterr()
    assert both(films, tmp_path, *more) == 0 and same(films, tmp_path)
    assert "4 to do" in (said := capsys.readouterr().out) and "2 skipped" in said  # those are no videos
    assert "2 videos written (flow of 1, RGB of 1), 6 pairs" in said
    assert sum(p.stat().st_mtime_ns != before.get(p) for p in (tmp_path / "flow").rglob("*.avi")) == 1


def test_rgb_is_not_mixed_with_anything(films, tmp_path):
    before = tree(films / "rgb")
    with pytest.raises(BadInput, match=r"rgb was made with other settings \(short_side is 190 there and 100 now"):
        command(films / "videos", films / "flow", "--rgb", str(films / "rgb"), *TRIAL, "--rgb-side", "100")
    with pytest.raises(BadInput, match="holds flow version 1, but rgb version 1 is needed"):
        command(films / "videos", tmp_path / "s", "--rgb", str(films / "flow"))
    with pytest.raises(BadInput, match=r"--rgb .* is --out too"):
        command(films / "videos", tmp_path / "s", "--rgb", str(tmp_path / "s"))
    with pytest.raises(BadInput, match=r"--rgb .* is inside --videos"):
        command(films / "videos", tmp_path / "s", "--rgb", str(films / "videos" / "rgb"))
    assert tree(films / "rgb") == before


# ---------------------------------------------------------------------------------------------------------------------
# Other methods
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["dis", "farneback"])
def test_faster_methods(films, tmp_path, method, capsys):
    """Their flow is OpenCV's, they find a translation, and their store is no TV-L1's."""
    settings = flow_methods.make_settings(method=method)
    create = {"dis": lambda: cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM),
              "farneback": cv2.FarnebackOpticalFlow_create}[method]
    names, defaults, _ = flow_methods.FLOW_METHODS[method]
    assert {name: getattr(create(), f"get{name}")() for name in defaults} == defaults
    assert settings["method"] == names and settings["backend"] == "opencv" and settings.items() >= defaults.items()
    frames = [frame.copy() for frame in moving(2, 64, 80, 2, -1)]
    (field,) = flow_methods.fields(frames, settings)
    assert np.array_equal(field, create().calc(*frames, None))
    assert np.abs(field[8:-8, 8:-8] - (2, -1)).mean() < 0.2

    assert command(films / "videos", tmp_path / "s", "--method", method) == 0
    assert f"{names} of opencv on cpu" in capsys.readouterr().out
    assert command(films / "videos", tmp_path / "b", "--method", method, "--batch", "16") == 0
    assert tree(tmp_path / "s") == tree(tmp_path / "b")
    with pytest.raises(BadInput, match=rf"other settings \(method is {names} there and TV-L1 now\)"):
        command(films / "videos", tmp_path / "s")
    with pytest.raises(BadInput, match=rf"other settings \(method is TV-L1 there and {names} now\)"):
        command(films / "videos", films / "flow", "--method", method)
    for more, words in ((["--warps", "2"], f"--warps and --epsilon are of --method tvl1; {method} has neither"),
                        (["--backend", "goca"], f"--backend goca is for --method tvl1; {method} is OpenCV's")):
        with pytest.raises(BadInput, match=words):
            command(films / "videos", tmp_path / "s", "--method", method, *more)


# ---------------------------------------------------------------------------------------------------------------------
# The plan
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("more", [[], ["--batch", "8"]], ids=["processes", "batches"])
def test_plan(tmp_path, capsys, more):
    """Videos of one length and content: the pairs are exact and the bytes those of the run; nothing is written."""
    for k in range(40):
        film(tmp_path / "v" / f"{k}.avi", moving(12, 24, 24, 1, 0))
    arguments = ["--rgb", str(tmp_path / "rgb"), *TRIAL, *more]
    assert command(tmp_path / "v", tmp_path / "flow", *arguments, "--plan") == 0
    said = capsys.readouterr().out
    assert "24 videos tried: " in said and "40 videos to do: some 440 pairs (+-0 %, from the lengths of 24)" in said
    assert not (tmp_path / "flow").exists() and not (tmp_path / "rgb").exists()
    assert command(tmp_path / "v", tmp_path / "flow", *arguments) == 0
    for kind in ("flow", "RGB"):
        size = sum(int(AviReader(p)._size.sum()) for p in (tmp_path / kind.lower()).rglob("*.avi"))
        planned = float(said.split(f" GB of {kind}")[0].split()[-1]) * 1e9
        assert abs(planned - size) < 0.15 * size
    capsys.readouterr()
    assert command(tmp_path / "v", tmp_path / "flow", *arguments, "--plan") == 0
    assert "0 to do" in capsys.readouterr().out


def test_progress(monkeypatch, capsys):
    clock = 100.0
    monkeypatch.setattr(flow_progress.time, "monotonic", lambda: clock)
    progress = Progress(total=10)
    progress.add("a", 1, 30, 1000, 500)
    progress.add("a", 1, 30, 1000, 500)
    clock = 109
    progress.show()  # too early
    progress.add("b", 2, 50, 2000, 1000)
    clock = 110
    progress.show()  # after 10 s: 4 of (30 + 50) / 2 * 10 pairs of 1500 bytes, 3 of them in these 10 s
    clock = 139
    progress.show()  # too early again
    progress.videos, clock = 1, 140
    progress.show()
    assert capsys.readouterr().out == (
        "0 of 10 videos, 4 of some 400 pairs, 0.3 pairs/s, 0:22:00 left, 1 MB in the end\n"
        "1 of 10 videos, 4 of some 400 pairs, 0.1 pairs/s, 1:28:00 left, 1 MB in the end\n")
    assert progress.estimate(10) == (400, 400 * 1000, 400 * 500)


def test_a_terminal_shows_a_bar_and_messages_above_it(monkeypatch):
    clock, terminal = 100.0, io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(flow_progress.time, "monotonic", lambda: clock)
    progress = Progress(total=10)
    progress.add("a", 1, 40, 1000, 500)
    progress.add("a", 99, 40, 1000, 500)
    clock = 101
    progress.show()
    bar = (" 25%|#####               | 0 of 10 videos, 100 of some 400 pairs, 99.0 pairs/s, 0:00:03 left, 0 MB in the "
           "end")
    assert terminal.getvalue().split("\r")[-1] == bar
    flow_progress.note("a message")
    lines = terminal.getvalue().split("\n")
    assert lines[-2].split("\r")[-1] == "a message" and lines[-1].strip("\r") == bar
    progress.bar.close()


# ---------------------------------------------------------------------------------------------------------------------
# info
# ---------------------------------------------------------------------------------------------------------------------
def test_info(tmp_path, capsys):
    film(tmp_path / "v" / "right.avi", moving(4, 32, 48, 3, 0))
    command(tmp_path / "v", tmp_path / "s")
    (tmp_path / "v" / "late.mp4").touch()
    capsys.readouterr()
    assert flow.main(["info", str(tmp_path / "s"), "--videos", str(tmp_path / "v"), "--video", "right",
                      "--picture", str(tmp_path / "p.png")]) == 0
    out = capsys.readouterr().out
    assert f"opencv           {cv2.__version__}\n" in out and "Lambda           0.15\n" in out
    assert "1 videos, 3 flow fields" in out and "1 of the 2 videos below" in out and "\n  late\n" in out
    assert abs(float(out.split("mean magnitude ")[1].split()[0]) - 3) < 0.3
    picture = cv2.imread(str(tmp_path / "p.png"))
    assert picture.shape == (256, 8 * (48 + 48 + 32), 3)
    b, g, r = np.median(picture[:, 8 * 48:8 * 96].reshape(-1, 3), axis=0)
    assert r > 200 and b < 80 and g < 80  # to the right is red


def test_info_of_rgb(films, tmp_path, capsys):
    assert flow.main(["info", str(films / "rgb"), "--videos", str(films / "videos"), "--video", "b/wide", "--picture",
                      str(tmp_path / "p.png")]) == 0
    out = capsys.readouterr().out
    assert "kind             rgb\n" in out and "5 videos, 57 frames" in out and "2 of the 7 videos below" in out
    assert "have no rgb\n  b/one\n  b/text\n" in out and "b/wide: frame 3 of 7, 40x24 px" in out
    (expected,) = RgbStore(films / "rgb").open("b/wide").read([3])
    assert np.array_equal(cv2.imread(str(tmp_path / "p.png")), expected)


def test_info_on_bad_input(films, tmp_path):
    with pytest.raises(BadInput, match="is no flow store"):
        flow.main(["info", str(tmp_path)])
    with pytest.raises(BadInput, match="has no flow of nobody"):
        flow.main(["info", str(films / "flow"), "--video", "nobody", "--picture", str(tmp_path / "p.png")])
    with pytest.raises(BadInput, match="go together"):
        flow.main(["info", str(films / "flow"), "--video", "a/v0"])
    with pytest.raises(BadInput, match="ends as a picture does"):
        flow.main(["info", str(films / "flow"), "--video", "a/v0", "--picture", "p.txt"])


def test_colours():
    """Direction is hue, stillness white."""
    still, right, left = colours(np.array([[[0, 0], [5, 0], [-5, 0]]], np.float32), 5)[0]
    assert list(still) == [255, 255, 255] and list(right) == [0, 0, 255] and list(left) == [255, 255, 0]
