"""What the tests of pages share: exact neighbours to compare with, and what a browser shows of a page."""

import json
import re
import time

import numpy as np

from support.page import LEVELS

FILMS = 30  # of the page of the fixture `collection`


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


def embedded(page):
    """What an index.html holds as JSON."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text())[1])


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
