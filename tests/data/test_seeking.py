"""Frames that are reached by seeking are those of the pass from the start, byte for byte."""

import io
import os

import av
import cv2
import numpy as np
import pytest
from helpers.containers import cut_by_copy, encode

from support import seeking
from support.videos import FilmReader, decode, frames_at


def pictures(n, h=48, w=64):
    """n different frames: a coloured texture that moves, and flickers."""
    rng = np.random.default_rng(0)
    big = cv2.GaussianBlur(rng.integers(0, 256, (h + 2 * n, w + 2 * n, 3)).astype(np.uint8), (0, 0), 3)
    big = cv2.normalize(big, None, 0, 255, cv2.NORM_MINMAX)
    return [cv2.convertScaleAbs(big[t:t + h, 2 * t:2 * t + w], alpha=0.6 + 0.4 * (t % 7) / 7) for t in range(n)]


@pytest.fixture
def jumps(monkeypatch):
    """Seek wherever there is a key frame between; the frames at which decoding began are kept."""
    begun, start = [], seeking.SeekingDecoder.start

    def watch(self, behind, number):
        begun.append(start(self, behind, number))
        return begun[-1]

    monkeypatch.setattr(seeking, "FAR", 0)
    monkeypatch.setattr(seeking.SeekingDecoder, "start", watch)
    return begun


def check(path, wanted, jumps, frames=None):
    """The frames `wanted` against the pass from the start -> at which frames decoding began."""
    jumps.clear()
    every = list(decode(path))
    found = dict(frames_at(path, wanted, frames=frames))
    assert list(found) == [t for t in wanted if t < len(every)]
    for t, frame in found.items():
        assert np.array_equal(frame, every[t]), t
    return [number for number in jumps if number is not None]


WANTED = [35, 36, 37, 70, 118, 119]
BT709 = {"colorspace": "bt709", "x264-params": "colormatrix=bt709:scenecut=0"}
FORMS = {"mp4": ("mp4", "libx264", {}), "b frames": ("mp4", "libx264", {"b_frames": 3}),
         "matroska": ("matroska", "libx264", {"b_frames": 3}),
         "transport stream": ("mpegts", "libx264", {"b_frames": 3}),
         "hevc": ("mp4", "libx265", {"options": {"x265-params": "open-gop=0:scenecut=0:log-level=none"}}),
         "av1": ("mp4", "libsvtav1", {"options": {"preset": "12"}}),
         "vp9": ("webm", "libvpx-vp9", {}), "vp8": ("webm", "libvpx", {}),
         "444": ("mp4", "libx264", {"pixels": "yuv444p"}), "422": ("mp4", "libx264", {"pixels": "yuv422p"}),
         "full range": ("mp4", "libx264", {"pixels": "yuvj420p"}),
         "bt709": ("mp4", "libx264", {"options": BT709})}


@pytest.mark.parametrize("form", FORMS)
def test_frames_of_every_codec_and_container(tmp_path, jumps, form):
    before, (container, codec, how) = os.sched_getscheduler(0), FORMS[form]
    path = tmp_path / "v.mkv"
    path.write_bytes(encode(pictures(120), container, codec, gop=15, **how))
    assert check(path, WANTED, jumps) == [30, 60, 105]
    assert check(path, [0, 1, 59, 60, 61], jumps, 120) == [45]
    assert os.sched_getscheduler(0) == before


@pytest.mark.parametrize(("codec", "options"), [
    ("libx264", {"x264-params": "open-gop=1:scenecut=0"}),
    ("libx265", {"x265-params": "open-gop=1:scenecut=0:log-level=none"}),
])
def test_key_frames_of_open_groups_are_passed_by(tmp_path, jumps, codec, options):
    """Frames after them may refer to what was before."""
    path = tmp_path / "v.mp4"
    path.write_bytes(encode(pictures(120), "mp4", codec, gop=15, b_frames=3, options=options))
    assert len(seeking.key_frames(str(path), ()).at) == 8
    assert check(path, WANTED, jumps) == []


def test_frames_before_the_cut_of_a_stream_copy_do_not_count(tmp_path, jumps):
    source = tmp_path / "source.mp4"
    source.write_bytes(encode(pictures(120), "mp4", gop=15, b_frames=3))
    path = cut_by_copy(source, tmp_path / "cut.mp4", 22)
    assert seeking.key_frames(str(path), ()).frames == 98
    assert check(path, [0, 20, 21, 70, 97, 98], jumps, 98) == [8, 68, 83]
    for t, picture in frames_at(path, [68]):
        assert np.array_equal(picture, list(decode(source))[90]) and t == 68


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turned_films_are_turned_as_before(tmp_path, jumps, degrees):
    path = tmp_path / "v.mp4"
    content = bytearray(encode(pictures(60), "mp4", gop=15))
    at = content.index(b"tkhd") + 4 + 40  # the matrix of its track: a, b, u, c, d, v as 32 bits
    turned = {90: (0, 1, 0, -1, 0, 0), 180: (-1, 0, 0, 0, -1, 0), 270: (0, -1, 0, 1, 0, 0)}[degrees]
    content[at:at + 24] = b"".join((x << 16).to_bytes(4, "big", signed=True) for x in turned)
    path.write_bytes(content)
    assert next(decode(path)).shape == ((48, 64, 3) if degrees == 180 else (64, 48, 3))
    assert check(path, [40, 50], jumps) == [30, 45]


def damaged_packet(content, number):
    """A file of Matroska whose packet `number` is overwritten."""
    with av.open(io.BytesIO(content)) as container:
        packets = [bytes(p) for p in container.demux(video=0) if p.size]
    at = content.index(packets[number])
    return content[:at + 4] + bytes(len(packets[number]) - 4) + content[at + len(packets[number]):]


def test_a_damaged_place_ends_a_film_as_in_a_pass_from_the_start(tmp_path, jumps):
    """Where it is known how many frames that gives there is no seeking, as the packets are more."""
    path = tmp_path / "v.mkv"
    content = encode(pictures(120), "matroska", gop=15)
    path.write_bytes(content)
    whole = list(decode(path))
    path.write_bytes(damaged_packet(content, 65))
    assert len(list(decode(path))) == 65 and seeking.key_frames(str(path), ()).frames == 120
    assert check(path, [50, 62, 66, 80], jumps, 65) == []
    assert [t for t, _ in frames_at(path, [50, 62, 66, 80])] == [50, 62] and jumps[-3:] == [45, 60, None]
    assert all(np.array_equal(frame, whole[t]) for t, frame in frames_at(path, [50, 80, 119]))


def test_colours_that_pyav_makes_otherwise_are_left_to_opencv(tmp_path, jumps):
    path = tmp_path / "v.mp4"
    path.write_bytes(encode(pictures(40), "mp4", gop=15, pixels="yuv420p10le"))
    assert check(path, [35, 36], jumps) == []


def test_a_file_that_ends_early(tmp_path, jumps):
    content = encode(pictures(120), "matroska", gop=15)
    path = tmp_path / "v.mkv"
    path.write_bytes(content[:len(content) // 2])
    reader = FilmReader(str(path))
    count = len(list(decode(path)))
    assert 40 < count < 90
    assert [t for t, _ in reader.frames_at([2, 35, 100])] == [2, 35] and reader.position in (count, count - 1)


def test_frames_at_a_rate(tmp_path, jumps):
    path = tmp_path / "v.mp4"
    path.write_bytes(encode(pictures(120), "mp4", gop=15, b_frames=3))
    every = list(decode(path, fps=10))
    jumps.clear()
    for t, frame in frames_at(path, [20, 21, 40], fps=10):
        assert np.array_equal(frame, every[t])
    assert [number for number in jumps if number is not None] == [45, 90]


def test_short_ways_are_not_sought(tmp_path, monkeypatch):
    path = tmp_path / "v.mp4"
    path.write_bytes(encode(pictures(120), "mp4", gop=15))
    monkeypatch.setattr(seeking, "SeekingDecoder", lambda *args: pytest.fail("opened for seeking"))
    assert [t for t, _ in frames_at(path, [seeking.FAR, seeking.FAR + 10])] == [seeking.FAR, seeking.FAR + 10]


def test_the_index_of_a_film_is_that_of_its_file(tmp_path, jumps):
    path = tmp_path / "v.mp4"
    path.write_bytes(encode(pictures(60), "mp4", gop=15))
    assert check(path, [50], jumps) == [45]
    path.write_bytes(encode(pictures(90), "mp4", gop=20))
    assert check(path, [50, 85], jumps) == [40, 80]


def test_all_real_clips(real_clips, jumps):
    """Weizmann's FFV1 and UCF101's and HMDB51's MPEG-4 are read in one pass, H.264 from its key frames."""
    rng, begun = np.random.default_rng(0), {}
    for folder in ("kinetics400", "ucf101", "hmdb51"):
        begun[folder] = 0
        for path in sorted((real_clips / folder / "videos").rglob("*.*")):
            n = sum(1 for _ in decode(path))
            begun[folder] += len(check(path, sorted(rng.choice(n, 5, replace=False).tolist()), jumps, n))
    assert begun["kinetics400"] >= 4 and begun["ucf101"] == begun["hmdb51"] == 0
