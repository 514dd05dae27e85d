"""What people bring: names, containers and codecs of all kinds, folders of images, cuts without encoding, films whose
size or rate varies."""

import io
import json
import os
import shutil
from collections import Counter

import av
import cv2
import numpy as np
import pytest
from helpers.clips import film, numbered, values
from helpers.containers import cut_by_copy, encode, joined
from PIL import Image

import data
from support import streams, video_index
from support.avi import write_avi
from support.datasets import read_split
from support.errors import BadInput
from support.stores import FlowStore
from support.video_index import scan
from support.videos import (
    VIDEO_SUFFIXES,
    FilmReader,
    cut_short,
    declared_frames,
    decode,
    file_stat,
    find_videos,
    frames_at,
    frames_at_rate,
)


def numbers(frames):
    """Frame numbers of `numbered` frames, from their grey; codecs of 16 to 235 levels darken them a little."""
    return [round((frame.mean() + 1.5) / 5) for frame in frames]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def images(folder, places, size=(24, 32), name="img_{:05d}.jpg"):
    """Images of grey 5 t for each t of `places`."""
    folder.mkdir(parents=True, exist_ok=True)
    for t in places:
        cv2.imwrite(str(folder / name.format(t)), np.full((*size, 3), 5 * t, np.uint8))
    return folder


# --- names -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["set:v1/a.avi", "-dash.avi", "%d.avi", "50%.avi", "a#b.avi", "a?b=c.avi", "a b.avi",
                                  "file:a.avi", "http:/a.avi", "concat:a|b.avi", "ü.avi", "-"])
def test_names_are_files_and_no_urls(tmp_path, monkeypatch, name):
    source = film(tmp_path / "source.avi", numbered(6))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, tmp_path / name)
    monkeypatch.chdir(tmp_path)  # a relative path begins with its name
    assert numbers(decode(name)) == [0, 1, 2, 3, 4, 5]
    assert [t for t, _ in frames_at(name, [1, 4])] == [1, 4]
    assert declared_frames(name) == 6 and frames_at_rate(name, 25) == list(range(6))


# --- what counts as a video ------------------------------------------------------------------------------------------
def test_more_suffixes_are_videos_and_the_rest_is_counted_and_named(tmp_path, capsys):
    film(tmp_path / "v" / "a.avi", numbered(3))
    write(tmp_path / "v" / "b.ts", encode(numbered(4), "mpegts"))
    write(tmp_path / "v" / "c.gif", encode_gif(numbered(5)))
    write(tmp_path / "v" / "d.VOB", encode(numbered(6), "vob", "mpeg2video"))
    write(tmp_path / "v" / "e.3gp", encode(numbered(7), "3gp"))
    for name in ("notes.txt", "more.txt", "list.json", ".hidden"):
        write(tmp_path / "v" / name, b"x")
    found = find_videos(tmp_path / "v")
    assert {name: len(list(decode(path))) for name, path in found.items()} == {"a": 3, "b": 4, "c": 5, "d": 6, "e": 7}
    assert found.passed_over == {".txt": 2, ".json": 1}
    (note,) = found.notes()
    assert "passed over: 3 files" in note and ".txt 2, .json 1" in note and str(tmp_path / "v") in note
    assert video_index.main(["--videos", str(tmp_path / "v"), "--index", str(tmp_path / "i.npz")]) == 0
    assert note in capsys.readouterr().out


def encode_gif(frames):
    file = io.BytesIO()
    pictures = [Image.fromarray(f[..., ::-1]) for f in frames]
    pictures[0].save(file, "gif", save_all=True, append_images=pictures[1:], duration=40)
    return file.getvalue()


def test_a_folder_without_videos_names_what_it_holds(tmp_path):
    write(tmp_path / "a.xyz", b"x")
    with pytest.raises(BadInput, match=r"holds no video .*passed over: 1 files .*\.xyz 1.*a\.xyz"):
        find_videos(tmp_path)
    assert {".ts", ".mts", ".3gp", ".gif", ".ogv", ".vob"} <= VIDEO_SUFFIXES


# --- size and cuts ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("codec", "form", "more"), [
    ("libx264", "mpegts", {}), ("mpeg2video", "mpegts", {}), ("mpeg4", "mpegts", {}), ("flv1", "flv", {}),
    ("mjpeg", "matroska", {"pixels": "yuvj420p"}), ("mjpeg", "avi", {"pixels": "yuvj420p"})])
def test_a_stream_that_changes_its_size_is_named(tmp_path, codec, form, more):
    """However frames are asked for."""
    wide, high = numbered(30, 48, 64), numbered(30, 64, 48)
    path = write(tmp_path / "joined.ts", joined([wide, high], form, codec, **more))
    for ask in (lambda: next(decode(path)), lambda: next(frames_at(path, [3])), lambda: FilmReader(path)):
        with pytest.raises(BadInput, match=r"joined\.ts changes its size from 64x48 to 48x64 after"):
            ask()
    assert len(list(decode(write(tmp_path / "same.ts", joined([wide, wide], form, codec, **more))))) == 60
    index, _ = scan(tmp_path, tmp_path / "i.npz", workers=1)
    assert index.unusable() == {"joined"} and "changes its size" in index.entries["joined"][4]


def test_a_clip_cut_by_stream_copy_is_not_cut_short(tmp_path):
    source = write(tmp_path / "source.mp4", encode(numbered(50), "mp4", gop=50))
    (tmp_path / "v").mkdir()
    path = cut_by_copy(source, tmp_path / "v" / "cut.mp4", 22)
    shown = numbers(decode(path))
    assert shown == list(range(22, 50))
    assert int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)) == 50  # what the container holds
    assert declared_frames(path) == 28 and cut_short(path, len(shown), declared_frames(path)) is None
    assert video_index.main(["--videos", str(tmp_path / "v"), "--index", str(tmp_path / "i.npz"), "--strict"]) == 0


def test_tags_in_another_encoding_are_no_fault(tmp_path):
    """Whichever PyAV reads them: before 19 they were an error unless told otherwise, since then one may not say so."""
    plain = encode(numbered(5), "matroska", title="caf~ au lait")
    assert plain.count(b"caf~") == 1
    path = write(tmp_path / "cafe.mkv", plain.replace(b"caf~", b"caf\xe9"))
    assert numbers(decode(path)) == list(range(5))
    assert streams.lenient("18.1.0") == {"metadata_errors": "replace"} and streams.lenient("19.0.2") == {}
    assert streams.lenient(av.__version__) == streams.OPEN


# --- folders of images -----------------------------------------------------------------------------------------------
def test_a_folder_of_images_is_a_video(tmp_path):
    images(tmp_path / "v" / "run" / "one", range(1, 13), name="{}.jpg")  # 10 follows 9, not 1
    images(tmp_path / "v" / "run" / "two", range(3), name="frame{:03d}.PNG")
    images(tmp_path / "v" / "mixed", range(2))
    write(tmp_path / "v" / "mixed" / "a.txt", b"x")  # not images only
    film(tmp_path / "v" / "run" / "three.avi", numbered(3))
    found = find_videos(tmp_path / "v")
    assert list(found) == ["run/one", "run/three", "run/two"]
    assert "2 folders of images count as videos" in found.notes()[0] and found.passed_over == {".jpg": 2, ".txt": 1}
    path = found["run/one"]
    assert numbers(decode(path)) == list(range(1, 13)) and declared_frames(path) == 12
    assert [(t, *numbers([f])) for t, f in frames_at(path, [0, 9, 11, 12])] == [(0, 1), (9, 10), (11, 12)]
    assert frames_at_rate(path, 5) == [0, 5, 10]
    size, _ = file_stat(path)
    assert size == sum(os.path.getsize(os.path.join(path, f)) for f in os.listdir(path))
    index, known = scan(tmp_path / "v", tmp_path / "i.npz", workers=1)
    assert {n: row[2:] for n, row in index.entries.items()} == {
        "run/one": (12, 12, ""), "run/three": (3, 3, ""), "run/two": (3, 3, "")}
    images(tmp_path / "v" / "run" / "two", [3], name="frame{:03d}.PNG")
    index, known = scan(tmp_path / "v", tmp_path / "i.npz", workers=1)
    assert known["changed"] == 1 and index.entries["run/two"][2] == 4


def test_gaps_and_steps_of_numbered_images(tmp_path):
    path = images(tmp_path / "gaps", [1, 2, 3, 5, 6, 9])
    assert "has gaps: 3 of 9 frames are missing, the first after img_00003.jpg" in cut_short(path, 6, 6)
    assert numbers(decode(path)) == [1, 2, 3, 5, 6, 9]
    assert cut_short(images(tmp_path / "steps", [0, 5, 10, 15]), 4, 4) is None


@pytest.mark.parametrize(("change", "words"), [
    (lambda d: images(d, [7], size=(32, 24)), r"img_00007\.jpg is 24x32, but .*img_00000\.jpg is 32x24"),
    (lambda d: images(d, [2], name="img_{:03d}.jpg"), "both frame 2"),
    (lambda d: images(d, [2], name="img_{:05d}.png"), "both frame 2"),
    (lambda d: images(d, [2], name="cam2_{:05d}.jpg"), "holds 2 series of images"),
    (lambda d: images(d, [2], name="cover.jpg"), r"cover\.jpg has no number"),
    (lambda d: write(d / "img_00001.jpg", b"no image"), r"img_00001\.jpg is no image"),
    (lambda d: write(d / "img_00001.jpg", b""), r"img_00001\.jpg is no image"),
])
def test_bad_folders_of_images_are_named(tmp_path, change, words):
    path = images(tmp_path / "one", range(4))
    change(path)
    with pytest.raises(BadInput, match=words):
        list(decode(path))


def test_flow_images_beside_the_frames_are_no_frames(tmp_path):
    path = images(tmp_path / "one", range(1, 5))
    for name in ("flow_x_{:05d}.jpg", "flow_y_{:05d}.jpg"):
        images(path, [1, 2, 3], name=name)
    assert numbers(decode(path)) == [1, 2, 3, 4]


def test_images_without_a_folder_of_their_own_are_refused(tmp_path):
    images(tmp_path, range(3))
    with pytest.raises(BadInput, match="holds images itself"):
        find_videos(tmp_path)


def test_a_film_and_a_folder_of_one_name_are_refused(tmp_path):
    images(tmp_path / "one", range(3))
    film(tmp_path / "one.avi", numbered(3))
    with pytest.raises(BadInput, match=r"one\.avi.* would have one name in a store, one"):
        find_videos(tmp_path)


# --- rates -----------------------------------------------------------------------------------------------------------
STAMPS = [0, 40, 80, 120, 320, 360, 600, 640, 680, 1000]  # ms: between 25 a second and 3


def on_screen(stamps, fps, duration):
    """By definition: the last frame whose time has come."""
    count = int(np.ceil((stamps[-1] + duration) * fps / 1000 - 1e-9))
    return [max(n for n, ms in enumerate(stamps) if ms <= k * 1000 / fps + 1e-6) for k in range(count)]


@pytest.mark.parametrize("fps", [25, 12.5, 5, 50])
@pytest.mark.parametrize(("form", "b_frames"), [("matroska", 0), ("mp4", 0), ("mp4", 2)])
def test_frames_of_a_variable_rate_by_their_time_stamps(tmp_path, fps, form, b_frames):
    content = encode(numbered(10), form, stamps=STAMPS, b_frames=b_frames)
    path = write(tmp_path / "v.mkv", content)
    shown = frames_at_rate(path, fps)
    expected = on_screen(STAMPS, fps, 0)
    assert shown[:len(expected)] == expected and set(shown[len(expected):]) <= {9}  # the last stays a while
    assert numbers(decode(path, fps=fps)) == shown and declared_frames(path, fps) == len(shown)
    wanted = [0, 2, 3, len(shown) - 1, len(shown) + 5]
    assert [(t, *numbers([f])) for t, f in frames_at(path, wanted, fps)] == [(t, shown[t]) for t in wanted[:-1]]


def test_a_constant_rate_gives_each_frame_once_or_as_often_as_the_rates_say(tmp_path):
    path = write(tmp_path / "v.mkv", encode(numbered(30), "matroska", rate=30))  # 33, 67, 100 ms: rounded
    assert frames_at_rate(path, 30) == list(range(30))
    assert frames_at_rate(path, 15) == list(range(0, 30, 2))
    assert frames_at_rate(path, 60) == [k // 2 for k in range(60)]
    path = film(tmp_path / "ntsc.avi", numbered(40), fps=30000 / 1001)
    assert frames_at_rate(path, 30) == sorted([*range(40), 14])  # a thousandth slower: one is shown twice


def test_joined_recordings_go_on_where_time_starts_again(tmp_path):
    one = encode(numbered(20), "mpegts")
    path = write(tmp_path / "v.ts", one + one)
    assert frames_at_rate(path, 25) == list(range(40)) and numbers(decode(path, 25)) == [*range(20), *range(20)]


def test_time_stamps_of_real_clips_are_those_of_their_frames(real_clips):
    clips = [p for s in ("ucf101", "kinetics400", "hmdb51") for p in (real_clips / s / "videos").rglob("*.*")]
    differ = Counter()
    for path in clips:
        rate = cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FPS)
        frames = sum(1 for _ in decode(path))
        differ[frames_at_rate(path, rate)[:frames] == list(range(frames))] += 1
    assert differ == {True: len(clips)} and len(clips) == 12


# --- clips of them ---------------------------------------------------------------------------------------------------
def stored(root, name, frames, about):
    """A store with the flow of one video, u = t and v = -t steps."""
    root.mkdir()
    (root / "header.json").write_text(json.dumps({"kind": "flow", "version": 1}))
    write_avi(root / f"{name}.avi", [np.concatenate([np.full((24, 32), 128 + t, np.uint8), np.full(
        (24, 32), 128 - t, np.uint8)]) for t in range(frames - 1)], about)
    return FlowStore(root)


def test_clips_of_a_folder_of_images(tmp_path):
    images(tmp_path / "v" / "run" / "one", range(12))
    store = stored(tmp_path / "flow", "run/one", 12, {})
    found = read_split("folder", tmp_path / "v")
    assert found.classes == ["run"] and found.videos[0].label == 0
    item = data.TrainClips(found.videos, store, frames=4, n_short=0, size=16)[(0, 0)]
    assert not item["fault"]
    for rgb, flow in zip(item["long"]["rgb"], item["long"]["flow"], strict=True):
        shown = values(rgb)
        assert shown == list(range(shown[0], shown[0] + 4)) and [int(f[0, 0, 0]) - 128 for f in flow] == shown


def test_clips_at_a_rate_hold_the_frames_that_were_on_the_screen(tmp_path):
    (tmp_path / "v").mkdir()
    path = write(tmp_path / "v" / "one.mkv", encode(numbered(10), "matroska", stamps=STAMPS))
    shown = frames_at_rate(path, 10)
    assert len(shown) > 10 and len(set(shown)) < len(shown)  # some frames are shown for longer
    store = stored(tmp_path / "flow", "one", len(shown), {"fps": 10})
    item = data.TrainClips(read_split("folder", tmp_path / "v").videos, store, frames=6, n_short=0, size=16)[(0, 0)]
    assert not item["fault"]
    for rgb, flow in zip(item["long"]["rgb"], item["long"]["flow"], strict=True):
        assert numbers(rgb.numpy()) == [shown[int(f[0, 0, 0]) - 128] for f in flow]
