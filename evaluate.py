"""Stage 4: what the representation is worth (paper section 4; Tables 1-8).

In   a checkpoint of pretrain.py (or `none`: the untrained network), or other people's weights (`--weights`, see
     support/weights.py), a labelled data set and its flow store;
     of --views rgb the videos alone, of --views flow the store.
Out  a table; with --json FILE {"protocol": {...}, "results": {view: {name: number}}, ...}.

    python evaluate.py retrieval --checkpoint runs/ucf101 --dataset ucf101 --videos UCF-101 --splits ucfTrainTestlist \\
        --flow flow/ucf101 --json retrieval.json

features   backbone features of all videos, extracted once into RUN/features; the three below take them from there
retrieval  R@k: share of queries (test list) with their class among the k nearest of the gallery (training list)
cluster    k-means on the test features, K = number of classes: Acc, NMI, F1, mean and deviation of 50 runs
linear     linear probe on the frozen backbone: on stored features (fast), or --on clips with augmentation (faithful)
finetune   the whole backbone trained on the labels
export     the backbones of a run in a file of their own

--protocol goca (paper): 3 x 10 views, each of unit length, averaged; cosine. coclr (CoCLR and ViCC): windows of the
length of a clip every 15 frames, averaged, centred by their set's mean; cosine. View "rgb+flow" averages both features
(paper); --fusion similarity adds their similarities, --fusion probability averages their softmax (CoCLR, ViCC).
Under torchrun several processes share the networks' work. The same command gives the same digits.
"""

import json
import time
from types import SimpleNamespace

import torch

import data
from support.classifiers import FINETUNE, LINEAR, fit_clips, fit_features, predict_clips, predict_features
from support.cli import command_line, say
from support.datasets import read_split
from support.distributed import GROUP_TIMEOUT, rank_and_world, run_on_all_ranks, same_on_all_ranks, start_processes
from support.errors import BadInput
from support.evaluation_flags import VIEWS, parser
from support.features import (
    NETWORK,
    Features,
    check_rate,
    check_store,
    fingerprint,
    load_network,
    load_or_extract,
    only_views,
    view_matrix,
)
from support.files import atomic, check_writable
from support.kmeans import kmeans
from support.metrics import KS, accuracy, cluster_scores, nearest, recall
from support.reporting import mean_of_splits, print_classes, print_results, print_skipped, protocol_in_words
from support.run import named_failures
from support.segments import expand
from support.stores import FlowStore, RgbStore
from support.training_flags import check_inputs
from support.training_log import commit
from support.watchdog import end_process_group
from support.weights import export

PRETRAINING = ("dataset", "split", "epochs", "global_batch", "optimizer", "lr", "lambda1", "lambda2", "prior_sign",
               "guide_start", "lead", "lead_epochs", "seed",
               "prototypes", "views")  # of a checkpoint's settings, repeated beside its numbers


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------
def labelled_videos(env, split, subset):
    """The labelled videos of a subset, long ones in segments -> VideoSet; those without a label are not used. Prints
    its notes."""
    s = env.s
    found = read_split(s.dataset, s.videos, s.splits, split, subset, store=env.films)
    if stores := [store for store in (env.store, env.rgb) if store]:
        found = found._replace(videos=expand(found.videos, stores[0], env.rgb, frames=not env.films))
    if env.rank == 0 and found.notes:
        say(*found.notes)
    videos = [v for v in found.videos if v.label >= 0]
    if not videos:
        cure = (f"give each path in --splits {s.splits} its label" if s.dataset == "list" else
                "put each class in a folder of its own, below train/ and test/")
        raise BadInput(f"{found_in(env)} has no labels, which {s.command} needs: {cure}")
    bare = [f"{v.name}: there, but of no class" for v in found.videos if v.label < 0]
    return found._replace(videos=videos, unused=(*found.unused, *bare))


def found_in(env):
    return env.films.root if env.films else env.s.videos


def check_classes(train, test, classes):
    """Refuse test videos of a class without training video; print which classes have one training video only."""
    count = torch.bincount(train, minlength=len(classes))
    lacking = sorted({classes[i] for i in test.tolist() if count[i] == 0})
    if lacking:
        raise BadInput(f"the test list has videos of {len(lacking)} classes of which no training video can be "
                       f"read ({', '.join(lacking[:5])}): complete --videos, or take them off the test list")
    single = [name for name, n in zip(classes, count.tolist(), strict=True) if n == 1]
    if single and rank_and_world()[0] == 0:
        say(f"{len(single)} classes have one training video only: {', '.join(single[:5])}")


def with_common_classes(train, test):
    """Give both the classes of both: folders name theirs one by one, and one subset may lack some."""
    if train.classes == test.classes:
        return train, test
    classes = train.classes + [c for c in test.classes if c not in train.classes]
    videos = [v._replace(label=classes.index(test.classes[v.label])) for v in test.videos]
    test = test._replace(videos=videos, classes=classes)
    if isinstance(test, Features):
        test = test._replace(labels=torch.tensor([v.label for v in videos]))
    return train._replace(classes=classes), test


def train_and_test_features(env, split):
    """Features of the training and the test list -> (train, test), None on rank > 0."""
    lists = run_on_all_ranks(lambda: {x: labelled_videos(env, split, x) for x in ("train", "test")})
    both = [features_of(env, found, f"split{split}-{subset}") for subset, found in lists.items()]
    return (None, None) if env.rank else with_common_classes(*both)


def features_of(env, found, what):
    return load_or_extract(env.net, found, env.store, env.s, env.device, what, env.rank, env.world, env.whole,
                           env.rgb)


def listed(env, videos):
    """What results say of videos."""
    cut = any(store.header.get("segment") for store in (env.store, env.rgb) if store)
    return [{"path": v.path, "label": v.label, "name": v.name,
             **({"first_frame": v.first} if cut and "@" in v.name else {})} for v in videos]


# ---------------------------------------------------------------------------------------------------------------------
# The commands: each takes the environment and a split, and gives what goes into the JSON file (None on rank > 0)
# ---------------------------------------------------------------------------------------------------------------------
def features_command(env, split):
    train, test = train_and_test_features(env, split)
    if env.rank:
        return None
    return {"results": {v: {"train videos": len(train.videos), "test videos": len(test.videos),
                            "dimensions": train.values[v].shape[1]} for v in train.values},
            "left_out": train.skipped + test.skipped}


def retrieval(env, split):
    gallery, queries = train_and_test_features(env, split)
    if env.rank:
        return None
    check_classes(gallery.labels, queries.labels, gallery.classes)
    s, k = env.s, min(max(KS), len(gallery.videos))
    results, lists, by_class = {}, {}, {}
    for view in s.views:
        q, g = (view_matrix(f.values, view, s.protocol, s.fusion).to(env.device) for f in (queries, gallery))
        near = nearest(q, g, k).cpu()
        results[view] = recall(near, queries.labels, gallery.labels)
        lists[view] = near[:, :10].tolist()
        by_class[view] = {}
        for i, name in enumerate(gallery.classes):
            own = queries.labels == i
            if own.any():
                found = recall(near[own], queries.labels[own], gallery.labels)
                by_class[view][name] = {"videos": int(own.sum()), **{j: found[j] for j in ("R@1", "R@5") if j in found}}
    return {"results": results, "per_class": by_class, "left_out": gallery.skipped + queries.skipped,
            "classes": gallery.classes, "gallery": listed(env, gallery.videos), "queries": listed(env, queries.videos),
            "neighbours": lists, "protocol": {"gallery": len(gallery.videos), "queries": len(queries.videos),
                                              "classes": len(gallery.classes), "metric": "cosine"}}


def cluster(env, split):
    found = run_on_all_ranks(lambda: labelled_videos(env, split, "test"))
    test = features_of(env, found, f"split{split}-test")
    if env.rank:
        return None
    s, k = env.s, len(test.labels.unique())
    results = {}
    for view in s.views:
        x = view_matrix(test.values, view, s.protocol, s.fusion).to(env.device)
        labels, inertia = kmeans(x, k, s.runs, s.seed)
        scores = {**cluster_scores(labels, test.labels, k), "inertia": inertia.cpu()}
        results[view] = {}
        for name, value in scores.items():
            results[view] |= {name: value.mean().item(), f"{name} deviation": value.std(correction=0).item()}
    return {"results": results, "left_out": test.skipped,
            "protocol": {"videos": len(test.videos), "classes": k, "clusters": k, "runs": s.runs, "seed": s.seed,
                         "metric": "Euclidean, of unit features"}}


def classification(env, probabilities, test_videos, classes):
    """What `linear` and `finetune` report: {view: [n, classes]}, the n videos."""
    labels = torch.tensor([v.label for v in test_videos])
    predicted = {view: p.argmax(1) for view, p in probabilities.items()}
    return {"results": {view: accuracy(p, labels) for view, p in probabilities.items()},
            "per_class": {view: {name: {"videos": int(own.sum()), "top-1": 100 * (p[own] == i).double().mean().item()}
                                 for i, name in enumerate(classes) if (own := labels == i).any()}
                          for view, p in predicted.items()},
            "classes": classes, "queries": listed(env, test_videos),
            "predictions": {view: p.tolist() for view, p in predicted.items()}}


def probabilities_by_view(s, predict):
    """predict(views) -> [n, classes] for each classifier that --views and --fusion need -> {view: [n, classes]}."""
    trained = {}

    def of(views):
        if views not in trained:
            trained[views] = predict(views)
        return trained[views]

    return {view: (of(("rgb",)) + of(("flow",))) / 2 if view == "rgb+flow" and s.fusion == "probability" else
            of(tuple(view.split("+"))) for view in s.views}


def linear_on_features(env, split):
    train, test = train_and_test_features(env, split)
    if env.rank:
        return None
    check_classes(train.labels, test.labels, train.classes)

    def predict(views):
        classifier = fit_features([train.values[v] for v in views], train.labels, len(train.classes),
                                  env.recipe, env.s, env.device, f"linear probe, {'+'.join(views)}")
        return predict_features(classifier, [test.values[v] for v in views], env.device)

    p = probabilities_by_view(env.s, predict)
    return {**classification(env, p, test.videos, train.classes), "left_out": train.skipped + test.skipped,
            "protocol": {"train": len(train.videos), "test": len(test.videos), "classes": len(train.classes)}}


def with_flow(train, store, s):
    """The training videos of which there is flow."""
    without = [f"{v.name}: there, but without flow" for v in train.videos if v.name not in store]
    train = train._replace(videos=[v for v in train.videos if v.name in store], unused=(*train.unused, *without))
    if not train.videos:
        raise BadInput(f"{s.flow} holds the flow of no training video; run: python flow.py --videos {s.videos} "
                       f"--out {s.flow}")
    return train


def on_clips(env, split):
    """`finetune`, and `linear --on clips`."""
    s, frozen = env.s, env.s.command == "linear"
    train, test = with_common_classes(*run_on_all_ranks(
        lambda: [labelled_videos(env, split, subset) for subset in ("train", "test")]))
    if "flow" in env.net.backbones:
        train = with_flow(train, env.store, s)
    check_classes(*(torch.tensor([v.label for v in f.videos]) for f in (train, test)), train.classes)
    scale = s.scale or data.default_scale(env.settings["arch"])
    settings = {k: env.settings[k] for k in NETWORK} | {"scale": list(scale)}
    faults = {}

    def predict(views):
        what = f"{s.command}-split{split}-{'+'.join(views)}"
        classifier = fit_clips(env.net, list(views), train, env.store, env.recipe, s, settings, frozen, what,
                               env.device, env.rank, env.world, env.rgb)
        p, its = predict_clips(classifier, test, env.store, s, env.device, f"{what}, test", env.rank, env.world,
                               env.rgb)
        faults.update(its)
        return p

    p = probabilities_by_view(s, predict)
    if env.rank:
        return None
    seen = [i for i in range(len(test.videos)) if i not in faults]  # by each view: all answer the same videos
    if not seen:
        raise BadInput(f"each of the {len(test.videos)} test videos lacks a view that can be read; the first: "
                       f"{faults[0]}")
    skipped = train.skipped() + test.skipped() + [faults[i] for i in sorted(faults)]
    p = {view: each[seen] for view, each in p.items()}
    return {**classification(env, p, [test.videos[i] for i in seen], train.classes), "left_out": skipped,
            "protocol": {"train": len(train.videos), "test": len(seen), "classes": len(train.classes)}}


COMMANDS = {"features": features_command, "retrieval": retrieval, "cluster": cluster, "linear": linear_on_features,
            "finetune": on_clips}


# ---------------------------------------------------------------------------------------------------------------------
# The run of a command
# ---------------------------------------------------------------------------------------------------------------------
def protocol_of(env):
    """All that the numbers depend on, as one flat dict."""
    s, settings = env.s, env.settings
    fusions = {"average": "mean of the unit features", "similarity": "sum of similarities",
               "probability": "mean of the softmax"}
    clips = (f"{s.frames} frames x 10 clips x 3 crops" if s.protocol == "goca" else
             f"{s.frames} frames, a window every 15, centre crop")
    pooled = ""
    if s.command != "finetune" and getattr(s, "on", "features") == "features":
        pooled = ", unit length, mean over views" if s.protocol == "goca" else ", mean over windows"
    centred = s.protocol == "coclr" and s.command in ("retrieval", "cluster")
    out = {"command": s.command, "protocol": s.protocol, "fusion": getattr(s, "fusion", None), "dataset": s.dataset,
           "split": s.split[0] if len(s.split) == 1 else s.split, "checkpoint": s.checkpoint,
           "weights": fingerprint(env.whole.backbones)[:16], "step": settings.get("step", 0),
           "method": "untrained" if s.checkpoint == "none" else settings["method"],
           **{k: settings[k] for k in NETWORK}, "views": clips,
           "feature": f"backbone, pooled, {next(iter(env.net.backbones.values())).feature_dim}-d{pooled}",
           "centring": "each set by its own mean" if centred else "none",
           "precision": "bf16" if env.device.type == "cuda" else "float32", "commit": commit(),
           "pretraining": {k: settings[k] for k in PRETRAINING if "step" in settings and k in settings}}
    if env.rgb:
        out["pictures"] = f"of an RGB store, short side {env.rgb.header['short_side']} px"
    if "fusion" in s:
        out["fusion of rgb+flow"] = fusions[s.fusion]
    if env.recipe:
        out |= {"on": getattr(s, "on", "clips"), "recipe": s.recipe, **env.recipe._asdict(), "seed": s.seed,
                "batch": s.batch_size * env.world, "metric": "accuracy", "result of": "the last epoch"}
    return out


def environment(s, device, rank, world):
    """What every command works on: the network of the views that are asked for, as part of `whole`, with its settings,
    the stores of flow and RGB or None, `films`: that of flow where it alone says which there are, the recipe. Raises
    BadInput."""
    whole, settings = load_network(s)
    for k in NETWORK:
        setattr(s, k, settings[k])
    known = [v for v in VIEWS if set(v.split("+")) <= set(whole.backbones)]
    s.views = s.views or (list(whole.backbones) if s.command == "features" else known)
    for v in (v for v in s.views if v not in known):
        raise BadInput(f"--views {v}: {'--weights ' * bool(s.weights)}{s.checkpoint} holds a network for {known[0]} "
                       f"only" + ("; name files for both: --weights rgb=FILE flow=FILE" if s.weights else ""))
    views = [v for v in whole.backbones if any(v in asked.split("+") for asked in s.views)]
    check_inputs(s, views)
    store = FlowStore(s.flow) if s.flow else None
    rgb = RgbStore(s.rgb) if s.rgb and "rgb" in views else None
    if store and "flow" in views:
        check_store(store, settings, s)
    elif "rgb" in views:
        check_rate(settings, rgb)
    whole = whole.to(device, memory_format=torch.channels_last_3d)
    return SimpleNamespace(s=s, net=only_views(whole, views), whole=whole, settings=settings, store=store,
                           rgb=rgb, films=None if "rgb" in views else store, device=device, rank=rank, world=world,
                           recipe=recipe_of(s))


def evaluate(s):
    """Run a command on its splits, print and write its results -> exit status."""
    if s.command == "export":
        check_writable(s.out, "--out")
        export(s.checkpoint, s.out)
        say(f"written: {s.out}")
        return 0
    if s.json:
        check_writable(s.json, "--json")
    memory = f"--batch-views {s.batch_views}. What helps: a smaller --batch-views or --batch-size, fewer --workers"
    with end_process_group(), named_failures(memory, GROUP_TIMEOUT):
        device, rank, world = start_processes(s)
        env = run_on_all_ranks(lambda: environment(s, device, rank, world))
        began = time.perf_counter()
        command = on_clips if getattr(s, "on", "features") == "clips" else COMMANDS[s.command]
        each = [command(env, split) for split in s.split]
    if rank:
        return 0
    protocol = {**protocol_of(env), **each[0].pop("protocol", {}), "left_out": sum(len(e["left_out"]) for e in each)}
    out = {"protocol": protocol, **each[0]}
    if len(each) > 1:
        out = {"protocol": protocol, "results": mean_of_splits([e["results"] for e in each]),
               "splits": dict(zip(map(str, s.split), each, strict=True))}
    say(protocol_in_words(protocol))
    print_results(out["results"])
    if getattr(s, "per_class", False):
        for split, e in zip(s.split, each, strict=True):
            say(f"split {split}")
            print_classes(e["per_class"])
    print_skipped([line for e in each for line in e["left_out"]])
    seconds = time.perf_counter() - began
    say(f"{s.command} in {seconds:.0f} s on {world} process(es), {device}")
    if s.json:
        with atomic(s.json) as tmp:
            tmp.write_text(json.dumps({**out, "seconds": round(seconds, 1)}))
        say(f"written: {s.json}")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------
def recipe_of(s):
    """The recipe of `linear` and `finetune` with what flags change, or None."""
    if "recipe" not in s:
        return None
    recipe = (LINEAR if s.command == "linear" else FINETUNE)[s.recipe]
    return recipe._replace(**{k: getattr(s, k) for k in ("epochs", "lr", "dropout") if getattr(s, k, None) is not None})


def arguments(argv=None):
    s = parser().parse_args(argv)
    if s.command == "export":
        return s
    if s.weights:
        s.checkpoint = " ".join(s.weights)
    if s.split != [1] and s.dataset not in ("ucf101", "hmdb51"):
        raise BadInput(f"--split {' '.join(map(str, s.split))}: {s.dataset} has one split; leave the flag out")
    if len(set(s.split)) < len(s.split):
        raise BadInput(f"--split {' '.join(map(str, s.split))} names a split twice")
    if s.command == "finetune" or getattr(s, "on", "") == "clips":
        if not s.out:
            raise BadInput("--out is missing: the folder where training on clips keeps its checkpoints")
        if s.scale and not 1 <= s.scale[0] <= s.scale[1]:
            raise BadInput(f"--scale {s.scale[0]} {s.scale[1]}: must be 1 <= LOW <= HIGH")
    return s


def main():
    try:
        s = arguments()
    except BadInput as e:
        raise same_on_all_ranks(e) from None
    return evaluate(s)


if __name__ == "__main__":
    command_line(main)
