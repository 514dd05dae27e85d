"""Build the compiled operator in place: `python setup.py build_ext --inplace` (csrc/ -> _goca*.so beside goca.py).

`pip install --no-build-isolation .` builds it into an environment, with goca.py and tvl1.py (pyproject.toml).

The CPU kernels always; the CUDA kernels where torch is a CUDA build and nvcc is found, for the cards present or for
TORCH_CUDA_ARCH_LIST. GOCA_CUDA=0 leaves them out, GOCA_CUDA=1 insists. About a minute on 2 cores; without it
everything runs on the PyTorch reference. CXX picks another compiler; GOCA_CXXFLAGS adds flags for it, such as
-fsanitize=address (then also in LDFLAGS).
"""

import glob
import os
import re
import sys

try:
    import torch
    from setuptools import setup
    from torch.utils import cpp_extension
except ImportError as error:
    sys.exit(f"error: {error}. The build needs the torch that the operator will run with: pip install -r "
             "requirements.txt. It is installed? Then pip hides it from the build: pip install --no-build-isolation .")

TORCH_OLDEST, TORCH_BEFORE = (2, 11), (2, 14)
ROOT = os.path.dirname(os.path.abspath(__file__))


def version(text):
    """(major, minor) of a version such as 2.13.0+cu130."""
    return tuple(int(x) for x in re.match(r"(\d+)\.(\d+)", text).groups())


def choose_cuda():
    """(whether to build the CUDA kernels, why)."""
    wish = os.environ.get("GOCA_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"error: GOCA_CUDA must be 0 or 1, got {wish!r}")
    home = cpp_extension.CUDA_HOME or ""
    nvcc, header = os.path.join(home, "bin", "nvcc"), os.path.join(home, "include", "cuda_runtime.h")
    if wish == "0":
        return False, "GOCA_CUDA=0"
    if torch.version.cuda is None:
        found, why = False, f"torch {torch.__version__} is a build without CUDA"
    elif not (home and os.path.isfile(nvcc) and os.path.isfile(header)):
        found, why = False, (f"torch is built for CUDA {torch.version.cuda}, but bin/nvcc and include/cuda_runtime.h "
                             f"aren't both below {home or 'a known folder'}; set CUDA_HOME")
    elif not (torch.cuda.is_available() or os.environ.get("TORCH_CUDA_ARCH_LIST")):
        found, why = False, "no card is present; TORCH_CUDA_ARCH_LIST (such as 8.0;9.0) would say what to build for"
    else:
        found, why = True, f"torch is built for CUDA {torch.version.cuda}, nvcc is {nvcc}"
    if wish == "1" and not found:
        sys.exit(f"error: GOCA_CUDA=1 asks for the CUDA kernels, but {why}")
    return found, why


def extension(cuda):
    # -fopenmp for at::parallel_for, -fopenmp-simd for the loops; errno and traps would keep the compiler from vectors.
    # Python's own flags may ask for symbols of a debugger: writing them, of torch's headers, took half of the build.
    cxx = ["-O3", "-g0", "-std=c++20", "-fopenmp", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
           "-Wall", "-Wno-psabi", "-Wno-unknown-pragmas", *os.environ.get("GOCA_CXXFLAGS", "").split()]
    common = dict(name="_goca", include_dirs=[os.path.join(ROOT, "csrc")],
                  depends=glob.glob("csrc/*.h") + glob.glob("csrc/*.cuh"))
    sources = ["csrc/bindings.cpp", "csrc/cpu_assign.cpp", "csrc/cpu_loss.cpp", "csrc/tvl1.cpp", "csrc/tvl1_cpu.cpp"]
    if not cuda:
        return cpp_extension.CppExtension(sources=sources, extra_link_args=["-fopenmp"],
                                          extra_compile_args={"cxx": cxx}, **common)
    return cpp_extension.CUDAExtension(
        sources=[*sources, "csrc/cuda_assign.cu", "csrc/cuda_loss.cu", "csrc/tvl1_cuda.cu"],
        extra_link_args=["-fopenmp"],
        extra_compile_args={"cxx": [*cxx, "-DGOCA_CUDA"], "nvcc": ["-O3", "-std=c++17", "-lineinfo"]}, **common)


if __name__ == "__main__":
    if not TORCH_OLDEST <= version(torch.__version__) < TORCH_BEFORE:
        sys.exit(f"error: torch {torch.__version__} is installed; this needs torch "
                 f">={TORCH_OLDEST[0]}.{TORCH_OLDEST[1]},<{TORCH_BEFORE[0]}.{TORCH_BEFORE[1]} (requirements.txt)")
    os.chdir(ROOT)
    cuda, why = choose_cuda()
    print(f"building the CPU kernels {'and the CUDA kernels' if cuda else 'alone, no CUDA kernels'}: {why}", flush=True)
    setup(ext_modules=[extension(cuda)],
          cmdclass={"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)})
