"""The loader as training uses it: one place and time in both views through every augmentation, the same batches
whatever the processes, faults on the way, RGB from its store."""

import json
import os
import re
import signal
import time
from multiprocessing import resource_sharer
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from helpers.clips import NEUTRAL, batch_of, film, numbered, values
from helpers.evaluation import UNTRAINED
from helpers.training import log, run
from torch.utils.data import DataLoader

import data
import evaluate
from support import loader
from support.avi import write_avi
from support.datasets import read_split
from support.epoch_batches import EpochBatches
from support.errors import BadInput
from support.loader import Loader, start_worker
from support.stores import FlowStore, RgbStore, rgb_settings, shrink
from support.videos import decode
from support.videos import frames_at as read_frames_at


def rgb_store(root, videos, flows, short_side=190, quality=90):
    """The RGB of `videos`, as flow.py --rgb writes it beside their flow -> data.RgbStore."""
    root.mkdir()
    (root / "header.json").write_text(json.dumps({"kind": "rgb", "version": 1,
                                                  **rgb_settings(short_side, quality)}))
    store = RgbStore(root)
    for video in videos:
        about = flows.open(video.name).header
        write_avi(store.path(video.name), (shrink(f, short_side) for f in decode(video.path)),
                  {k: about[k] for k in ("source", "source_bytes", "source_frames")}, quality=quality)
    return store


@pytest.fixture
def films(tmp_path):
    """Six films of 16 numbered frames, the flow of frame t being u = t, v = -t steps -> (videos, FlowStore)."""
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow" / "header.json").write_text(json.dumps({"kind": "flow", "version": 1}))
    for name in "abcdef":
        path = film(tmp_path / "films" / f"{name}.avi", numbered(16))
        planes = [np.concatenate([np.full((24, 32), 128 + t, np.uint8), np.full((24, 32), 128 - t, np.uint8)])
                  for t in range(15)]
        write_avi(tmp_path / "flow" / f"{name}.avi", planes, {
            "source": path.name, "source_bytes": path.stat().st_size, "source_frames": 16})
    return read_split("folder", tmp_path / "films").videos, FlowStore(tmp_path / "flow")


def tensors(batch):
    return [batch[kind][k] for kind in ("long", "short") for k in ("rgb", "flow", "params")] + [batch["index"]]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


# --- one place, both views -------------------------------------------------------------------------------------------
SQUARE, STEP = 22, (4, 2)  # px, and px right and down a frame; even, so that 1.5 times as much is whole


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """A square moves over a plain ground; its flow is stored half as large again as the film -> TrainClips."""
    root = tmp_path_factory.mktemp("moving")
    frames, planes = [], []
    for t in range(9):
        x, y = 36 + STEP[0] * t, 30 + STEP[1] * t
        frames.append(np.full((96, 128, 3), (70, 90, 80), np.uint8))
        frames[-1][y:y + SQUARE, x:x + SQUARE] = (110, 150, 190)
        flow = np.full((2, 144, 192), 128, np.uint8)
        flow[:, y * 3 // 2:(y + SQUARE) * 3 // 2, x * 3 // 2:(x + SQUARE) * 3 // 2] = np.reshape((170, 156), (2, 1, 1))
        planes.append(flow.reshape(288, 192))
    film(root / "films" / "a.avi", frames)
    (root / "flow").mkdir()
    (root / "flow" / "header.json").write_text(json.dumps({"kind": "flow", "version": 1}))
    write_avi(root / "flow" / "a.avi", planes[:-1], {}, quality=100)
    videos = read_split("folder", root / "films").videos
    return data.TrainClips(videos, FlowStore(root / "flow"), frames=8, n_long=1, n_short=0, size=64)


def places(difference):
    """Where something differs from its ground, [T, S, S] -> centres (x, y) [T, 2], or None where it meets an edge."""
    m = difference / difference.amax((1, 2), keepdim=True)
    m = torch.where(m > 0.1, m, torch.zeros(()))
    if torch.cat([m[:, :2].flatten(), m[:, -2:].flatten(), m[:, :, :2].flatten(), m[:, :, -2:].flatten()]).any():
        return None
    at = torch.arange(m.shape[-1], dtype=torch.float32)
    return torch.stack([(m.sum(1) * at).sum(1), (m.sum(2) * at).sum(1)], dim=1) / m.sum((1, 2))[:, None]


@pytest.mark.parametrize("change", [{}, {0: 1.0}, {1: 1.4}, {2: 0.6}, {3: 0.0}, {3: 1.4}, {4: 0.1}, {5: 2.0}, None],
                         ids=["crop and scale", "flip", "brightness", "contrast", "grey", "saturation", "hue", "blur",
                              "all as drawn"])
def test_a_square_is_at_one_place_in_both_views_after_every_augmentation(moving, change):
    seen, worst = 0, 0.0
    for epoch in range(60):
        batch = torch.utils.data.default_collate([moving[(epoch, 0)]])
        if change is not None:
            params = list(NEUTRAL)
            for k, value in change.items():
                params[k] = value
            batch["long"]["params"][:] = torch.tensor(params)
        flipped = batch["long"]["params"][0, 0, 0] > 0
        clip = {view: x[0, 0] for view, x in data.augment(batch, "cpu")[0].items()}  # [C, T, S, S]
        rgb = (clip["rgb"] - clip["rgb"].flatten(2).median(2).values[..., None, None]).abs().sum(0)
        in_rgb, in_flow = places(rgb), places(clip["flow"][1].abs())
        if in_rgb is None or in_flow is None:
            continue
        seen += 1
        worst = max(worst, (in_rgb - in_flow).abs().max().item())
        moved = in_flow[-1] - in_flow[0]
        assert moved[1] > 0 and moved[0] / moved[1] == pytest.approx((-1 if flipped else 1) * 2, rel=0.1)
        u, v = clip["flow"].flatten(2).amax(2).amax(1), clip["flow"].flatten(2).amin(2).amin(1)
        size = torch.where(u.abs() > v.abs(), u, v) * 127  # the strongest u and v, in steps
        assert size[0] == pytest.approx(-42 if flipped else 42, abs=2) and size[1] == pytest.approx(28, abs=2)
    assert seen >= 15 and worst <= 0.5, (seen, worst)


def test_eight_bits_and_torch_augment_alike(moving):
    rng = np.random.default_rng(0)
    clips = batch_of([NEUTRAL] + [moving._params(rng)[1] for _ in range(60)])["long"]
    clips = {k: x[0] for k, x in clips.items()}
    made = []
    for augment in (data._augment_in_torch, data._augment_in_8_bits):
        made.append({view: torch.empty(clips[view].movedim(-1, 1).shape, memory_format=torch.channels_last_3d)
                     for view in ("rgb", "flow")})
        augment(clips, made[-1])
    assert torch.equal(made[0]["flow"], made[1]["flow"])
    levels = (made[0]["rgb"] - made[1]["rgb"]).abs() * torch.tensor(data.STD).view(3, 1, 1, 1) * 255
    assert levels.max() < 3 and levels.mean((1, 2, 3, 4)).max() < 0.6


# --- the same batches ------------------------------------------------------------------------------------------------
@pytest.fixture
def batches(films):
    """Makes the batches of a loader, 2 epochs of 3 batches of 2."""
    videos, flows = films
    clips = data.TrainClips(videos, flows, frames=6, short_frames=4, size=16)

    def make(workers=0, batch_size=2, **k):
        return list(DataLoader(clips, batch_sampler=EpochBatches(6, batch_size, 2, **k), num_workers=workers,
                               worker_init_fn=start_worker if workers else None))
    return make


def test_batches_are_the_same_whatever_the_workers(batches):
    alone = batches()
    assert len(alone) == 6 and not same(alone[0], alone[3])  # epochs differ
    for workers in (1, 3):
        assert all(same(a, b) for a, b in zip(alone, batches(workers), strict=True))


def test_batches_are_the_same_whatever_the_processes(batches):
    alone = batches()
    first, second = (batches(batch_size=1, rank=rank, world=2) for rank in (0, 1))
    for whole, a, b in zip(alone, first, second, strict=True):
        assert all(torch.equal(w, torch.cat([x, y]))
                   for w, x, y in zip(tensors(whole), tensors(a), tensors(b), strict=True))


@pytest.mark.parametrize("start", [1, 4])
def test_a_run_that_continues_gets_the_next_sample(batches, start):
    assert all(same(a, b) for a, b in zip(batches()[start:], batches(1, start=start), strict=True))


@pytest.mark.parametrize(("protocol", "n", "starts"), [("goca", 50, [round(t) for t in np.linspace(0, 41, 10)]),
                                                       ("coclr", 50, [0, 15, 30]), ("coclr", 6, [0])])
def test_views_hold_the_documented_frames(tmp_path, protocol, n, starts):
    film(tmp_path / "films" / "a.avi", numbered(n, h=24, w=40))
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow" / "header.json").write_text(json.dumps({"kind": "flow", "version": 1}))
    write_avi(tmp_path / "flow" / "a.avi", [np.full((48, 40), 128 + t, np.uint8) for t in range(n - 1)], {})
    clips = data.TestClips(read_split("folder", tmp_path / "films").videos, FlowStore(tmp_path / "flow"),
                           protocol=protocol, frames=8, size=12)
    item = clips[0]
    times = {"goca": 3, "coclr": 1}[protocol]
    expected = sorted([(start + i) % (n - 1) for i in range(8)] for start in starts * times)
    assert sorted(values(clip) for clip in item["rgb"]) == expected
    assert sorted((clip[..., 0].float().mean((1, 2)).round() - 128).tolist() for clip in item["flow"]) == expected


# --- faults on the way -----------------------------------------------------------------------------------------------
def test_files_that_vanish_break_or_stall_cost_their_samples_alone(films, monkeypatch):
    """b disappears, c's flow is cut, d stalls and e's flow disappears, all after the first batch."""
    videos, flows = films
    real = read_frames_at
    started = time.monotonic()

    def frames_at(path, wanted, *more):
        if path.endswith("d.avi") and os.path.exists(f"{path}.stalls"):
            time.sleep(60)
        return real(path, wanted)

    monkeypatch.setattr("support.frames.frames_at", frames_at)
    clips = data.TrainClips(videos, flows, frames=6, n_short=0, size=16, time_limit=0.5)
    loader = DataLoader(clips, batch_sampler=EpochBatches(6, 2, 8), num_workers=2, worker_init_fn=start_worker)
    got = []
    for k, batch in enumerate(loader):
        got += zip(batch["index"].tolist(), batch["fault"], batch["long"]["rgb"], strict=True)
        if k == 0:
            os.remove(videos[1].path)
            flows.path("c").write_bytes(flows.path("c").read_bytes()[:-100])
            open(f"{videos[3].path}.stalls", "w").close()
            os.remove(flows.path("e"))
    assert len(got) == 8 * 6 and all(clip.any() for *_, clip in got)
    words = {"b.avi doesn't exist", "c.avi is damaged (", "d.avi gave nothing for 0.5 s",
             "has no flow of e"}
    for index, fault, _ in got[-6:]:  # whatever the workers were ahead, the last epoch knows
        assert not fault or sum(w in fault for w in words) == 1
        assert index in (0, 5) or not fault
    assert sorted(w for w in words for _, fault, _ in got[-6:] if w in fault) == sorted(words)
    assert time.monotonic() - started < 50  # nobody waits for the one that stalls


def test_what_a_codec_raises_is_a_fault_of_its_video(films, monkeypatch):
    videos, flows = films

    def frames_at(path, wanted, *more, real=read_frames_at):
        if path.endswith("a.avi"):
            raise cv2.error("(-215:Assertion failed)\n in function 'resize'\n")
        if path.endswith("b.avi"):
            raise OSError(5, "Input/output error", path)
        return real(path, wanted)

    monkeypatch.setattr("support.frames.frames_at", frames_at)
    clips = data.TrainClips(videos, flows, frames=6, n_short=0, size=16)
    faults = [clips[(0, k)]["fault"] for k in range(3)]
    assert re.fullmatch(r"\S+/a\.avi failed: .*resize'", faults[0])
    assert re.fullmatch(r"\S+/b\.avi failed: .*Input/output error: .*", faults[1]) and faults[2] == ""
    views = data.TestClips(videos, flows, frames=6, size=16)
    assert [views[k].get("fault") for k in range(3)] == [*faults[:2], None]


# --- RGB from its store ----------------------------------------------------------------------------------------------
def test_clips_from_the_store_are_those_of_the_video(films, tmp_path, monkeypatch):
    videos, flows = films
    rgb = rgb_store(tmp_path / "rgb", videos, flows)
    plain, stored = (data.TrainClips(videos, flows, frames=4, n_short=1, short_frames=4, size=16, rgb=store)
                     for store in (None, rgb))
    expected = [plain[(1, k)] for k in range(6)]
    for video in videos:  # the videos are no longer needed
        os.remove(video.path)
    decoded = []
    real = cv2.imdecode
    monkeypatch.setattr(cv2, "imdecode", lambda *a: decoded.append(1) or real(*a))
    for k, item in enumerate(expected):
        decoded.clear()
        other = stored[(1, k)]
        assert other["fault"] == "" and len(decoded) <= 2 * 12  # only what 3 clips of 4 frames hold
        for kind in ("long", "short"):
            assert torch.equal(item[kind]["flow"], other[kind]["flow"])
            assert torch.equal(item[kind]["params"], other[kind]["params"])
            assert [values(c) for c in item[kind]["rgb"]] == [values(c) for c in other[kind]["rgb"]]
    cached = data.TrainClips(videos, flows, frames=4, n_short=1, short_frames=4, size=16, rgb=rgb, cache=True)
    assert same(torch.utils.data.default_collate([cached[(1, 0)]]), torch.utils.data.default_collate([stored[(1, 0)]]))


def test_a_store_of_rgb_that_does_not_fit_is_a_fault_of_its_video(films, tmp_path):
    videos, flows = films
    rgb = rgb_store(tmp_path / "rgb", videos, flows)
    frames = list(decode(videos[0].path))
    about = flows.open("a").header
    write_avi(rgb.path("a"), frames, {**about, "source_bytes": 1})
    write_avi(rgb.path("b"), frames[:-1], about)
    os.remove(rgb.path("c"))
    rgb.path("d").write_bytes(rgb.path("d").read_bytes()[:200])
    clips = data.TrainClips(videos, flows, frames=4, n_short=0, size=16, rgb=rgb)
    size = about["source_bytes"]
    command = f"python flow.py --videos DIR --out FLOW --rgb {rgb.root}"
    for k, words in enumerate((f"a.avi holds 16 frames of a video of 1 bytes, but {flows.path('a')} is the flow of 16 "
                               f"frames of one of {size} bytes",
                               f"b.avi holds 15 frames of a video of {size} bytes, but", f"{rgb.root} has no rgb of c",
                               f"{rgb.path('d')} is damaged")):
        item = clips[(0, k)]
        assert words in item["fault"] and item["fault"].endswith(command) and item["index"] in (4, 5)


def test_a_longer_film_under_an_old_name_does_not_take_the_flow_of_the_old_one(films):
    videos, flows = films
    path, size = Path(videos[0].path), flows.open("a").header["source_bytes"]
    film(path, numbered(40))
    words = (f"{path} has {path.stat().st_size} bytes, but its flow {flows.path('a')} is that of a shorter video "
             f"of {size}; has it changed? Run again: python flow.py")
    item = data.TrainClips(videos, flows, frames=4, n_short=0, size=16)[(0, 0)]
    assert words in item["fault"] and item["index"] in range(1, 6)  # another in its place
    assert words in data.TestClips(videos, flows, frames=4, size=16)[0]["fault"]
    # the same film encoded anew keeps its flow
    film(path, numbered(16)[::-1])
    write_avi(flows.path("a"), list(flows.open("a").frames(range(15))), {**flows.open("a").header, "source_bytes": 1})
    assert data.TestClips(videos, flows, frames=4, size=16)[0].get("fault", "") == ""
    film(path, numbered(40))
    # imported without its video, flow says nothing of it
    header = {"source": "a", "source_bytes": 99, "images_bytes": 99, "source_frames": 16}
    write_avi(flows.path("a"), list(flows.open("a").frames(range(15))), header)
    assert data.TestClips(videos, flows, frames=4, size=16)[0].get("fault", "") == ""


def test_pretraining_reads_the_store(tiny, tmp_path, capsys):
    found = read_split("ucf101", tiny.videos, tiny.splits).videos
    rgb = rgb_store(tmp_path / "rgb", found, FlowStore(tiny.flow))
    empty = tmp_path / "videos"
    for video in found:  # names alone are wanted of them
        (empty / video.name).parent.mkdir(parents=True, exist_ok=True)
        (empty / f"{video.name}.avi").touch()
    os.remove(rgb.path(found[0].name))
    more = ["--videos", str(empty), "--epochs", "1", "--batch-size", "9"]
    assert run(tiny, tmp_path / "run", *more, "--rgb", str(rgb.root)) == 0
    assert log(tmp_path / "run")[-1]["skipped"] == 0
    assert "19 videos" in (said := capsys.readouterr().out) and "1 without flow or RGB" in said
    with pytest.raises(BadInput, match=r"is no rgb store .*--rgb"):
        run(tiny, tmp_path / "other", *more, "--rgb", str(empty))


def crashes(monkeypatch, name, does):
    """Reading the film `name` does that; others are read."""
    real = read_frames_at
    monkeypatch.setattr("support.frames.frames_at",
                        lambda path, wanted, *more: does() if path.endswith(name) else real(path, wanted))


def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)


def unreadable():
    raise BadInput("no video")


def test_a_film_that_crashes_its_reader_costs_its_samples_alone(films, monkeypatch):
    """The batches are those in which it is just unreadable; it is named, and no process ends for it again."""
    videos, flows = films
    batches = EpochBatches(6, 2, 3)

    def clips():
        return data.TrainClips(videos, flows, frames=6, short_frames=4, size=16)

    crashes(monkeypatch, "c.avi", unreadable)
    expected = list(DataLoader(clips(), batch_sampler=batches))
    crashes(monkeypatch, "c.avi", segfault)
    got = list(Loader(clips(), batches.after, 2))
    assert len(got) == 9 and all(same(a, b) for a, b in zip(expected, got, strict=True))
    said = {fault for batch in got for fault in batch["fault"]} - {""}
    assert said == {f"{videos[2].path} ended the process that read it; convert it, or see whether memory ran out"}


def test_a_test_film_that_crashes_its_reader_is_a_fault(films, monkeypatch):
    videos, flows = films
    crashes(monkeypatch, "b.avi", segfault)
    clips = data.TestClips(videos, flows, frames=6, size=16)
    own = [4, 1, 5]
    items = list(Loader(clips, lambda done: {"sampler": own[done:], "batch_size": None}, 1))
    assert [item["index"] for item in items] == own
    assert "b.avi ended the process" in items[1]["fault"] and "fault" not in items[0] and "fault" not in items[2]


def test_a_process_may_end_while_it_hands_over_what_it_made(films, monkeypatch):
    """Its memory comes through a socket of its own, which then closes in mid-sentence."""
    videos, flows = films
    crashes(monkeypatch, "b.avi", segfault)
    clips = data.TestClips(videos, flows, frames=6, size=16)
    whole, own = resource_sharer._ResourceSharer.get_connection, [4, 1, 5]

    def closes(ident):
        if not clips.ended:  # the process that will end; the next one is well
            raise EOFError
        return whole(ident)

    monkeypatch.setattr(resource_sharer._ResourceSharer, "get_connection", staticmethod(closes))
    items = list(Loader(clips, lambda done: {"sampler": own[done:], "batch_size": None}, 1))
    assert [item["index"] for item in items] == own and "b.avi ended the process" in items[1]["fault"]


def test_a_process_that_never_begins_is_replaced(films, monkeypatch, tmp_path):
    """As one that was forked while another thread held a lock of the interpreter."""
    def hangs_once(worker):
        if worker == 1 and not (tmp_path / "hung").exists():
            (tmp_path / "hung").touch()
            time.sleep(999)
        begin(worker)

    begin = loader.begin
    monkeypatch.setattr(loader, "begin", hangs_once)
    for name, seconds in (("START", 1), ("LOOK_EVERY", 1), ("PATIENCE", 20)):
        monkeypatch.setattr(Loader, name, seconds)
    videos, flows = films
    clips = data.TestClips(videos, flows, frames=6, size=16, time_limit=0.1)
    monkeypatch.setattr(data, "with_time_limit", lambda seconds, path, read, *given: read(*given))
    items = list(Loader(clips, lambda done: {"sampler": range(done, len(videos)), "batch_size": None}, 2))
    assert [item["index"] for item in items] == list(range(len(videos))) and (tmp_path / "hung").exists()
    assert clips.begun.tolist() == [True, True] and not clips.ended


def test_processes_that_all_end_are_not_the_films(films, monkeypatch):
    videos, flows = films
    crashes(monkeypatch, ".avi", segfault)
    clips = data.TrainClips(videos * 4, flows, frames=6, n_short=0, size=16)
    monkeypatch.setattr(Loader, "MAX_RESTARTS", 1)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(Loader(clips, EpochBatches(24, 12, 1).after, 1))
    assert len(clips.ended) == 1  # at the second without a batch between it was over


def test_evaluation_whose_processes_all_end_is_an_error_message(tiny, monkeypatch):
    crashes(monkeypatch, ".avi", segfault)
    monkeypatch.setattr(Loader, "MAX_RESTARTS", 0)
    with pytest.raises(BadInput, match=r"a loader process ended .*fewer --workers"):
        evaluate.evaluate(evaluate.arguments(["retrieval", *tiny.common(), *UNTRAINED, "--workers", "1"]))
