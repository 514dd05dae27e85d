"""The networks against what their papers publish."""

import pytest
import torch
from torch import nn

import model


def count(net):
    return sum(p.numel() for p in net.parameters())


def test_s3d_has_the_published_size():
    # Xie et al. 2018, Table 2: 8.77 M is S3D-G; S3D is 8.3 M with a 400-way classifier, 7.91 M without
    assert count(model.S3D(3)) == 7_910_048


def test_r2plus1d_has_the_published_size():
    # Tran et al. 2018: 31.5 M with a 400-way classifier
    assert count(model.R2Plus1D18(3)) + count(nn.Linear(512, 400)) == 31_505_325


@pytest.mark.parametrize(("arch", "frames", "size", "shape"), [
    ("s3d", 32, 128, (1, 1024, 4, 4, 4)), ("s3d", 16, 64, (1, 1024, 2, 2, 2)), ("s3d", 8, 32, (1, 1024, 1, 1, 1)),
    ("r2plus1d18", 16, 112, (1, 512, 2, 7, 7)), ("r2plus1d18", 5, 33, (1, 512, 1, 3, 3))])
@pytest.mark.parametrize("channels", [2, 3])
def test_feature_map_shapes(arch, frames, size, shape, channels):
    net = model.ARCHITECTURES[arch](channels).to("meta").eval()
    assert net(torch.empty(1, channels, frames, size, size, device="meta")).shape == shape


@pytest.mark.parametrize(("arch", "pool", "dim"), [("s3d", "avg", 1024), ("r2plus1d18", "avg", 512),
                                                   ("r2plus1d18", "1x2x2", 2048)])
def test_feature_dimensions(arch, pool, dim):
    net = model.Backbone(arch, 3, pool=pool).to("meta").eval()
    assert net.feature_dim == dim
    assert net(torch.empty(2, 3, 16, 64, 64, device="meta")).shape == (2, dim)


@pytest.mark.parametrize("arch", model.ARCHITECTURES)
def test_width_scales_every_layer_and_one_is_the_published_network(arch):
    quarter = model.ARCHITECTURES[arch](3, 0.25)
    assert count(quarter) < count(model.ARCHITECTURES[arch](3)) / 10
    assert quarter.out_channels == {"s3d": 256, "r2plus1d18": 128}[arch]
    assert all(m.out_channels % 8 == 0 for m in quarter.modules()
               if isinstance(m, nn.Conv3d) and arch == "s3d")


@pytest.mark.parametrize("arch", model.ARCHITECTURES)
def test_channels_last_changes_nothing_but_speed(arch):
    torch.manual_seed(0)
    net = model.Backbone(arch, 3, 0.125).double()
    x = torch.randn(2, 3, 8, 32, 32, dtype=torch.float64)
    before = net.net(x)
    grad = torch.autograd.grad(before.square().sum(), next(net.parameters()))[0]
    net = net.to(memory_format=torch.channels_last_3d)
    after = net.net(x.to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.autograd.grad(after.square().sum(), next(net.parameters()))[0], grad, rtol=1e-7,
                               atol=1e-9)


@pytest.mark.parametrize(("ours", "plain"), [
    *[(model.Conv3d(6, 8, k, s, p), nn.Conv3d(6, 8, k, s, p, bias=False))
      for k, s, p in (((1, 3, 3), (1, 2, 2), (0, 1, 1)), ((7, 1, 1), (2, 1, 1), (3, 0, 0)), (1, 1, 0),
                      (1, (2, 2, 2), 0), ((3, 3, 3), 1, 1))],
    *[(model.MaxPool3d((k,) * 3, (s,) * 3, (p,) * 3), nn.MaxPool3d(k, s, p))
      for k, s, p in ((3, 1, 1), (3, 2, 1), (2, 2, 0))]])
def test_folded_layers_are_their_plain_twins(ours, plain):
    """Zeros and ones in plenty, so that pooling has ties: they must get their gradient where torch puts it.

    8 frames: on 5, the twin of the second case (stride 2) writes beyond its memory (torch 2.13, CPU, channels last).
    """
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(3, 6, 8, 9, 7, generator=torch.Generator().manual_seed(0)).clamp(0, 1)
    x, out, grads = x.to(memory_format=torch.channels_last_3d), [], []
    for layer in (ours, plain):
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        out.append(layer(leaf))
        weight = torch.randn(out[0].shape, generator=torch.Generator().manual_seed(1))
        grads.append(torch.autograd.grad((out[-1] * weight).sum(), [leaf, *layer.parameters()]))
    assert model.folds(x) and not model.folds(x.contiguous())
    for a, b in zip([out[0], *grads[0]], [out[1], *grads[1]], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_gradients_are_right_at_two_frames():
    # The trap of torch 2.13 on the CPU in bfloat16: Conv3d (3, 1, 1) on 2 frames, S3D's last blocks. float32 is used
    # there, and must agree with float64.
    torch.manual_seed(0)
    single, x = model.SeparableConv(16, 24, 3).to(memory_format=torch.channels_last_3d), torch.randn(8, 16, 2, 7, 7)
    double = model.SeparableConv(16, 24, 3).double()
    double.load_state_dict(single.state_dict())
    grads = [torch.autograd.grad(net(inputs).square().mean(), list(net.parameters()))
             for net, inputs in ((single, x.to(memory_format=torch.channels_last_3d)), (double, x.double()))]
    for a, b in zip(*grads, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-6


def test_too_small_clips_are_named():
    with pytest.raises(ValueError, match="clips of 4 frames and 64 px are too small for s3d"):
        model.Backbone("s3d", 3, 0.125)(torch.zeros(1, 3, 4, 64, 64))


def clips(m, crops, frames=8, size=32):
    return {"rgb": torch.randn(m, crops, 3, frames, size, size), "flow": torch.randn(m, crops, 2, frames, size, size)}


@pytest.mark.parametrize(("merge", "views", "heads"), [("shared", 2, 1), ("separate", 2, 2), ("average", 1, 1)])
def test_two_view_gives_unit_features_by_view_crop_and_sample(merge, views, heads):
    torch.manual_seed(0)
    net = model.TwoView(torch.randn(20, 6), "s3d", 0.125, hidden=16, merge=merge).eval()
    batch = [clips(3, 2), clips(3, 4)]
    out = net(batch)
    assert out.shape == (views, 6, 3, 6) and len(net.heads) == heads
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(views, 6, 3))
    # sample 1, short crop 2, by itself: lies at crop 2 + 2 (long crops first)
    alone = net([{k: v[1:2, 2:3] for k, v in batch[1].items()}])
    torch.testing.assert_close(out[:, 4, 1], alone[:, 0, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net.scores(out), out @ net.prototypes.T)


def test_prototypes_are_fixed_and_unit():
    net = model.TwoView(torch.randn(20, 6), "s3d", 0.125, hidden=16)
    assert "prototypes" in net.state_dict() and "prototypes" not in dict(net.named_parameters())
    torch.testing.assert_close(net.prototypes.norm(dim=1), torch.ones(20))


def test_seed_decides_the_backbones_whatever_the_prototypes():
    settings = {"seed": 3, "arch": "s3d", "width": 0.125, "hidden": 16, "pool": "avg", "method": "goca"}
    a = model.two_view(settings, torch.eye(2)).backbones.state_dict()
    b = model.two_view({**settings, "hidden": 24, "method": "sview"}, torch.eye(5)).backbones.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
