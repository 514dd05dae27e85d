"""The page of a collection: what it embeds, and what it does in a browser."""

import json
import re
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest
from helpers.pages import FILMS, bound, exact, in_view, shown, unit

from support.page import Group, Item, embedded_json, pack, write_page


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
    browser.until("document.getElementById('count').textContent === arguments[0]", f"{len(expected)} of {FILMS} films")
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
    assert browser.run(focus) == str(FILMS - 1)
    assert browser.run("(b => b.bottom <= innerHeight && b.top >= 0)(document.activeElement.getBoundingClientRect())")
    browser.press("Enter")
    assert shown(browser, "#panel .near .card") == exact(collection.features["rgb"], FILMS - 1, 12)[0]
    time.sleep(0.3)  # the grid has become narrower
    assert browser.run(focus) == str(FILMS - 1)  # it keeps the focus, and stays in view
    assert browser.run("(b => b.bottom <= innerHeight && b.top >= 0)(document.activeElement.getBoundingClientRect())")
    browser.press("ArrowLeft", "Enter")
    assert browser.run("document.querySelector('#panel h2').textContent") == collection.items[FILMS - 2].name
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


def test_from_a_group_the_keyboard_goes_on_to_the_panel(browser, collection):
    """Between them lie the films of all other groups."""
    browser.open(collection.page, "tab=groups")
    browser.until("document.querySelector('#groups .card')")
    browser.run("document.querySelector('#groups .card').focus()")
    browser.press("Enter")
    assert browser.until("document.getElementById('panel').contains(document.activeElement)")
    browser.press("Escape")
    assert browser.run("document.activeElement === document.querySelector('#groups .card')")


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
