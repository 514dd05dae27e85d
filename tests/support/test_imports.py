"""Where names come from: each is imported from the file that writes it, and nothing imports upward."""

import ast
from pathlib import Path

import pytest
from helpers.paths import ROOT

FILES = sorted(p for pattern in ("*.py", "support/*.py", "experiments/**/*.py") for p in ROOT.glob(pattern))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
STAGES = {"flow", "prototypes", "pretrain", "evaluate", "search"}
METHOD = {"goca", "tvl1"}
# their subject is data and model
ABOUT_NETWORKS = {"features", "inference", "classifiers", "weights", "training_flags", "evaluation_flags",
                  "collection_index", "memory"}


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def defined(tree):
    """Names that a file writes itself, and the modules of ours that it imports whole."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


TREES = {module(p): ast.parse(p.read_text()) for p in FILES}
DEFINED = {name: defined(tree) for name, tree in TREES.items()}


def imports(tree):
    """-> [(module of ours, name or None for the module itself, line)], {alias: module of ours}."""
    found, aliases = [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                if a.name in DEFINED:
                    found.append((a.name, None, node.lineno))
                    aliases[a.asname or a.name] = a.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            for a in node.names:
                if (inner := f"{node.module}.{a.name}") in DEFINED:
                    found.append((inner, None, node.lineno))
                    aliases[a.asname or a.name] = inner
                elif node.module in DEFINED:
                    found.append((node.module, a.name, node.lineno))
    return found, aliases


TAKEN = {name: {taken for _, taken, _ in imports(tree)[0]} for name, tree in TREES.items()}  # of other files of ours


def passed_on(tree):
    """Names of ours that a file takes from another that does not write them -> ["line: module.name", ...]."""
    found, aliases = imports(tree)
    wrong = [f"{line}: {name} from {m}" for m, name, line in found if name and name not in DEFINED[m]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            m = aliases[node.value.id]
            if node.attr in TAKEN[m] - DEFINED[m]:
                wrong.append(f"{node.lineno}: {node.value.id}.{node.attr}")
    return wrong


@pytest.mark.parametrize("path", FILES + TESTS, ids=module)
def test_names_are_imported_from_where_they_are_written(path):
    assert not passed_on(ast.parse(path.read_text()))


def test_a_name_that_is_passed_on_would_be_noticed():
    assert passed_on(ast.parse("from pretrain import LARS")) == ["1: LARS from pretrain"]
    assert passed_on(ast.parse("import pretrain\npretrain.LARS")) == ["2: pretrain.LARS"]
    assert not passed_on(ast.parse("from support.optim import LARS\nimport data\ndata.augment"))


@pytest.mark.parametrize("path", FILES, ids=module)
def test_nothing_imports_upward(path):
    """Stages stand on the method, model, data and support; support on itself, and where it is about networks or flow
    methods on those; the method on nothing."""
    name, (found, _) = module(path), imports(TREES[module(path)])
    modules = {m for m, _, _ in found}
    if name in METHOD:
        assert modules <= {"goca"}
    elif name in ("model", "data"):
        assert all(m.startswith("support.") or m == "model" for m in modules)
    elif name.startswith("support."):
        allowed = {"data", "model"} if name.split(".")[1] in ABOUT_NETWORKS else set()
        allowed |= METHOD if name == "support.flow_methods" else set()
        assert all(m.startswith("support.") or m in allowed for m in modules), modules
    elif name in STAGES:
        assert not any(m.startswith("experiments") or m in STAGES for m in modules)


def test_no_test_imports_another():
    for path in TESTS:
        names = [n.module or "" for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        names += [a.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Import) for a in n.names]
        assert not [n for n in names if n.startswith("test_") or n == "conftest"], path


def test_the_map_of_support_names_every_file():
    text = ast.get_docstring(ast.parse((ROOT / "support" / "__init__.py").read_text()))
    for path in Path(ROOT / "support").glob("*.py"):
        assert path.name == "__init__.py" or f"{path.stem}" in text.split(), path.name


@pytest.mark.parametrize("path", [p for p in FILES if "experiments" not in p.parts], ids=module)
def test_scikit_learn_is_imported_where_it_is_used(path):
    """It takes a second, which most commands would start later for nothing."""
    for node in TREES[module(path)].body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        assert not any(n.split(".")[0] in ("sklearn", "scipy", "matplotlib") for n in names), node.lineno
