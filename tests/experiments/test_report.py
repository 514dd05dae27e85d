"""The page of a run: what of its log, results, films and flow it shows, in a browser and without; bad input."""

import json
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from urllib.request import url2pathname

import cv2
import numpy as np
import pytest
import torch
from helpers.evaluation import command as evaluation
from helpers.pages import embedded
from helpers.training import train

from experiments import result_files
from experiments.report import page as report_page
from experiments.report.__main__ import main
from experiments.report.flow_films import colours, drawn, flow_strip
from experiments.report.prototypes import cosines
from experiments.report.training import STANDS_S
from experiments.result_files import confusion_table, read_log
from support.errors import BadInput
from support.previews import FRAMES
from support.stores import FlowStore

START = {"command": [], "ln_n": 1.0, "videos": 2, "settings": dict.fromkeys(result_files.SETTINGS, 1)}
NET = ["--checkpoint", "none", "--arch", "r2plus1d18", "--width", "0.125", "--frames", "4", "--size", "16"]


@pytest.fixture(scope="session")
def run(tiny, tmp_path_factory):
    """A small run, retrieval before and after it, its page."""
    root = tmp_path_factory.mktemp("report")
    assert train(tiny, root / "run") == 0
    for name, network in (("before", NET), ("after", ["--checkpoint", str(root / "run")])):
        assert evaluation(tiny, "retrieval", *network, "--json", str(root / f"{name}.json")) == 0
    before, after = (json.loads((root / f"{name}.json").read_text()) for name in ("before", "after"))
    files = [str(root / "after.json"), str(root / "before.json")]
    assert main([str(root / "run"), "--json", *files, "--out", str(root / "page")]) == 0
    return SimpleNamespace(root=root, folder=root / "run", files=files, before=before, after=after,
                           page=root / "page" / "index.html")


def log_of(run, folder, lines=None, **settings):
    """A run's folder with the log of another, of its first lines only, other settings in it."""
    first, *steps = (run.folder / "log.jsonl").read_text().splitlines()
    first = json.loads(first)
    first["settings"] |= settings
    folder.mkdir()
    (folder / "log.jsonl").write_text("\n".join([json.dumps(first), *steps[:lines]]) + "\n")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# In a browser
# ---------------------------------------------------------------------------------------------------------------------
def all_tabs(browser):
    return browser.run("[...document.querySelectorAll('#tabs button')].map(e => e.textContent)")


def test_what_was_trained_and_its_curves(browser, run):
    browser.open(run.page)
    assert all_tabs(browser) == ["Run", "Queries", "Confusion", "Prototypes", "Flow", "Films"]
    text = browser.run("document.querySelector('.run').textContent")
    first = json.loads((run.folder / "log.jsonl").read_text().splitlines()[0])
    assert first["commit"] in text and "24 prototypes, ln N = 3.178" in text and "20 videos in" in text
    assert "ended" in browser.run("document.getElementById('notes').textContent")
    charts = browser.run("[...document.querySelectorAll('#section-0 .chart')].map(c => ["
                         "c.querySelector('figcaption').textContent,"
                         " [...c.querySelectorAll('.name')].map(t => t.textContent),"
                         " [...c.querySelectorAll('polyline')].map(p => p.points.length), c.textContent])")
    titles = [title for title, *_ in charts]
    assert titles[:2] == ["Loss", "Entropy of an assignment, nats"] and len(titles) == 6
    assert all("warm-up ends" in text for *_, text in charts)
    assert charts[0][1] == ["ln N", "RGB", "Flow", "both"] and charts[0][2] == [4, 4, 4]
    looks = browser.run("['.curve.rgb', '.curve.flow'].map(c => getComputedStyle(document.querySelector(c)))"
                        ".map(s => [s.stroke, s.strokeDasharray])")
    assert looks[0][0] != looks[1][0] and looks[0][1] != looks[1][1]  # by colour, and by dashes
    assert browser.complaints() == []


def test_the_table_has_the_numbers_of_the_files(browser, run):
    browser.open(run.page)
    rows = browser.run("[...document.querySelectorAll('table.results tbody tr')].map(r => "
                       "[...r.querySelectorAll('th[scope=row], td')].map(c => c.textContent))")
    own = run.after["results"]["rgb"]
    assert rows[0][0] == "before training" and rows[1][0] == "after, goca" and rows[2][0] == "chance"
    assert rows[0][1] == "{R@1:.1f} ± {R@1 standard error:.1f}".format(**run.before["results"]["rgb"])
    assert rows[1][1:] == [f"{own[f'R@{k}']:.1f} ± {own[f'R@{k} standard error']:.1f}" for k in (1, 5)]
    assert rows[2][1] == f"{own['R@1 chance']:.1f}" and len(rows) == 9


def test_queries_and_their_nearest_are_marked_right_and_wrong(browser, run):
    browser.open(run.page, "tab=section-1")
    data, names = embedded(run.page), run.after["classes"]
    assert browser.until("document.querySelectorAll('.query').length") == 6
    said = browser.run("[...document.querySelectorAll('.query')].map(q => [[...q.querySelectorAll('.asked .card')]"
                       ".map(c => Number(c.dataset.film)), ...[...q.querySelectorAll('.answers')].map(a => "
                       "[...a.querySelectorAll('.card')].map(c => [Number(c.dataset.film), c.className,"
                       " c.querySelector('.mark').textContent]))])")
    kinds = set()
    for (query,), *answers in said:
        path = data["films"][query]["path"]
        i = next(i for i, q in enumerate(run.after["queries"]) if q["path"] == path)
        label = run.after["queries"][i]["label"]
        for out, cards in zip((run.before, run.after), answers, strict=True):
            near = [out["gallery"][j] for j in out["neighbours"]["rgb"][i][:4]]
            assert [data["films"][place]["path"] for place, *_ in cards] == [v["path"] for v in near]
            right = [v["label"] == label for v in near]
            assert [kind for _, kind, _ in cards] == ["card right" if r else "card wrong" for r in right]
            assert [mark for *_, mark in cards] == ["✓ same class" if r else "✗ other class" for r in right]
            kinds |= set(right)
        assert data["films"][query]["label"] == names[label]
    assert kinds == {True, False}
    heads = browser.run("[...document.querySelectorAll('.query')][0].querySelectorAll('.answers h3')[1].textContent")
    assert heads.startswith("after, goca ") and heads.endswith("of 4 right")


def test_queries_show_rgb_in_whatever_order_views_were_evaluated(run, tmp_path):
    files = []
    for file in run.files:
        out = json.loads(Path(file).read_text())
        out["neighbours"] = dict(sorted(out["neighbours"].items()))
        assert next(iter(out["neighbours"])) == "flow"
        files.append(str(tmp_path / Path(file).name))
        Path(files[-1]).write_text(json.dumps(out))
    assert main([str(run.folder), "--json", *files, "--out", str(tmp_path / "page")]) == 0
    assert "RGB: queries, one of a class by chance" in (tmp_path / "page" / "index.html").read_text()


def test_previews_and_flow_play(browser, run):
    for tab, card in (("section-1", ".answers .card"), ("section-4", ".pair > :last-child .card")):
        browser.open(run.page, f"tab={tab}")
        browser.until("(a => a.length > 2 && a.every(i => i.complete && i.naturalWidth))"
                      "([...document.querySelectorAll('.tab:not([hidden]) .seen img')])")
        x, y, w, h = browser.run("(b => [b.x, b.y, b.width, b.height].map(Math.round))"
                                 "(document.querySelector(arguments[0] + ' .frame').getBoundingClientRect())", card)
        before = browser.picture()[y:y + h, x:x + w].astype(int)
        assert before.std() > 5
        assert any(np.abs(browser.picture()[y:y + h, x:x + w] - before).mean() > 1 for _ in range(10))
    assert browser.complaints() == []


def test_confusion_counts_every_query(browser, run):
    browser.open(run.page, "tab=section-2")
    titles = browser.run("[...document.querySelectorAll('.matrix h2')].map(e => e.textContent)")
    assert [t.partition(",")[0] for t in titles] == ["RGB", "RGB", "Flow", "RGB + flow"]
    assert titles[1].endswith(f": {run.after['results']['rgb']['R@1']:.1f} % right")  # of the nearest
    rows = browser.run("[...document.querySelectorAll('.matrix')[1].querySelectorAll('tbody tr')].map(r => "
                       "[...r.querySelectorAll('td')].map(c => Number(c.textContent)))")
    assert [sum(row) for row in rows] == [100] * 10 and np.trace(rows) / 10 == run.after["results"]["rgb"]["R@1"]


def test_nothing_is_fetched_from_outside_and_no_error(browser, run):
    browser.open(run.page)
    for tab in ("section-1", "section-2", "section-3", "section-4", "films"):
        browser.run("go(arguments[0])", tab)
        time.sleep(0.3)
    asked = [urlsplit(url) for url in browser.requests() if not url.startswith("data:")]
    assert any(url.path.endswith(".webp") for url in asked)
    folder = run.page.parent.resolve()
    assert all(url.scheme == "file" and folder in Path(url2pathname(url.path)).parents for url in asked)
    assert browser.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_all_without_scrolling_sideways(browser, run, dark):
    browser.open(run.page, width=400, height=800, dark=dark)
    for tab in ("section-0", "section-1", "section-2", "section-3", "section-4"):
        browser.run("go(arguments[0])", tab)
        assert browser.run("document.documentElement.scrollWidth") <= 400, tab
    ink = browser.run("['.curve.rgb', '.curve.flow', '.chart svg'].map(c => document.querySelector(c))"
                      ".map(e => getComputedStyle(e)).map(s => s.stroke === 'none' ? s.fill : s.stroke)")
    light = [np.mean([int(c) for c in re.findall(r"\d+", colour)[:3]]) > 127 for colour in ink]
    assert light == [dark] * 3


def test_a_page_reloads_itself_until_the_run_has_ended(browser, run, tmp_path):
    folder, out = log_of(run, tmp_path / "run", lines=2), tmp_path / "page"
    s = SimpleNamespace(run=str(folder), json=[], out=str(out), split=None, watch=1.0)
    parts = report_page.read_parts(s, read_log(folder).settings)
    assert report_page.write(s, read_log(folder), parts)
    browser.open(out / "index.html")
    assert "it goes on" in browser.run("document.getElementById('notes').textContent")
    assert browser.run("document.querySelector('.chart polyline').points.length") == 2
    shutil.copy(run.folder / "log.jsonl", folder)
    assert not report_page.write(s, read_log(folder), parts)
    browser.until("document.getElementById('notes').textContent.includes('ended')")
    assert browser.run("document.querySelector('.chart polyline').points.length") == 4
    assert browser.run("data.reload") is None


# ---------------------------------------------------------------------------------------------------------------------
# While a run goes on, and what is lacking
# ---------------------------------------------------------------------------------------------------------------------
def test_watching_ends_with_the_run(run, tmp_path, monkeypatch, capsys):
    folder, out, states = log_of(run, tmp_path / "run", lines=1), tmp_path / "page", []

    def sleep(seconds):
        states.append((seconds, embedded(out / "index.html")["reload"]))
        shutil.copy(run.folder / "log.jsonl", folder)

    monkeypatch.setattr(report_page.time, "sleep", sleep)
    assert main([str(folder), "--out", str(out), "--watch", "7"]) == 0
    assert states == [(7, 7)] and embedded(out / "index.html")["reload"] is None
    assert "4 lines of the log" in capsys.readouterr().out


@pytest.mark.parametrize(("lines", "age", "reload", "words"), [
    (0, 0, 60, "before its first step is logged"), (2, 0, 60, "at epoch 3.0 of 5"),
    (2, STANDS_S + 9, None, "interrupted"), (None, 0, None, "ended"), (None, STANDS_S + 9, None, "ended")])
def test_the_log_alone_is_enough(run, tmp_path, lines, age, reload, words):
    """Of a run that has just begun, goes on, was left, has ended."""
    folder, out = log_of(run, tmp_path / "run", lines), tmp_path / "page"
    then = time.time() - age
    os.utime(folder / "log.jsonl", (then, then))
    assert main([str(folder), "--out", str(out)]) == 0
    assert embedded(out / "index.html")["reload"] == reload
    notes = re.search(r'<ul id="notes">(.*?)</ul>', (out / "index.html").read_text())[1]
    assert words in notes
    assert ("No step is logged yet" in (out / "index.html").read_text()) == (lines == 0)


@pytest.mark.parametrize(("method", "marked"), [("goca", True), ("sep", False)])
def test_a_lead_is_named_and_its_end_marked(run, tmp_path, method, marked):
    folder = log_of(run, tmp_path / "run", method=method, lead="flow", lead_epochs=3)
    assert main([str(folder), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert ("flow leads for 3 epochs" in page) == ("lead ends" in page) == marked and "warm-up ends" in page


def test_a_log_by_itself_whose_data_are_gone(run, tmp_path, capsys):
    """As those in results/: no films, no flow, no prototypes, keys of an earlier version."""
    folder = log_of(run, tmp_path / "run", videos="gone/films", flow="gone/flow", prototypes="gone/p.npz")
    first, *steps = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    steps = [{k: v for k, v in step.items() if not k.endswith(("_rgb", "_flow"))} for step in steps]
    (tmp_path / "old.jsonl").write_text("\n".join(map(json.dumps, [first, *steps])) + "\n")
    assert main([str(tmp_path / "old.jsonl"), "--out", str(tmp_path / "page")]) == 0
    said = capsys.readouterr().out
    assert "gone/flow is no flow store" in said and "gone/p.npz doesn't exist" in said and "0 films" in said
    page = (tmp_path / "page" / "index.html").read_text()
    assert page.count('class="chart"') == 6 and "gone/p.npz" in page  # what is lacking is named there too


def test_videos_that_have_moved_keep_their_previews_and_are_named(tiny, run, tmp_path, capsys):
    films, out = tmp_path / "films", tmp_path / "page"
    shutil.copytree(tiny.videos, films)
    folder = log_of(run, tmp_path / "run", videos=str(films))
    (tmp_path / "after.json").write_text(json.dumps(run.after).replace(str(tiny.videos), str(films)))
    command = [str(folder), "--json", str(tmp_path / "after.json"), "--out", str(out)]
    assert main(command) == 0
    first = embedded(out / "index.html")["films"]
    assert all(film["strip"] and not film["missing"] for film in first)
    assert "0 of them not readable" in capsys.readouterr().out
    films.rename(tmp_path / "elsewhere")
    assert main(command) == 0
    said, second = capsys.readouterr().out, embedded(out / "index.html")["films"]
    moved = [film for film in second if film["path"]]
    assert len(moved) > 10 and all(film["strip"] and "doesn't exist" in film["missing"] for film in moved)
    assert f"{len(moved)} of them not readable" in said and "no flow is shown" in said
    for film in moved:
        assert (out / "previews" / film["strip"][0]).is_file()


def test_lines_that_are_not_finite_are_left_out(run, tmp_path):
    folder = log_of(run, tmp_path / "run")
    first, *steps = (folder / "log.jsonl").read_text().splitlines()
    steps[1] = re.sub(r'"loss_rgb": [^,]+', '"loss_rgb": NaN', steps[1])
    (folder / "log.jsonl").write_text("\n".join([first, *steps]) + '\n{"step": 99, "lo')  # and one half written
    assert main([str(folder), "--out", str(tmp_path / "page")]) == 0
    drawn_points = re.findall(r'class="curve (\w+)" points="([^"]*)"', (tmp_path / "page" / "index.html").read_text())
    assert [(kind, len(points.split())) for kind, points in drawn_points[:3]] == [("rgb", 3), ("flow", 4), ("three", 4)]


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("content", "words"), [
    (None, "log.jsonl doesn't exist; give a folder that pretrain.py wrote"),
    (b"", "is empty"), (b'{"command": [], "settings": {"method"', "is empty, or its first line"),
    (b"\xff\xfe\x00\n", "is no log of pretrain.py"), (b"not JSON\n", "is damaged, or no log of pretrain.py, at line 1"),
    (b'{"a": 1}\n', "at line 1"), (b"[1]\n", "at line 1"), (b'{"loss": 1}\n', "at line 1"),
    (json.dumps(START).encode() + b'\n{"loss": 1, "step": "x", "epoch": 1}\n', "at line 2"),
    *((json.dumps({k: v for k, v in START.items() if k != lacking}).encode() + b"\n", f"at line 1 ('{lacking}')")
      for lacking in sorted(result_files.START)),
    *((json.dumps({**START, "settings": {k: 1 for k in result_files.SETTINGS if k != lacking}}).encode() + b"\n",
       f"at line 1 ('{lacking}')") for lacking in ("arch", "batch_size")),
    (json.dumps({**START, "settings": dict.fromkeys(result_files.SETTINGS, "x")}).encode() + b"\n", "at line 1"),
    ("folder", "can't be read"),
])
def test_an_unreadable_log(tmp_path, content, words):
    (tmp_path / "run").mkdir()
    if content == "folder":
        (tmp_path / "run" / "log.jsonl").mkdir()
    elif content is not None:
        (tmp_path / "run" / "log.jsonl").write_bytes(content)
    with pytest.raises(BadInput, match=re.escape(words)):
        main([str(tmp_path / "run"), "--out", str(tmp_path / "page")])
    assert not (tmp_path / "page" / "index.html").exists()


@pytest.mark.parametrize(("change", "words"), [
    (lambda out: out["protocol"].update(dataset="hmdb51"), "can't be compared: dataset"),
    (lambda out: out["protocol"].update(frames=99), r"that the run has not \(--frames 99, the run \d+\); evaluate"),
    (lambda out: out["protocol"].update(command="features"), "is of evaluate.py features; --json takes"),
    (lambda out: out["queries"].reverse(), "answer different queries"),
    (lambda out: out.update(neighbours={"flow": out["neighbours"]["flow"]}) or out.update(
        neighbours={"other": out["neighbours"]["flow"]}), "have no view in common"),
    (lambda out: out.pop("results"), "is no result of"),
])
def test_results_that_do_not_belong_together(run, tmp_path, change, words):
    other = json.loads(json.dumps(run.before))
    change(other)
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(BadInput, match=words):
        main([str(run.folder), "--json", run.files[0], str(tmp_path / "other.json"), "--out", str(tmp_path / "page")])


def test_a_result_of_another_run_is_not_this_one_s(run, tmp_path, capsys):
    """Its settings are others: then it is named as what it is, and no queries of it are shown as "after"."""
    other = json.loads(json.dumps(run.after))
    other["protocol"]["pretraining"]["seed"] += 1
    (tmp_path / "other.json").write_text(json.dumps(other))
    assert main([str(run.folder), "--json", str(tmp_path / "other.json"), "--out", str(tmp_path / "page")]) == 0
    assert f"none of {tmp_path / 'other.json'} is of this run" in capsys.readouterr().out
    page = (tmp_path / "page" / "index.html").read_text()
    assert "after, goca" not in page and 'class="query"' not in page and "goca: each view&#x27;s assignment" in page


def test_results_that_are_not_there_or_named_twice(run, tmp_path):
    for files, words in ([tmp_path / "none.json"], "is no file"), ([run.files[0]] * 2, "twice"):
        with pytest.raises(BadInput, match=words):
            main([str(run.folder), "--json", *map(str, files), "--out", str(tmp_path / "page")])


def test_an_output_that_can_t_be_written(run, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"--out .* can't be written"):
        main([str(run.folder), "--out", str(tmp_path / "file" / "page")])
    (tmp_path / "previews").touch()
    with pytest.raises(BadInput, match=r"--out .*previews is a file; give a folder"):
        main([str(run.folder), "--out", str(tmp_path)])


# ---------------------------------------------------------------------------------------------------------------------
# Flow, confusion, prototypes
# ---------------------------------------------------------------------------------------------------------------------
def test_directions_have_their_colours():
    right, down, left, up = colours(np.array([[1, 0], [0, 1], [-1, 0], [0, -1]], np.float32)).astype(int)  # BGR
    assert right.tolist() == [0, 0, 255] and left.tolist() == [255, 255, 0]
    assert down[1] > 200 > down[0] and up[0] > 200 > up[1]  # green, violet


def test_what_stands_still_is_grey_and_what_moves_is_not():
    frame = np.full((48, 64, 3), 120, np.uint8)
    flow = np.zeros((24, 32, 2), np.float32)
    flow[:, 16:, 0] = 2  # the right half moves right
    out = drawn(frame, flow, 2.0).astype(int)
    assert out.shape == (144, 192, 3)
    still, moving = out[:, :80], out[:, 112:]
    assert np.ptp(still, axis=2).max() == 0 and still.mean() == pytest.approx(90, abs=1)
    red = moving[..., 2] - moving[..., :2].max(2)
    assert (red > 100).mean() > 0.7 and (moving.min(2) > 200).any()  # with arrows in white


def test_flow_lies_over_the_frame_that_it_begins_at(tiny, tmp_path):
    """The strip's frames are those of a preview of the film's frames with flow, and the flow of each is its own."""
    name = next(iter(FlowStore(tiny.flow).films()))
    strip = flow_strip(name, str(tiny.videos / f"{name}.avi"), FlowStore(tiny.flow), tmp_path)
    shown = cv2.imread(str(tmp_path / strip.file))
    assert shown.shape == (192, FRAMES * 192, 3) and (strip.width, strip.height) == (192, 192)
    frames = shown.reshape(192, FRAMES, 192, 3).swapaxes(0, 1).astype(int)
    assert np.abs(np.diff(frames, axis=0)).mean((1, 2, 3)).min() > 1
    assert np.ptp(frames, axis=3).max() > 60  # colours, over a film in grey


def test_a_film_shorter_than_its_flow(tiny, tmp_path):
    name = next(iter(FlowStore(tiny.flow).films()))
    video = cv2.VideoWriter(str(tmp_path / "short.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (40, 40))
    for _ in range(3):
        video.write(np.zeros((40, 40, 3), np.uint8))
    video.release()
    with pytest.raises(BadInput, match=r"short\.avi has fewer frames than its flow"):
        flow_strip(name, str(tmp_path / "short.avi"), FlowStore(tiny.flow), tmp_path)


def test_confusion_by_nearest_and_by_classifier():
    videos = [{"path": "", "label": k} for k in (0, 0, 1)]
    out = {"classes": ["a", "b"], "queries": videos, "gallery": videos, "neighbours": {"rgb": [[0, 2], [2, 0], [2, 1]]}}
    assert confusion_table(out, "rgb").tolist() == [[1, 1], [0, 1]]
    assert confusion_table(out, "flow") is None
    assert confusion_table({**out, "predictions": {"flow": [1, 1, 0]}}, "flow").tolist() == [[0, 2], [1, 0]]


def test_cosines_of_a_square_in_the_plane():
    """Four unit vectors at right angles: the nearest at cosine 0; of six pairs two are opposite."""
    nearest, pairs = cosines(torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]))
    assert nearest.tolist() == [0, 0, 0, 0]
    assert pairs.sum() == 6 and pairs[0] == 2 and pairs[100] == 4
