"""A page of generated films for the tests of pages, five films and their index for those of search."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.evaluation import checkpoint
from helpers.indexing import NAMES, index
from helpers.pages import FILMS, unit

from experiments import walkers
from support.page import Group, Item, write_page
from support.previews import make_previews


@pytest.fixture(scope="session")
def collection(tmp_path_factory):
    """A page of 30 generated films: colours as rgb, motion as flow, groups by action, a map, two films missing."""
    root = tmp_path_factory.mktemp("collection")
    walkers.make(root / "set", train=FILMS, test=1, size=48, frames=12)
    paths = [path for path, _ in walkers.clips(root / "set", "train")]
    found = [walkers.descriptors(path) for path in paths]
    rgb, flow = (unit((v := np.stack([d[name] for d in found])) - v.mean(0))
                 for name in ("colour histogram", "flow histogram"))
    both = unit(np.hstack([rgb, flow]))
    previews = make_previews([(str(path), 0.0, None) for path in paths], root / "page" / "previews")
    items = [Item(path.relative_to(root / "set" / "videos").as_posix(), str(path), 0.0, None, *preview)
             for path, preview in zip(paths, previews, strict=True)]
    items[4] = items[4]._replace(missing=f"{items[4].path} doesn't exist")
    items[5] = items[5]._replace(missing=f"{items[5].path} doesn't exist", strip=None)
    features = {"rgb": rgb, "flow": flow, "rgb+flow": both}
    actions = sorted({item.name.split("/")[0] for item in items})
    groups = {view: [Group(a, [i for i in range(FILMS) if items[i].name.startswith(a + "/")], "tight") for a in actions]
              for view in features}
    maps = {view: (x[:, :2] - x[:, :2].min(0)) / np.ptp(x[:, :2], axis=0) for view, x in features.items()}
    page = write_page(root / "page", title="Walkers", items=items, features=features, groups=groups, maps=maps,
                      notes=["30 films"])
    return SimpleNamespace(page=page, items=items, features=features, groups=groups, maps=maps, root=root)


@pytest.fixture(scope="session")
def films(tiny, tmp_path_factory):
    """A folder of five films, and a run."""
    root = tmp_path_factory.mktemp("collection")
    for name, path in zip(NAMES, sorted(tiny.videos.rglob("*.avi"))[::5], strict=False):
        target = root / "films" / f"{name}.avi"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    (root / "run").mkdir()
    checkpoint(root / "run")
    return root


@pytest.fixture(scope="session")
def rgb_index(films):
    assert index(films, films / "rgb.npz") == 0
    return films / "rgb.npz"
