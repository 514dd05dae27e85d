"""README and docs: all that they name exists, their examples run, and the README stays short."""

import json
import re
import shlex

import pytest
from helpers.documentation import Page, expanded, problems
from helpers.evaluation import checkpoint
from helpers.paths import ROOT

import model
from experiments import compare, tables
from support import datasets
from support.weights import export

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "results" / "README.md"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # @presets/FILE is read from there


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_all_that_a_page_names_exists(path):
    assert problems(Page(path)) == []


def test_the_readme_is_short_and_so_are_its_pictures():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 220
    assert len(text.encode()) <= 16 * 1024
    pictures = [p for p in (ROOT / "docs").iterdir() if p.suffix != ".md"]
    assert pictures
    for picture in pictures:
        assert picture.stat().st_size < 200_000, picture
        assert any(f"{picture.name})" in page.read_text() for page in PAGES), f"{picture.name} is shown nowhere"


# ---------------------------------------------------------------------------------------------------------------------
# The examples
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def workplace(tiny, tmp_path_factory):
    """A folder with what the examples name: my_videos, its flow and lists, an export."""
    root = tmp_path_factory.mktemp("examples")
    (root / "my_videos").symlink_to(tiny.videos)
    (root / "flow").mkdir()
    (root / "flow" / "mine").symlink_to(tiny.flow)
    (root / "my_lists").mkdir()
    rows = (line.split()[0].removesuffix(".avi") for line in (tiny.splits / "trainlist01.txt").read_text().splitlines())
    (root / "my_lists" / "train.csv").write_text("".join(f"{name},{name.split('/')[0]}\n" for name in rows))
    (root / "run").mkdir()
    export(checkpoint(root / "run"), root / "goca.pt")
    return root


EXAMPLES = [(path, i, code) for path in PAGES
            for i, (language, code) in enumerate(Page(path).blocks) if language == "python"]


@pytest.mark.parametrize(("path", "code"), [(path, code) for path, _, code in EXAMPLES],
                         ids=[f"{path.name}-{i}" for path, i, _ in EXAMPLES])
def test_examples_run(path, code, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(datasets, "DATASETS", dict(datasets.DATASETS))
    monkeypatch.setattr(model, "ARCHITECTURES", dict(model.ARCHITECTURES))
    exec(compile(code, str(path), "exec"), {})  # our own pages


# ---------------------------------------------------------------------------------------------------------------------
# The checker itself: it notices what does not exist, and only that
# ---------------------------------------------------------------------------------------------------------------------
VALID = "--videos v --flow f --prototypes p --out r"


@pytest.mark.parametrize(("text", "words"), [
    ("[a](docs/nothing.md)", "no docs/nothing.md"),
    ("[a](docs/paper.md#nowhere)", "no heading"),
    ("[a](#nowhere)", "no heading"),
    ("see `support/nothing.py`", "support/nothing.py: there is none"),
    ("see `nothing.py`", "nothing.py: there is none"),
    ("`csrc/{goca,nothing}.h`", "csrc/nothing.h: there is none"),
    ("`tests/test_goca.py::test_nothing`", "no such test"),
    ("```\nsupport/nothing.py   a file tree\n```", "support/nothing.py: there is none"),
    ("`goca.nothing`", "no such name"),
    ("`make nothing`", "no such target"), ("`make demo SEAD=7`", "no such variable"),
    ("```\nmake demo nothing\n```", "no such target"),
    ("`--made-up`", "no command takes that"),
    ("`--protocol nothing`", "no command takes that"),
    ("`--lambda`", "no command takes that"),
    ("`pretrain.py --made-up`", "there is no --made-up"),
    ("`pretrain.py --method nothing`", "takes no nothing"),
    ("`evaluate.py nothing`", "it has no command nothing"),
    ("`evaluate.py cluster --per-class`", "there is no --per-class"),
    ("`python -m experiments.figures nothing`", "it has no command nothing"),
    ("`python -m experiments.nothing`", "no program experiments.nothing"),
    ("`flow.py info --made-up`", "there is no --made-up"),
    ("`@presets/nothing`", "no such file"),
    (f"```\npython pretrain.py {VALID} --made-up 3\n```", "unrecognized arguments: --made-up"),
    (f"```\npython pretrain.py {VALID} --epoch 3\n```", "unrecognized arguments: --epoch"),
    ("```\npython pretrain.py --videos v\n```", "required"),
    (f"```\npython pretrain.py @presets/nothing {VALID}\n```", "presets/nothing"),
    ("```\ntorchrun --nproc-per-node 8 evaluate.py \\\n    finetune --videos v\n```", "required"),
    (f"```\nsbatch launch/slurm.sh {VALID} --made-up 3\n```", "unrecognized arguments: --made-up"),
    ("With `SET` for `--per-class`:\n```\npython flow.py --videos v --out o SET\n```", "arguments: --per-class"),
])
def test_the_checker_notices(text, words):
    found = problems(Page(ROOT / "README.md", text))
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize("text", [
    "# A heading: two words\n[a](#a-heading-two-words) [b](docs/paper.md#symbols) [c](https://example.org/x#y)",
    "`support/errors.py`, `csrc/goca.h`, `results/demo/sep_seed{0..2}.json`, `my_videos/train/<class>`, `flow/mine`",
    "`goca.assign(log_prior=...)`, `goca.pt`, `--prior-sign -1`, `make test`, `exp(1/0.01)`, `D' = 3`",
    f"```\npython pretrain.py @presets/cpu {VALID} --lambda2 0   # a comment\nmake demo\n```",
    'SET:\n```\nSET="--videos v --out o"\npython flow.py $SET --plan\n```',
])
def test_the_checker_is_content(text):
    assert problems(Page(ROOT / "README.md", text)) == []


SHOWN = re.findall(r"<!-- python -m experiments.compare (show .*?) -->\n\n(.*?)\n\n<!-- end -->",
                   (ROOT / "docs" / "results.md").read_text(), re.DOTALL)


@pytest.mark.parametrize(("command", "tables"), SHOWN, ids=[command for command, _ in SHOWN])
def test_tables_over_seeds_are_what_their_command_prints(command, tables, capsys):
    assert compare.main(shlex.split(command)) == 0
    printed, explanation = capsys.readouterr().out.rstrip().rsplit("\n\n", 1)
    assert printed == tables and explanation.startswith("In percent")


TABLES = re.findall(r"<!-- python -m experiments.tables (show .*?) -->\n\n(.*?)\n\n<!-- end -->",
                    (ROOT / "docs" / "results.md").read_text(), re.DOTALL)


assert len(TABLES) == 2  # of the lambdas, and of S3D


@pytest.mark.parametrize(("command", "shown"), TABLES, ids=[command for command, _ in TABLES])
def test_other_tables_are_what_their_command_prints(command, shown, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert tables.main(shlex.split(command)) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.split("\n"))
    assert shown.removeprefix("```\n").removesuffix("\n```") in printed


def test_every_experiment_is_shown():
    of = {command.split()[1] for command, _ in SHOWN}
    assert of == {str(path.relative_to(ROOT)) for path in (ROOT / "results").rglob("experiment.json")}


@pytest.mark.parametrize("folders", [["guiding_36"], ["ut_interaction/split1", "ut_interaction/split2"]])
def test_the_readme_s_rows_on_guiding_are_what_the_files_say(folders):
    every = [compare.collect(compare.read_experiment(ROOT / "results" / f / "experiment.json")) for f in folders]
    sep, led = (", ".join(compare.mean_and_deviation(r["rgb"] for r in found[name].values()) for found in every)
                for name in ("sep", "goca_led"))
    (seeds, fewer), = {(len(found["goca_led"]), len(found["sep"])) for found in every}
    without = "without guiding" if fewer == seeds else f"without guiding, {fewer} seeds"
    row = f"{seeds} seeds{' a direction' if len(every) > 1 else ''} | {sep} {without} | {led} guided by flow |"
    assert row in PAGES[0].read_text()


def test_the_readme_s_row_on_fine_tuning_is_what_the_files_say():
    x = compare.read_experiment(ROOT / "results" / "finetuning" / "plain" / "experiment.json")
    found = compare.collect(x, "finetune", "top-1")
    scratch, led = (compare.mean_and_deviation(r["rgb"] for r in found[name].values())
                    for name in ("untrained", "goca_led"))
    seeds, = {len(found[name]) for name in ("untrained", "goca_led")}
    assert f"{seeds} seeds | {scratch} from scratch | {led} from guided weights |" in PAGES[0].read_text()


def test_the_readme_s_numbers_of_s3d_are_what_the_files_say():
    guided, without = (json.loads((ROOT / f"results/trial/{name}.json").read_text())["results"]["rgb"]["R@1"]
                       for name in ("goca", "sep"))
    assert f"R@1 of RGB {guided:.1f} guided, {without:.1f} not" in PAGES[0].read_text()


def test_the_table_on_tennis_is_what_the_file_says():
    text = (ROOT / "docs" / "results.md").read_text()
    found = json.loads((ROOT / "results/tennis7/supervised.json").read_text())
    rows = {fold: each["results"] for fold, each in found["splits"].items()} | {"mean": found["results"]}
    for fold, r in rows.items():
        cells = (f"{r[v]['top-1']:.1f} ± {r[v]['top-1 standard error']:.1f}" for v in ("rgb", "flow"))
        assert f"| {fold} | {' | '.join(cells)} |" in text
    plain = [json.loads((ROOT / f"results/tennis7/supervised_plain_fold1_{view}.json").read_text())["results"][view]
             for view in ("rgb", "flow")]
    rgb, flow = (f"{r['top-1']:.1f} ± {r['top-1 standard error']:.1f}" for r in plain)
    assert f"RGB has {rgb} and flow {flow}" in " ".join(text.split())


def test_results_are_all_listed():
    """results/README.md says of each file what it is."""
    names = {each for span in Page(PAGES[-1]).spans for each in expanded(span)}
    for file in sorted((ROOT / "results").rglob("*.json")):
        below = file.relative_to(ROOT / "results").as_posix()
        assert below in names or any(n.endswith("/") and below.startswith(n) for n in names), below
    for row in re.findall(r"^\| (`.*?) \|", PAGES[-1].read_text(), re.MULTILINE):
        for name in (each for span in re.findall(r"`(.*?)`", row) for each in expanded(span)):
            assert list((ROOT / "results").glob(name.rstrip("/"))), f"{name}: there is none"
