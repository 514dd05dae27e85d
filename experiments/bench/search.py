"""Row of the bench about looking up a film: the exact search of search.py against FAISS, flat (exact too) and IVF.

    python -m experiments.bench.search --num 1000000 --dim 128      # other sizes than the bench's; 10^6 x 1024: 13 GB
    python -m experiments.bench.search --query [FILM]               # what search.py query spends on which part

10^4 and 10^5 unit vectors of 128 and 1024 dimensions, about as mixed as trained features; the 10 nearest of one query,
as search.py asks, and of 100 at once. FAISS searches an index that stands in memory already; what building it costs,
in seconds and in memory beside the vectors, is in the row's case, and IVF's recall of the exact 10, of which it is to
find 95 % (support/approximate.py). Needs faiss-cpu. About two minutes, most of it IVF's training.

--query: a film (default: a generated one of 150 frames, 240 px) by RGB, S3D at full width on clips of 32 frames of 128
px, --protocol fast, among 10^4 entries: seconds of decoding, network and search, medians of five.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from experiments.bench.evaluation import class_features
from experiments.bench.loader import real_or_generated
from experiments.bench.measure import in_turns, row
from model import Backbone
from support import approximate
from support.cli import Help, command_line
from support.collection_index import features_of
from support.files import atomic, check_writable
from support.metrics import nearest
from support.weights import Backbones

K = 10
CHUNK = 50_000  # vectors made at a time


def gallery_of(n, dim):
    """`class_features` [n, dim] without the memory of making them all at once."""
    x = torch.empty(n, dim)
    for i, part in enumerate(x.split(CHUNK)):
        part.copy_(class_features(len(part), dim=dim, seed=i + 1))
    return x


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def built(make):
    """make() -> (a FAISS index, what it cost, in words)."""
    before, began = resident(), time.perf_counter()
    index = make()
    return index, f"built in {time.perf_counter() - began:.2f} s, {(resident() - before) / 2**20:.0f} MiB more"


def search(device, videos, sizes=(10**4, 10**5), dims=(128, 1024)):
    if not approximate.installed():
        print("search: left out, since FAISS is not installed (pip install faiss-cpu)", file=sys.stderr)
        return
    import faiss

    def flat_of(x):
        index = faiss.IndexFlatIP(x.shape[1])
        index.add(x.numpy())
        return index

    faiss.omp_set_num_threads(torch.get_num_threads())
    for n in sizes:
        for dim in dims:
            x, queries = gallery_of(n, dim), class_features(100, dim=dim, seed=10**6)
            exact = nearest(queries, x, K)
            flat, flat_cost = built(lambda x=x: flat_of(x))
            (ivf, _), ivf_cost = built(lambda x=x: approximate.build(x))
            found = torch.from_numpy(flat.search(queries.numpy(), K)[0])
            torch.testing.assert_close(found, (queries[:, None] * x[exact]).sum(2), rtol=0, atol=1e-5)
            near = torch.from_numpy(ivf.search(queries.numpy(), K)[1])
            recall = (near[:, :, None] == exact[:, None]).any(2).double().mean().item()
            for q in (queries[:1], queries):
                ours, by_flat, by_ivf = in_turns([lambda q=q, x=x: nearest(q, x, K)] + [
                    lambda i=i, q=q: i.search(q.numpy(), K) for i in (flat, ivf)], device, seconds=2)
                case = f"{K} nearest of {len(q)}, {n} x {dim}; FAISS"
                yield row("search", f"{case} flat, {flat_cost}", torch.device("cpu"), by_flat, ours)
                yield row("search", f"{case} IVF, {ivf.nprobe} of {ivf.nlist} cells, recall {recall:.2f}, {ivf_cost}",
                          torch.device("cpu"), by_ivf, ours)


def query_parts(film=None, n=10**4, rounds=5, **smaller):
    """{part of a query: median seconds}, as `search.py query` spends them. film: its path, or None for a generated one.
    smaller: settings of the network or the clips."""
    how = {"arch": "s3d", "width": 1.0, "frames": 32, "size": 128, "stride": 1, "protocol": "fast", "segment": None,
           "flow": None, **smaller}
    backbone = Backbone(how["arch"], 3, how["width"])
    net = Backbones({"rgb": backbone}).to(memory_format=torch.channels_last_3d)
    rows, spent = gallery_of(n, backbone.feature_dim), []
    with tempfile.TemporaryDirectory() as folder:
        film = film or real_or_generated(None, Path(folder))[0][0].path
        for _ in range(rounds + 1):
            values, seconds, _ = features_of(film, net, how, torch.device("cpu"), 32)
            began = time.perf_counter()
            nearest(values["rgb"], rows, K)
            spent.append({**seconds, "search": time.perf_counter() - began})
    return {part: statistics.median(s[part] for s in spent[1:]) for part in spent[0]}  # the first one allocates


def main():
    p = argparse.ArgumentParser(prog="python -m experiments.bench.search", description=__doc__.split("\n")[0],
                                formatter_class=Help)
    p.add_argument("--num", type=int, nargs="+", default=[10**4, 10**5], help="vectors")
    p.add_argument("--dim", type=int, nargs="+", default=[128, 1024], help="of which dimensions")
    p.add_argument("--json", metavar="FILE", help="write the rows as a JSON list")
    p.add_argument("--query", nargs="?", const="", metavar="FILM", help="time the parts of one query instead")
    args = p.parse_args()
    if args.query is not None:
        seconds = query_parts(args.query or None)
        parts = ", ".join(f"{part} {t:.3f} s" for part, t in seconds.items())
        print(f"query among 10000 on {torch.get_num_threads()} threads: {parts}, in all {sum(seconds.values()):.2f} s")
        return
    if args.json:
        check_writable(args.json, "--json")
    rows = []
    for result in search(torch.device("cpu"), None, args.num, args.dim):
        rows.append(result)
        print(f"{result['case']}: FAISS {result['baseline_ms']:.3f} ms, ours {result['ours_ms']:.3f} ms, "
              f"{result['ratio']:.2f}x", flush=True)
    if args.json:
        with atomic(args.json) as path:
            path.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    command_line(main)
