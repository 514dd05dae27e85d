"""Split files, decoding, clips and augmentation: frames, places and signs are exact."""

import csv
import json
import os

import cv2
import numpy as np
import pytest
import torch
from helpers.clips import NEUTRAL, batch_of, film, numbered, values

import data
from support.avi import write_avi
from support.crops import Box, cut, cut_same_region
from support.datasets import Video, read_split
from support.epoch_batches import EpochBatches
from support.errors import BadInput
from support.frames import read_frames
from support.stores import FlowStore
from support.videos import FilmReader, decode


@pytest.fixture
def store(tmp_path):
    """Makes a video of numbered frames and its store, where flow frame t is u = t, v = -t steps."""
    def make(n, name="a", h=24, w=32):
        film(tmp_path / "videos" / f"{name}.avi", numbered(n, h, w))
        planes = [np.concatenate([np.full((h, w), 128 + t, np.uint8), np.full((h, w), 128 - t, np.uint8)])
                  for t in range(n - 1)]
        (tmp_path / "flow").mkdir(exist_ok=True)
        (tmp_path / "flow" / "header.json").write_text(json.dumps({"kind": "flow", "version": 1}))
        write_avi(tmp_path / "flow" / f"{name}.avi", planes, {})
        found = read_split("folder", tmp_path / "videos")
        return found.videos, FlowStore(tmp_path / "flow")
    return make


# --- split files -----------------------------------------------------------------------------------------------------
def test_official_ucf101_lists(real_clips):
    root = real_clips / "ucf101"
    for split, (train, test) in {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}.items():
        there = 0
        for subset, number in (("train", train), ("test", test)):
            try:
                found = read_split("ucf101", root / "videos", root / "splits", split, subset)
            except BadInput as e:
                assert f"none of the {number} videos" in str(e)
                continue
            assert len(found.classes) == 101 and found.classes[0] == "ApplyEyeMakeup"
            assert all(f"/{found.classes[v.label]}/" in v.path for v in found.videos)
            assert len(found.videos) + len(found.absent) == number
            there += len(found.videos)
        assert there == 6


def test_official_hmdb51_lists(real_clips):
    root = real_clips / "hmdb51"
    seen = 0
    for split in (1, 2, 3):
        for subset, number in (("train", 3570), ("test", 1530)):
            try:
                found = read_split("hmdb51", root / "videos", root / "splits", split, subset)
            except BadInput as e:
                assert f"none of the {number} videos" in str(e)
                continue
            assert len(found.videos) + len(found.absent) == number and len(found.classes) == 51
            assert found.classes[found.videos[0].label] == "wave"
            seen += 1
    assert seen > 0


def test_kinetics_lists_and_folders(real_clips, tmp_path):
    root = real_clips / "kinetics400"
    found = read_split("k400", root / "videos")
    assert len(found.videos) == 5 and found.classes == ["arm_wrestling", "cleaning_pool", "cutting_watermelon",
                                                        "using_segway"]
    # two of them are in the validation list, as <id>_<start>_<end>; the files are called by id alone
    rows = len((root / "splits" / "val_videofolder.txt").read_text().splitlines())
    found = read_split("k400", root / "videos", root / "splits", subset="test")
    assert [os.path.basename(v.path) for v in found.videos] == ["R6llTwEh07w.mp4", "SOX5yA1l24A.mp4"]
    assert [found.classes[v.label] for v in found.videos] == ["using_segway"] * 2 and len(found.classes) == 400
    assert len(found.absent) == rows - 2
    # the official csv and the usual layout, class names with spaces
    film(tmp_path / "videos" / "val" / "air drumming" / "abc_000017_000027.mp4", numbered(3))
    (tmp_path / "validate.csv").write_text('label,youtube_id,time_start,time_end,split\nair drumming,abc,17,27,val\n'
                                           'air drumming,gone,1,11,val\n')
    found = read_split("k400", tmp_path / "videos", tmp_path, subset="test")
    assert [v.name for v in found.videos] == ["val/air drumming/abc_000017_000027"]
    assert found.classes == ["air_drumming"] and found.absent == ["gone_000001_000011"]


def test_official_diving48_lists(real_clips, tmp_path):
    splits = real_clips / "diving48" / "splits"
    first = json.loads((splits / "Diving48_V2_test.json").read_text())[0]
    film(tmp_path / "rgb" / f"{first['vid_name']}.mp4", numbered(3))
    found = read_split("diving48", tmp_path, splits, subset="test")
    assert len(found.videos) == 1 and len(found.absent) == 1969 and len(found.classes) == 48
    assert found.videos[0].label == first["label"]
    with pytest.raises(BadInput, match="none of the 15027 videos"):
        read_split("diving48", tmp_path, splits, subset="train")


def test_plain_folder_with_and_without_classes(tmp_path):
    for name in ("train/run/a", "train/sit/b", "test/run/c"):
        film(tmp_path / f"{name}.avi", numbered(3))
    train, test = (read_split("folder", tmp_path, subset=s) for s in ("train", "test"))
    assert [(v.name, v.label) for v in train.videos] == [("train/run/a", 0), ("train/sit/b", 1)]
    assert [(v.name, test.classes[v.label]) for v in test.videos] == [("test/run/c", "run")]
    film(tmp_path / "flat" / "x ü.avi", numbered(3))
    flat = read_split("folder", tmp_path / "flat")
    assert flat.classes == [] and flat.videos[0].label == -1 and flat.videos[0].name == "x ü"


@pytest.mark.parametrize(("change", "words"), [
    (lambda r: (r / "videos" / "a.mp4").write_bytes(b"x"), "would have one name in a store, a"),
    (lambda r: (r / "videos" / "a.avi").unlink(), "holds no video"),
])
def test_bad_folders(tmp_path, change, words):
    film(tmp_path / "videos" / "a.avi", numbered(3))
    change(tmp_path)
    with pytest.raises(BadInput, match=words):
        read_split("folder", tmp_path / "videos")


def test_bad_split_arguments(tmp_path):
    film(tmp_path / "videos" / "A" / "a.avi", numbered(3))
    for words, args in {
        "is no folder": ("folder", tmp_path / "nowhere"),
        "needs --splits": ("ucf101", tmp_path / "videos"),
        "lacks classInd.txt": ("ucf101", tmp_path / "videos", tmp_path),
        "has no folder test/": ("folder", tmp_path / "videos", None, 1, "test"),
    }.items():
        with pytest.raises(BadInput, match=words):
            read_split(*args)
    (tmp_path / "classInd.txt").write_text("A\n")  # number missing
    with pytest.raises(BadInput, match="not in ucf101's published format"):
        read_split("ucf101", tmp_path / "videos", tmp_path)


# --- decoding --------------------------------------------------------------------------------------------------------
def test_decode_counts_what_decodes(real_clips):
    rows = [r for r in csv.DictReader(open(real_clips / "manifest.csv"))
            if r["set"] in ("ucf101", "hmdb51", "kinetics400")]
    assert len(rows) == 12
    for r in rows:
        path, = (real_clips / r["set"] / "videos").rglob(r["clip"])
        frames = list(decode(path))
        assert len(frames) == int(r["frames_decoded"])
        assert frames[0].shape == (int(r["height"]), int(r["width"]), 3)


@pytest.mark.parametrize(("content", "words"), [(b"", "is empty"), (b"hello, I am text", "holds no frame"),
                                                (None, "doesn't exist")])
def test_decode_names_the_bad_file(tmp_path, content, words, capfd):
    path = tmp_path / "bad ü.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=f"bad ü.mp4 {words}"):
        list(decode(path))
    assert capfd.readouterr().err == ""  # our message alone, no codec's chatter


# --- clips -----------------------------------------------------------------------------------------------------------


def test_clips_hold_consecutive_frames_of_both_views(store):
    videos, flows = store(30)
    clips = data.TrainClips(videos, flows, frames=8, short_frames=4, size=16)
    item = clips[(0, 0)]
    assert item["long"]["rgb"].shape == (2, 8, 16, 16, 3) and item["short"]["flow"].shape == (4, 4, 16, 16, 2)
    starts = set()
    for kind in ("long", "short"):
        for rgb, flow in zip(item[kind]["rgb"], item[kind]["flow"], strict=True):
            numbers = values(rgb)
            assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and numbers[-1] <= 28
            assert [int(f) - 128 for f in flow[..., 0].float().mean((1, 2)).round()] == numbers  # u
            assert [128 - int(f) for f in flow[..., 1].float().mean((1, 2)).round()] == numbers  # v
            starts.add(numbers[0])
    assert len(starts) > 2


def test_every_start_occurs_first_and_last_too(store):
    videos, flows = store(12)  # 11 usable frames
    clips = data.TrainClips(videos, flows, frames=8, n_short=0, size=8, stride=1)
    starts = {values(c)[0] for e in range(20) for c in clips[(e, 0)]["long"]["rgb"]}
    assert starts == {0, 1, 2, 3}


def test_short_videos_start_again(store):
    videos, flows = store(6)  # 5 usable frames
    item = data.TrainClips(videos, flows, frames=8, n_short=0, size=8)[(0, 0)]
    assert values(item["long"]["rgb"][0]) == [0, 1, 2, 3, 4, 0, 1, 2]
    item = data.TrainClips(videos, flows, frames=4, n_short=0, size=8, stride=3)[(0, 0)]
    assert values(item["long"]["rgb"][0]) == [0, 3, 1, 4]


def test_a_clip_follows_from_seed_epoch_and_index_alone(store):
    videos, flows = store(30)
    make = lambda seed=0, **k: data.TrainClips(videos * 3, flows, frames=4, size=8, seed=seed, **k)  # noqa: E731
    a, b = make()[(2, 1)], make(cache=True)[(2, 1)]
    assert all(torch.equal(a[k][v], b[k][v]) for k in ("long", "short") for v in ("rgb", "flow", "params"))
    others = [make()[(3, 1)], make()[(2, 2)], make(seed=1)[(2, 1)]]
    assert all(not torch.equal(a["long"]["params"], o["long"]["params"]) for o in others)


def test_unreadable_video_is_replaced_and_named(store, tmp_path):
    videos, flows = store(10, "good")
    store(10, "bad")
    (tmp_path / "videos" / "bad.avi").write_bytes(b"")
    videos = read_split("folder", tmp_path / "videos").videos
    clips = data.TrainClips(videos, flows, frames=4, n_short=0, size=8)
    assert clips[(0, 1)]["fault"] == ""
    item = clips[(0, 0)]
    assert "bad.avi is empty" in item["fault"] and item["index"] == 1 and item["long"]["rgb"].any()
    with pytest.raises(BadInput, match="100 videos in a row"):
        data.TrainClips(videos[:1], flows, frames=4, n_short=0, size=8)[(0, 0)]


def test_changed_video_is_noticed(store, tmp_path):
    videos, flows = store(20)
    film(tmp_path / "videos" / "a.avi", numbered(7))
    with pytest.raises(BadInput, match="fewer frames than its flow"):
        list(read_frames(videos[0], flows.open("a"), range(19)))


def test_goca_views_are_3_places_by_10_times(store):
    videos, flows = store(50, h=24, w=40)
    item = data.TestClips(videos, flows, frames=8, size=12)[0]
    assert item["rgb"].shape == (30, 8, 12, 12, 3) and item["weight"].tolist() == pytest.approx([1 / 30] * 30)
    starts = sorted({values(c)[0] for c in item["rgb"]})
    assert starts == [round(t) for t in np.linspace(0, 49 - 8, 10)]


def test_coclr_windows_every_15_frames(store):
    videos, flows = store(50, h=24, w=40)
    clips = data.TestClips(videos, flows, protocol="coclr", frames=8, size=12)
    assert [values(c)[0] for c in clips[0]["rgb"]] == [0, 15, 30]
    assert clips.starts(3) == [0]


def test_coinciding_views_come_once_with_their_weight(store):
    videos, flows = store(10, h=24, w=24)  # square, 9 usable frames, clips of 8: starts 0 and 1
    item = data.TestClips(videos, flows, frames=8, size=12)[0]
    assert len(item["rgb"]) == 2 and item["weight"].sum() == pytest.approx(1)
    assert item["weight"].tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(("scale", "size"), [(1, 45), (2, 45), (1.5, 45), (1.31, 40), (3, 20)])
def test_one_box_cuts_the_same_place_at_any_resolution(scale, size):
    def picture(scale):
        h, w = round(60 * scale), round(80 * scale)
        y, x = np.mgrid[:h, :w] + 0.5
        return np.uint8(np.rint(y / h * 250)), np.uint8(np.rint(x / w * 250))  # how far down and right, at any scale

    box = Box(0.77, 0.6, 0.3)  # 46 px of 60, from x = 20.4 -> 20, y = 4.2 -> 4
    for frame, plane, start, length in zip(picture(1), picture(scale), (4, 20), (60, 80), strict=True):
        ours, alike = cut(frame, box, size), cut_same_region(plane, box, size, 60, 80)
        # half a pixel of the clip in levels, and half a level of rounding in each
        assert np.abs(ours.astype(int) - alike).max() <= 0.5 * 46 / size / length * 250 + 1
        middle = (start + 46 * (size // 2 + 0.5) / size) / length * 250
        assert alike[size // 2, size // 2] == pytest.approx(middle, abs=2)


# --- batches ---------------------------------------------------------------------------------------------------------
def test_processes_share_one_permutation():
    one = list(EpochBatches(23, 6, 3, seed=5))
    shares = [list(EpochBatches(23, 2, 3, seed=5, rank=r, world=3)) for r in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*shares, strict=True)] == one
    first, second = ([i for batch in one[at:at + 3] for _, i in batch] for at in (0, 3))  # two epochs
    assert len(one) == 9 and len(set(first)) == 18 and first != second


def test_batches_continue_anywhere():
    whole = list(EpochBatches(23, 6, 3, seed=5))
    for start in range(len(whole)):
        rest = EpochBatches(23, 6, 3, seed=5, start=start)
        assert list(rest) == whole[start:] and len(rest) == len(whole) - start


def test_batch_larger_than_the_data_set_is_refused():
    with pytest.raises(BadInput, match=r"--batch-size 8 x 3 process\(es\) is more than the 23 videos.*choose 7"):
        EpochBatches(23, 8, 1, world=3)


# --- augmentation ----------------------------------------------------------------------------------------------------


def test_neutral_parameters_change_nothing():
    batch = batch_of([NEUTRAL])
    out, = data.augment(batch, "cpu")
    torch.testing.assert_close(out["rgb"], data.normalise_rgb(batch["long"]["rgb"].float() / 255), atol=1e-5, rtol=0)
    assert torch.equal(out["flow"], data.normalise_flow(batch["long"]["flow"]))
    assert out["rgb"].shape == (1, 1, 3, 3, 16, 16) and out["flow"].shape == (1, 1, 2, 3, 16, 16)


def test_flip_mirrors_both_views_and_negates_u():
    batch = batch_of([[1.0, *NEUTRAL[1:]], NEUTRAL])
    out, = data.augment(batch, "cpu")
    plain = data.normalise_flow(batch["long"]["flow"])
    assert torch.equal(out["flow"][0, 0, 0], -plain[0, 0, 0].flip(-1))  # u
    assert torch.equal(out["flow"][0, 0, 1], plain[0, 0, 1].flip(-1))  # v
    assert torch.equal(out["flow"][0, 1], plain[0, 1])
    rgb = data.normalise_rgb(batch["long"]["rgb"].float() / 255)
    torch.testing.assert_close(out["rgb"][0, 0], rgb[0, 0].flip(-1), atol=1e-5, rtol=0)


def test_a_moving_square_keeps_its_flow_under_the_flip():
    # the square moves right by 2 px a frame; after the flip it moves left, and u must say so
    rgb, flow = torch.zeros(1, 1, 4, 16, 16, 3, dtype=torch.uint8), torch.full((1, 1, 4, 16, 16, 2), 128,
                                                                               dtype=torch.uint8)
    for t in range(4):
        rgb[0, 0, t, 6:9, 2 + 2 * t:5 + 2 * t] = 255
        flow[0, 0, t, 6:9, 2 + 2 * t:5 + 2 * t, 0] = 141  # 13 steps of 20/127 px = 2.05 px
    out, = data.augment({"long": {"rgb": rgb, "flow": flow, "params": torch.tensor([[[1.0, *NEUTRAL[1:]]]])}}, "cpu")
    at = [(out["rgb"][0, 0, 0, t] > 0).nonzero()[:, 1].float().mean().item() for t in range(4)]
    assert np.diff(at) == pytest.approx([-2, -2, -2])
    moving = out["flow"][0, 0, 0] != 0
    assert torch.equal(moving, out["rgb"][0, 0, 0] > 0) and (out["flow"][0, 0, 0][moving] * 20 < -2).all()


def test_colour_never_touches_flow():
    wild = [0.0, 1.4, 0.6, 0.0, 0.1, 2.0]
    batch = batch_of([wild])
    out, = data.augment(batch, "cpu")
    assert torch.equal(out["flow"], data.normalise_flow(batch["long"]["flow"]))
    assert not torch.allclose(out["rgb"], data.normalise_rgb(batch["long"]["rgb"].float() / 255), atol=0.1)


def test_colour_operations_one_by_one():
    x = torch.rand(1, 2, 8, 8, 3, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    at = lambda **k: torch.tensor([[0.0, k.get("b", 1), k.get("c", 1), k.get("s", 1), k.get("h", 0),  # noqa: E731
                                    k.get("sigma", 0)]])

    def colour(x, params):
        return data.colour(x.movedim(-1, 1), params).movedim(1, -1)

    torch.testing.assert_close(colour(x, at(b=1.2)), x * 1.2)
    grey = colour(x, at(s=0.0))
    torch.testing.assert_close(grey, (x @ torch.tensor(data.GREY))[..., None].expand_as(x), atol=1e-6, rtol=1e-5)
    mean = (x @ torch.tensor(data.GREY)).mean()
    torch.testing.assert_close(colour(x, at(c=0.7)), 0.7 * x + 0.3 * mean)
    luma = colour(x, at(h=0.05)) @ torch.tensor(data.GREY)  # hue turns colour, not brightness
    torch.testing.assert_close(luma, x @ torch.tensor(data.GREY), atol=2e-3, rtol=0)
    blurred = colour(x, at(sigma=1.3))
    expected = cv2.GaussianBlur(x[0, 1].numpy(), (13, 13), 1.3, borderType=cv2.BORDER_REFLECT_101)
    np.testing.assert_allclose(blurred[0, 1], expected, atol=1e-5)


def test_drawn_parameters_have_the_documented_ranges_and_rates(store):
    videos, flows = store(10)
    clips = data.TrainClips(videos, flows, frames=2, short_frames=2, size=4)
    p = torch.cat([clips[(e, 0)][k]["params"] for e in range(150) for k in ("long", "short")]).numpy()  # 900 draws
    for column, low, high in ((1, 0.6, 1.4), (2, 0.6, 1.4), (4, -0.1, 0.1), (5, 0, 2)):
        assert low <= p[:, column].min() and p[:, column].max() <= high
    error = 4 * 0.5 / np.sqrt(len(p))
    assert abs((p[:, 0] == 1).mean() - 0.5) < error and abs((p[:, 5] > 0).mean() - 0.5) < error
    assert abs((p[:, 3] == 0).mean() - 0.2) < error and abs((p[:, 1] != 1).mean() - 0.8) < error


@pytest.mark.parametrize("device", ["cpu", "torch"])
def test_still_jitter_takes_a_share_of_what_stands_still_off_rgb_alone(store, monkeypatch, device):
    if device == "torch":  # what a GPU runs
        monkeypatch.setattr(data, "_augment_in_8_bits", data._augment_in_torch)
    rgb = torch.randint(256, (1, 3, 4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    flow = torch.randint(256, (1, 3, 4, 8, 8, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    shares = (0.0, 0.4, 1.0)
    plain, = data.augment({"long": {"rgb": rgb, "flow": flow, "params": torch.tensor([[NEUTRAL] * 3])}}, "cpu")
    out, = data.augment({"long": {"rgb": rgb, "flow": flow, "params": torch.tensor([[[*NEUTRAL, a] for a in shares]])}},
                        "cpu")
    assert torch.equal(out["flow"], plain["flow"]) and torch.equal(out["rgb"][0, 0], plain["rgb"][0, 0])
    x, y = plain["rgb"][0].double(), out["rgb"][0].double()  # [v, 3, T, S, S]
    still = x.mean(2)
    for k, a in enumerate(shares):  # what moves is left, of what stands still 1 - a, and each channel's mean
        torch.testing.assert_close(y[k] - y[k].mean(1, keepdim=True), x[k] - x[k].mean(1, keepdim=True),
                                   atol=1e-5, rtol=0)
        mean = still[k].mean((1, 2), keepdim=True)
        torch.testing.assert_close(y[k].mean(1) - mean, (1 - a) * (still[k] - mean), atol=1e-5, rtol=0)


def test_still_jitter_is_drawn_and_changes_no_other_number(store):
    videos, flows = store(10)
    plain, jittered = (data.TrainClips(videos, flows, frames=2, short_frames=2, size=4, still_jitter=j)
                       for j in (0.0, 1.5))
    assert plain[0, 0]["long"]["params"].shape == (2, 6)
    p = torch.cat([jittered[e, 0][k]["params"] for e in range(60) for k in ("long", "short")])[:, 6]
    assert abs((p == 1).float().mean() - 1 / 3) < 0.1 and p.min() >= 0 and p.max() == 1
    assert torch.equal(plain[3, 0]["long"]["params"][0], jittered[3, 0]["long"]["params"][0, :6])


# --- clips of RGB alone ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("declared", [None, 3, 12, 90, 0])
@pytest.mark.parametrize("protocol", ["goca", "fast", "coclr"])
def test_rgb_without_flow_has_the_clips_that_it_has_beside_flow(tiny, monkeypatch, protocol, declared):
    """Whatever the container declares."""
    videos = [Video(str(p), str(p.relative_to(tiny.videos).with_suffix("")), 0) for p in tiny.videos.rglob("*g01*.avi")]
    how = {"protocol": protocol, "frames": 4, "size": 16}
    both = data.TestClips(videos, FlowStore(tiny.flow), **how)
    alone = data.TestClips(videos, None, views=("rgb",), **how)
    if declared is not None:
        monkeypatch.setattr(data, "declared_frames", lambda path: declared)
    for i in (0, 1):
        assert torch.equal(both[i]["rgb"], alone[i]["rgb"]) and torch.equal(both[i]["weight"], alone[i]["weight"])
        assert "flow" not in alone[i] and len(alone[i]["rgb"]) > (protocol != "coclr")


def test_pieces_are_cut_from_their_frames_in_one_pass(tmp_path, monkeypatch):
    frames = [np.full((24, 32, 3), 5 * t, np.uint8) for t in range(40)]
    path, opened = str(film(tmp_path / "f.avi", frames, fps=10)), []
    monkeypatch.setattr(data, "FilmReader", lambda path, *more: opened.append(path) or FilmReader(path))
    pieces = [Video(path, "f", -1, first, 10) for first in (0, 10, 20, 30, 40)]
    clips = data.TestClips(pieces, None, views=("rgb",), protocol="fast", frames=4, size=8)
    for first, item in zip((0, 10, 20, 30), map(clips.__getitem__, range(4)), strict=True):
        seen = {round(t.float().mean().item() / 5) for clip in item["rgb"] for t in clip}
        assert {first, first + 8} <= seen <= set(range(first, first + 9))  # the last frame has no flow
    assert len(opened) == 1
    assert "ends at frame 40" in clips[4]["fault"]
