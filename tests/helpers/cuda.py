"""CUDA kernels compiled by g++ over a stand-in for CUDA."""

import os
import shutil
import subprocess

import pytest
from helpers.paths import ROOT


def cuda_on_cpu(source, library, *flags):
    """Compile CUDA kernels by g++ over the stand-in for CUDA: cuda_on_cpu/`source` -> library. Skips without g++."""
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile the kernels with")
    tests = ROOT / "tests"
    run = subprocess.run(["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", "-w",
                          *flags, *os.environ.get("GOCA_CXXFLAGS", "").split(), f"-I{tests / 'cuda_on_cpu'}",
                          f"-I{ROOT / 'csrc'}", str(tests / "cuda_on_cpu" / source), "-o", str(library)],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
