"""What a page of documentation names, against what there is: links, files, commands with their flags, Python names.

`problems(page)` gives a sentence for each thing that does not exist. A command is parsed by the parser of its own
program: in a code block whole, in running text as far as it goes.
"""

import argparse
import functools
import importlib
import re
import runpy
import shlex
import sys
from pathlib import Path

from helpers.paths import ROOT
from torch.distributed.run import get_args_parser

from support.errors import BadInput

MODULES = ("goca", "tvl1", "model", "data", "flow", "prototypes", "pretrain", "evaluate", "search")
MADE = ("results/ucf101", "runs/", "demo/", "trial/")  # by commands on the pages
OTHERS = ("pip", "git", "source", "python -m venv", "python setup.py build_ext --inplace")  # commands that are not ours
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Page:
    """A Markdown file: its prose, the code spans in it, and its code blocks [(language, text), ...]."""

    def __init__(self, path, text=None):
        self.path = Path(path)
        self.text = self.path.read_text(encoding="utf-8") if text is None else text
        self.blocks = FENCE.findall(self.text)
        self.prose = FENCE.sub("", self.text)
        self.spans = [" ".join(span.replace("\\|", "|").split()) for span in re.findall(r"`([^`]+)`", self.prose)]

    def anchors(self):
        """The names by which GitHub links to the page's headings."""
        heads = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


# ---------------------------------------------------------------------------------------------------------------------
# Links and files
# ---------------------------------------------------------------------------------------------------------------------
def broken_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.prose):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.path.parent / name if name else page.path
        if not file.exists():
            yield f"link to {target}: there is no {name}"
        elif anchor and anchor not in (page.anchors() if file == page.path else Page(file).anchors()):
            yield f"link to {target}: no heading of that name"


def expanded(name):
    """demo/sep_seed{0,1}.json -> both names; {0..7} likewise."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^}]*))\}", name)
    if not found:
        return [name]
    low, high, listed = found.groups()
    values = listed.split(",") if listed is not None else range(int(low), int(high) + 1)
    return [each for v in values for each in expanded(f"{name[:found.start()]}{v}{name[found.end():]}")]


def lacking_files(page):
    """Names that can only be of this repository's files: below one of its folders, or source code."""
    near = {p.name for folder in (ROOT, page.path.parent) for p in folder.iterdir() if p.is_dir()}
    words = " ".join([*page.spans, *(text for _, text in page.blocks)])
    for word in set(re.findall(r"(?<![\w./{@-])[\w{][\w.,*{}/-]*(?:::\w+)?", words)):
        name, _, test = word.rstrip(".,").partition("::")
        ours = name.endswith((".py", ".cpp", ".cu", ".h", ".sh")) or ("/" in name and name.split("/")[0] in near)
        if not ours or name.startswith(MADE):
            continue
        for each in expanded(name):
            found = [p for folder in (ROOT, page.path.parent) for p in folder.glob(each.rstrip("/"))]
            if each.startswith("test_"):  # a test may be called by its file's name alone
                found = [*(ROOT / "tests").rglob(each)]
            if not found:
                yield f"file {each}: there is none"
            elif test and f"def {test}(" not in found[0].read_text():
                yield f"{word}: there is no such test"


def lacking_names(page):
    """goca.assign and the like: attributes of the modules at the top."""
    for module, name in set(re.findall(rf"(?<![\w./-])({'|'.join(MODULES)})\.(\w+)\b(?!\.\w)", " ".join(page.spans))):
        if name not in ("py", "pt", "md", "npz") and not hasattr(importlib.import_module(module), name):
            yield f"{module}.{name}: {module}.py has no such name"


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------
class Reached(BaseException):
    """Raised in place of parsing, so that a program goes no further; holds its parser and what it would parse."""


@functools.cache
def parser_of(program, first=""):
    """The parser that `python program first ...` hands its arguments to, and how many it takes off before."""
    def stop(parser, args=None, namespace=None):
        raise Reached(parser, sys.argv[1:] if args is None else args)

    argv, parse = sys.argv, argparse.ArgumentParser.parse_args
    sys.argv, argparse.ArgumentParser.parse_args = [program, first, "..."], stop
    try:
        runpy.run_path(str(programs()[program]), run_name="__main__")
    except Reached as e:
        parser, args = e.args
        parser._get_option_tuples = lambda option: []  # a flag is to be written out
        return parser, 2 - len(args)
    finally:
        sys.argv, argparse.ArgumentParser.parse_args = argv, parse


@functools.cache
def programs():
    """What `python` starts here: the stages, and what support and experiments hold of the kind -> {name: file}."""
    out = {}
    for folder in (".", "support", "experiments", "experiments/bench", "experiments/report"):
        for file in sorted((ROOT / folder).glob("*.py")):
            module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
            if '\nif __name__ == "__main__":' in (text := file.read_text()) and "parse" in text:
                out[file.name if folder == "." else module] = file
    return out


def split_command(words):
    """Words of a command, with or without `python`, `torchrun`, `sbatch` -> (program or None, its arguments)."""
    if words[:1] == ["torchrun"] and any(word.endswith(".py") for word in words):
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        get_args_parser().parse_args(words[1:])
        words = words[at:]
    elif words[:1] == ["sbatch"]:
        at = next(i for i, word in enumerate(words) if word.endswith(".sh"))
        words = ["pretrain.py", *words[at + 1:]]  # launch/slurm.sh hands all on
    elif words[:2] == ["python", "-m"]:
        words = words[2:]
    elif words[:1] == ["python"]:
        words = words[1:]
    return (words[0], words[1:]) if words else (None, [])


def whole(program, args):
    """Parse a command of a code block as its program would -> a sentence, or None."""
    parser, off = parser_of(program, *args[:1])
    errors = []

    def error(self, message):
        errors.append(message)
        raise SystemExit(2)

    kept, argparse.ArgumentParser.error = argparse.ArgumentParser.error, error
    try:
        parser.parse_args(args[off:])
    except SystemExit:
        return errors[0] if errors else None
    except BadInput as e:  # of a parser of ours
        return str(e)
    finally:
        argparse.ArgumentParser.error = kept


def subparsers(parser):
    return next((a for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)


def refused(action, word):
    """Whether a word that stands behind a flag, or alone, can't be its value; capitals and dots stand for any."""
    return bool(action.choices) and not re.fullmatch(r"[A-Z]+|\W+", word) and word not in map(str, action.choices)


def partly(parser, words):
    """The flags, subcommands and choices of a command in running text -> sentences."""
    action = None
    for word in words:
        if word.startswith("--"):
            action = parser._option_string_actions.get(word)
            if action is None:
                yield f"there is no {word}"
        elif action is not None and action.nargs != 0:
            if refused(action, word):
                yield f"{'/'.join(action.option_strings)} takes no {word}"
        elif word.startswith("@"):
            if not (ROOT / word[1:]).is_file():
                yield f"there is no {word}"
        elif commands := subparsers(parser):
            if refused(commands, word):
                yield f"it has no command {word}"
            parser = commands.choices.get(word, parser)
        elif any(refused(a, word) for a in parser._actions if not a.option_strings):
            yield f"it takes no {word}"


@functools.cache
def all_parsers():
    """Of every program and subcommand, and torchrun's."""
    out = [parser_of("flow.py", "info")[0], get_args_parser()]
    for program in programs():
        parser, _ = parser_of(program)
        commands = subparsers(parser)
        out += [parser, *(commands.choices.values() if commands else ())]
    return out


def lines_of(block, placeholders):
    """The lines of a code block, continued ones joined, comments off and placeholders replaced."""
    for line in re.sub(r"\\\n *", " ", block).splitlines():
        if match := re.fullmatch(r'([A-Z]+)="(.*)"', line):
            placeholders = {**placeholders, match[1]: match[2]}
            continue
        for name, value in placeholders.items():
            line = re.sub(rf"(?<!\S)\$?{name}(?!\S)", value, line)
        yield line


def wrong_commands(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    placeholders = dict(re.findall(r"With\s+`([A-Z]+)`\s+for\s+`([^`]+)`", page.prose))
    lines = [(line, True) for language, block in page.blocks if not language for line in lines_of(block, placeholders)]
    for line, complete in [*lines, *((span, False) for span in page.spans)]:
        if line.startswith(OTHERS) or not line.strip():
            continue
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # mathematics
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words = words[1:]
        if complete and words[:1] not in (["python"], ["torchrun"], ["sbatch"], ["make"]):
            continue  # output, a file tree
        if words[:1] == ["make"]:
            variables = set(re.findall(r"^([A-Z_]+) [?:]?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
            yield from (f"make {t}: the Makefile has no such {'variable' if '=' in t else 'target'}" for t in words[1:]
                        if (t.split("=")[0] not in variables if "=" in t else t not in targets))
        elif words[:1] and words[0].startswith("--") and not complete:
            words = [word.rstrip(",") for word in words]
            if all(any(partly(parser, words)) for parser in all_parsers()):
                yield f"{line}: no command takes that"
        elif words[:1] and words[0].startswith("@") and not (ROOT / words[0][1:].replace("FILE", "cpu")).is_file():
            yield f"{words[0]}: there is no such file"
        else:
            program, args = split_command(words)
            if program not in programs():
                if words[:1] == ["python"]:
                    yield f"{line}: there is no program {program}"
            elif not complete:
                parser, off = parser_of(program, *args[:1])
                yield from (f"{line}: {problem}" for problem in partly(parser, args[off:]))
            elif problem := whole(program, args):
                yield f"{line.strip()}: {problem}"


def problems(page):
    return [f"{page.path.name}: {problem}" for check in (broken_links, lacking_files, lacking_names, wrong_commands)
            for problem in check(page)]
