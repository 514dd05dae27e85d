"""The files between the stages: written whole or not at all, read without executing anything, damage is named."""

import json
import re
import resource
import signal
import subprocess

import cv2
import numpy as np
import pytest
import torch
from helpers.damage import mutate

from support.avi import AviReader, AviWriter, write_avi
from support.checkpoints import load_checkpoint, save_checkpoint
from support.errors import BadInput
from support.files import atomic, load_arrays, save_arrays
from support.stores import FlowStore, RgbStore, dequantise, quantise, rgb_settings, shrink
from support.videos import decode


# --- files between stages --------------------------------------------------------------------------------------------
def test_arrays_go_and_come_back(tmp_path):
    save_arrays(tmp_path / "x.npz", "features", {"seed": 1}, a=np.arange(3))
    header, arrays = load_arrays(tmp_path / "x.npz", "features", "cmd")
    assert header == {"kind": "features", "version": 1, "seed": 1} and arrays["a"].tolist() == [0, 1, 2]
    for words, kind in (("holds features version 1, but prototypes", "prototypes"),):
        with pytest.raises(BadInput, match=words):
            load_arrays(tmp_path / "x.npz", kind, "cmd")
    with pytest.raises(BadInput, match="make it with: cmd"):
        load_arrays(tmp_path / "absent.npz", "features", "cmd")
    (tmp_path / "x.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:100])
    with pytest.raises(BadInput, match="damaged"):
        load_arrays(tmp_path / "x.npz", "features", "cmd")


class Malicious:
    def __reduce__(self):
        return (print, ("executed!",))


def test_nothing_loaded_is_executed(tmp_path, capsys):
    np.savez(open(tmp_path / "x.npz", "wb"), header=np.array(Malicious(), dtype=object))
    (tmp_path / "text").write_text("no arrays")
    for name in ("x.npz", "text"):  # and NumPy's advice to do so is not handed on
        with pytest.raises(BadInput, match="damaged or no features file") as told:
            load_arrays(tmp_path / name, "features", "cmd")
        assert "pickle" not in str(told.value)
    torch.save({"kind": "checkpoint", "version": 1, "x": Malicious()}, tmp_path / "checkpoint.pt")
    with pytest.raises(BadInput, match="damaged or no checkpoint"):
        load_checkpoint(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_failing_to_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic(path) as tmp:
        tmp.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    with atomic(path) as tmp:
        tmp.write_text("new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("size", [(31, 17), (64, 48), (2, 2)])
def test_avi_gives_any_frame_exactly_once(tmp_path, size):
    g = np.random.default_rng(0)
    planes = [cv2.GaussianBlur(g.integers(0, 256, size, dtype=np.uint8), (0, 0), 3) for _ in range(9)]
    write_avi(tmp_path / "x.avi", planes, {"note": "é"})
    reader = AviReader(tmp_path / "x.avi")
    assert len(reader) == 9 and reader.header == {"note": "é", "frames": 9, "crc32": reader.header["crc32"]}
    for t, plane in zip((7, 0, 7), reader.read([7, 0, 7]), strict=True):
        assert plane.shape == size and np.abs(plane.astype(int) - planes[t]).mean() < 2
    played = list(decode(tmp_path / "x.avi"))  # a person can play it
    assert len(played) == 9 and played[0].shape[:2] == size


def test_zero_flow_is_exact_and_the_bound_holds():
    flow = np.array([[0.0, 0.0], [25.0, -25.0], [1.0, -1.0]], np.float32)
    stored = quantise(flow)
    assert stored[0].tolist() == [128, 128] and stored[1].tolist() == [255, 1]
    assert dequantise(stored)[1].tolist() == [20.0, -20.0]
    assert np.abs(dequantise(stored)[2] - flow[2]).max() <= 20 / 127 / 2 + 1e-6
    assert (256 - stored[1:].astype(int)).tolist() == quantise(-flow[1:]).tolist()


def test_damaged_flow_is_named(tmp_path):
    path = tmp_path / "x.avi"
    write_avi(path, [np.zeros((8, 8), np.uint8)] * 5, {})
    whole = path.read_bytes()
    for cut in (0, 10, 200, len(whole) - 20):
        path.write_bytes(whole[:cut])
        with pytest.raises(BadInput, match=r"x\.avi is damaged"):
            AviReader(path)
    body = bytearray(whole)
    at = whole.index(b"\xff\xd8")
    body[at:at + 40] = b"\0" * 40
    path.write_bytes(body)
    with pytest.raises(BadInput, match=r"x\.avi is damaged at frame 0"):
        AviReader(path).read([0])


# --- the store of RGB ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [(31, 17), (64, 48)])
def test_avi_of_colours_gives_any_frame_in_bgr(tmp_path, size):
    g = np.random.default_rng(0)
    planes = [cv2.GaussianBlur(g.integers(0, 256, (*size, 3), dtype=np.uint8), (0, 0), 5) for _ in range(5)]
    write_avi(tmp_path / "x.avi", iter(planes), {"source_frames": 5}, quality=95)
    reader = AviReader(tmp_path / "x.avi")
    assert len(reader) == 5 and reader.header == {"source_frames": 5, "frames": 5, "colour": True,
                                                  "crc32": reader.header["crc32"]}
    for t, frame in zip((4, 0, 4), reader.read([4, 0, 4]), strict=True):
        assert frame.shape == (*size, 3) and np.abs(frame.astype(int) - planes[t]).mean() < 3
    played = list(decode(tmp_path / "x.avi"))
    assert len(played) == 5 and played[0].shape == (*size, 3)


def test_one_pass_fills_a_store_of_flow_and_one_of_rgb(tmp_path):
    frames = [np.full((24, 32, 3), (0, 5 * t, 250), np.uint8) for t in range(6)]
    flow, rgb = AviWriter(), AviWriter(quality=90)
    for t, frame in enumerate(frames):
        assert rgb.add(shrink(frame, 12)) > 100  # bytes
        if t:
            flow.add(np.full((48, 32), 128 + t, np.uint8))
    flow.write(tmp_path / "flow" / "a.avi", {})
    rgb.write(tmp_path / "rgb" / "a.avi", {})
    (tmp_path / "rgb" / "header.json").write_text(json.dumps({"kind": "rgb", "version": 1, **rgb_settings(12)}))
    store = RgbStore(tmp_path / "rgb")
    assert store.header["short_side"] == 12 and store.header["quality"] == 90 and "a" in store and "b" not in store
    stored = store.open("a").read([3])[0]
    assert stored.shape == (12, 16, 3) and np.abs(stored[5, 5].astype(int) - (0, 15, 250)).max() <= 3  # blue is first
    with pytest.raises(BadInput, match="would hold no frame"):
        write_avi(tmp_path / "none.avi", [], {})
    assert not (tmp_path / "none.avi").exists()


def test_shrink_never_enlarges_and_keeps_the_shape():
    frame = np.zeros((240, 320, 3), np.uint8)
    assert shrink(frame, 190).shape == (190, 253, 3) and shrink(frame.transpose(1, 0, 2), 190).shape[1] == 190
    assert shrink(frame, 240) is frame and shrink(frame, 256) is frame


@pytest.mark.parametrize(("kind", "cls", "flags"), [("flow", FlowStore, "--out {}"),
                                                    ("rgb", RgbStore, "--out FLOW --rgb {}")])
def test_a_store_that_is_none_says_the_command_that_makes_it(tmp_path, kind, cls, flags):
    root = tmp_path / kind
    command = re.escape("python flow.py --videos DIR " + flags.format(root))
    other = {"flow": "rgb", "rgb": "flow"}[kind]
    with pytest.raises(BadInput, match=f"{root} is no {kind} store .*{command}"):
        cls(root)
    for text, words in (("{", "header.json is damaged"), ("[1]", f"holds 0 version 0, but {kind} version 1"),
                        (json.dumps({"kind": other, "version": 1}), f"holds {other} version 1, but {kind} version 1"),
                        (json.dumps({"kind": kind, "version": 2}), f"holds {kind} version 2, but {kind} version 1")):
        root.mkdir(exist_ok=True)
        (root / "header.json").write_text(text)
        with pytest.raises(BadInput, match=f"{words}.*{command}"):
            cls(root)
    (root / "header.json").write_text(json.dumps({"kind": kind, "version": 1}))
    with pytest.raises(BadInput, match=f"{root} has no {kind} of x; .*{command}"):
        cls(root).open("x")
    (root / "x.avi").write_bytes(b"RIFF")
    with pytest.raises(BadInput, match=f"{root}/x.avi is damaged .*{command}"):
        cls(root).open("x")


def test_a_frame_of_another_size_is_damage(tmp_path):
    """A changed size in one JPEG must not reach the loader, which cuts flow in halves."""
    write_avi(tmp_path / "x.avi", [np.zeros((16, 8), np.uint8)] * 2, {})
    body = bytearray((tmp_path / "x.avi").read_bytes())
    at = body.index(b"\xff\xc0") + 5  # height and width of the first frame
    body[at:at + 2] = b"\x00\x0f"
    (tmp_path / "x.avi").write_bytes(body)
    reader = AviReader(tmp_path / "x.avi")
    assert reader.read([1])[0].shape == (16, 8)
    with pytest.raises(BadInput, match=r"x\.avi is damaged at frame 0"):
        reader.read([0])


@pytest.mark.parametrize("shape", [(48, 32), (24, 32, 3)])
def test_three_hundred_mutated_files_are_damage_or_frames(tmp_path, shape):
    """Nothing but BadInput comes out of a damaged file, and no frame of another shape."""
    g = np.random.default_rng(0)
    write_avi(tmp_path / "x.avi", g.integers(0, 256, (4, *shape), np.uint8), {"source": "x"})
    whole, read, damaged = (tmp_path / "x.avi").read_bytes(), 0, 0
    for _ in range(300):
        (tmp_path / "x.avi").write_bytes(mutate(whole, g))
        try:
            frames = AviReader(tmp_path / "x.avi").read(range(4))
            assert [f.shape for f in frames] == [shape] * 4
            read += 1
        except BadInput as e:
            assert str(tmp_path / "x.avi") in str(e) and "\n" not in str(e)
            damaged += 1
    assert read + damaged == 300 and read > 20 and damaged > 100


# --- outputs that can't be written -----------------------------------------------------------------------------------
WRITERS = {
    "x.npz": lambda path, seed: save_arrays(path, "features", {}, x=np.random.default_rng(seed).random(99_999)),
    "x.pt": lambda path, seed: save_checkpoint(path, {"x": torch.full((99_999,), seed), "step": seed}),
    "x.avi": lambda path, seed: write_avi(path, noise(seed), {"seed": seed}),
    "x.txt": lambda path, seed: write_text(path, f"{seed}" * 700_000),
}


def noise(seed):
    return np.random.default_rng(seed).integers(0, 256, (9, 300, 300), np.uint8)


def write_text(path, text):
    with atomic(path) as tmp:
        tmp.write_text(text)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 1 MB in memory, or a skip where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("no file system may be mounted here")
    yield place
    subprocess.run(["umount", place], check=True)


def refused(name, place, words):
    """The writer gives one message, and leaves what was there."""
    path = place / name
    before = path.read_bytes()
    with pytest.raises(BadInput, match=words) as e:
        WRITERS[name](path, 2)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert path.read_bytes() == before and [p.name for p in place.iterdir()] == [name]


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_an_error_message_and_what_was_there_stays(tiny_disk, name):
    WRITERS[name](tiny_disk / name, 1)  # 400 to 800 kB, of which two do not fit
    refused(name, tiny_disk, "could not be written .No space left on device.; what stood there before is untouched")


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_folder_is_a_sentence_and_what_was_there_stays(tiny_disk, name):
    WRITERS[name](tiny_disk / name, 1)
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    refused(name, tiny_disk, "can't be written .Read-only file system.; choose a folder that can")


@pytest.mark.parametrize("name", WRITERS)
def test_a_quota_is_a_sentence_and_what_was_there_stays(tmp_path, name):
    """As a full disk, where none may be mounted: the system refuses files beyond 100 kB."""
    WRITERS[name](tmp_path / name, 1)
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        refused(name, tmp_path, "could not be written .File too large.; what stood there before is untouched")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
