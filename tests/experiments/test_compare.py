"""Settings compared over seeds: the runs on the tiny set, and the statistics by hand."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.paths import ROOT
from scipy.stats import t as student

from experiments import compare, driver, figures, result_files
from support.errors import BadInput


def experiment(folder, **changes):
    fields = {"set": {"dataset": "ucf101", "videos": "v", "splits": "s", "flow": "f"}, "prototypes": "p.npz",
              "processes": 1, "flags": "--epochs 1", "settings": {"sep": "--method sep", "goca": ""},
              "seeds": [0, 1, 2, 3], "versus": "sep", **changes}
    path = folder / "experiment.json"
    path.write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    return path


START = {"command": [], "ln_n": 1.0, "videos": 2, "settings": dict.fromkeys(result_files.SETTINGS, 1)}


def log(path, *steps, end=""):
    """The log of a run with these numbers at its steps."""
    lines = [START, *({"step": k, "epoch": k, "loss": 1, **numbers} for k, numbers in enumerate(steps, 1))]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines) + end)


def result(path, rgb, metric="R@1", **protocol):
    path.parent.mkdir(parents=True, exist_ok=True)
    both = {"protocol": {"method": "goca", "queries": 4, **protocol}, "results": {"rgb": {metric: rgb}}}
    path.write_text(json.dumps(both))
    if metric == "R@1":
        log(path.with_suffix(".jsonl"))


def test_means_deviations_and_the_paired_test_by_hand(tmp_path, capsys):
    path = experiment(tmp_path)
    for seed, (sep, goca) in enumerate([(10, 40), (12, 20), (8, 50), (14, 34)]):
        result(tmp_path / "sep" / f"seed{seed}.json", sep)
        log(tmp_path / "sep" / f"seed{seed}.jsonl", {"effective_rank_rgb": 9, "views_agree": 0.5},
            {"effective_rank_rgb": (1, 2, 2, 3)[seed], "views_agree": 0.25})
        result(tmp_path / "goca" / f"seed{seed}.json", goca)
    (tmp_path / "goca" / "seed3.json").unlink()  # a run that failed: its log is there
    assert compare.main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    differences = [30, 8, 42]
    mean, error = sum(differences) / 3, math.sqrt(sum((d - 80 / 3) ** 2 for d in differences) / 2 / 3)
    p = 2 * student.sf(mean / error, 2)
    assert "| sep | 4 | 11.0 ± 2.6 | 0 of 4 |" in out and "| sep | 2.0 ± 0.8 | – | 25.0 ± 0.0 |" in out
    assert "| goca | 3, 1 without a result | 36.7 ± 15.3 | 2 of 3 |" in out
    assert f"| goca | {mean:+.1f} ± {error:.1f}, p = {p:.2g} (3) |" in out
    capsys.readouterr()
    compare.main(["show", str(path), "--learned", "45"])
    assert "1 of 3" in capsys.readouterr().out


def test_the_picture_shows_every_seed_and_when_a_view_began_to_learn(tmp_path, monkeypatch):
    path = experiment(tmp_path)
    for name in ("sep", "goca"):
        for seed in range(3):
            result(tmp_path / name / f"seed{seed}.json", 10 + seed)
            log(tmp_path / name / f"seed{seed}.jsonl",
                *({"effective_rank_rgb": 1 + k + seed, "effective_rank_flow": 2} for k in (1, 2)))
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, out: drawn.append((figure, out)))
    assert compare.main(["draw", str(path), "--out", "seeds.png"]) == 0
    (figure, out), = drawn
    seeds, rgb, flow = figure.axes
    dots = [tuple(xy) for c in seeds.collections for xy in c.get_offsets().tolist()]
    assert sorted(y for _, y in dots if y >= 10) == [10, 10, 11, 11, 12, 12] and out == "seeds.png"
    assert [line.get_ydata().tolist() for line in rgb.lines] == [[2, 3], [3, 4], [4, 5]] * 2
    assert rgb.get_ylim()[0] == 1 and rgb.get_ylim()[1] >= 5  # no curve is cut
    assert [line.get_ydata().tolist() for line in flow.lines] == [[2, 2]] * 6


def test_only_the_experiment_s_seeds_count_and_what_failed_has_no_end(tmp_path, capsys, monkeypatch):
    """Beside it lie results of other seeds, and the log of a run that was killed within a line."""
    path = experiment(tmp_path, seeds=[0, 1], settings={"sep": "", "a$_{$": ""})
    for name in ("sep", "a$_{$"):
        for seed in range(4):
            result(tmp_path / name / f"seed{seed}.json", 10 + seed)
            log(tmp_path / name / f"seed{seed}.jsonl", {"effective_rank_rgb": 2 + seed, "effective_rank_flow": 2},
                end='{"step": 2, "lo')
    (tmp_path / "sep" / "seed1.json").unlink()
    assert compare.main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "| sep | 1, 1 without a result | 10.0 |" in out and "| sep | 2.0 | 2.0 | – |" in out
    assert "| a$_{$ | 2 | 10.5 ± 0.7 |" in out and "| a$_{$ | 2.5 ± 0.7 | 2.0 ± 0.0 | – |" in out
    drawn, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, out: (drawn.append(figure), save(figure, out)))
    assert compare.main(["draw", str(path), "--out", str(tmp_path / "seeds.svg")]) == 0
    assert [line.get_ydata().tolist() for line in drawn[0].axes[1].lines] == [[2], [2], [3]]
    for out, words in (("figure", "has no suffix of a picture"), ("x.xyz", "end its name in one of ")):
        with pytest.raises(BadInput, match=words):
            compare.main(["draw", str(path), "--out", str(tmp_path / out)])
    with pytest.raises(BadInput, match="has no result to draw"):
        compare.main(["draw", str(experiment(tmp_path, seeds=[5])), "--out", str(tmp_path / "x.png")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a$_{$", "experiment.json", "seeds.svg", "sep"]


def test_rows_are_chosen_and_compared_with_any_other(tmp_path, capsys):
    path = experiment(tmp_path)
    for seed in range(3):
        result(tmp_path / "sep" / f"seed{seed}.json", 10 + seed)
        result(tmp_path / "goca" / f"seed{seed}.json", 40 + 2 * seed)
    compare.main(["show", str(path), "--versus", "goca", "sep"])
    assert "| minus goca, seed by seed | rgb |" in (out := capsys.readouterr().out) and "| sep | -31.0 ± 0.6" in out
    assert "| minus sep, seed by seed | rgb |" in out and "| goca | +31.0 ± 0.6" in out
    compare.main(["show", str(path), "--settings", "goca"])
    assert "sep |" not in (out := capsys.readouterr().out) and "| goca | 3 | 42.0 ± 2.0 | 3 of 3 |" in out
    with pytest.raises(BadInput, match=r"--settings untrained is none of its settings \(sep, goca\)"):
        compare.main(["show", str(path), "--settings", "untrained"])
    with pytest.raises(BadInput, match="--versus sep is not among --settings goca"):
        compare.main(["show", str(path), "--settings", "goca", "--versus", "sep"])


def test_what_is_downstream_has_its_own_tables(tmp_path, capsys):
    path = experiment(tmp_path, downstream={"linear": {}, "finetune": {"settings": ["goca"]}})
    for seed in range(3):
        for name, top1 in (("sep", 20), ("goca", 50 + seed)):
            result(tmp_path / name / f"seed{seed}.json", 10)
            result(tmp_path / name / f"seed{seed}.linear.json", top1, "top-1")
    assert compare.main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "| linear: top-1 | seeds | rgb |" in out and "| goca | 3 | 51.0 ± 1.0 |\n" in out
    assert "| linear: top-1 minus sep, seed by seed | rgb |" in out and "| goca | +31.0 ± 0.6" in out
    assert "finetune" not in out
    assert compare.main(["show", str(path), "--of", "retrieval", "cluster"]) == 0
    assert "linear" not in (out := capsys.readouterr().out) and "| goca | 3 | 10.0 ± 0.0 |" in out


def test_without_three_pairs_no_difference_is_shown(tmp_path, capsys):
    path = experiment(tmp_path)
    result(tmp_path / "goca" / "seed0.json", 40)
    assert compare.main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "| goca | 1 | 40.0 | 1 of 1 |" in out and "| sep | 0 | – | 0 of 0 |" in out and "minus" not in out


def test_all_runs_are_made_once_and_their_logs_kept(tiny, tmp_path, forked, monkeypatch):
    """The commands run in forks of a process that has imported the stages; test_tables.py starts them as a user."""
    class Popen:
        def __init__(self, command, **_):
            forked("command", stage=Path(command[1]).stem, argv=command[2:], interrupt=0)
            self.returncode = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def wait(self):
            pass

        def poll(self):
            return 0

    monkeypatch.setattr(driver, "subprocess", SimpleNamespace(Popen=Popen))
    folder = tmp_path / "results"
    folder.mkdir()
    path = experiment(
        folder, seeds=[5], prototypes=str(tiny.prototypes), settings={"sep": "--method sep"},
        set={"dataset": "ucf101", "videos": str(tiny.videos), "splits": str(tiny.splits), "flow": str(tiny.flow)},
        flags="@presets/cpu --epochs 1 --warmup-epochs 0 --batch-size 2 --size 16 --scale 1.0 1.25 --frames 4",
        untrained="--arch r2plus1d18 --width 0.125 --size 16 --frames 4 --stride 2",
        downstream={"cluster": {"flags": "--runs 2"}, "linear": {"seeds": [6]},
                    "finetune": {"settings": ["sep"], "flags": "--views flow --epochs 1 --batch-size 2"}})
    monkeypatch.chdir(tmp_path)
    run = ["run", "results/experiment.json", "--work", "work"]
    assert compare.main(run) == 0
    settings = json.loads((folder / "sep" / "seed5.jsonl").read_text().splitlines()[0])["settings"]
    assert (settings["method"], settings["seed"]) == ("sep", 5)
    assert set(json.loads((folder / "sep" / "seed5.json").read_text())["results"]) == {"rgb", "flow", "rgb+flow"}
    notes = (folder / "commands.jsonl").read_text()
    assert [json.loads(line)["command"][:2] for line in notes.splitlines()] == [
        ["pretrain.py", "@presets/cpu"], ["evaluate.py", "retrieval"], ["evaluate.py", "cluster"],
        ["evaluate.py", "finetune"], ["evaluate.py", "retrieval"], ["evaluate.py", "cluster"]]
    untrained = json.loads((folder / "untrained" / "seed5.json").read_text())
    row = f"| untrained | 1 | {untrained['results']['rgb']['R@1']:.1f} |"
    assert untrained["protocol"]["method"] == "untrained"
    assert any(line.startswith(row) for line in compare.lines(compare.read_experiment(path), 30, ["retrieval"]))
    assert compare.main(run) == 0 and (folder / "commands.jsonl").read_text() == notes
    fields = json.loads(path.read_text())
    for changes, made in (({"settings": {"sep": "--method sep --lr 1.0"}}, "sep/seed5/checkpoint.pt"),
                          ({"evaluate": "--protocol coclr"}, "sep/seed5.json"),
                          ({"downstream": {"cluster": {"flags": "--runs 3"}}}, "sep/seed5.cluster.json")):
        path.write_text(json.dumps({**fields, **changes}))
        with pytest.raises(BadInput, match=f"{made} was made by another command"):
            compare.main(run)
        for other in (["run", "results/sep/../experiment.json", *run[2:]], [*run[:-1], "moved"]):
            with pytest.raises(BadInput, match=f"{made} was made by another command"):
                compare.main(other)
    path.write_text(json.dumps(fields))
    assert compare.main([*run[:-1], "moved"]) == 0  # what is there needs no run
    folder.rename("elsewhere")
    assert compare.main(["run", str(tmp_path / "elsewhere" / "experiment.json"), *run[2:]]) == 0
    assert Path("elsewhere/commands.jsonl").read_text() == notes


@pytest.mark.parametrize(("more", "of_tuning"), [({}, 2), ({"processes": 1}, 1)])
def test_fine_tuning_may_have_its_own_number_of_processes(tmp_path, monkeypatch, more, of_tuning):
    calls = []

    class Recorder(driver.Driver):
        def __call__(self, command, out, log, processes):
            calls.append((command[1] if command[0] == "evaluate.py" else command[0], processes))
            return True

    monkeypatch.setattr(compare, "Driver", Recorder)
    path = experiment(tmp_path, seeds=[5], settings={"sep": "--method sep"}, processes=2,
                      downstream={"linear": {}, "finetune": more})
    assert compare.main(["run", str(path), "--work", str(tmp_path / "work")]) == 0
    assert calls == [("pretrain.py", 2), ("retrieval", 1), ("linear", 1), ("finetune", of_tuning)]


@pytest.mark.parametrize(("changes", "words"), [
    ({"versus": "none"}, "versus none is none of its settings"), ({"seeds": None}, "seeds must be list"),
    ({"settings": ["goca"]}, "settings must be dict"),
    ({"downsteam": {}}, "downsteam is none of its fields"), ({"downstream": ["linear"]}, "downstream must be dict"),
    ({"downstream": {"retrieval": {}}}, 'downstream knows cluster, linear, finetune.*not {"retrieval": {}}'),
    ({"downstream": {"linear": {"flag": ""}}}, r"each with flags \(text\), settings and seeds \(lists\), processes"),
    ({"downstream": {"linear": {"seeds": 1}}}, 'not {"linear": {"seeds": 1}}'),
    ({"settings": {"sep": None}}, "settings of sep must be str"), ({"set": {"split": 2}}, "set of split must be str"),
    ({"downstream": {"linear": {"settings": ["avg"]}}}, "downstream linear avg is none of its settings"),
    ({"settings": {"sep": "", "lr/1": "", "..": ""}}, "'lr/1' can't be the name of a folder; settings '..' can't"),
    ({"settings": {"sep": "", "untrained": ""}, "untrained": "--size 16"}, "has the name of the row that the field"),
    ({"flags": "--out 'a"}, r"flags can't be split into words \(No closing quotation\)"),
    ({"settings": {"sep": "'"}, "downstream": {"linear": {"flags": '"'}}},
     "settings sep can't be split.*; downstream linear can't be split"),
    ({"processes": 0, "downstream": {"finetune": {"processes": -1}}},
     "processes must be at least 1, not 0; processes must be at least 1, not -1"),
    ({"seeds": [{"a": 1}, 0, None]}, 'not {"a": 1}; seeds must be whole numbers of at least 0, not null'),
    ({"downstream": {"linear": {"seeds": [-1, True]}}}, "at least 0, not -1; seeds .*, not true")])
def test_what_an_experiment_lacks_is_named(tmp_path, changes, words):
    with pytest.raises(BadInput, match=words):
        compare.main(["show", str(experiment(tmp_path, **changes))])


def test_a_file_where_a_folder_is_to_be(tmp_path):
    path, work = experiment(tmp_path), tmp_path / "work"
    for file, words in ((work, "--work .*work is a file"), (tmp_path / "sep", "the folder of sep, .*sep is a file"),
                        (work / "sep" / "seed0", "the folder of the log, .*seed0 is a file")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        with pytest.raises(BadInput, match=words):
            compare.main(["run", str(path), "--work", str(work)])
        file.unlink()


def test_rows_of_other_clips_are_compared_and_named(tmp_path, capsys):
    path = experiment(tmp_path)
    result(tmp_path / "sep" / "seed0.json", 40, frames=8, precision="float32")
    result(tmp_path / "goca" / "seed0.json", 40, frames=8, precision="float32")
    assert compare.main(["show", str(path)]) == 0 and "not of the same" not in capsys.readouterr().out
    result(tmp_path / "goca" / "seed1.json", 40, frames=16, precision="bfloat16")
    assert compare.main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert "The rows are not of the same frames: 8 (sep goca), 16 (goca).\n" in out
    assert "not of the same precision: float32 (sep goca), bfloat16 (goca)." in out
    assert out.count("not of the same") == 2


def test_results_of_other_queries_are_refused(tmp_path):
    path = experiment(tmp_path)
    result(tmp_path / "goca" / "seed0.json", 40)
    result(tmp_path / "sep" / "seed0.json", 40, queries=5)
    with pytest.raises(BadInput, match="can't be compared: queries"):
        compare.main(["show", str(path)])
    result(tmp_path / "sep" / "seed0.json", 40, recipe="vicc")
    with pytest.raises(BadInput, match="can't be compared: recipe"):
        compare.main(["show", str(path)])
    (tmp_path / "experiment.json").write_text("[")
    with pytest.raises(BadInput, match="no JSON file of an experiment"):
        compare.main(["show", str(path)])


@pytest.mark.parametrize("path", sorted((ROOT / "results").rglob("experiment.json")),
                         ids=lambda p: str(p.parent.relative_to(ROOT / "results")))
def test_committed_results_are_of_their_experiment_s_flags(path, monkeypatch):
    """The command that docs/results.md gives goes on with them: none is refused as another command's."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(driver.Driver, "__call__", lambda *_: False)  # nothing is run,
    monkeypatch.setattr(compare.shutil, "copyfile", lambda *_: None)  # and no log of a run here taken for a result
    checked = []
    monkeypatch.setattr(driver.Driver, "check", lambda self, command, out, check=driver.Driver.check: (
        check(self, command, out), checked.append(bool(self.made_by(out)))))
    work = ROOT / "runs" / path.parent.relative_to(ROOT / "results")
    assert compare.main(["run", str(path.relative_to(ROOT)), "--work", str(work)]) == 0
    assert sum(checked) >= 10
