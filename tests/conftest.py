"""What several test files share: a tiny generated data set with its flow and prototypes, the real clips, a browser."""

import json
import os
import subprocess
import sys
from pathlib import Path

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # threads that spin while they wait take the cores from others
os.environ["OMP_NUM_THREADS"] = "1"  # here and in the processes that tests start: sums depend on it

import numpy as np
import pytest
from helpers.browser import Browser
from helpers.paths import ROOT

import flow
from experiments import walkers
from support.files import save_arrays

CLIPS = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="session")
def real_clips():
    """The folder of real clips, which have no place in the repository."""
    if not CLIPS.is_dir():
        pytest.skip(f"the real clips are not at {CLIPS} (research-use terms: they are not distributed)")
    return CLIPS


class TinySet:
    """20 + 10 generated films of 40 px and 12 frames, their flow, 24 prototypes of 16-d."""

    def __init__(self, root):
        self.videos, self.splits = root / "set" / "videos", root / "set" / "splits"
        self.flow, self.prototypes = root / "flow", root / "prototypes.npz"
        walkers.make(root / "set", train=20, test=10, size=40, frames=12)
        status = flow.main(["--videos", str(self.videos), "--out", str(self.flow), "--short-side", "0", "--warps", "1",
                            "--epsilon", "0.1"])
        assert status == 0
        p = np.random.default_rng(0).standard_normal((24, 16), dtype=np.float32)
        save_arrays(self.prototypes, "prototypes", {}, prototypes=p / np.linalg.norm(p, axis=1, keepdims=True))

    def common(self):
        return ["--dataset", "ucf101", "--videos", str(self.videos), "--splits", str(self.splits), "--flow",
                str(self.flow)]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return TinySet(tmp_path_factory.mktemp("tiny"))


class Forked:
    """tests/helpers/forked.py: `forked(function, **arguments)` fails with what that printed."""

    def __init__(self, root):
        self.said = root / "said"
        self.process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "helpers" / "forked.py")], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        env={**os.environ, "OMP_NUM_THREADS": "1"})

    def __call__(self, function, **arguments):
        arguments = {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}
        self.process.stdin.write(json.dumps([function, {**arguments, "_said": str(self.said)}]) + "\n")
        self.process.stdin.flush()
        status = self.process.stdout.readline().strip()
        assert status == "0", f"{function}: status {status}\n{self.said.read_text()}"


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    server = Forked(tmp_path_factory.mktemp("forked"))
    yield server
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture
def run_script(forked, tmp_path):
    """run_script(name, *argv) does what `python name *argv` does in the checkout, in a fork -> what it prints."""
    def run(name, *argv, status, largest=-1, **environment):
        said = tmp_path / "said"
        forked("script", path=ROOT / name, argv=[str(a) for a in argv], folder=ROOT, environment=environment,
               largest=largest, status=status, said=said)
        return said.read_text()
    return run


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()
