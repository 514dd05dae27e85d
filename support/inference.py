"""Test clips through a network in batches, averaged by video."""

import torch

import data
import model


def to_input(view, clips, device):
    """Test clips of a view as stored, uint8 [B, T, S, S, C] -> what its backbone takes, [B, C, T, S, S]."""
    x = clips.to(device, non_blocking=True)
    return data.normalise_rgb(x.float() / 255) if view == "rgb" else data.normalise_flow(x)


def mean_over_views(call, items, views, device, batch_views):
    """Apply `call` to all test views of some videos in batches and average its outputs by video.

    items: of data.TestClips, without faults. call: {view: [B, C, T, S, S]} -> {name: [B, D]}. Returns {name: float32
    [videos, D]} on the CPU.
    """
    weight, counts = torch.cat([i["weight"] for i in items])[:, None], [len(i["weight"]) for i in items]
    outputs = []
    for batch in zip(*(torch.cat([i[view] for i in items]).split(batch_views) for view in views), strict=True):
        with model.precision(device):
            outputs.append(call({view: to_input(view, c, device) for view, c in zip(views, batch, strict=True)}))
    out = {}
    for name in outputs[0]:
        each = torch.cat([f[name].float() for f in outputs]) * weight.to(device)
        out[name] = torch.stack([video.sum(0) for video in each.split(counts)]).cpu()
    return out


def group_by_views(items, batch_views):
    """Group items so that each group has `batch_views` test views or a little more."""
    group, views = [], 0
    for item in items:
        group.append(item)
        views += len(item.get("weight", ()))
        if views >= batch_views:
            yield group
            group, views = [], 0
    if group:
        yield group
