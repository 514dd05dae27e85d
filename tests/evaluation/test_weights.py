"""Other people's files, built here from their published key names and shapes, against forward passes written from those
names; our own export, and the example of its use in docs/evaluation.md."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.paths import ROOT

import data
import evaluate
import model
from support.checkpoints import save_checkpoint
from support.errors import BadInput
from support.files import load_arrays
from support.weights import export, load

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINETICS = (0.43216, 0.394666, 0.37645), (0.22803, 0.22145, 0.216989)


# ---------------------------------------------------------------------------------------------------------------------
# The published networks, by name: each makes its weights where its forward pass first needs them
# ---------------------------------------------------------------------------------------------------------------------
class Published:
    """state: what a file of this network holds."""

    def __init__(self, eps=1e-5, seed=0):
        self.state, self.eps, self.random = {}, eps, torch.Generator().manual_seed(seed)

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.random)

    def unit(self, x, conv, bn, cout, k, stride=(1, 1, 1), relu=True):
        """Convolution `conv` padded to keep the size, batch norm `bn`, ReLU."""
        if f"{conv}.weight" not in self.state:
            cin = x.shape[1]
            self.state[f"{conv}.weight"] = self.randn(cout, cin, *k) * (2 / (cin * k[0] * k[1] * k[2]))**0.5
            self.state |= {f"{bn}.weight": 1 + 0.1 * self.randn(cout), f"{bn}.bias": 0.1 * self.randn(cout),
                           f"{bn}.running_mean": 0.1 * self.randn(cout),
                           f"{bn}.running_var": 0.5 + self.randn(cout).abs(),
                           f"{bn}.num_batches_tracked": torch.tensor(7)}
        x = F.conv3d(x, self.state[f"{conv}.weight"], stride=stride, padding=tuple(n // 2 for n in k))
        mean, var, w, b = (self.state[f"{bn}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        x = F.batch_norm(x, mean, var, w, b, eps=self.eps)
        return F.relu(x) if relu else x


class S3D(Published):
    """CoCLR's backbone/s3dg.py without gates, or torchvision/models/video/s3d.py."""

    def __init__(self, torchvision=False, seed=0):
        super().__init__(1e-3 if torchvision else 1e-5, seed)
        self.torchvision = torchvision

    def one(self, x, name, cout):
        return self.unit(x, *([f"{name}.0", f"{name}.1"] if self.torchvision else [f"{name}.conv", f"{name}.bn"]),
                         cout, (1, 1, 1))

    def split(self, x, name, cout, k, stride=1):
        a, b, c, d = ("0.0", "0.1", "1.0", "1.1") if self.torchvision else ("conv1", "bn1", "conv2", "bn2")
        x = self.unit(x, f"{name}.{a}", f"{name}.{b}", cout, (1, k, k), (1, stride, stride))
        return self.unit(x, f"{name}.{c}", f"{name}.{d}", cout, (k, 1, 1), (stride, 1, 1))

    def mixed(self, x, name, c0, c1a, c1b, c2a, c2b, c3):
        zero = f"{name}.branch0" + ("" if self.torchvision else ".0")
        return torch.cat([
            self.one(x, zero, c0),
            self.split(self.one(x, f"{name}.branch1.0", c1a), f"{name}.branch1.1", c1b, 3),
            self.split(self.one(x, f"{name}.branch2.0", c2a), f"{name}.branch2.1", c2b, 3),
            self.one(F.max_pool3d(x, 3, 1, 1), f"{name}.branch3.1", c3)], 1)

    def forward(self, x):
        names = ([f"features.{i}" for i in (0, 2, 3, 5, 6, 8, 9, 10, 11, 12, 14, 15)] if self.torchvision else
                 ["Conv_1a", "Conv_2b", "Conv_2c", *(f"Mixed_{n}" for n in "3b 3c 4b 4c 4d 4e 4f 5b 5c".split())])
        x = self.split(x, names[0], 64, 7, 2)
        x = self.one(F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1)), names[1], 64)
        x = F.max_pool3d(self.split(x, names[2], 192, 3), (1, 3, 3), (1, 2, 2), (0, 1, 1))
        x = self.mixed(x, names[3], 64, 96, 128, 16, 32, 32)
        x = F.max_pool3d(self.mixed(x, names[4], 128, 128, 192, 32, 96, 64), 3, 2, 1)
        for name, channels in zip(names[5:10], ((192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64),
                                                (128, 128, 256, 24, 64, 64), (112, 144, 288, 32, 64, 64),
                                                (256, 160, 320, 32, 128, 128)), strict=True):
            x = self.mixed(x, name, *channels)
        x = self.mixed(F.max_pool3d(x, 2, 2), names[10], 256, 160, 320, 32, 128, 128)
        return self.mixed(x, names[11], 384, 192, 384, 48, 128, 128).mean((2, 3, 4))

    def file(self):
        """The state, in CoCLR's with each layer a second time under the name of its block."""
        blocks = {"Conv_1a": "block1.0", "Conv_2b": "block2.1", "Conv_2c": "block2.2", "Mixed_3b": "block3.1",
                  "Mixed_3c": "block3.2", "Mixed_5b": "block5.1", "Mixed_5c": "block5.2",
                  **{f"Mixed_4{n}": f"block4.{i + 1}" for i, n in enumerate("bcdef")}}
        twice = {} if self.torchvision else {
            f"{blocks[k.split('.', 1)[0]]}.{k.split('.', 1)[1]}": t for k, t in self.state.items()}
        return {**self.state, **twice}


class R2Plus1D(Published):
    """torchvision/models/video/resnet.py, r2plus1d_18."""

    def forward(self, x):
        x = self.unit(x, "stem.0", "stem.1", 45, (1, 7, 7), (1, 2, 2))
        x = self.unit(x, "stem.3", "stem.4", 64, (3, 1, 1))
        for layer, cout in enumerate((64, 128, 256, 512), 1):
            for block in (0, 1):
                cin, s, name = x.shape[1], 2 if layer > 1 and not block else 1, f"layer{layer}.{block}"
                m = cin * cout * 27 // (cin * 9 + 3 * cout)
                y = self.unit(x, f"{name}.conv1.0.0", f"{name}.conv1.0.1", m, (1, 3, 3), (1, s, s))
                y = self.unit(y, f"{name}.conv1.0.3", f"{name}.conv1.1", cout, (3, 1, 1), (s, 1, 1))
                y = self.unit(y, f"{name}.conv2.0.0", f"{name}.conv2.0.1", m, (1, 3, 3))
                y = self.unit(y, f"{name}.conv2.0.3", f"{name}.conv2.1", cout, (3, 1, 1), relu=False)
                if cin != cout:
                    x = self.unit(x, f"{name}.downsample.0", f"{name}.downsample.1", cout, (1, 1, 1), (s, s, s), False)
                x = F.relu(x + y)
        return x.mean((2, 3, 4))

    def file(self):
        return self.state


def prefixed(state, prefix):
    return {prefix + k: t for k, t in state.items()}


def pictures(seed=0, frames=9, size=40):
    """One clip as stored, uint8: RGB [1, T, S, S, 3] and flow [1, T, S, S, 2]."""
    rng = np.random.default_rng(seed)
    return (torch.from_numpy(rng.integers(0, 256, (1, frames, size, size, 3), np.uint8)),
            torch.from_numpy(rng.integers(1, 256, (1, frames, size, size, 2), np.uint8)))


def normalised(picture, statistics):
    """A picture [B, T, S, S, 3] in 0..1 as the published code's transforms leave it, [B, 3, T, S, S]."""
    return ((picture - torch.tensor(statistics[0])) / torch.tensor(statistics[1])).movedim(-1, 1)


def flow_picture(stored):
    """Flow as stored -> px -> the (128, v, u) picture in 0..1 of CoCLR's, ViCC's and GOCA's extraction."""
    px = (stored.float() - 128) * (20 / 127)
    grey = torch.full_like(px[..., :1], 128)
    return torch.cat([grey, ((px + 20) * (255 / 40)).flip(-1)], -1) / 255


HEAD = {"encoder_q.2.weight": torch.zeros(4, 4, 1, 1, 1), "encoder_q.2.bias": torch.zeros(4),
        "encoder_q.4.weight": torch.zeros(2, 4, 1, 1, 1), "encoder_q.4.bias": torch.zeros(2)}


# ---------------------------------------------------------------------------------------------------------------------
# Each weight at its place
# ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("view", model.VIEWS)
def test_coclr_and_vicc(tmp_path, view):
    rgb, flow = pictures()
    net, other = S3D(), S3D(seed=1)
    picture = rgb / 255 if view == "rgb" else flow_picture(flow)
    expected = net.forward(normalised(picture, IMAGENET))
    state = {**prefixed(net.file(), "encoder_q.0."), **HEAD, "queue": torch.zeros(2, 3), "queue_ptr": torch.zeros(1)}
    if view == "rgb":  # CoCLR: momentum encoder, the other view's encoder and their heads
        other.forward(normalised(picture, IMAGENET))
        state |= {**prefixed(other.file(), "encoder_k.0."), **prefixed(other.file(), "sampler.0."),
                  "queue_second": torch.zeros(2, 3), "queue_vname": torch.zeros(3), "queue_label": torch.zeros(3)}
    else:  # ViCC
        state |= {"prototypes.weight": torch.zeros(3, 2)}
    path = tmp_path / "epoch396.pth.tar"
    torch.save({"epoch": 396, "state_dict": state, "best_acc": 0.5, "iteration": 9, "optimizer": {"state": {}}}, path,
               _use_new_zipfile_serialization=False)  # as torch 1.4 wrote
    loaded, settings = load(f"{view}={path}")
    x = data.normalise_rgb(rgb.float() / 255) if view == "rgb" else data.normalise_flow(flow)
    with torch.no_grad():
        torch.testing.assert_close(loaded.features(view, x), expected, rtol=1e-4, atol=1e-5)
    assert list(loaded.backbones) == [view] and settings["arch"] == "s3d" and settings["frames"] == 32
    with pytest.raises(BadInput, match="does not say of which view it is; write --weights rgb="):
        load(str(path))


def test_released_goca_has_both_views_in_one_file(tmp_path):
    rgb, flow = pictures()
    nets = {"rgb": S3D(), "flow": S3D(seed=1)}
    expected = {"rgb": nets["rgb"].forward(normalised(rgb / 255, IMAGENET)),
                "flow": nets["flow"].forward(normalised(flow_picture(flow), IMAGENET))}
    state = {**prefixed(nets["rgb"].file(), "video_network."), **prefixed(nets["flow"].file(), "video_network_flow."),
             "projection_head.0.weight": torch.zeros(2, 2), "projection_head.1.running_mean": torch.zeros(2),
             "prototypes.weight": torch.zeros(3, 2)}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 500, "state_dict": prefixed(state, "module."), "optimizer": {}}, path)
    loaded, settings = load(str(path))
    assert settings["method"] == "GOCA (released)" and settings["arch"] == "s3d"
    with torch.no_grad():
        for view, x in (("rgb", data.normalise_rgb(rgb.float() / 255)), ("flow", data.normalise_flow(flow))):
            torch.testing.assert_close(loaded.features(view, x), expected[view], rtol=1e-4, atol=1e-5)
    assert list(load(f"flow={path}")[0].backbones) == ["flow"]


def test_torchvision_s3d(tmp_path):
    rgb, _ = pictures()
    net = S3D(torchvision=True)
    expected = net.forward(normalised(rgb / 255, KINETICS))
    head = {"classifier.1.weight": torch.zeros(400, 1024, 1, 1, 1), "classifier.1.bias": torch.zeros(400)}
    torch.save({**net.file(), **head}, tmp_path / "s3d.pth")
    x = data.normalise_rgb(rgb.float() / 255)
    loaded, settings = load(f"rgb={tmp_path / 's3d.pth'}")
    with torch.no_grad():
        torch.testing.assert_close(loaded.features("rgb", x), expected, rtol=1e-4, atol=1e-5)
        four = load(str(tmp_path / "s3d.pth"), pool="1x2x2")[0].features("rgb", x)
    assert settings["arch"] == "s3d" and settings["size"] == 224 and four.shape == (1, 4096)
    with pytest.raises(BadInput, match="holds no network for flow; it is torchvision's for rgb"):
        load(f"flow={tmp_path / 's3d.pth'}")


def test_r2plus1d_of_torchvision_and_of_the_released_goca(tmp_path):
    rgb, flow = pictures()
    net, files = R2Plus1D(), {}
    files["torchvision"] = net.forward(normalised(rgb / 255, KINETICS)), net.file(), "fc.", "rgb"
    files["GOCA (released)"] = (net.forward(normalised(flow_picture(flow), IMAGENET)),
                                prefixed(net.file(), "video_network_flow."), "video_network.fc.", "flow")
    for name, (expected, state, head, view) in files.items():
        torch.save({**state, f"{head}weight": torch.zeros(400, 512), f"{head}bias": torch.zeros(400)}, tmp_path / "r")
        loaded, settings = load(f"{view}={tmp_path / 'r'}")
        assert settings["arch"] == "r2plus1d18" and settings["method"] == name
        x = data.normalise_rgb(rgb.float() / 255) if view == "rgb" else data.normalise_flow(flow)
        with torch.no_grad():
            torch.testing.assert_close(loaded.features(view, x), expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit is said
# ---------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def coclr():
    """The state dict of a CoCLR file of zeros and ones: names and shapes only."""
    net = S3D()
    net.forward(torch.zeros(1, 3, 8, 32, 32))
    return prefixed(net.file(), "encoder_q.0.")


def run_of(path, arch="s3d"):
    settings = {"arch": arch, "width": 0.125, "hidden": 8, "pool": "avg", "method": "goca", "seed": 3, "frames": 8,
                "size": 32, "stride": 1, "flow_header": None, "videos": "/home/me/videos", "lambda1": 0.02}
    net = model.two_view(settings, torch.eye(4))
    save_checkpoint(path / "checkpoint.pt", {"settings": settings, "step": 5, "model": net.state_dict()})
    return str(path)


def refused(tmp_path, state, words, view="rgb="):
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(BadInput, match=words):
        load(f"{view}{tmp_path / 'x.pth'}")


def test_backbone_keys_that_do_not_fit_are_listed(tmp_path, coclr):
    q = "encoder_q.0."
    lost = "Mixed_4c.branch2.1.bn2.bias", "block4.2.branch2.1.bn2.bias"
    without = {k: t for k, t in coclr.items() if not k.endswith(lost)}
    refused(tmp_path, without, rf"missing: {q}Mixed_4c.branch2.1.bn2.bias")
    refused(tmp_path, {**coclr, f"{q}Mixed_6a.conv.weight": torch.zeros(1)}, rf"not known: {q}Mixed_6a.conv.weight")
    refused(tmp_path, {**coclr, "decoder.weight": torch.zeros(1)}, "not known: decoder.weight")
    stem = f"{q}Conv_1a.conv1.weight"
    refused(tmp_path, {**coclr, stem: torch.zeros(64, 2, 1, 7, 7)},
            rf"another shape: {stem} is \[64, 2, 1, 7, 7\], not \[64, 3, 1, 7, 7\]")
    refused(tmp_path, {**coclr, stem: coclr[stem] + 1}, f"block1.0.conv1.weight differs from {stem}, which is the same")
    half = {k: t for k, t in coclr.items() if ".block" not in k and "num_batches" not in k}
    torch.save(half, tmp_path / "half.pth")
    load(f"rgb={tmp_path / 'half.pth'}")  # one name a layer is enough


def test_other_networks_are_refused(tmp_path, coclr):
    refused(tmp_path, {**coclr, "encoder_q.0.Mixed_3b.gating_b0.fc.weight": torch.zeros(64, 64)}, "it is S3D-G")
    refused(tmp_path, {"encoder_q.0.conv1.spatial_conv.weight": torch.zeros(83, 3, 1, 7, 7)}, "it is ViCC's R")
    refused(tmp_path, {"stem.0.weight": torch.zeros(64, 3, 3, 7, 7)}, "missing: stem.1.weight.*another shape: stem.0.w")
    refused(tmp_path, {"fc.weight": torch.zeros(2)}, "no network of a known layout; known are GOCA.*holds: fc.weight")
    refused(tmp_path, torch.zeros(2), "holds a Tensor, no state dict")
    refused(tmp_path, {"kind": "checkpoint"}, "is a checkpoint of pretrain.py; give it as --checkpoint")
    for arch in ("s3d", "r2plus1d18"):
        run_of(tmp_path, arch)
        export(tmp_path, tmp_path / f"{arch}.pt")
    with pytest.raises(BadInput, match="s3d and r2plus1d18 can't be fused"):
        load(f"rgb={tmp_path / 'r2plus1d18.pt'}", f"flow={tmp_path / 's3d.pt'}")
    with pytest.raises(BadInput, match="the network for rgb is given twice"):
        load(f"rgb={tmp_path / 's3d.pt'}", str(tmp_path / "s3d.pt"))


class Trap:
    """Unpickled by a careless reader, it would leave a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path, coclr):
    for thing in (Trap(tmp_path / "ran"), argparse.Namespace(net="s3d")):
        refused(tmp_path, {"state_dict": coclr, "args": thing}, r"holds Python objects \(\w.*save its tensors alone")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "x.pth").write_bytes(b"rubbish")
    for path, words in ((tmp_path / "x.pth", "damaged or no file of torch.save"), (tmp_path / "y", "doesn't exist")):
        with pytest.raises(BadInput, match=words):
            load(f"rgb={path}")


# ---------------------------------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------------------------------
def evaluated(tiny, tmp_path, name, *more):
    argv = [name, *tiny.common(), "--workers", "0", "--json", str(tmp_path / "r.json"), *more]
    assert evaluate.evaluate(evaluate.arguments(argv)) == 0
    return json.loads((tmp_path / "r.json").read_text())


def test_evaluate_with_other_peoples_weights(tiny, tmp_path, coclr):
    torch.save({"state_dict": coclr}, tmp_path / "coclr.pth.tar")
    both = [f"{v}={tmp_path / 'coclr.pth.tar'}" for v in model.VIEWS]
    small = ["--frames", "8", "--size", "32", "--protocol", "coclr"]
    out = evaluated(tiny, tmp_path, "retrieval", "--weights", *both, *small)
    p = out["protocol"]
    assert set(out["results"]) == {"rgb", "flow", "rgb+flow"} and p["method"] == "CoCLR or ViCC" and p["frames"] == 8
    assert p["checkpoint"] == " ".join(both) and len(p["weights"]) == 16 and p["step"] == 0
    assert len(list((tmp_path / "features").glob("*.npz"))) == 2  # beside the file, like a checkpoint's
    out = evaluated(tiny, tmp_path, "linear", "--weights", both[0], *small, "--on", "clips", "--epochs", "1",
                    "--batch-size", "20", "--out", str(tmp_path / "o"), "--scale", "1", "1.2")
    assert set(out["results"]) == {"rgb"} and out["protocol"]["centring"] == "none" != p["centring"]
    with pytest.raises(BadInput, match=r"--views flow: .* holds a network for rgb only; name files for both"):
        evaluated(tiny, tmp_path, "retrieval", "--weights", both[0], *small, "--views", "flow")
    with pytest.raises(BadInput, match="was trained with --arch s3d, not r2plus1d18"):
        evaluated(tiny, tmp_path, "retrieval", "--weights", both[0], *small, "--arch", "r2plus1d18")


def test_an_export_is_the_run(tiny, tmp_path, capsys):
    run = run_of(tmp_path)
    (tmp_path / "lr=0.1").mkdir()
    out = str(tmp_path / "lr=0.1" / "goca.pt")
    assert evaluate.evaluate(evaluate.arguments(["export", "--checkpoint", run, "--out", out])) == 0
    plain = torch.load(out, weights_only=True)
    assert "/home/me" not in str(plain["settings"]) and set(plain) == {"kind", "version", "settings", "rgb", "flow"}
    assert all(k.startswith("net.layers.") for v in model.VIEWS for k in plain[v])
    a = evaluated(tiny, tmp_path, "retrieval", "--checkpoint", run)
    b = evaluated(tiny, tmp_path, "retrieval", "--weights", out)
    differ = {k for k in a["protocol"].keys() | b["protocol"].keys() if a["protocol"].get(k) != b["protocol"].get(k)}
    assert a["results"] == b["results"] and a["neighbours"] == b["neighbours"] and differ == {"checkpoint"}
    b = evaluated(tiny, tmp_path, "retrieval", "--weights", f"flow={out}")
    assert list(b["results"]) == ["flow"] and b["results"]["flow"] == a["results"]["flow"]
    assert {file.name for file in (tmp_path / "lr=0.1").iterdir()} == {"goca.pt", "features"}
    plain["flow"].popitem()  # the count of batches
    plain["flow"].popitem()
    torch.save(plain, out)
    with pytest.raises(BadInput, match=r"is damaged: .*Missing key"):
        load(out)


def test_the_documentation_s_example_of_features(tiny, tmp_path, monkeypatch):
    code = re.search(r"```python\n(import torch\n.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL)[1]
    run = run_of(tmp_path)
    export(run, tmp_path / "goca.pt")
    (tmp_path / "flow").mkdir()
    (tmp_path / "flow" / "mine").symlink_to(tiny.flow)
    (tmp_path / "my_videos").symlink_to(tiny.videos)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "evaluation.md", "exec"), names)  # our own page
    evaluated(tiny, tmp_path, "features", "--weights", "goca.pt")
    seen = set()
    for file in (tmp_path / "features").glob("*.npz"):  # of the training and of the test list
        _, kept = load_arrays(file, "features", "")
        for name, rgb, flow in zip(kept["names"], kept["rgb"], kept["flow"], strict=True):
            np.testing.assert_allclose(names["features"][name], np.concatenate([rgb, flow]), rtol=1e-3, atol=1e-6)
            seen.add(name)
    assert seen == names["features"].keys() and len(seen) == 30
