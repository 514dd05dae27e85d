"""Moving previews: which frames, how large, when they are made again."""

import os
import shutil

import cv2
import numpy as np
import pytest

from support.avi import write_avi
from support.errors import BadInput
from support.page import Item, write_page
from support.previews import FRAMES, LIMIT, SETTINGS, encode, frame_numbers, make_previews


@pytest.mark.parametrize("first, last, fps, numbers, step", [
    (0, 8, 25, [0, 1, 2, 3, 4, 5, 6, 7], 1 / 25),  # every frame once
    (0, 16, 25, [1, 3, 5, 7, 9, 11, 13, 15], 2 / 25),
    (0, 3, 25, [0, 0, 0, 1, 2, 2, 2, 2], 1 / 25),  # fewer than eight: the ends wait
    (100, 1100, 20, [589, 592, 595, 598, 601, 604, 607, 610], 0.15),  # 1.2 s round the middle
    (0, 10**6, 10, [1194, 1196, 1197, 1199, 1200, 1202, 1203, 1205], 0.15),  # no later than two minutes
])
def test_frames_lie_round_the_middle(first, last, fps, numbers, step):
    assert frame_numbers(first, last, fps) == (numbers, pytest.approx(step))


def test_a_preview_is_small_whatever_it_shows():
    noise = np.random.default_rng(0).integers(0, 256, (FRAMES, 240, 320, 3), dtype=np.uint8)
    data, width, height = encode(list(noise))
    assert 1000 < len(data) <= LIMIT and (width, height) != (192, 144)
    plain = [np.full((240, 320, 3), 20 * k, np.uint8) for k in range(FRAMES)]
    data, width, height = encode(plain)
    assert (width, height) == (192, 144) and len(data) < LIMIT / 4
    shown = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape == (144, FRAMES * 192, 3)
    assert np.allclose(shown.reshape(144, FRAMES, 192, 3).mean((0, 2, 3)), [20 * k for k in range(FRAMES)], atol=3)


@pytest.mark.parametrize("height, width, size", [(1000, 3, (2, 192)), (40, 30, (30, 40)), (1080, 1920, (192, 108))])
def test_shapes(height, width, size):
    assert encode([np.zeros((height, width, 3), np.uint8)] * FRAMES)[1:] == size


def brightness(folder, strip):
    """Of the strip's frames, in the film's counting: frame t of `film` has brightness 5 t."""
    shown = cv2.imread(str(folder / strip.file))
    return (shown.reshape(strip.height, FRAMES, strip.width, 3).mean((0, 2, 3)) / 5).round().astype(int).tolist()


@pytest.fixture
def film(tmp_path):
    """48 frames whose brightness counts them, 24 a second."""
    path = tmp_path / "films" / "counted.avi"
    write_avi(path, np.arange(48, dtype=np.uint8)[:, None, None].repeat(32, 1).repeat(48, 2) * 5, {}, fps=24)
    return path


def test_pieces_show_their_own_frames_at_their_own_speed(film, tmp_path):
    pieces = [(str(film), 0.0, None), (str(film), 0.0, 1.0), (str(film), 1.0, 2.0), (str(film), 0.5, 0.5 + 8 / 24)]
    previews = make_previews(pieces, tmp_path / "previews")
    assert [p.problem for p in previews] == [""] * 4
    assert [p.strip.seconds for p in previews] == pytest.approx([1.2, 1.0, 1.0, 8 / 24], abs=1e-3)
    expected = [frame_numbers(*frames, 24)[0] for frames in ((0, 48), (0, 24), (24, 48), (12, 20))]
    assert expected[3] == list(range(12, 20))
    assert [brightness(tmp_path / "previews", p.strip) for p in previews] == expected


def test_fewer_frames_than_declared(film, tmp_path):
    data = film.read_bytes()
    film.write_bytes(data[:len(data) * 4 // 10])  # 19 frames of the 48 that its header declares
    whole, late = make_previews([(str(film), 0.0, None), (str(film), 1.5, 2.0)], tmp_path / "previews")
    shown = brightness(tmp_path / "previews", whole.strip)
    assert shown == sorted(shown) and shown[0] < shown[-1] < 20
    assert max(brightness(tmp_path / "previews", late.strip)) < 20


def test_kept_made_again_and_taken_away(film, tmp_path):
    folder, other = tmp_path / "previews", film.with_name("other.avi")
    shutil.copy(film, other)
    pieces = [(str(film), 0.0, None), (str(other), 0.0, None)]
    first = make_previews(pieces, folder)
    stamps = {p.strip.file: (folder / p.strip.file).stat().st_mtime_ns for p in first}
    assert make_previews(pieces, folder) == first
    assert {p.strip.file: (folder / p.strip.file).stat().st_mtime_ns for p in first} == stamps

    os.utime(other, ns=(1, 1))  # changed since
    second = make_previews(pieces, folder)
    assert second[0] == first[0] and second[1].strip.file != first[1].strip.file
    assert sorted(os.listdir(folder)) == sorted(p.strip.file for p in second)

    other.unlink()  # gone: its preview stays
    assert make_previews(pieces, folder) == [second[0], (second[1].strip, f"{other} doesn't exist")]
    assert make_previews(pieces[:1], folder) == [second[0]]
    assert os.listdir(folder) == [second[0].strip.file]


def test_what_is_no_film_is_named(film, tmp_path):
    broken = film.with_name("broken.mp4")
    broken.write_bytes(b"no film" * 100)
    listed = film.with_name("list.mp4")
    listed.write_text(f"ffconcat version 1.0\nfile {film}\n")  # would open the other film
    previews = make_previews([(str(p), 0.0, None) for p in (broken, film, listed)], tmp_path / "previews")
    assert [p.strip is None for p in previews] == [True, False, True]
    assert str(broken) in previews[0].problem and "is a list of other files" in previews[2].problem


def test_a_folder_that_can_not_be_written(film, tmp_path):
    (tmp_path / "previews").write_text("a file")
    with pytest.raises(BadInput, match="previews can't be written"):
        make_previews([(str(film), 0.0, None)], tmp_path / "previews")


def test_a_thousand_stay_below_twenty_megabytes(tmp_path):
    """The page of films with the largest previews and 1024 dimensions of every view, too."""
    x = np.random.default_rng(0).standard_normal((1000, 1024), dtype=np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    items = [Item(f"class{i % 101}/film{i}.mp4", f"/films/class{i % 101}/film{i}.mp4") for i in range(1000)]
    page = write_page(tmp_path, title="Many", items=items, features={view: x for view in ("rgb", "flow", "rgb+flow")},
                      maps={"rgb": x[:, :2] * 0 + 0.5})
    assert page.stat().st_size + 1000 * LIMIT < 20e6 and SETTINGS == tuple(sorted(SETTINGS, reverse=True))
