"""Optical flow of pairs of frames: the methods of flow.py, each with all parameters that determine its numbers.

tvl1       TV-L1 [92], the paper's, with OpenCV's default parameters. Two backends that agree: this project's operator
           (tvl1.py, csrc/tvl1*; on a GPU too), and cv2.optflow.DualTVL1OpticalFlow.
dis        Dense Inverse Search (Kroeger, Timofte, Dai, Van Gool 2016), OpenCV's preset "medium"
farneback  Farneback (2003), OpenCV's defaults

The latter two are other flows, for those who accept them; docs/flow.md says how far away and how fast.
"""

import functools
import itertools

import cv2
import numpy as np
import torch

import goca
import tvl1
from support.errors import BadInput
from support.stores import BOUND

# By the names of OpenCV's setters. Zach, Pock, Bischof (2007): Lambda weighs the data term, Theta couples u with its
# auxiliary v, Tau is the step of the dual ascent; most others say where to stop.
TVL1 = {"Tau": 0.25, "Lambda": 0.15, "Theta": 0.3, "ScalesNumber": 5, "ScaleStep": 0.8, "WarpingsNumber": 5,
        "Epsilon": 0.01, "InnerIterations": 30, "OuterIterations": 10, "MedianFiltering": 5, "Gamma": 0.0}
DIS = {"FinestScale": 1, "PatchSize": 8, "PatchStride": 3, "GradientDescentIterations": 25,
       "UseMeanNormalization": True, "UseSpatialPropagation": True, "VariationalRefinementIterations": 5,
       "VariationalRefinementAlpha": 20.0, "VariationalRefinementDelta": 5.0, "VariationalRefinementGamma": 10.0}
FARNEBACK = {"NumLevels": 5, "PyrScale": 0.5, "FastPyramids": False, "WinSize": 13, "NumIters": 10, "PolyN": 5,
             "PolySigma": 1.1, "Flags": 0}
FLOW_METHODS = {"tvl1": ("TV-L1", TVL1, lambda: cv2.optflow.DualTVL1OpticalFlow_create()),
                "dis": ("DIS", DIS, lambda: cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)),
                "farneback": ("Farneback", FARNEBACK, lambda: cv2.FarnebackOpticalFlow_create())}
OURS = {"Tau": "tau", "Lambda": "lam", "Theta": "theta", "ScalesNumber": "scales", "ScaleStep": "scale_step",
        "WarpingsNumber": "warps", "Epsilon": "epsilon", "InnerIterations": "inner", "OuterIterations": "outer",
        "MedianFiltering": "median"}  # names in tvl1.py, which has no Gamma
SAME_FLOW_PX = 0.02  # px, mean end-point distance


def make_solver(settings):
    """The method of `settings` (of `make_settings`) -> a function: pairs uint8 [P, 2, h, w] -> float32 [P, 2, h, w] on
    their device, the flow from the first frame of each pair to its second, (u, v) in px to the right and down."""
    (params, create), = [(names, make) for name, names, make in FLOW_METHODS.values() if name == settings["method"]]
    if settings["backend"] == "goca":
        ours = {name: settings[theirs] for theirs, name in OURS.items()}
        return lambda pairs: tvl1.flow(pairs, impl="compiled", **ours)[:, 0]
    theirs = create()
    for name in params:
        getattr(theirs, f"set{name}")(settings[name])
    return lambda pairs: torch.from_numpy(np.stack([theirs.calc(*pair, None).transpose(2, 0, 1)
                                                    for pair in pairs.numpy()]))


def fields(frames, settings):
    """Flow of consecutive frames, an iterable of uint8 [h, w]: yields float32 [h, w, 2] for each pair, on the CPU."""
    solve = make_solver(settings)
    for a, b in itertools.pairwise(frames):
        yield solve(torch.from_numpy(np.stack([a, b]))[None])[0].permute(1, 2, 0).numpy()


def generated_pair():
    """A smooth texture that turns and grows a little, uint8 [1, 2, 96, 128]."""
    noise = np.random.default_rng(0).normal(size=(96, 128)).astype(np.float32)
    first = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)
    turn = cv2.getRotationMatrix2D((64, 48), 2, 1.02)
    second = cv2.warpAffine(first, turn, (128, 96), borderMode=cv2.BORDER_REFLECT)
    return torch.from_numpy(np.stack([first, second]))[None]


def same_flow(one, other):
    """Whether two flows [P, 2, h, w] are the same to SAME_FLOW_PX on average."""
    return float((one.cpu() - other.cpu()).norm(dim=1).mean()) < SAME_FLOW_PX


@functools.cache
def backends_agree(**params):
    """Whether this project's TV-L1 is OpenCV's. OpenCV 5: to the bit. OpenCV 4 rounds its warps: 0.014 px (4.14)."""
    pair, settings = generated_pair(), {"method": "TV-L1", **TVL1, **params}
    return same_flow(*(make_solver({**settings, "backend": backend})(pair) for backend in ("goca", "opencv")))


def choose_backend(backend="auto", method="tvl1", **params):
    """"auto", "goca" or "opencv" -> the latter two. Raises BadInput, with the cure, where it is not there."""
    if method != "tvl1":
        if backend == "goca":
            raise BadInput(f"--backend goca is for --method tvl1; {method} is OpenCV's alone")
        return "opencv"
    if backend != "opencv" and goca._goca is None:
        if backend == "goca":
            raise BadInput(f"--backend goca needs the extension; build it with: {goca.BUILD}")
        backend = "opencv"
    if backend != "goca" and not hasattr(getattr(cv2, "optflow", None), "DualTVL1OpticalFlow_create"):
        raise BadInput(
            f"OpenCV {cv2.__version__} has no cv2.optflow: opencv-python was installed over opencv-contrib-python "
            f"(both use one folder); mend it with: pip uninstall -y opencv-python opencv-python-headless "
            f"opencv-contrib-python opencv-contrib-python-headless && pip install opencv-contrib-python; "
            f"or take --backend goca, which does without")
    if backend == "auto":
        backend = "goca" if backends_agree(**params) else "opencv"
    return backend


def choose_device(wish, settings, local=0):
    """Where flow is computed: "auto", "cpu" or "cuda", and the process's local rank -> (torch.device, why not on a GPU,
    or None). A GPU is used where it gives the CPU's flow of a generated pair, to SAME_FLOW_PX.

    Raises BadInput if a GPU is asked for and can't be used.
    """
    why = None
    if wish == "cpu":
        return torch.device("cpu"), None
    if not torch.cuda.is_available():
        why = "torch sees no GPU (torch.cuda.is_available() is false)"
    elif settings["backend"] != "goca":
        why = f"{settings['method']} of OpenCV runs on the CPU alone"
    elif not goca._goca.cuda:
        why = f"the extension has no CUDA kernels; build them with: {goca.BUILD}"
    elif local >= torch.cuda.device_count():
        why = f"process {local} of this machine has no GPU of its own; there are {torch.cuda.device_count()}"
    else:
        device, pair, solve = torch.device("cuda", local), generated_pair(), make_solver(settings)
        try:
            if same_flow(solve(pair.to(device)), solve(pair)):
                return device, None
            why = f"{torch.cuda.get_device_name(device)} gives another flow than the CPU"
        except RuntimeError as e:
            why = f"{torch.cuda.get_device_name(device)} failed ({str(e).splitlines()[0]})"
    if wish == "cuda":
        raise BadInput(f"--device cuda can't be used: {why}")
    return torch.device("cpu"), why if torch.cuda.is_available() else None


def make_settings(short_side=256, quality=95, backend="auto", method="tvl1", **params):
    """All settings that determine the bytes of a store -> dict, the store's header. params: parameters of the method
    to change.

    The device is no setting: a GPU has the CPU's flow to SAME_FLOW_PX and mostly to the bit (`choose_device` checks
    that before it takes one), so a store may be begun on one and finished on the other. Each file's header names it.
    Raises BadInput, with the cure, where the backend is not there.
    """
    name, defaults, _ = FLOW_METHODS[method]
    return {"method": name, "backend": choose_backend(backend, method, **params), "opencv": cv2.__version__,
            "short_side": short_side, "resize": "grey, then area to shrink or bilinear to enlarge",
            "bound": BOUND, "quality": quality, **defaults, **params}
