"""The films of a run's page: queries with their nearest videos, right and wrong marked, and flow over film."""

import os
from pathlib import Path

from experiments.report.charts import text
from experiments.report.flow_films import flow_strip, forget_others, name_in_store, some_films, wheel
from experiments.report.training import VIEWS
from experiments.result_files import one_query_a_class
from support.errors import BadInput
from support.page import Item, Section, film
from support.previews import make_previews
from support.stores import FlowStore

QUERIES, NEIGHBOURS, FLOWS = 6, 4, 4  # films shown: 6 x (1 + 2 x 4) at most, and 4 of flow


class Films:
    """The films of a page, each once: `add` gives a film's place among them."""

    def __init__(self, root):
        self.root, self.items, self.places = root, [], {}

    def add(self, path, label=""):
        if path not in self.places:
            below = self.root and Path(self.root) in Path(path).parents
            self.places[path] = len(self.items)
            self.items.append(Item(os.path.relpath(path, self.root) if below else path, path, label=label))
        return self.places[path]

    def add_flow(self, film, strip):
        """The flow of a film that is there."""
        self.items.append(Item(f"{self.items[film].name} (flow)", strip=strip, label=self.items[film].label))
        return len(self.items) - 1

    def make_previews(self, folder):
        """Give all items their previews -> [why a film can't be read]."""
        bare = [i for i, item in enumerate(self.items) if not item.strip]
        made = make_previews([(self.items[i].path, 0.0, None) for i in bare], folder, progress=True)
        for i, preview in zip(bare, made, strict=True):
            self.items[i] = self.items[i]._replace(strip=preview.strip, missing=preview.problem)
        return [preview.problem for preview in made if preview.problem]


# ---------------------------------------------------------------------------------------------------------------------
# Queries
# ---------------------------------------------------------------------------------------------------------------------
def _answers(r, view, i, films):
    """The nearest videos of query i by a result -> HTML."""
    label, classes = r.out["queries"][i]["label"], r.out["classes"]
    near = [r.out["gallery"][j] for j in r.out["neighbours"][view][i][:NEIGHBOURS]]
    right = sum(video["label"] == label for video in near)
    shown = "".join(film(films.add(v["path"], classes[v["label"]]), "right" if v["label"] == label else "wrong",
                         "" if classes[v["label"]] in Path(v["path"]).parts else classes[v["label"]]) for v in near)
    return (f'<div class="answers"><h3>{text(r.name)} <small>{right} of {len(near)} right</small></h3>'
            f'<div class="films">{shown}</div></div>')


def queries_section(results, films):
    """Queries with their nearest videos, before training beside after -> [Section], paths of the queries."""
    able = [r for r in results if r.role and r.command == "retrieval" and "neighbours" in r.out]
    if not able:
        return [], []
    out = able[0].out
    for r in able[1:]:
        if [q["path"] for q in r.out["queries"]] != [q["path"] for q in out["queries"]]:
            raise BadInput(f"{r.path} and {able[0].path} answer different queries; evaluate both on the same videos")
    view = next((v for v in ("rgb", *out["neighbours"]) if all(v in r.out["neighbours"] for r in able)), None)
    if view is None:
        raise BadInput(f"{' and '.join(r.path for r in able)} have no view in common; evaluate both with one --views")
    rows, chosen = "", one_query_a_class(out["queries"], QUERIES)
    for i in chosen:
        query = out["queries"][i]
        name = out["classes"][query["label"]]
        rows += (f'<div class="query"><div class="asked"><h3>{text(name)}</h3>{film(films.add(query["path"], name))}'
                 f'</div>{"".join(_answers(r, view, i, films) for r in able)}</div>')
    hint = (f'<p class="hint">{VIEWS.get(view, view)}: queries, one of a class by chance, and the nearest videos of '
            f"each. ✓ in a solid frame: the same class; ✗ in a dashed one: another.</p>")
    return [Section("Queries", hint + rows)], [out["queries"][i]["path"] for i in chosen]


# ---------------------------------------------------------------------------------------------------------------------
# Flow
# ---------------------------------------------------------------------------------------------------------------------
def _films_with_flow(store, videos, queries):
    """A few films of which there is flow, of the queries or else by chance -> [(name in the store, path)]."""
    named = [(name_in_store(path, videos), path) for path in queries if os.path.exists(path)]
    return [(name, path) for name, path in named if name in store][:FLOWS] or some_films(store, videos, FLOWS)


def flow_section(settings, queries, films, folder):
    """A few films beside their flow -> [Section], [why flow is lacking]."""
    if not settings.get("flow") or not settings.get("videos"):
        return [], []
    try:
        store = FlowStore(settings["flow"])
        chosen = _films_with_flow(store, settings["videos"], queries)
    except BadInput as e:
        return [], [f"no flow is shown: {e}"]
    parts, strips, faults = "", [], []
    for name, path in chosen:
        try:
            strips.append(flow_strip(name, path, store, folder))
        except BadInput as e:
            faults.append(f"no flow is shown: {e}")
            continue
        own = films.add(path)
        parts += f'<div class="pair">{film(own)}{film(films.add_flow(own, strips[-1]))}</div>'
    forget_others(folder, strips)
    hint = (f'<div class="legend"><img class="wheel" alt="Right is red, down green, left cyan, up violet." '
            f'src="{wheel()}"><p class="hint">{text(store.header.get("method", "Flow"))} over its film. Colour and '
            f"arrows say where a point moves, their strength and length how far.</p></div>")
    return [Section("Flow", f'{hint}<div class="pairs">{parts}</div>')] if parts else [], faults
