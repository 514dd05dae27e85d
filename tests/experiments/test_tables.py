"""The driver on the tiny set, tables beside the paper's numbers, and the pictures of evaluations."""

import json
import math

import cv2
import numpy as np
import pytest

from experiments import driver, figures, paper, tables
from support.errors import BadInput
from support.files import load_arrays, save_arrays

# PROTOCOLS, section 3: what the tables of the paper print
PRINTED = {1: {"GOCA+": {"ucf101": (70.8, 81.4), "hmdb51": (33.7, 58.7)}}, 6: {"GOCA+": {"ucf101": (61.2, 78.7, 61.3)}},
           5: {"GOCA": {"diving48": (8.1, 24.8, 38.3, 55.1)}},
           8: {"GOCA+, S3D": {"ucf101": (81.1,), "hmdb51": (50.0,)}}}


def test_every_cell_of_the_paper_has_its_numbers():
    for n, table in paper.TABLES.items():
        for row in table.rows:
            assert all(len(v) == len(table.metrics) for v in row.values.values()), row
            if row.label in PRINTED.get(n, {}):
                assert row.values == PRINTED[n][row.label]
    assert len(paper.TABLES[2].rows) == 16 and paper.TABLES[2].rows[9].values == {"ucf101": (60.9,)}
    assert paper.TABLES[2].rows[9].run == paper.lambda_run(0.02, 0.03)  # the best cell is the paper's default


def result(results, run, seed, r1, /, command="retrieval", on="ucf101", **more):
    path = results / run / f"seed{seed}" / f"{command}-{on}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    r = {"R@1": r1, "R@1 standard error": 0.8}
    path.write_text(json.dumps({"protocol": {"method": "goca"}, "results": {"rgb": r, "rgb+flow": r}, **more}))
    return path


def test_a_cell_by_hand(tmp_path):
    for seed, r1 in enumerate((70, 66, 68)):
        out = result(tmp_path, "goca", seed, r1)
        for name in (out, out.parent / "checkpoint.pt"):
            with open(tmp_path / "commands.jsonl", "a") as f:
                noted = "results/" + str(name.relative_to(tmp_path))  # as in a checkout, from whose root it is noted
                f.write(json.dumps({"out": noted, "command": [], "seconds": 1800, "status": 0}) + "\n")
    lines = {line[:2]: line[2:] for line in tables.cells(paper.TABLES[1], tmp_path, None)}
    error = math.hypot(0.8, 2 / 3**0.5)
    assert lines["GOCA+", "ucf101"] == ("70.8 / 81.4", f"68.0 ± {error:.1f} / –", f"{(68 - 70.8) / error:+.1f} / –",
                                        "0, 1, 2", "3.00", "goca/seed{0,1,2}")
    assert lines["GOCA+", "hmdb51"][:2] == ("33.7 / 58.7", "not run") and lines["Sep", "ucf101"][1] == "not run"
    assert lines["GOCA, flow", "ucf101"][1] == "not run"  # the view was not evaluated
    own = tables.cells(paper.TABLES[1], tmp_path, ["walkers"])
    assert {line[2] for line in own} == {"–"} and {line[3] for line in own} == {"not run"}


def test_seeds_of_a_table_are_comparable_and_other_folders_none(tmp_path):
    run = paper.lambda_run(0.02, 0.03)
    result(tmp_path, run, 0, 59.0)
    result(tmp_path, run, "0.old", 10)
    out = json.loads(result(tmp_path, run, 1, 61.0).read_text())
    assert [line[5] for line in tables.cells(paper.TABLES[2], tmp_path, None) if line[3] != "not run"] == ["0, 1"]
    for other in (run, paper.lambda_run(0.01, 0.01)):  # of this cell, of another
        result(tmp_path, other, 1, 61.0, protocol=out["protocol"] | {"protocol": "coclr"})
        with pytest.raises(BadInput, match="can't be compared: protocol"):
            tables.cells(paper.TABLES[2], tmp_path, None)
        result(tmp_path, other, 1, 61.0)


def test_notes_that_are_none(tmp_path):
    for line in ('{"out": "x"}', "3", '{"out": 3, "command": [], "seconds": 1, "status": 0}', "{"):
        (tmp_path / "commands.jsonl").write_text(line + "\n")
        with pytest.raises(BadInput, match=r"commands.jsonl is damaged at line 1 .*; remove that line"):
            tables.cells(paper.TABLES[2], tmp_path, None)


def test_markdown_and_latex(tmp_path, capsys):
    result(tmp_path, paper.lambda_run(0.02, 0.03), 0, 59.0)
    assert tables.main(["show", "--table", "2", "6", "--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "| 0.03 | 58.1 → not run | 60.9 → 59.0 ± 0.8 | 60.5 → not run | 57.5 → not run |" in out
    assert "| CoCLR+ | ucf101 | 46.1 / 68.6 / 43.1 | not ours |" in out
    rows = [line for line in out.splitlines() if line.startswith("| ")]
    assert {line.count("|") for line in rows} == {6, 9}
    assert tables.main(["show", "--table", "2", "--results", str(tmp_path), "--format", "latex", "--out",
                        str(tmp_path / "t.tex")]) == 0
    capsys.readouterr()
    tex = (tmp_path / "t.tex").read_text()
    assert r"60.9 $\to$ 59.0 $\pm$ 0.8" in tex and tex.count(r"\begin{tabular}") == tex.count(r"\end{tabular}") == 2
    assert "_" not in tex.replace(r"\_", "").replace(r"\lambda_", "")
    assert r"$\lambda_2$ 0.03, $\lambda_1$ 0.02" in tex and r"& lambda1-0.02-lambda2-0.03/seed\{0\} \\" in tex
    assert tables.main(["show", "--table", "1", "--results", str(tmp_path), "--format", "latex", "--on",
                        "50%_a&b#{$}\\"]) == 0
    tex = capsys.readouterr().out
    body = [line for line in tex.splitlines() if line.endswith(r" \\")]
    assert tex.isascii() and r"50\%\_a\&b\#\{\$\}/" in body[1]
    assert {line.replace(r"\&", "").count("&") for line in body} == {7}  # as many cells in every line


SMALL = ("--arch r2plus1d18 --width 0.125 --hidden 16 --frames 4 --short-crops 0 --size 16 --scale 1 1.2 --epochs 1 "
         "--batch-size 10 --workers 0")


def test_the_driver_runs_what_is_missing_and_no_more(tiny, tmp_path, capsys, monkeypatch):
    for n in (5, 8):  # one run is enough
        rows = [row for row in paper.TABLES[n].rows if row.run in ("", "goca")]
        monkeypatch.setitem(paper.TABLES, n, paper.TABLES[n]._replace(rows=rows))
    sets = {"films": {"dataset": "ucf101", "videos": str(tiny.videos), "splits": str(tiny.splits), "flow":
                      str(tiny.flow)}}
    (tmp_path / "sets.json").write_text(json.dumps(sets), "utf-8-sig")  # as some editors save
    results = tmp_path / "results"
    results.mkdir()
    _, arrays = load_arrays(tiny.prototypes, "prototypes", "")
    save_arrays(results / "prototypes.npz", "prototypes", {}, **arrays)  # as if fitted before
    command = ["prototypes.py", "--num", "24", "--dim", "16", "--out", str(results / "prototypes.npz")]
    (results / "commands.jsonl").write_text(json.dumps({"out": command[-1], "command": command, "seconds": 1,
                                                        "status": 0}) + "\n")
    args = ["run", "--table", "5", "--results", str(results), "--sets", str(tmp_path / "sets.json"), "--pretrain",
            "films", "--on", "films", "--num", "24", "--dim", "16", "--pretrain-flags", SMALL, "--evaluate-flags",
            "--workers 0 --views rgb"]
    assert tables.main(args) == 0
    notes = driver.read_commands(results)
    assert [n["command"][0] for n in notes] == ["prototypes.py", "pretrain.py", "evaluate.py"]
    made = json.loads((results / "goca" / "seed0" / "retrieval-films.json").read_text())
    assert made["protocol"]["method"] == "goca" and made["protocol"]["pretraining"]["seed"] == 0
    line = next(x for x in tables.cells(paper.TABLES[5], results, ["films"]) if x[0] == "GOCA")
    assert line[2] == "–" and line[3].startswith(f"{made['results']['rgb']['R@1']:.1f} ± ")
    (results / "goca" / "seed0" / "retrieval-films.json").unlink()
    assert tables.main(args) == 0  # only what is missing is done again
    assert [n["command"][0] for n in driver.read_commands(results)[len(notes):]] == ["evaluate.py"]
    with pytest.raises(BadInput, match="made by another command"):
        tables.main([*args, "--evaluate-flags", "--workers 0"])
    assert tables.main([*args, "--evaluate-flags", "--workers 0 --views red", "--seeds", "0", "--on", "films",
                        "--results", str(results), "--table", "8"]) == 1  # a command that fails
    assert "failed with status 2" in capsys.readouterr().out


def test_flags_of_the_runs():
    assert tables.run_flags("sview-random-prototypes") == ([], ["--method", "sview"])
    assert tables.run_flags("goca-trained-prototypes")[1] == ["--method", "goca", "--train-prototypes"]
    assert tables.run_flags("goca-k400")[1] == ["--method", "goca"]
    assert tables.run_flags("goca-prior-sign-minus")[1] == ["--method", "goca", "--prior-sign", "-1"]
    assert tables.run_flags(paper.lambda_run(0.03, 0.01)) == (["--epochs", "200"], [
        "--method", "goca", "--lambda1", "0.03", "--lambda2", "0.01"])
    assert tables.run_flags("sview-trained-prototypes") == (
        [], ["--method", "sview", "--views", "rgb", "--train-prototypes"])
    assert [tables.evaluate_flags(run, command) for run in ("goca", "goca-r2plus1d18") for command in (
        "retrieval", "cluster", "linear", "finetune")] == [[]] * 6 + [["--frames", "16"]] * 2
    assert tables.run_flags("goca-r2plus1d18") == (["--size", "112"], ["--method", "goca", "--arch", "r2plus1d18"])


def test_bad_input_gets_an_error_message(tmp_path):
    (tmp_path / "sets.json").write_text('{"a": {"videos": "x"}}')
    run = ["run", "--table", "1", "--results", str(tmp_path), "--sets"]
    for words, argv in {"is no JSON file of": [*run, str(tmp_path / "sets.json")],
                        "either result files, or --table": ["show"],
                        "--results is missing": ["show", "--table", "1"],
                        "is no result of: python evaluate.py": ["show", str(tmp_path / "sets.json")]}.items():
        with pytest.raises(BadInput, match=words):
            tables.main(argv)
    (tmp_path / "sets.json").write_text('{"a": {"dataset": "folder", "videos": "x", "flow": "y"}}')
    with pytest.raises(BadInput, match="names no data set ucf101; it has a"):
        tables.main([*run, str(tmp_path / "sets.json")])
    with pytest.raises(BadInput, match="holds no run of Table 2"):
        figures.main(["lambda", "--results", str(tmp_path), "--out", str(tmp_path / "x.png")])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------
def picture(path):
    """A picture that is not empty."""
    pixels = cv2.imread(str(path))
    assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_picture_of_lambda(tmp_path, monkeypatch):
    for seed, r1 in enumerate((59, 61)):
        result(tmp_path, paper.lambda_run(0.02, 0.03), seed, r1)
    result(tmp_path, paper.lambda_run(0.04, 0.01), 0, 40)
    result(tmp_path, paper.lambda_run(0.01, 0.01), 0, 40, results={"flow": {"R@1": 50.0}})
    out, save, drawn = str(tmp_path / "p.png"), figures.save, []
    monkeypatch.setattr(figures, "save", lambda figure, path: (drawn.extend(figure.axes), save(figure, path)))
    figures.main(["lambda", "--results", str(tmp_path), "--out", out])
    picture(out)
    theirs, mine = ([text.get_text() for text in axis.texts] for axis in drawn[:2])
    assert theirs[9] == "60.9" and mine[9] == "60.0\n± 1.4" and mine[3] == "40.0"  # rows lambda2, columns lambda1
    assert mine.count("not run") == 14 and drawn[1].get_title() == "ours: ucf101, RGB, 2 seeds at most"


def test_pictures_of_features_and_confusion(tmp_path):
    out = str(tmp_path / "p.png")
    rng = np.random.default_rng(0)
    labels = np.arange(40) % 4
    values = {v: (np.eye(4)[labels] + 0.1 * rng.random((40, 4))).astype(np.float32) for v in ("rgb", "flow")}
    save_arrays(tmp_path / "f.npz", "features", {"classes": list("abcd"), "protocol": "goca"}, labels=labels,
                **values)
    figures.main(["features", "--features", str(tmp_path / "f.npz"), "--versus", str(tmp_path / "f.npz"), "--view",
                  "rgb+flow", "--classes", "3", "--out", out])
    picture(out)
    save_arrays(tmp_path / "f.npz", "features", {"classes": list("abcd")}, labels=labels, rgb=values["rgb"])
    with pytest.raises(BadInput, match=r"f.npz holds no features of flow"):
        figures.main(["features", "--features", str(tmp_path / "f.npz"), "--view", "rgb+flow", "--out", out])
    save_arrays(tmp_path / "f.npz", "features", {"classes": list("abcd")}, labels=labels,
                rgb=np.float32(0.3) + np.float32(1e-8) * values["rgb"])
    with pytest.raises(BadInput, match=r"the features of rgb are the same for all 40 videos"):
        figures.main(["features", "--features", str(tmp_path / "f.npz"), "--out", out])
    said = result(tmp_path, "x", 0, 50, classes=["a$_{$", "caf\udce9"], predictions={"rgb": [0, 1, 0]},
                  queries=[{"path": "", "label": i} for i in (0, 1, 1)])
    figures.main(["confusion", "--json", str(said), "--out", out])
    picture(out)
    with pytest.raises(BadInput, match="no single videos of view flow"):
        figures.main(["confusion", "--json", str(said), "--view", "flow", "--out", out])


def test_picture_of_what_a_run_s_checkpoints_retrieve(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, out: drawn.append(figure))
    draw = ["steps", "--run", str(tmp_path), "--out", str(tmp_path / "p.png")]
    of = {"seed": 3, "lr": 2.0, "epochs": 28, "lead": "flow"}
    names = ("dataset", "videos", "flow", "arch", "width", "frames", "size", "lambda1", "lambda2",
             "batch_size", "optimizer")
    log = [{"command": [], "ln_n": 3.0, "videos": 8, "settings": dict.fromkeys(names) | of | {"method": "goca"}},
           {"step": 10, "epoch": 1, "loss": 3.0, "effective_rank_rgb": 1.5}]
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))
    with pytest.raises(BadInput, match=r"holds no \*.json of retrieval; evaluate its checkpoints"):
        figures.main(draw)
    for name, step, found in (("late", 20, 60.0), ("early", 10, 12.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps({
            "protocol": {"method": "goca", "step": step, "pretraining": of}, "results": {"rgb": {"R@1": found}}}))
    assert figures.main(draw) == 0
    above, below = drawn[0].axes
    assert [tuple(map(float, p)) for p in above.lines[0].get_xydata()] == [(10, 12), (20, 60)]
    assert [tuple(map(float, p)) for p in below.lines[0].get_xydata()] == [(10, 1.5)]
    (tmp_path / "probe.json").write_text(json.dumps({"protocol": {"method": "goca", "command": "linear"},
                                                     "results": {"rgb": {"top-1": 60.0}}}))
    log.append({**log[0], "step": 20, "settings": log[0]["settings"] | {"epochs": 40}})  # of pretrain.py --extend
    (tmp_path / "log.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))
    assert figures.main(draw) == 0
    assert len(drawn[1].axes[0].lines[0].get_xydata()) == 2
    assert f"left out: {tmp_path / 'probe.json'}, a result of evaluate.py linear" in capsys.readouterr().out
    late = json.loads((tmp_path / "late.json").read_text())
    (tmp_path / "late.json").write_text(json.dumps({**late, "protocol": {**late["protocol"], "protocol": "coclr"}}))
    with pytest.raises(BadInput, match=r"late.json and .*early.json can't be compared: protocol"):
        figures.main(draw)
    for method, seed in (("goca", 4), ("sep", 3)):
        (tmp_path / "late.json").write_text(json.dumps({"protocol": {"method": method, "step": 20, "pretraining": {
            **of, "seed": seed}}, "results": {"rgb": {"R@1": 60.0}}}))
        with pytest.raises(BadInput, match=r"late\.json is of another run"):
            figures.main(draw)


def test_pictures_of_one_split_of_several(tmp_path, monkeypatch, capsys):
    """As evaluate.py writes it: results are means, single videos lie under their split."""
    drawn = []
    monkeypatch.setattr(figures, "tile", lambda axis, video, classes, right=None: drawn.append(video["path"]))

    def on(split):
        videos = [{"path": f"{split}{c}", "label": i} for i, c in enumerate("ab")]
        return {"results": {"rgb": {"R@1": 50.0}}, "classes": ["a", "b"], "queries": videos, "gallery": videos,
                "neighbours": {"rgb": [[0, 1], [0, 1]]}, "predictions": {"rgb": [0, 0]}}

    several = {k: on(k) for k in "23"}
    file = result(tmp_path, "x", 0, 50, splits=several)
    out = str(tmp_path / "p.png")
    for more, split in (([], "2"), (["--split", "3"], "3")):
        for command in ("retrieval", "confusion"):
            figures.main([command, "--json", str(file), "--out", out, *more])
            picture(out)
        assert {path[0] for path in drawn} == {split}
        drawn.clear()
    assert "--neighbours 5: the results keep 2 of each query, which are drawn" in capsys.readouterr().out
    with pytest.raises(BadInput, match="holds no split 1; it holds 2, 3"):
        figures.main(["confusion", "--json", str(file), "--split", "1", "--out", out])
    other = json.loads(file.read_text())
    other["protocol"]["fusion"] = "similarity"
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(BadInput, match="can't be compared: fusion"):
        figures.main(["retrieval", "--json", str(file), "--versus", str(tmp_path / "other.json"), "--out", out])


def test_results_of_other_protocols_are_not_listed_together(tmp_path):
    """Nor what is no result of retrieval."""
    whole = {"protocol": "goca", "fusion": "average", "gallery": 2}
    files = [result(tmp_path, run, 0, 50) for run in ("a", "b", "c")]
    for command, more in (("linear", {"epochs": 3}), ("linear", {"train": 9}), ("cluster", {"runs": 2})):
        with pytest.raises(BadInput, match=f"can't be compared: {next(iter(more))}"):
            tables.check_comparable("a", {"command": command, **more}, "b", {"command": command})
    with pytest.raises(BadInput, match="can't be compared: command linear and retrieval"):
        tables.check_comparable("a", {"command": "linear"}, "b", {})  # old results of retrieval name none
    tables.check_comparable("a", {"method": "goca", "seed": 1, "arch": "s3d"}, "b", {"method": "untrained"})
    for file, more in zip(files, (whole, {**whole, "protocol": "coclr"}, {"protocol": "goca"}), strict=True):
        out = json.loads(file.read_text())
        file.write_text(json.dumps({**out, "protocol": out["protocol"] | more}))
    for other, words in (files[1], "can't be compared: protocol coclr and goca"), (files[2], "is no result of"):
        with pytest.raises(BadInput, match=words):
            tables.main(["show", str(files[0]), str(other)])


def test_ks_that_results_do_not_hold_are_named(tmp_path, capsys):
    protocol = {"method": "goca", "fusion": "average", "gallery": 2, "queries": 2, "classes": 2, "split": 1,
                "dataset": "ucf101", "protocol": "goca"}
    numbers = {"R@1": 50.0, "R@1 standard error": 1.0, "R@1 chance": 20.0}
    file = str(result(tmp_path, "a", 0, 50, protocol=protocol, results={"rgb": numbers}))
    assert tables.main(["show", file, "--k", "1", "3"]) == 0
    assert "left out, as not all files hold it: R@3" in capsys.readouterr().out
    with pytest.raises(BadInput, match=r"--k 3: .*json holds R@1; give one of these"):
        tables.main(["show", file, "--k", "3"])
    for none in ([], {"rgb": 5}):
        with pytest.raises(BadInput, match=r"is no result of: python evaluate.py retrieval"):
            tables.main(["show", str(result(tmp_path, "a", 0, 50, results=none))])


@pytest.mark.parametrize(("flag", "value"), [("--rows", "0"), ("--neighbours", "-1"), ("--seed", "-1")])
def test_numbers_that_are_none(capsys, flag, value):
    with pytest.raises(SystemExit, match="2"):
        figures.main(["retrieval", "--json", "r.json", "--out", "p.png", flag, value])
    assert f"argument {flag}: {value} must be a whole number" in capsys.readouterr().err


def test_names_of_pictures_and_what_has_none(tmp_path):
    for out in ("figure", "x.xyz", ".png"):
        with pytest.raises(BadInput, match="has no suffix of a picture; end its name in one of"):
            figures.main(["method", "--out", str(tmp_path / out)])
    save_arrays(tmp_path / "p.npz", "prototypes", {}, prototypes=np.eye(1, 4))
    with pytest.raises(BadInput, match="holds one prototype"):
        figures.main(["prototypes", "--prototypes", str(tmp_path / "p.npz"), "--out", str(tmp_path / "x.PNG")])
    assert [p.name for p in tmp_path.iterdir()] == ["p.npz"]


def test_a_video_s_class_is_shown_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "frame_of", lambda video: np.zeros((4, 4, 3), np.uint8))
    figure, (one, two) = figures.plt.subplots(2)
    for axis, name in ((one, "a$_{$"), (two, "caf\udce9")):
        figures.tile(axis, {"label": 0}, [name])
    figures.save(figure, tmp_path / "p.svg")
    assert two.get_xlabel() == r"caf\udce9"


def test_what_is_noted_has_no_path_of_this_machine(tmp_path, capsys):
    """Commands run in the checkout; they are noted as they would be typed there, and known again however given."""
    run, out = driver.Driver(tmp_path), tmp_path / "out"
    for place in (str(driver.ROOT / "runs" / "x"), "runs/x"):
        assert run(["-c", f"open({str(out)!r}, 'a').write('once')", place], out, tmp_path / "log")
    assert out.read_text() == "once" and str(driver.ROOT) not in capsys.readouterr().out
    assert [line["command"][2] for line in driver.read_commands(tmp_path)] == ["runs/x"]
    with pytest.raises(BadInput, match="made by another command"):
        driver.Driver(tmp_path)(["-c", "pass", "runs/y"], out, tmp_path / "log")
