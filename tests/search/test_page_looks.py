"""A page in a browser: hostile names, many films, colours, phones, a reader without sight; the page of a run."""

import time

import numpy as np
import pytest
from helpers.pages import FILMS, colour_of, exact, in_view, shown, unit

from support.page import Group, Item, Section, film, nearest, write_page

HOSTILE = ["<script>alert(1)</script>", "</script><script>document.title='owned'</script>",
           "<img src=x onerror=alert(1)>", "\"'`><b>bold</b>", "a%20b#c?d&amp;e", "{{data}} ${x} {{script}}",
           "folder/<svg onload=alert(1)>.avi", "caf\udce9.avi", "\u202egpj.avi", "line\nbreak\ttab", "]]>--><!--",
           "\u2028\u2029", "__proto__", "映像/動画.mp4"]


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
    pairs = [(luminance(name), g) for name in ("--text", "--quiet", "--accent", "--right", "--wrong", "--rgb", "--flow")
             for g in grounds]
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
    assert browser.run("document.querySelector('main').inert")  # what it covers can't be reached, and does not play
    assert browser.run("document.getAnimations().filter(a => a.effect.target.closest('main')).length") == 0
    assert browser.run("document.getAnimations().length") > 0
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
    gallery = np.arange(FILMS) % 2 == 0
    flow = collection.features["flow"]

    def right(i):
        return [items[j].label == items[i].label for j in exact(flow, i, 5, gallery)[0]]

    query = next(i for i in range(FILMS) if len(set(right(i))) == 2)  # some right, some wrong
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
