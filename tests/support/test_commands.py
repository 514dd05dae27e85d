"""What the commands say of themselves: usage, defaults, devices that are not there."""

import re

import pytest
import torch

import evaluate
import flow
import pretrain
import prototypes
import search
from experiments import compare, figures, scaling, tables, walkers
from experiments.bench import __main__ as bench
from experiments.bench import long_film
from experiments.bench import prototypes as bench_prototypes
from experiments.report import __main__ as report
from support.errors import BadInput
from support.video_index import main

COMMANDS = {"pretrain.py": pretrain.arguments, "evaluate.py": evaluate.arguments, "search.py": search.arguments,
            "flow.py": flow.main, "prototypes.py": prototypes.main, "python -m support.video_index": main,
            **{f"python -m {m.__name__.removesuffix('.__main__')}": m.main for m in (
                bench, bench_prototypes, compare, figures, long_film, report, scaling, tables, walkers)}}


def said(name, capsys, monkeypatch, *more):
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.setattr("sys.argv", [name, *more, "--help"])
    with pytest.raises(SystemExit) as e:
        COMMANDS[name]()
    assert e.value.code == 0
    return re.sub(r"\n {20,}", " ", capsys.readouterr().out)  # a line a flag


@pytest.mark.parametrize("name", COMMANDS)
def test_help_names_the_command_and_no_empty_default(name, capsys, monkeypatch):
    out = said(name, capsys, monkeypatch)
    assert out.startswith(f"usage: {name} ")
    subcommands = re.search(r"{([a-z,]+)} \.\.\.", out)
    for sub in subcommands[1].split(",") if subcommands else ():
        out += said(name, capsys, monkeypatch, sub)
        assert f"usage: {name} {sub} " in out
    assert not re.search(r"default:? ?(None|\)|\[|$)", out, re.MULTILINE)


@pytest.mark.parametrize(("name", "argv"), [
    ("search.py", ["query", "film.mp4", "--index", "films.npz"]), ("evaluate.py", ["export", "--checkpoint", "run"]),
    ("evaluate.py", ["cluster", "--weights", "w.pt"]), ("python -m experiments.compare", ["show", "e.json"]),
    ("python -m experiments.tables", ["show"]), ("python -m experiments.figures", ["method"])])
def test_what_a_subcommand_does_not_know_is_said_with_its_own_usage(name, argv, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [name, *argv, "--out", "x", "--colour", "red"])
    with pytest.raises(SystemExit) as e:
        COMMANDS[name]()
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith(f"usage: {name} {argv[0]} ") and "--colour" in err


@pytest.mark.parametrize(("name", "sub", "lines"), [
    ("pretrain.py", [], [r"--epochs EPOCHS +default: 500", r"--seed SEED +default: 0", r"--dataset .* +default: folder",
                         r"--lambda1 .* \(Table 2\) \(default: 0.02\)", r"--splits SPLITS +folder of .* lists$"]),
    ("python -m experiments.tables", ["run"], [r"--pretrain-flags .* in one string$", r"--seeds .* +default: 0",
                                               r"--on .* to evaluate on \(default: ucf101\)"])])
def test_help_says_each_default_once(name, sub, lines, capsys, monkeypatch):
    out = said(name, capsys, monkeypatch, *sub)
    for line in lines:
        assert re.search(line, out, re.MULTILINE), line
    assert not re.search(r"default.*default", out)


@pytest.mark.parametrize("module", [bench, bench_prototypes])
def test_devices_of_the_bench(module, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["x", "--device", "cuda"])
    with pytest.raises(BadInput, match="--device cuda: torch sees no NVIDIA GPU"):
        module.main()
    monkeypatch.setattr("sys.argv", ["x", "--device", "abacus"])
    with pytest.raises(SystemExit) as e:
        module.main()
    assert e.value.code == 2 and "invalid choice: 'abacus'" in capsys.readouterr().err
