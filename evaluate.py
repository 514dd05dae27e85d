"""Stage 4: what the representation is worth. Here: video retrieval (paper section 4.2, Tables 1, 3-5, Fig. 4).

In   a checkpoint of pretrain.py (or `none`: the untrained network), a labelled data set and its flow store.
Out  a table; with --json FILE {"protocol": {...}, "results": {view: {"R@1": ..., ...}}, "neighbours": {...}, ...}.

    python evaluate.py retrieval --checkpoint runs/ucf101 --dataset ucf101 --videos UCF-101 --splits ucfTrainTestlist \\
        --flow flow/ucf101 --json retrieval.json

Gallery = training list, queries = test list; R@k = share of queries with their class among the k nearest videos.
--protocol goca (paper): features of 3 x 10 views, each of unit length, averaged; cosine. --protocol coclr (CoCLR and
ViCC): averaged over windows of a clip's length every 15 frames, centred by their set's mean; cosine. View "rgb+flow"
averages the two views' features (paper) or, with --fusion similarity, adds their similarities (CoCLR, ViCC).
"""

import argparse
import json
import math
import time

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model

KS = (1, 5, 10, 20, 50)


# ---------------------------------------------------------------------------------------------------------------------
# Retrieval
# ---------------------------------------------------------------------------------------------------------------------
def prepare(features, protocol):
    """Averaged features [n, D] of one view and subset -> unit rows; "coclr" centres each set by its own mean."""
    if protocol == "coclr":
        features = features - features.mean(0)
    return F.normalize(features, dim=1)


def similarity(queries, gallery, view, fusion):
    """Blocks of the similarity matrix: dicts of unit features [q, D], [g, D] by view -> generator of [<=1024, g]."""
    if view == "rgb+flow" and fusion == "average":
        pairs = [(F.normalize(queries["rgb"] + queries["flow"], dim=1), F.normalize(gallery["rgb"] + gallery["flow"],
                                                                                   dim=1))]
    else:
        pairs = [(queries[v], gallery[v]) for v in view.split("+")]
    for at in range(0, len(pairs[0][0]), 1024):
        yield sum(q[at:at + 1024] @ g.T for q, g in pairs)


def nearest(queries, gallery, view, fusion, k):
    """The k nearest gallery rows of each query, nearest first -> int64 [q, k]."""
    return torch.cat([s.topk(k, dim=1).indices for s in similarity(queries, gallery, view, fusion)])


def recall(neighbours, query_labels, gallery_labels):
    """R@k in percent for k in KS that the gallery allows, with standard errors and chance.

    neighbours [q, K]; labels int64 [q], [g]. Chance is that of k gallery videos drawn at random.
    """
    right = gallery_labels[neighbours] == query_labels[:, None]  # [q, K]
    out, g, q = {}, len(gallery_labels), len(query_labels)
    others = g - (gallery_labels[None] == query_labels[:, None]).sum(1).double()  # gallery videos of another class
    for k in (k for k in KS if k <= neighbours.shape[1]):
        hit = right[:, :k].any(1).double().mean().item()
        i = torch.arange(k, dtype=torch.float64)
        miss = ((others[:, None] - i).clamp(min=0) / (g - i)).prod(1)  # C(others, k) / C(g, k)
        out |= {f"R@{k}": 100 * hit, f"R@{k} standard error": 100 * math.sqrt(hit * (1 - hit) / q),
                f"R@{k} chance": 100 * (1 - miss.mean().item())}
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Features
# ---------------------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def extract(net, videos, store, s, device, what):
    """Backbone features of each video, averaged over its test views -> ({view: float32 [n, D]}, kept videos, faults).

    Each view's feature has unit length before the average under protocol "goca".
    """
    clips = data.TestClips(videos, store, protocol=s.protocol, frames=s.frames, size=s.size, stride=s.stride)
    loader = DataLoader(clips, batch_size=None, num_workers=s.workers, worker_init_fn=data.start_worker)
    features, kept, faults = {v: [] for v in model.VIEWS}, [], []
    for item in tqdm(loader, total=len(videos), desc=what, unit="video", mininterval=1):
        if "fault" in item:
            faults.append(item["fault"])
            continue
        kept.append(videos[item["index"]])
        weight = item["weight"].to(device)[:, None]
        for view in model.VIEWS:
            out = []
            for at in range(0, len(weight), s.batch_views):
                x = item[view][at:at + s.batch_views].to(device)
                x = data.normalise_rgb(x.float() / 255) if view == "rgb" else data.normalise_flow(x)
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    out.append(net.features(view, x))
            out = torch.cat(out)  # [K, D]
            if s.protocol == "goca":
                out = F.normalize(out, dim=1)
            features[view].append((out * weight).sum(0).cpu())
    if not kept:
        raise data.BadInput(f"none of the {len(videos)} {what} can be read; the first: {faults[0]}")
    return {v: torch.stack(f) for v, f in features.items()}, kept, faults


def load_network(s):
    """--checkpoint -> (network in eval mode, its settings); what a flag says must agree with the checkpoint."""
    given = {k: getattr(s, k) for k in ("arch", "width", "pool", "frames", "size", "stride")}
    if s.checkpoint == "none":
        settings = {"arch": "s3d", "width": 1.0, "pool": "avg", "frames": 32, "size": 128, "stride": 1, "hidden": 8,
                    "method": "goca", "seed": s.seed, **{k: v for k, v in given.items() if v is not None}}
        return model.two_view(settings, torch.eye(2)).eval(), settings
    state = data.load_checkpoint(s.checkpoint)
    settings = state["settings"]
    for k in ("arch", "width", "pool"):
        if given[k] is not None and given[k] != settings[k]:
            raise data.BadInput(f"{s.checkpoint} was trained with --{k} {settings[k]}, not {given[k]}; "
                                f"leave the flag out")
    net = model.two_view(settings, state["model"]["prototypes"])
    net.load_state_dict(state["model"])
    return net.eval(), {**settings, "step": state["step"], **{k: given[k] for k in ("frames", "size", "stride")
                                                            if given[k] is not None}}


def check_store(store, settings, s):
    """Refuse a flow store made with other settings than the one that the checkpoint was trained on."""
    trained = settings.get("flow_header")
    if trained is None or trained == store.header:
        return
    keys = sorted(k for k in trained.keys() | store.header.keys() if trained.get(k) != store.header.get(k))
    what = ", ".join(f"{k}: {trained.get(k)} in training, {store.header.get(k)} here" for k in keys)
    raise data.BadInput(f"the flow in {s.flow} was made with other settings than the checkpoint's ({what}); extract it "
                        f"with the same")


def retrieval(s):
    """The command `retrieval` -> exit status."""
    device = torch.device(s.device if s.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    net, settings = load_network(s)
    for k in ("frames", "size", "stride"):
        setattr(s, k, settings[k])
    store = data.FlowStore(s.flow)
    check_store(store, settings, s)
    net = net.to(device, memory_format=torch.channels_last_3d)
    began = time.perf_counter()
    sets, labels, kept, left_out = {}, {}, {}, []
    for subset, what in (("train", "gallery videos"), ("test", "queries")):
        found = data.read_split(s.dataset, s.videos, s.splits, s.split, subset)
        if not found.classes:
            raise data.BadInput(f"{s.videos} has no labels, which retrieval needs: put each class in a "
                                f"folder of its own")
        features, kept[subset], faults = extract(net, found.videos, store, s, device, what)
        sets[subset] = {v: prepare(f, s.protocol) for v, f in features.items()}
        labels[subset] = torch.tensor([v.label for v in kept[subset]])
        left_out += [f"{a}: listed, but absent" for a in found.absent] + faults
    k = min(max(KS), len(kept["train"]))
    protocol = {"protocol": s.protocol, "fusion": s.fusion, "dataset": s.dataset, "split": s.split, "checkpoint":
                s.checkpoint, "step": settings.get("step", 0), "method": settings["method"] if "step" in settings else
                "untrained", "arch": settings["arch"], "width": settings["width"], "pool": settings["pool"],
                "frames": s.frames, "stride": s.stride, "size": s.size, "gallery": len(kept["train"]),
                "queries": len(kept["test"]), "classes": len(found.classes), "left_out": len(left_out),
                "feature": "backbone, pooled, " + ("unit length, mean over 3 x 10 views" if s.protocol == "goca" else
                                                   "mean over windows every 15 frames, centred by set"),
                "distance": "cosine"}
    print(json.dumps(protocol))
    results, lists = {}, {}
    for view in s.views:
        near = nearest(sets["test"], sets["train"], view, s.fusion, k)
        results[view] = recall(near, labels["test"], labels["train"])
        lists[view] = near[:, :10].tolist()
    show(results)
    for line in left_out[:10]:
        print(f"left out: {line}")
    if left_out:
        print(f"{len(left_out)} videos were left out of this evaluation"
              "; the numbers are not those of the whole data set")
    print(f"{len(kept['train'])} gallery videos and {len(kept['test'])} queries in {time.perf_counter() - began:.0f} s")
    if s.json:
        out = {"protocol": protocol, "results": results, "left_out": left_out, "classes": found.classes,
               "gallery": [{"path": v.path, "label": v.label} for v in kept["train"]],
               "queries": [{"path": v.path, "label": v.label} for v in kept["test"]], "neighbours": lists}
        with data.atomic(s.json) as tmp:
            tmp.write_text(json.dumps(out))
        print(f"written: {s.json}")
    return 0


def show(results):
    """Print R@k by view, each with its standard error, and chance below."""
    ks = [k for k in KS if f"R@{k}" in next(iter(results.values()))]
    print(f"{'view':>10}" + "".join(f"{f'R@{k}':>14}" for k in ks))
    for view, r in results.items():
        print(f"{view:>10}" + "".join(f"{r[f'R@{k}']:8.1f} ± {r[f'R@{k} standard error']:<3.1f}" for k in ks))
    print(f"{'chance':>10}" + "".join(f"{r[f'R@{k} chance']:8.1f}      " for k in ks))


def arguments(argv=None):
    p = argparse.ArgumentParser(description="Evaluate a representation.")
    commands = p.add_subparsers(dest="command", required=True)
    c = commands.add_parser("retrieval", help="R@k of nearest neighbours (Tables 1, 3-5)",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = c.add_argument_group("input and output")
    g.add_argument("--checkpoint", required=True, help="a run's folder, a checkpoint, or none (untrained network)")
    g.add_argument("--dataset", choices=data.DATASETS, default="folder")
    g.add_argument("--videos", required=True)
    g.add_argument("--splits", help="folder of the data set's official lists")
    g.add_argument("--split", type=int, default=1, choices=(1, 2, 3))
    g.add_argument("--flow", required=True, help="flow store of flow.py")
    g.add_argument("--json", help="file for the results and each query's 10 nearest")
    g = c.add_argument_group("protocol")
    g.add_argument("--views", nargs="+", choices=("rgb", "flow", "rgb+flow"), default=["rgb", "flow", "rgb+flow"])
    g.add_argument("--protocol", choices=("goca", "coclr"), default="goca")
    g.add_argument("--fusion", choices=("average", "similarity"), default="average", help="of rgb+flow")
    g.add_argument("--frames", type=int, help="of a clip (default: as trained)")
    g.add_argument("--stride", type=int, help="default: as trained")
    g.add_argument("--size", type=int, help="px (default: as trained)")
    g = c.add_argument_group("network (of --checkpoint none; a checkpoint knows its own)")
    g.add_argument("--arch", choices=model.ARCHITECTURES)
    g.add_argument("--width", type=float)
    g.add_argument("--pool", choices=("avg", "1x2x2"))
    g.add_argument("--seed", type=int, default=0)
    g = c.add_argument_group("run")
    g.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    g.add_argument("--workers", type=int, default=2, help="loader processes")
    g.add_argument("--batch-views", type=int, default=32, help="clips a forward pass")
    return p.parse_args(argv)


if __name__ == "__main__":
    data.command_line(lambda: retrieval(arguments()))
