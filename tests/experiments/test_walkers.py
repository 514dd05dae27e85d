"""experiments/walkers.py and puppets.py: the films are what their lists say, repeatable, told apart by motion alone."""

import json

import cv2
import numpy as np
import pytest

from experiments import puppets, walkers
from experiments.puppets import ACTIONS
from experiments.walkers import make
from support.datasets import read_split
from support.errors import BadInput
from support.videos import decode
from support.worker_pool import run_in_processes


def films(out):
    """Relative path -> decoded frames, of every film below `out`."""
    return {str(p.relative_to(out)): np.stack(list(decode(p))) for p in sorted(out.rglob("*.avi"))}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("small") / "set"
    assert make(out, train=20, test=10, size=48, frames=5, seed=3)
    return out


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """What the baselines score on 200 clips."""
    out = tmp_path_factory.mktemp("large") / "set"
    make(out, train=120, test=80, frames=8)
    return walkers.baselines(out)


# --- files and lists ---
def test_lists_are_ucf101s_balanced_and_disjoint(small):
    classes = [line.split() for line in (small / "splits" / "classInd.txt").read_text().splitlines()]
    assert classes == [[str(i), a] for i, a in enumerate(ACTIONS, 1)] and len(ACTIONS) >= 8
    subjects = {}
    for subset, count in (("train", 20), ("test", 10)):
        lines = (small / "splits" / f"{subset}list01.txt").read_text().splitlines()
        assert len(lines) == len(set(lines)) == count
        for line in lines:
            name, *label = line.split()
            action, file = name.split("/")
            assert file.startswith(f"v_{action}_g") and (small / "videos" / name).is_file()
            assert label == ([str(ACTIONS.index(action) + 1)] if subset == "train" else [])
        labels = [label for _, label in walkers.clips(small, subset)]
        assert np.bincount(labels).tolist() == [count // len(ACTIONS)] * len(ACTIONS)
        subjects[subset] = {line.split("_g")[1][:2] for line in lines}
    assert not subjects["train"] & subjects["test"]
    listed = {p for subset in walkers.SUBSETS for p, _ in walkers.clips(small, subset)}
    assert listed == set(small.rglob("*.avi"))


def test_the_ucf101_reader_reads_it(small):
    for subset, count in (("train", 20), ("test", 10)):
        found = read_split("ucf101", small / "videos", small / "splits", 1, subset)
        assert len(found.videos) == count and list(found.classes) == list(ACTIONS)


@pytest.mark.parametrize("size, frames", [(48, 5), (67, 3), (33, 2), (130, 2)])
def test_every_film_decodes_to_its_frames_and_size(tmp_path, size, frames):
    make(tmp_path / "set", train=10, test=1, size=size, frames=frames)
    found = films(tmp_path / "set")
    assert len(found) == 11
    for name, film in found.items():
        assert film.shape == (frames, size, size, 3), name


def test_the_codec_hardly_changes_the_picture(small):
    """Among others: a writer that cuts or shears odd sizes, or swaps colours, is off by tens of grey levels."""
    person = puppets.subject(np.random.default_rng([3, 1, 0]))
    drawn = puppets.render("Walk", 48, 5, 25, person, np.random.default_rng([3, 0, 0, 1]))
    read = list(decode(small / "videos" / "Walk" / "v_Walk_g01_c01.avi"))
    for a, b in zip(drawn, read, strict=True):
        grey = [cv2.cvtColor(x, cv2.COLOR_BGR2GRAY).astype(float) for x in (a, b)]
        assert np.abs(grey[0] - grey[1]).mean() < 3
        assert np.abs(a.mean((0, 1)) - b.mean((0, 1))).max() < 3


# --- the seed ---
def test_a_seed_gives_the_same_films_whatever_their_number(small, tmp_path):
    make(tmp_path / "again", train=12, test=10, size=48, frames=5, seed=3)
    make(tmp_path / "other", train=12, test=10, size=48, frames=5, seed=4)
    first, again, other = films(small), films(tmp_path / "again"), films(tmp_path / "other")
    assert len(again) == 22 and again.keys() == other.keys() and again.keys() < first.keys()
    for name, film in again.items():
        assert np.array_equal(film, first[name]), name
        assert not np.array_equal(film, other[name]), name


# --- motion alone ---
def test_the_action_changes_no_other_draw():
    """From one generator every action has the same background and camera, and leaves the generator in one state."""
    films, states = [], []
    for action in ACTIONS:
        rng = np.random.default_rng(5)
        films.append(np.stack(puppets.render(action, 64, 6, 25, puppets.subject(np.random.default_rng(1)), rng)))
        states.append(rng.bit_generator.state)
    assert all(s == states[0] for s in states)
    assert all(np.array_equal(f[:, :5, :5], films[0][:, :5, :5]) for f in films)  # a corner that no figure reaches
    assert all((f[:, 16:48, 16:48] != films[0][:, 16:48, 16:48]).any() for f in films[1:])
    assert np.abs(np.diff(films[0][:, :5, :5].astype(float), axis=0)).mean() > 0.3  # and the camera moves


@pytest.mark.parametrize("action", ACTIONS)
def test_figures_are_rigid_stand_on_the_ground_and_repeat(action):
    rng = np.random.default_rng(2)
    build = puppets.subject(rng)
    rest = puppets.rest(np.zeros(40), rng)  # one instant, so without sway
    cycle = np.linspace(0, 2, 41)[:-1]
    puppets.move(action, cycle, 1.0, 1, -1, *rest)
    p = puppets.joints(*rest, build)
    for s in "01":
        for a, b, length in ((f"shoulder{s}", f"elbow{s}", "arm"), (f"elbow{s}", f"hand{s}", "arm"),
                             (f"hip{s}", f"knee{s}", "leg"), (f"knee{s}", f"ankle{s}", "leg")):
            np.testing.assert_allclose(np.linalg.norm(p[a] - p[b], axis=1), build[length], rtol=1e-9)
    lowest = np.minimum(p["ankle0"][:, 2], p["ankle1"][:, 2])
    np.testing.assert_allclose(lowest, rest[2][:, 2], atol=1e-9)
    assert (lowest.max() > 0.03) == (action in ("Run", "Jump", "JumpingJack"))
    for name, q in p.items():
        np.testing.assert_allclose(q[:20], q[20:], atol=1e-9, err_msg=name)
    still = max(np.ptp(q, axis=0).max() for q in p.values())
    assert np.ptp(rest[2][:, 3]) > 300 if action == "Turn" else still > 0.1  # in body heights: it does move


def test_a_mean_frame_is_no_better_than_chance(scores):
    assert scores["chance"] == 10 and scores["test"] == 80
    assert scores["chance_stderr"] == pytest.approx(100 * np.sqrt(0.1 * 0.9 / 80))
    for name in ("mean grey frame", "mean colour frame", "colour histogram", "middle frame"):
        assert abs(scores["results"][name]["R@1"] - scores["chance"]) < 3 * scores["chance_stderr"], name


def test_motion_tells_the_actions_apart(scores):
    row = scores["results"]["flow histogram"]
    assert row["R@1"] - 3 * row["stderr"] > scores["chance"]


# --- starting again ---
def test_a_set_is_kept_if_the_settings_agree_and_refused_otherwise(small):
    before = {p: p.stat().st_mtime_ns for p in small.rglob("*")}
    assert not make(small, train=20, test=10, size=48, frames=5, seed=3)
    with pytest.raises(BadInput, match=r"--size 48 instead of 64, --seed 3 instead of 0"):
        make(small, train=20, test=10, size=64, frames=5, seed=0)
    assert {p: p.stat().st_mtime_ns for p in small.rglob("*")} == before


def test_interrupted_it_leaves_nothing_and_is_run_again(small, tmp_path, monkeypatch):
    write, calls = walkers.write_film, []

    def interrupted(path, *rest):
        write(path, *rest)
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt

    out = tmp_path / "new" / "set"
    monkeypatch.setattr(walkers, "write_film", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(out, train=20, test=10, size=48, frames=5, seed=3)
    assert not list(out.parent.iterdir())
    monkeypatch.undo()
    killed = out.parent / "set.part" / "videos" / "Walk"  # what a killed process leaves
    killed.mkdir(parents=True)
    (killed / "v_Walk_g09_c01.avi").write_bytes(b"half")
    make(out, train=20, test=10, size=48, frames=5, seed=3)
    assert list(out.parent.iterdir()) == [out]
    assert ({p.relative_to(out): p.read_bytes() for p in out.rglob("*.*")}
            == {p.relative_to(small): p.read_bytes() for p in small.rglob("*.*")})


def test_many_films_are_made_by_processes_and_are_the_same(small, tmp_path, monkeypatch):
    monkeypatch.setattr(walkers, "FILMS_A_PROCESS", 10)
    monkeypatch.setattr(walkers, "cores", lambda: 2)
    used = []

    def counted(*args):
        used.append(args[3])
        yield from run_in_processes(*args)

    monkeypatch.setattr(walkers, "run_in_processes", counted)
    assert make(tmp_path / "set", train=20, test=10, size=48, frames=5, seed=3) and used == [2]
    assert ({p.relative_to(tmp_path / "set"): p.read_bytes() for p in (tmp_path / "set").rglob("*.*")}
            == {p.relative_to(small): p.read_bytes() for p in small.rglob("*.*")})
    jobs = {k: (tmp_path / "missing" / f"{k}.avi", 0, k) for k in range(20)}
    with pytest.raises(BadInput, match=r"missing/\d+.avi could not be written whole"):
        list(walkers.make_films(jobs, {"seed": 0, "size": 48, "frames": 5, "fps": 25}))


def test_other_things_in_the_folder_are_refused_untouched(tmp_path):
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(BadInput, match="holds no set of walkers"):
        make(tmp_path, train=1, test=1)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.txt"]


def test_a_damaged_set_is_named(tmp_path):
    out = tmp_path / "set"
    make(out, train=1, test=1, size=32, frames=2)
    film = out / "videos" / "Walk" / "v_Walk_g01_c01.avi"
    film.unlink()
    with pytest.raises(BadInput, match=r"lacks 1 of its films, the first .*v_Walk_g01_c01.avi"):
        make(out, train=1, test=1, size=32, frames=2)
    (out / "splits" / "testlist01.txt").unlink()
    with pytest.raises(BadInput, match=r"testlist01.txt can't be read"):
        make(out, train=1, test=1, size=32, frames=2)
    (out / "walkers.json").write_text(json.dumps({"version": 0}))
    with pytest.raises(BadInput, match="version 0"):
        make(out, train=1, test=1, size=32, frames=2)


@pytest.mark.parametrize("name, value", [("train", 0), ("test", 0), ("size", 8), ("frames", 1), ("fps", 0),
                                         ("seed", -1)])
def test_settings_out_of_range_are_named(tmp_path, name, value):
    with pytest.raises(BadInput, match=f"--{name} is {value}"):
        make(tmp_path / "set", **{name: value})
    assert not list(tmp_path.iterdir())


# --- the command ---
def test_the_command_keeps_a_set_draws_it_and_scores_it(small, tmp_path, capsys):
    picture, table = tmp_path / "sheet.png", tmp_path / "scores.json"
    arguments = ["--out", str(small), "--sheet", str(picture), "--baselines", "--json", str(table)]
    assert walkers.main(arguments) == 0
    assert "kept 20 + 10 films" in capsys.readouterr().out
    image = cv2.imread(str(picture))
    assert len(image) == len(ACTIONS) * (2 * 48 + 2)
    found = json.loads(table.read_text())
    assert found["settings"]["size"] == 48 and found["test"] == 10 and len(found["results"]) >= 4
    for row in found["results"].values():
        p = row["R@1"] / 100
        assert row["stderr"] == pytest.approx(100 * np.sqrt(p * (1 - p) / 10))
    with pytest.raises(BadInput, match="--frames 5 instead of 6"):
        walkers.main(["--out", str(small), "--frames", "6"])
    with pytest.raises(BadInput, match="--baselines"):
        walkers.main(["--out", str(small), "--json", str(table)])
