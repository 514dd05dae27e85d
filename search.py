"""Stage 5: what one's own films are like, without a label: index, nearest, groups, a page to look at them.

In   a run of pretrain.py, an export, or other people's weights (support/weights.py), and a folder of films.
Out  an index: one .npz with a unit feature of every film, or of every piece of one (support/collection_index.py).

    python search.py index  --checkpoint runs/mine --videos films --out films.npz   # again: new and changed ones
    python search.py query  --index films.npz film.mp4 --k 5
    python search.py groups --index films.npz --num 20 --json groups.json
    python search.py page   --index films.npz --out page                              # open page/index.html

index   features of all films; with --flow, the store that flow.py made of them, of both views, else of RGB alone.
        --segment 10 indexes every 10 seconds of long films; a store that flow.py --segment made is indexed by its
        segments. Under torchrun several processes share the work; an interrupted one goes on. Films that can't be read
        are named, and tried again the next time
query   the nearest by cosine of a film that need not be in the index; where it isn't, its flow is computed if the index
        has flow. Of a film of several pieces each is looked up, and the best similarity counts
groups  k-means of all entries (section 4.3), the most typical of each group first
page    all of it to look at, in a browser without server or network: support/page.py

View "rgb+flow" is the average of both unit features (section 4.2). --protocol fast takes 4 test views of a film, goca
the paper's 30. docs/search.md: the index in other programs, how fast this is, and how to choose --num.
"""

import argparse
import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist

from data import SPREAD
from model import VIEWS
from support import approximate
from support.cli import Subcommand, command_line, non_negative_int, positive, positive_int, random_seed, say
from support.collection_index import (
    bring_up_to_date,
    check_weights,
    entries_of,
    extract,
    features_of,
    load_collection,
    make_header,
    of_views,
    open_network,
    piece_seconds,
    survey,
)
from support.distributed import GROUP_TIMEOUT, run_on_first_rank, start_processes
from support.errors import BadInput
from support.features import check_rate, check_store, view_matrix
from support.files import atomic, check_folder, check_writable
from support.frame_folders import is_frame_folder
from support.grouping import make_groups, quality_in_words
from support.locks import only_these_processes
from support.metrics import nearest
from support.page import Group, Item, write_page
from support.previews import make_previews
from support.projection import flat_map
from support.run import named_failures
from support.stores import FlowStore

TYPICAL = 5  # films named of a group


# ---------------------------------------------------------------------------------------------------------------------
# index
# ---------------------------------------------------------------------------------------------------------------------
def index(s):
    """Bring an index up to date with a folder, no other run at the same time -> exit status."""
    if os.path.islink(s.out):
        s.out = os.path.realpath(s.out)  # the index that it leads to, beside which the parts lie
    check_writable(s.out, "--out")
    device, rank, world = start_processes(s)
    with only_these_processes(s.out, "search.py index", rank):
        return make_index(s, device, rank, world)


def make_index(s, device, rank, world):
    began = time.perf_counter()
    store = FlowStore(s.flow) if s.flow else None
    net, settings = open_network(s.checkpoint, frames=s.frames, size=s.size, stride=s.stride)
    net = of_views(net, s.views, store is not None, s.checkpoint).to(device, memory_format=torch.channels_last_3d)
    if "flow" in net.backbones:
        check_store(store, settings, s)
        s.segment = piece_seconds(store, s.flow, s.segment)
    else:
        check_rate(settings, None)
    header = make_header(net, settings, s.checkpoint, s.protocol, store, s.segment, s.videos)
    todo, before, counts, faults, notes = run_on_first_rank(lambda: survey(s.out, header, store))
    if rank == 0:
        say(f"films below {s.videos}: {', '.join(f'{n} {what}' for what, n in counts.items())}", *notes)
    memory = f"--batch-views {s.batch_views}. What helps: a smaller --batch-views, fewer --workers"
    with named_failures(memory, GROUP_TIMEOUT):
        every = [extract(net, todo, store, header, s.out, s, device, rank, world) if todo else ([], [])]
    if world > 1:
        shared = [None] * world
        dist.all_gather_object(shared, every[0])  # and all parts are there
        dist.destroy_process_group()
        every = shared
    if rank:
        return 0
    faults += [fault for _, said in every for fault in said]
    read = {key for keys, _ in every for key in keys}
    held, *_ = bring_up_to_date(s.out, header, store)
    lost = (read | before).difference(held.keys() if held else ())
    faults += [f"{os.path.join(header['videos'], file)} changed or vanished meanwhile; give the same command again"
               for file in sorted({file for file, _ in lost})]
    for fault in faults:
        say(f"skipped: {fault}")
    if held is None:
        raise BadInput(f"none of the films below {s.videos} can be read; the first: {faults[0]}")
    say(f"{s.out} holds {len(held.files)} {'pieces' if s.segment else 'films'} by {' and '.join(header['views'])}; "
        f"{len(read - lost)} made anew in {time.perf_counter() - began:.0f} s on {world} process(es), {device}; "
        f"{len(faults)} skipped")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# query
# ---------------------------------------------------------------------------------------------------------------------
def view_of(s, header):
    """The view that is asked for, by default all of the index together."""
    view = s.view or "+".join(header["views"])
    if lacking := set(view.split("+")) - set(header["views"]):
        raise BadInput(f"--view {view}: {s.index} holds {' and '.join(header['views'])} only; index the films with "
                       f"{'--flow' if lacking == {'flow'} else 'a network for it'}")
    return view


def best(queries, rows, k, find):
    """The k of `rows` [n, D] that are most like any of `queries` [p, D] -> similarities [k], places [k].

    find(k) -> the k nearest of each query, int64 [p, k]; -1 where there are fewer.
    """
    places = find(k).flatten().unique()
    places = places[places >= 0]
    values, order = (rows[places] @ queries.T).max(1).values.sort(descending=True)
    return values[:k], places[order[:k]]


def finder(s, view, queries, rows):
    """--engine -> `best`'s find."""
    if s.engine == "faiss" and approximate.installed():
        index, message = approximate.kept(s.index, view, rows)
        if message:
            say(message)
        return lambda k: torch.from_numpy(index.search(queries.numpy(), k)[1])
    if s.engine == "faiss":
        say("FAISS is not installed (pip install faiss-cpu); the search is exact")
    return lambda k: nearest(queries, rows, k)


def check_frame_folder(folder):
    """Raise BadInput where a folder is no film."""
    names = next(os.walk(folder), None)
    if names is None:
        raise BadInput(f"{folder} can't be read; its rights forbid it")
    if not is_frame_folder(*names[1:]):
        raise BadInput(f"{folder} is a folder, and not one of images alone; a query is one film")


def query(s):
    """Find what is like a film -> exit status."""
    if s.json:
        check_writable(s.json, "--json")
    if os.path.isdir(s.video):
        check_frame_folder(s.video)
    device, _, _ = start_processes(s)
    held = load_collection(s.index)
    view = view_of(s, held.header)
    queries, seconds = query_rows(s, held, view, device)
    rows, n = matrix(held, view), len(held.files)
    find = finder(s, view, queries, rows)
    if s.k > n:
        say(f"--k {s.k} is more than {entries(n)} of {s.index}; all are given")
    began = time.perf_counter()
    similarity, places = best(queries, rows, min(s.k, n), find)
    seconds["search"] = time.perf_counter() - began
    paths = held.paths()
    results = [{"path": paths[i], "start_s": round(float(held.spans[i, 0]), 3),
                "end_s": round(float(held.spans[i, 1]), 3), "similarity": round(float(x), 6)}
               for x, i in zip(similarity, places.tolist(), strict=True)]
    for r in results:
        say(f"{r['similarity']:.4f}  {r['start_s']:8.2f} to {r['end_s']:.2f} s  {r['path']}")
    say(f"{view}, {n} entries: " + ", ".join(f"{what} {t:.2f} s" for what, t in seconds.items()))
    write_json(s.json, {"query": s.video, "results": results})
    return 0


def query_rows(s, held, view, device):
    """-> (unit rows [q, D] of the film of a query, one a piece, {part: seconds it took})."""
    own = [] if s.checkpoint else entries_of(held, s.video)
    if own:
        say(f"the film is in the index: the features of its {len(own)} pieces are taken from there" if len(own) > 1 else
            "the film is in the index: its features are taken from there")
        return matrix(held.take(own), view), {}
    checkpoint, began = s.checkpoint or held.header["checkpoint"], time.perf_counter()
    net, _ = open_network(checkpoint, **{k: held.header[k] for k in ("frames", "size", "stride")})
    net = of_views(net, held.header["views"], True, checkpoint)
    check_weights(s.index, held.header, net, checkpoint)
    net = of_views(net, view.split("+"), True, checkpoint).to(device, memory_format=torch.channels_last_3d)
    loading = time.perf_counter() - began
    values, spent, faults = features_of(s.video, net, held.header, device, s.batch_views)
    for fault in faults:
        say(f"not looked up, a piece of the film: {fault}")
    return view_matrix(values, view, "", "average"), {"loading": loading, **spent}


def matrix(held, view):
    """Unit rows [n, D] of a view of an index."""
    return view_matrix({v: torch.from_numpy(x) for v, x in held.values.items()}, view, "", "average")


def entries(n):
    return f"the {n} {'entry' if n == 1 else 'entries'}"


def write_json(path, content):
    if path:
        with atomic(path) as tmp:
            tmp.write_text(json.dumps(content))
        say(f"written: {path}")


# ---------------------------------------------------------------------------------------------------------------------
# groups
# ---------------------------------------------------------------------------------------------------------------------
def checked_groups(s, held):
    """`make_groups` of an index for --num -> (view, Groups)."""
    n, view = len(held.files), view_of(s, held.header)
    if n < 2:
        raise BadInput(f"{s.index} holds one entry, and groups need two; index more films")
    if s.num > n:
        raise BadInput(f"--num {s.num} is more than the {n} entries of {s.index}; choose {n // 2} or fewer")
    return view, make_groups(matrix(held, view), s.num, s.seed)


def groups(s):
    """Group a collection -> exit status."""
    if s.json:
        check_writable(s.json, "--json")
    held = load_collection(s.index)
    view, found = checked_groups(s, held)
    paths = entry_names(held)
    for i, (members, tight) in enumerate(zip(found.members, found.tightness, strict=True), 1):
        say(f"group {i}: {len(members)}, mean cosine with its centre {tight:.3f}; most typical:",
            *(f"    {paths[m]}" for m in members[:TYPICAL]))
    say(f"{view}, {quality_in_words(found)}")
    write_json(s.json, {"groups": [{"size": len(m), "members": [paths[i] for i in m], "typical": [
        paths[i] for i in m[:TYPICAL]], "tightness": t} for m, t in zip(found.members, found.tightness, strict=True)],
        "view": view, "silhouette": found.silhouette, "agreement": found.agreement})
    return 0


def entry_names(held):
    """Paths of all entries; of a piece with its time, as in film.mp4#t=10,20."""
    if not held.header["segment"]:
        return held.paths()
    return [f"{path}#t={a:.6g},{b:.6g}" for path, (a, b) in zip(held.paths(), held.spans.tolist(), strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# page
# ---------------------------------------------------------------------------------------------------------------------
def page(s):
    """Write the page of a collection: films, their nearest, groups and a map by every view -> exit status."""
    check_folder(s.out, "--out")
    held = load_collection(s.index)
    n, paths, root = len(held.files), held.paths(), held.header["videos"]
    spans = [(a, b if frames else None) for (a, b), (_, frames) in
             zip(held.spans.tolist(), held.frames.tolist(), strict=True)]
    previews = make_previews([(path, *span) for path, span in zip(paths, spans, strict=True)],
                             Path(s.out) / "previews", progress=True)
    items = [Item(str(file), path, *span, strip=preview.strip, missing=preview.problem) for file, path, span, preview
             in zip(held.files, paths, spans, previews, strict=True)]
    views = [*held.values, *(["rgb+flow"] if len(held.values) == 2 else [])]
    rows = {view: matrix(held, view) for view in views}
    num = min(s.num or max(2, round((n / 2) ** 0.5)), n)
    if s.num and s.num > n:
        say(f"--num {s.num} is more than {entries(n)} of {s.index}; {num} is taken")
    found = {view: make_groups(x, num, s.seed) for view, x in rows.items()} if n > 1 else {}
    missing = {item.path: item.missing for item in items if item.missing}  # once a film, of how many pieces ever
    write_page(s.out, title=f"{n} {'pieces of films' if held.header['segment'] else 'films'} below {root}", items=items,
               features={view: x.numpy() for view, x in rows.items()},
               groups={view: [Group(f"group {i}", members, f"mean cosine with its centre {tight:.3f}")
                              for i, (members, tight) in enumerate(zip(g.members, g.tightness, strict=True), 1)]
                       for view, g in found.items()},
               maps={view: flat_map(x.numpy(), s.seed)[0] for view, x in rows.items()},
               notes=["index {index}: {arch}, {frames} frames of {size} px, protocol {protocol}, weights {checkpoint} "
                      "({weights:.12})".format(index=s.index, **held.header),
                      *(f"{view}, {quality_in_words(g)}" for view, g in found.items())])
    for why in missing.values():
        say(f"shown as they were, or without a picture: {why}")
    say(f"{Path(s.out) / 'index.html'}: {n} entries, {len(missing)} of their films can't be read any more"
        f"{'; index the films where they are now with search.py index' if missing else ''}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
COMMANDS = {"index": index, "query": query, "groups": groups, "page": page}
CHECKPOINT = "a run's folder, a checkpoint, an export, or others' weights"


def below(bits, kind):
    """A type of argparse: a number of `kind` that the libraries can hold in so many bits."""
    def number(text):
        if kind(text) >= 2**bits:
            raise argparse.ArgumentTypeError(f"{text} must be below 2^{bits}")
        return kind(text)
    return number


def arguments(argv=None):
    p = Subcommand(prog="search.py", description="Search and group a collection of one's own films.")
    commands = p.add_subparsers(dest="command", required=True, parser_class=Subcommand)
    c = commands.add_parser("index", help="features of every film, new and changed ones only")
    c.add_argument("--checkpoint", nargs="+", required=True, metavar="[rgb=|flow=]FILE", help=CHECKPOINT)
    c.add_argument("--videos", required=True, help="folder of films, searched with all below it")
    c.add_argument("--flow", help="flow store of flow.py; without it RGB alone")
    c.add_argument("--views", nargs="+", choices=VIEWS, help="default: all that there are networks and data for")
    c.add_argument("--out", required=True, help="the index: a new file (.npz), or one to bring up to date")
    c.add_argument("--segment", type=positive,
                   help="seconds of a piece (default: whole films, or the segments of --flow)")
    c.add_argument("--protocol", choices=SPREAD, default="fast", help="test views: fast 4, goca 30 (the paper's)")
    for name in ("frames", "stride", "size"):
        c.add_argument(f"--{name}", type=below(31, positive_int), help="of a clip (default: as trained)")
    c.add_argument("--workers", type=non_negative_int, default=2, help="loader processes")
    q = commands.add_parser("query", help="the nearest of a film")
    q.add_argument("video", help="a film; it need not be in the index")
    q.add_argument("--k", type=positive_int, default=10, help="how many")
    q.add_argument("--checkpoint", nargs="+", metavar="[rgb=|flow=]FILE",
                   help="the index's weights, where they have moved (default: from where it was made)")
    q.add_argument("--engine", choices=("exact", "faiss"), default="exact",
                   help="faiss: approximate, for 10^5 films and more, where it is installed; its index is kept")
    g = commands.add_parser("groups", help="k-means, each group with its most typical films")
    g.add_argument("--num", type=positive_int, required=True, help="how many groups")
    w = commands.add_parser("page", help="a page that plays the films, without a server")
    w.add_argument("--out", required=True, help="folder of the page: OUT/index.html")
    w.add_argument("--num", type=positive_int, help="groups (default: the root of half the films)")
    for sub in (q, g, w):
        sub.add_argument("--index", required=True, help="of search.py index")
    for sub in (g, w):
        sub.add_argument("--seed", type=random_seed, default=0, help="of k-means")
    for sub in (q, g):
        sub.add_argument("--view", choices=(*VIEWS, "rgb+flow"), help="default: all that the index has, together")
        sub.add_argument("--json", help="file for the results")
    for sub in (c, q):
        sub.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
        sub.add_argument("--batch-views", type=below(31, positive_int), default=32, help="clips a forward pass")
    return p.parse_args(argv)


def main(argv=None):
    s = arguments(argv)
    return COMMANDS[s.command](s)


if __name__ == "__main__":
    command_line(main)
