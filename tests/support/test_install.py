"""The build, and pip install: the method and the compiled operator in another environment that has torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT

FLAG = "--no-build-isolation"
USE = """
import torch, goca, tvl1
assert goca._goca is not None, goca._MISSING
scores = torch.nn.functional.normalize(torch.randn(2, 3, 5, 7), dim=-1)
torch.testing.assert_close(*(goca.guided_loss(scores, impl=impl) for impl in ("compiled", "reference")))
assert tvl1.flow(torch.rand(1, 2, 20, 20), impl="compiled", warps=1).shape == (1, 1, 2, 20, 20)
print(goca.__file__, tvl1.__file__, goca._goca.__file__, sep="\\n")
"""


@pytest.fixture
def sources(tmp_path):
    """What a build reads, in a folder of its own: one in the checkout would leave files there."""
    folder = tmp_path / "sources"
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for name in ("goca.py", "tvl1.py", "setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def pip_install(*arguments, **environment):
    if not shutil.which(os.environ.get("CXX", "c++")):
        pytest.skip("no C++ compiler to build the operator with")
    run = subprocess.run([sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps",
                          *map(str, arguments)], capture_output=True, text=True,
                         env={**os.environ, "PIP_RETRIES": "0", **environment})  # where there is no network
    if "No module named pip" in run.stderr:
        pytest.skip("this Python has no pip")
    return run


def test_pip_install(tmp_path):
    """Of the checkout, so that what `make build` compiled there isn't compiled again; the rest is built elsewhere."""
    places = tmp_path / "places.cfg"
    places.write_text(f"[build]\nbuild_lib={tmp_path}/lib\n[egg_info]\negg_base={tmp_path}\n"
                      f"[bdist_wheel]\nbdist_dir={tmp_path}/wheel\n")
    site = tmp_path / "site"
    run = pip_install(FLAG, "--no-index", "--target", site, ROOT, DIST_EXTRA_CONFIG=str(places))
    assert run.returncode == 0, run.stdout + run.stderr
    installed = {path.name.split(".")[0].split("-")[0] for path in site.iterdir()} - {"__pycache__"}
    assert installed == {"goca", "tvl1", "_goca"}, "the stages and their folders are not for other projects"
    use = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, cwd=tmp_path,
                         env={**os.environ, "PYTHONPATH": str(site)})
    assert use.returncode == 0, use.stderr
    assert [Path(path).parent for path in use.stdout.split()] == [site] * 3


def test_a_build_that_sees_no_torch_names_the_flag(sources, tmp_path):
    run = subprocess.run([sys.executable, "-S", "-E", "setup.py", "build_ext"], capture_output=True, text=True,
                         cwd=sources)
    assert run.returncode != 0 and FLAG in run.stderr and "requirements.txt" in run.stderr
    isolated = pip_install("--target", tmp_path / "site", sources)
    if "setuptools>=77" in isolated.stderr:
        pytest.skip("pip's isolated build needs a package index to fetch setuptools from")
    assert isolated.returncode != 0 and FLAG in isolated.stdout + isolated.stderr, isolated.stderr
    assert not (tmp_path / "site").exists()


def test_setup_says_what_it_builds(run_script):
    said = run_script("setup.py", "--name", status=0, GOCA_CUDA="0")
    assert "building the CPU kernels alone, no CUDA kernels: GOCA_CUDA=0" in said
    if torch.version.cuda is None:
        said = run_script("setup.py", "--name", status=1, GOCA_CUDA="1")
        assert "GOCA_CUDA=1 asks for the CUDA kernels, but torch" in said


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_make_lets_python_keep_what_it_compiled():
    """Else each process would compile torch's Python again: 9 s instead of 2."""
    run = subprocess.run(["make", "--eval", "show: ; @env", "show"], capture_output=True, text=True, cwd=ROOT,
                         env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert run.returncode == 0 and "PYTHONDONTWRITEBYTECODE" not in run.stdout, run.stderr
