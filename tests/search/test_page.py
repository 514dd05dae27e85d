"""The page of a collection: what it embeds, and what it does in a browser."""

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest

from experiments import walkers
from support.page import LEVELS, Group, Item, Section, embedded_json, film, nearest, pack, write_page
from support.previews import make_previews

HOSTILE = ["<script>alert(1)</script>", "</script><script>document.title='owned'</script>",
           "<img src=x onerror=alert(1)>", "\"'`><b>bold</b>", "a%20b#c?d&amp;e", "{{data}} ${x} {{script}}",
           "folder/<svg onload=alert(1)>.avi", "caf\udce9.avi", "\u202egpj.avi", "line\nbreak\ttab", "]]>--><!--",
           "\u2028\u2029", "__proto__", "映像/動画.mp4"]


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def exact(x, i, k, allowed=None):
    """The k nearest of row i by inner products in double precision, best first, and all inner products."""
    products = x.astype(np.float64) @ x[i].astype(np.float64)
    order = [j for j in np.argsort(-products, kind="stable") if j != i and (allowed is None or allowed[j])]
    return order[:k], products


def bound(x):
    """How far the page's similarities may be off: the bound in support/page.py, and float32."""
    c = np.abs(x - x.mean(0, dtype=np.float64))
    return c.max() / LEVELS * c.sum(1).max() + 3e-7


# ---------------------------------------------------------------------------------------------------------------------
# What is embedded
# ---------------------------------------------------------------------------------------------------------------------
def unpacked(data, n):
    """Inner products as the page computes them."""
    scale, offset = np.frombuffer(data[:8 * n], "<f4").astype(np.float64).reshape(2, n)
    q = np.frombuffer(data[8 * n:], "<i2").reshape(n, -1).astype(np.float64)
    return scale[:, None] * scale * (q @ q.T) + offset[:, None] + offset


@pytest.mark.parametrize("spread", [1, 1e-2, 1e-4])
def test_embedded_similarities_are_exact_to_rounding(spread):
    """Also where all features share one direction, as those of a collapsed network: what differs is kept."""
    rng = np.random.default_rng(0)
    x = unit(np.abs(rng.standard_normal((300, 64))) * spread + 1)
    true = x.astype(np.float64) @ x.T.astype(np.float64)
    error = np.abs(unpacked(pack(x), 300) - true).max()
    assert error <= bound(x)
    differences = np.ptp(true[~np.eye(300, dtype=bool)])
    assert error < 1e-3 * differences or (spread == 1e-4 and differences < 1e-6)


def test_one_film_and_equal_films():
    x = unit(np.ones((1, 5)))
    assert unpacked(pack(x), 1) == pytest.approx(1)
    assert np.allclose(unpacked(pack(np.repeat(x, 3, axis=0)), 3), 1)


def test_json_can_not_end_its_element():
    value = ["</script>", "<!--", "\udce9", float("1e300")]
    text = embedded_json(value)
    assert "<" not in text and json.loads(text) == value and text.isascii()
    with pytest.raises(ValueError):
        embedded_json([float("nan")])


@pytest.mark.parametrize("wrong, message", [
    ({"features": {"rgb": np.ones((2, 4), np.float32)}}, r"features\['rgb'\] must be finite numbers \[3, D\]"),
    ({"features": {"rgb": np.full((3, 4), np.nan)}}, r"features\['rgb'\] must be finite"),
    ({"maps": {"rgb": np.ones((3, 3))}}, r"maps\['rgb'\] must be finite numbers \[3, 2\]"),
    ({"maps": {"flow": np.ones((3, 2))}}, "not 'flow'"),
    ({"groups": {"rgb": [Group("one", [0, 3])]}}, "places in the 3 items"),
    ({"gallery": [True]}, "not of 1"),
])
def test_wrong_arguments(tmp_path, wrong, message):
    right = {"title": "t", "items": [Item(str(i)) for i in range(3)], "features": {"rgb": np.ones((3, 4), np.float32)}}
    with pytest.raises(ValueError, match=message):
        write_page(tmp_path, **{**right, **wrong})
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# A collection of generated films
# ---------------------------------------------------------------------------------------------------------------------
N = 30


@pytest.fixture(scope="session")
def collection(tmp_path_factory):
    """A page of 30 generated films: colours as rgb, motion as flow, groups by action, a map, two films missing."""
    root = tmp_path_factory.mktemp("collection")
    walkers.make(root / "set", train=N, test=1, size=48, frames=12)
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
    groups = {view: [Group(a, [i for i in range(N) if items[i].name.startswith(a + "/")], "tight") for a in actions]
              for view in features}
    maps = {view: (x[:, :2] - x[:, :2].min(0)) / np.ptp(x[:, :2], axis=0) for view, x in features.items()}
    page = write_page(root / "page", title="Walkers", items=items, features=features, groups=groups, maps=maps,
                      notes=["30 films"])
    return SimpleNamespace(page=page, items=items, features=features, groups=groups, maps=maps, root=root)


def shown(browser, selector="#grid .card"):
    """The films of the cards that a selector finds, in their order."""
    return browser.run("[...document.querySelectorAll(arguments[0])].map(e => Number(e.dataset.film))", selector)


def colour_of(browser, name):
    """A colour of the style sheet, [3] in 0..1."""
    colour = browser.run("""(element => {
        element.style.color = `var(${arguments[0]})`;
        document.body.append(element);
        const colour = getComputedStyle(element).color;
        element.remove();
        return colour;
    })(document.createElement('i'))""", name)
    return np.array([int(c) for c in re.findall(r"\d+", colour)[:3]]) / 255


def in_view(browser):
    """Once observers have reported: how many pictures lie in the window, how many play, how many animations run."""
    time.sleep(0.3)
    return browser.run("""(() => {
        const inside = e => {
            const b = e.getBoundingClientRect();
            return b.height && b.bottom > 0 && b.top < innerHeight && b.right > 0 && b.left < innerWidth;
        };
        const frames = [...document.querySelectorAll('.frame:not(.none)')];
        return [frames.filter(inside).length, frames.filter(e => e.classList.contains('seen')).length,
                document.getAnimations().filter(a => a.playState === 'running').length, frames.length];
    })()""")


def test_films_move(browser, collection):
    browser.open(collection.page)
    browser.until("document.querySelectorAll('#grid img[src]').length > 5 && "
                  "[...document.querySelectorAll('#grid img[src]')].every(i => i.complete && i.naturalWidth)")
    box = browser.run("(b => [b.x, b.y, b.width, b.height].map(Math.round))"
                      "(document.querySelector('#grid .frame').getBoundingClientRect())")
    x, y, w, h = box

    def first_film():
        return browser.picture()[y:y + h, x:x + w].astype(int)

    def moves(looks):
        before = first_film()
        assert before.std() > 5  # a film, no empty field
        return any(np.abs(first_film() - before).mean() > 2 for _ in range(looks))

    assert moves(8)
    browser.click("#motion")
    time.sleep(0.2)
    assert not moves(3)
    browser.mouse("mouseMoved", x + w / 2, y + h / 2)  # the one that is pointed at plays
    assert moves(8)
    browser.mouse("mouseMoved", 0, 0)
    assert browser.complaints() == []


def test_no_film_plays_unless_it_is_in_view(browser, collection):
    browser.open(collection.page, height=500)
    inside, seen, running, there = in_view(browser)
    assert inside == seen == running > 3 and there > inside
    browser.run("scrollTo(0, 600)")
    inside, seen, running, there = in_view(browser)
    assert inside == seen == running > 3 and there > inside
    browser.run("go('map')")
    assert in_view(browser)[:3] == [0, 0, 0]


def test_reduced_motion(browser, collection):
    browser.open(collection.page, calm=True)
    inside, seen, running, _ = in_view(browser)
    assert inside == seen > 3 and running == 0
    assert browser.run("document.getElementById('motion').getAttribute('aria-pressed')") == "false"
    browser.click("#motion")
    assert in_view(browser)[2] == inside


@pytest.mark.parametrize("view", ["rgb", "flow", "rgb+flow"])
def test_a_click_shows_the_nearest(browser, collection, view):
    browser.open(collection.page)
    browser.until("document.querySelectorAll('#grid .card').length > 9")
    for i in (0, 8):
        browser.click(f"#grid [data-film='{i}']")
        browser.click(f"header .views input[value='{view}'] + span")
        expected, products = exact(collection.features[view], i, 12)
        assert shown(browser, "#panel .near .card") == expected
        values = browser.run("[...document.querySelectorAll('#panel .near .caption i')].map(e => e.textContent)")
        assert [float(v) for v in values] == pytest.approx([products[j] for j in expected], abs=0.0051)
        assert browser.run("document.querySelector('#panel h2').textContent") == collection.items[i].name
    browser.click("#panel > .plain")
    assert shown(browser, "#panel .near .card") == exact(collection.features[view], 8, 24)[0]
    browser.click("#panel .near .card", 3)  # a neighbour is opened likewise
    i = exact(collection.features[view], 8, 4)[0][3]
    assert shown(browser, "#panel .near .card") == exact(collection.features[view], i, 12)[0]


def test_all_films_have_their_exact_neighbours(browser, collection):
    browser.open(collection.page)
    for view, x in collection.features.items():
        found = browser.run("films.map((_, i) => nearest(arguments[0], i, 12))", view)
        off = bound(x)
        assert off < 2e-4
        for i, near in enumerate(found):
            order, products = exact(x, i, 12)
            own = np.array([products[n["film"]] for n in near])
            assert len({n["film"] for n in near} | {i}) == 13
            assert np.abs([n["similarity"] for n in near] - own).max() <= off
            assert np.abs(own - products[order]).max() <= 2 * off  # the same films, or others as near


def test_views_side_by_side(browser, collection):
    browser.open(collection.page, "film=3&view=side+by+side")
    sections = "#panel .lists > section:nth-child({}) .card"
    for k, x in enumerate(collection.features.values(), 1):
        assert shown(browser, sections.format(k)) == exact(x, 3, 6)[0]
    heads = browser.run("[...document.querySelectorAll('#panel h3')].map(e => e.textContent)")
    assert heads == ["RGB", "Flow", "RGB + flow"]
    browser.run("go('map')")
    assert browser.until("document.querySelectorAll('#maps canvas').length") == 3
    assert browser.run("maps.map(m => m.view)") == list(collection.features)


def test_the_filter(browser, collection):
    browser.open(collection.page)
    browser.press("/", *"bend C01")
    names = [item.name.lower() for item in collection.items]
    expected = [i for i, name in enumerate(names) if "bend" in name and "c01" in name]
    assert 0 < len(expected) < names.count("bend") + 5
    browser.until("document.getElementById('count').textContent === arguments[0]", f"{len(expected)} of {N} films")
    assert shown(browser) == expected
    browser.press(*"zzz")
    browser.until("!document.getElementById('nothing').hidden")
    assert shown(browser) == []
    browser.open(collection.page, "filter=walk")  # an address opens what it showed
    assert shown(browser) == [i for i, name in enumerate(names) if "walk" in name]


def test_the_keyboard_reaches_everything(browser, collection):
    browser.open(collection.page)
    browser.until("document.querySelectorAll('#grid .card').length > 9")
    focus = "document.activeElement.dataset.film"
    for _ in range(12):
        if browser.run(focus) is not None:
            break
        browser.press("Tab")
    assert browser.run(focus) == "0"
    columns = browser.run("grid.columns")
    browser.press("ArrowRight", "ArrowDown")
    assert browser.run(focus) == str(columns + 1)
    assert browser.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    browser.press("End")
    assert browser.run(focus) == str(N - 1)
    assert browser.run("(b => b.bottom <= innerHeight && b.top >= 0)(document.activeElement.getBoundingClientRect())")
    browser.press("Enter")
    assert shown(browser, "#panel .near .card") == exact(collection.features["rgb"], N - 1, 12)[0]
    time.sleep(0.3)  # the grid has become narrower
    assert browser.run(focus) == str(N - 1)  # it keeps the focus, and stays in view
    assert browser.run("(b => b.bottom <= innerHeight && b.top >= 0)(document.activeElement.getBoundingClientRect())")
    browser.press("ArrowLeft", "Enter")
    assert browser.run("document.querySelector('#panel h2').textContent") == collection.items[N - 2].name
    browser.press("Escape")
    assert browser.run("document.getElementById('panel').hidden")
    browser.press("Home")
    assert browser.run(focus) == "0"


def test_groups(browser, collection):
    browser.open(collection.page, "tab=groups")
    groups = collection.groups["rgb"]
    titles = browser.run("[...document.querySelectorAll('.group h3')].map(e => e.textContent)")
    assert titles == [g.title for g in groups]
    assert browser.run("document.querySelector('.group p').textContent") == f"{len(groups[0].members)} films · tight"
    browser.run("scrollTo(0, document.body.scrollHeight)")  # rows are filled as they come into view
    browser.until("document.querySelectorAll('.group:last-child .card').length")
    assert shown(browser, ".group:last-child .card") == groups[-1].members
    browser.click(".group:last-child .plain")
    assert browser.until("document.getElementById('films').hidden === false")
    assert shown(browser) == groups[-1].members
    assert groups[-1].title in browser.run("document.getElementById('chip').textContent")
    browser.click("#chip")
    assert len(shown(browser)) > len(groups[-1].members)


def test_the_map(browser, collection):
    browser.open(collection.page, "tab=map")
    browser.until("maps.length && maps[0].pictures && maps[0].pictures.length > 3")
    wanted = browser.run("maps[0].pictures[3]")
    screen = "(b => [b.x, b.y])(maps[0].canvas.getBoundingClientRect())"
    x, y = np.add(browser.run(screen), browser.run("maps[0].toScreen(maps[0].places[arguments[0]])", wanted)).round()
    under = f"(([x, y]) => maps[0].fromScreen([arguments[0] - x, arguments[1] - y]))({screen})"
    there = browser.run(under, x, y)
    browser.mouse("mouseMoved", x, y)
    browser.until("!document.getElementById('hover').hidden")
    assert collection.items[wanted].name.split("/")[-1] in browser.run("document.getElementById('hover').textContent")
    before = browser.picture()
    browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-600)
    browser.until("maps[0].zoom > 2")
    assert browser.run(under, x, y) == pytest.approx(there)  # what is under the pointer stays there
    browser.mouse("mousePressed", x, y, button="left", clickCount=1)
    for step in range(1, 6):
        browser.mouse("mouseMoved", x + 10 * step, y + 6 * step, button="left", buttons=1)
    browser.mouse("mouseReleased", x + 50, y + 30, button="left", clickCount=1)
    assert browser.run(under, x + 50, y + 30) == pytest.approx(there)
    assert browser.run("document.getElementById('panel').hidden")  # a drag is no click
    time.sleep(0.2)
    assert (browser.picture() != before).mean() > 0.01
    browser.mouse("mousePressed", x + 50, y + 30, button="left", clickCount=1)
    browser.mouse("mouseReleased", x + 50, y + 30, button="left", clickCount=1)
    assert browser.until("state.film >= 0") and browser.run("state.film") == wanted
    assert browser.run("state.near.rgb") == exact(collection.features["rgb"], wanted, 12)[0]
    assert browser.complaints() == []


def test_the_map_by_keyboard(browser, collection):
    browser.open(collection.page, "tab=map")
    browser.run("maps[0].canvas.focus()")
    browser.press("0", "+", "ArrowRight", "Enter")
    chosen = browser.run("state.film")
    middle = browser.run("[maps[0].x, maps[0].y]")
    assert chosen >= 0 and middle[0] > 0.5 == middle[1]
    assert browser.run("document.getElementById('live').textContent").endswith(collection.items[chosen].name)


def test_missing_films_are_named_and_keep_their_stills(browser, collection):
    browser.open(collection.page)
    assert browser.until("document.querySelector('#missing summary').textContent") == "2 films can't be read any more"
    listed = browser.run("document.querySelector('#missing ul').textContent")
    assert all(collection.items[i].name in listed for i in (4, 5))
    badges = browser.run("[...document.querySelectorAll('#grid .card')].filter(c => c.querySelector('.badge'))"
                         ".map(c => [c.dataset.film, Boolean(c.querySelector('img')), c.getAttribute('aria-label')])")
    assert badges == [["4", True, f"{collection.items[4].name}, film missing"],
                      ["5", False, f"{collection.items[5].name}, film missing"]]
    browser.click("#grid [data-film='5']")
    assert "doesn't exist" in browser.run("document.querySelector('#panel .warning').textContent")


def test_back_and_forward(browser, collection):
    browser.open(collection.page)
    browser.click("#grid .card", 2)
    browser.click("#tab-map")
    assert browser.run("[state.film, state.tab]") == [2, "map"]
    browser.driver.back()
    browser.until("state.tab === 'films' && state.film === 2")
    browser.driver.back()
    browser.until("state.film === -1 && document.getElementById('panel').hidden")
    browser.driver.forward()
    browser.until("state.film === 2 && !document.getElementById('panel').hidden")


def test_nothing_is_fetched_from_outside_the_folder(browser, collection):
    browser.open(collection.page, "view=side+by+side&film=0")
    for tab in ("groups", "map", "films"):
        browser.run("go(arguments[0])", tab)
        time.sleep(0.3)
    asked = browser.requests()
    entries = browser.run("performance.getEntriesByType('resource').map(e => e.name)")
    folder = collection.page.parent.resolve()
    assert any(url.endswith(".webp") for url in asked)
    for url in asked + entries:
        parts = urlsplit(url)
        assert parts.scheme == "file" and folder in Path(url2pathname(parts.path)).parents, url
    page = collection.page.read_text()
    assert not re.findall(r"""(?:src|href)=["']?(?!#)""", page) and "@import" not in page and "url(" not in page
    browser.run("new Image().src = 'http://127.0.0.1:9/beacon'")  # nor could it be
    browser.until("true")
    time.sleep(0.3)
    assert any("Content Security Policy" in said for said in browser.complaints())


# ---------------------------------------------------------------------------------------------------------------------
# Names, sizes, looks
# ---------------------------------------------------------------------------------------------------------------------
def test_hostile_names_stay_text(browser, collection, tmp_path):
    n = len(HOSTILE)
    x = unit(np.random.default_rng(0).standard_normal((n, 8)))
    (tmp_path / "previews").symlink_to(collection.page.parent / "previews")
    items = [Item(name, name, 0.0, 2.5, collection.items[0].strip, missing=name, label=name) for name in HOSTILE]
    page = write_page(tmp_path, title=HOSTILE[1], items=items, features={HOSTILE[0]: x, HOSTILE[3]: x},
                      groups={HOSTILE[3]: [Group(name, [k], name) for k, name in enumerate(HOSTILE)]},
                      maps={HOSTILE[0]: np.zeros((n, 2))}, notes=HOSTILE,
                      sections=[Section(HOSTILE[2], film(1, "right", HOSTILE[0]) + nearest(0, HOSTILE[0], 3))])
    text = [name.encode(errors="backslashreplace").decode() for name in HOSTILE]
    browser.open(page)
    assert browser.run("document.title") == text[1]
    assert browser.run("films.map(f => f.name)") == text
    assert browser.run("document.querySelectorAll('script').length") == 4  # data, two views, the page's own
    assert len(browser.run("[...document.querySelectorAll('[data-nearest] .card')].map(e => 1)")) == 3
    for tab in ("films", "groups", "map"):
        browser.run("go(arguments[0])", tab)
        browser.run("choose(1)")
        time.sleep(0.2)
        made_of_names = "main b b, main svg, #panel svg, img[src=x], [onerror], [onload]"
        assert browser.run("document.querySelectorAll(arguments[0]).length", made_of_names) == 0
    browser.run("go('films')")
    shown_names = browser.run("[...document.querySelectorAll('#grid .caption')].map(e => e.title)")
    assert shown_names == [f"{name} 0:00.0–0:02.5" for name in text]
    assert browser.run("[...document.querySelectorAll('#notes li')].map(e => e.textContent)") == text
    assert browser.run("document.querySelector('#panel h2').textContent") == text[1]
    browser.open(page, "tab=films&filter=%3Cscript%3Ealert")
    assert shown(browser) == [0]
    assert browser.complaints() == []


def test_pieces_of_films(browser, collection, tmp_path):
    x = unit(np.random.default_rng(0).standard_normal((6, 8)) * 0.1 + np.repeat(np.eye(2, 8), 3, axis=0))
    items = [Item(f"film{k // 3}", f"/films/film{k // 3}.avi", 10.0 * (k % 3), 10.0 * (k % 3 + 1)) for k in range(6)]
    browser.open(write_page(tmp_path, title="Pieces", items=items, features={"rgb": x}), "film=1")
    assert browser.run("document.getElementById('count').textContent") == "6 pieces of films"
    assert browser.run("document.querySelector('#panel .about p').textContent") == "0:10–0:20"
    assert shown(browser, "#panel .near .card") == exact(x, 1, 12)[0]
    assert set(shown(browser, "#panel .near .card")[:2]) == {0, 2}
    browser.click("#panel .others input")
    assert shown(browser, "#panel .near .card") == exact(x, 1, 12, [False] * 3 + [True] * 3)[0]
    assert browser.run("[...document.querySelectorAll('#tabs button')].map(e => e.textContent)") == ["Films"]
    assert browser.run("document.querySelector('header .views').hidden")  # one view: nothing to switch


def test_one_film_and_no_features(browser, tmp_path):
    one = [Item("only.avi")]
    browser.open(write_page(tmp_path, title="One", items=one, features={"rgb": np.ones((1, 1))}), "film=0")
    assert browser.run("document.querySelector('#panel .lists').textContent").endswith("There is no other film.")
    browser.open(write_page(tmp_path, title="None", items=one), "film=0")
    assert browser.run("document.querySelector('#panel h2').textContent") == "only.avi"
    assert browser.complaints() == []


def test_two_thousand_films(browser, collection, tmp_path):
    n = 2000
    x = unit(np.random.default_rng(0).standard_normal((n, 128)))
    (tmp_path / "previews").symlink_to(collection.page.parent / "previews")
    strips = [item.strip for item in collection.items if item.strip]
    items = [Item(f"folder{i % 7}/film{i:04d}.avi", strip=strips[i % len(strips)]) for i in range(n)]
    groups = {"rgb": [Group(f"Group {g}", list(range(g, n, 100))) for g in range(100)]}
    page = write_page(tmp_path, title="Many", items=items, features={"rgb": x}, groups=groups,
                      maps={"rgb": np.random.default_rng(1).random((n, 2))})
    browser.open(page)
    browser.until("document.querySelector('#grid .card img[src]')?.complete")
    nodes = "document.getElementsByTagName('*').length"
    assert browser.run(nodes) < 1500
    last = browser.run("document.body.scrollHeight") - 900
    assert last > 20 * 900
    for at in (0, 500, last // 3, last // 3 - 400, last // 2, last):  # on and back, by little and by much
        browser.run("scrollTo(0, arguments[0])", at)
        rows = "[Math.floor(-grid.topOf(0) / grid.row), Math.ceil((innerHeight - grid.topOf(0)) / grid.row)]"
        first, end = (max(0, row) * browser.run("grid.columns") for row in browser.run(rows))
        wanted = set(range(first, min(n, end)))
        assert wanted
        browser.until("arguments[0].every(i => document.querySelector(`#grid [data-film='${i}']`))", sorted(wanted))
        browser.until("(a => a.length > 6 && a.every(i => i.complete))([...document.querySelectorAll('.seen img')])")
        inside, seen, _, _ = in_view(browser)
        assert inside == seen
        assert browser.run(nodes) < 1500
        order = shown(browser)
        assert order == sorted(order)  # in the document's order, too, for who has it read aloud
    assert order[-1] == n - 1
    i = order[len(order) // 2]
    browser.click(f"#grid [data-film='{i}']")
    assert shown(browser, "#panel .near .card") == exact(x, i, 12)[0]
    assert browser.run(f"{nodes}") < 2000
    browser.run("go('groups')")
    assert browser.run(nodes) < 4000
    browser.run("go('map')")
    browser.until("maps[0].pictures.length > 20")
    assert browser.complaints() == []


@pytest.mark.parametrize("dark", [False, True])
def test_colours_are_legible(browser, collection, dark):
    browser.open(collection.page, dark=dark)

    def luminance(name):
        rgb = colour_of(browser, name)
        return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    grounds = [luminance(name) for name in ("--paper", "--card")]
    assert all((g < 0.05) == dark for g in grounds)
    pairs = [(luminance(name), g) for name in ("--text", "--quiet", "--accent", "--right", "--wrong") for g in grounds]
    pairs.append((luminance("--accent"), luminance("--on-accent")))
    assert min((max(p) + 0.05) / (min(p) + 0.05) for p in pairs) >= 4.5  # WCAG 2.2, AA


def test_a_phone(browser, collection):
    browser.open(collection.page, width=400, height=800)
    browser.until("document.querySelectorAll('#grid .card').length > 3")
    for tab in ("films", "groups", "map"):
        browser.run("go(arguments[0])", tab)
        time.sleep(0.2)
        assert browser.run("document.documentElement.scrollWidth") <= 400
    browser.run("go('films')")
    browser.click("#grid .card")
    box = "(b => [b.x, b.y, b.width, b.height])(document.getElementById('panel').getBoundingClientRect())"
    assert browser.run(box) == [0, 0, 400, 800]
    assert browser.run("document.querySelector('main').inert")  # what it covers can't be reached
    browser.click("#panel .views input[value='flow'] + span")
    assert shown(browser, "#panel .near .card") == exact(collection.features["flow"], 0, 12)[0]
    assert browser.run("document.getElementById('panel').scrollWidth") <= 400
    browser.click("#panel .close")
    assert browser.run("document.getElementById('panel').hidden && !document.querySelector('main').inert")


@pytest.mark.parametrize("tab", ["films", "groups", "map"])
def test_all_controls_have_names(browser, collection, tab):
    browser.open(collection.page, f"film=1&tab={tab}")
    time.sleep(0.3)
    browser.cdp("Accessibility.enable")
    nodes = [n for n in browser.cdp("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]
    controls = [n for n in nodes if n["role"]["value"] in
                {"button", "radio", "searchbox", "tab", "checkbox", "tablist", "list", "complementary", "application"}]
    assert {"button", "radio", "searchbox", "tab", "complementary"} <= {n["role"]["value"] for n in controls}
    unnamed = [n["role"]["value"] for n in controls if not n.get("name", {}).get("value")]
    assert set(unnamed) <= {"list"} and len(unnamed) <= 1  # the notes


# ---------------------------------------------------------------------------------------------------------------------
# The same pieces in the page of a run
# ---------------------------------------------------------------------------------------------------------------------
def test_sections_marks_and_a_gallery(browser, collection, tmp_path):
    (tmp_path / "previews").symlink_to(collection.page.parent / "previews")
    items = [item._replace(label=item.name.split("/")[0], missing="") for item in collection.items]
    gallery = np.arange(N) % 2 == 0
    flow = collection.features["flow"]

    def right(i):
        return [items[j].label == items[i].label for j in exact(flow, i, 5, gallery)[0]]

    query = next(i for i in range(N) if len(set(right(i))) == 2)  # some right, some wrong
    page = write_page(tmp_path, title="Run", items=items, features={"flow": flow}, gallery=gallery, sections=[
        Section("Overview", "<h2>Queries</h2>" + film(3, "wrong", "seen before") + nearest(query, "flow", 5)),
        Section("More", "<p>text</p>")])
    browser.open(page)
    tabs = browser.run("[...document.querySelectorAll('#tabs button')].map(e => e.textContent)")
    assert tabs == ["Overview", "More", "Films"]
    assert "✗ other class" in browser.run("document.querySelector('span[data-film]').textContent")
    assert "seen before" in browser.run("document.querySelector('span[data-film]').textContent")
    order, _ = exact(flow, query, 5, gallery)
    assert shown(browser, "[data-nearest] .card") == order
    marks = browser.run("[...document.querySelectorAll('[data-nearest] .mark')].map(e => e.textContent)")
    assert marks == ["✓ same class" if s else "✗ other class" for s in right(query)]
    for kind in ("right", "wrong"):  # a frame round the film, solid or dashed, in front of what moves
        x, y, _, h = browser.run("(b => [b.x, b.y, b.width, b.height])"
                                 "(document.querySelector(`[data-nearest] .${arguments[0]} .frame`)"
                                 ".getBoundingClientRect())", kind)
        edge = browser.picture()[round(y + h / 4):round(y + 3 * h / 4), round(x) + 1]
        colour = colour_of(browser, f"--{kind}")
        share = (np.abs(edge[:, ::-1] - 255 * colour).max(1) < 12).mean()
        assert share == 1 if kind == "right" else 0.3 < share < 0.9
    browser.click("[data-nearest] .card")
    assert browser.run("state.film") == order[0]
    browser.run("go('section-1')")
    assert browser.run("document.querySelector('#section-1').textContent") == "text"


def test_a_page_that_reloads_itself_stays_where_it_was(browser, collection, tmp_path):
    (tmp_path / "previews").symlink_to(collection.page.parent / "previews")
    page = write_page(tmp_path, title="Step 1", items=collection.items, features=collection.features, reload_s=1)
    browser.open(page, "film=2&view=flow")
    write_page(tmp_path, title="Step 2", items=collection.items, features=collection.features)
    browser.until("document.title === 'Step 2'")
    browser.until("state.film === 2 && state.view === 'flow' && !document.getElementById('panel').hidden")
