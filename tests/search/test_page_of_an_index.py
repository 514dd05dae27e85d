"""search.py page: its neighbours are those of search.py query, and folders of images play as films do."""

import json
import shutil
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from helpers.evaluation import checkpoint
from helpers.pages import embedded

import search
from support.previews import FRAMES
from support.videos import decode


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Seven films, one of them a folder of images, their index and its page."""
    root = tmp_path_factory.mktemp("indexed")
    for k, path in enumerate(sorted(tiny.videos.rglob("*.avi"))[::5]):
        (root / "films").mkdir(exist_ok=True)
        shutil.copy(path, root / "films" / f"film{k}.avi")
    frames = root / "films" / "as_images"
    frames.mkdir()
    for t, frame in enumerate(decode(sorted(tiny.videos.rglob("*.avi"))[2]), 1):
        cv2.imwrite(str(frames / f"{t:05d}.jpg"), frame)
    (root / "run").mkdir()
    checkpoint(root / "run")
    assert search.main(["index", "--checkpoint", str(root / "run"), "--videos", str(root / "films"), "--out",
                        str(root / "films.npz"), "--workers", "0"]) == 0
    assert search.main(["page", "--index", str(root / "films.npz"), "--out", str(root / "page")]) == 0
    return SimpleNamespace(root=root, page=root / "page" / "index.html", frames=frames)


def query(made, film):
    """{path: similarity}, best first, as the command gives it."""
    out = made.root / "query.json"
    assert search.main(["query", "--index", str(made.root / "films.npz"), film, "--json", str(out)]) == 0
    return {r["path"]: r["similarity"] for r in json.loads(out.read_text())["results"]}


def test_a_click_shows_what_the_query_gives(browser, made):
    films = embedded(made.page)["films"]
    for i in (0, len(films) - 1):
        asked = query(made, films[i]["path"])
        assert len(films) == 7 and asked.pop(films[i]["path"]) == pytest.approx(1, abs=1e-5)
        browser.open(made.page)
        browser.until("document.querySelectorAll('#grid .card').length === 7")
        browser.click(f"#grid [data-film='{i}']")
        shown = browser.run("[...document.querySelectorAll('#panel .near .card')].map(c => Number(c.dataset.film))")
        near = browser.run("nearest('rgb', arguments[0], 12)", i)
        assert [n["film"] for n in near] == shown and len(shown) == 6
        for n in near:
            assert n["similarity"] == pytest.approx(asked[films[n["film"]]["path"]], abs=5e-6)
        assert np.diff(list(asked.values())).max() < -1e-5  # no ties: the order says something
        assert [films[j]["path"] for j in shown] == list(asked)
    assert browser.complaints() == []


def test_a_folder_of_images_plays_and_is_made_anew_when_an_image_changes(made):
    def preview():
        film = next(f for f in embedded(made.page)["films"] if f["path"] == str(made.frames))
        file, width, height, seconds = film["strip"]
        assert (width, height) == (40, 40) and seconds == pytest.approx(FRAMES / 25 * 12 / 8, abs=0.01)
        return file, cv2.imread(str(made.page.parent / "previews" / file)).reshape(40, FRAMES, 40, 3).astype(int)

    file, shown = preview()
    frames = [cv2.imread(str(path)) for path in sorted(made.frames.iterdir())]
    for k, t in enumerate([0, 2, 3, 5, 6, 8, 9, 11]):
        assert np.abs(shown[:, k] - frames[t]).mean() < 12, k
    cv2.imwrite(str(made.frames / "00001.jpg"), np.full_like(frames[0], 255))
    assert search.main(["page", "--index", str(made.root / "films.npz"), "--out", str(made.page.parent)]) == 0
    anew, shown = preview()
    assert anew != file and shown[:, 0].mean() > 250
    assert not (made.page.parent / "previews" / file).exists()
