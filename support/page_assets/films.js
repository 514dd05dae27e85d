"use strict";
// What the page holds, what is near to what, and a film that plays.

const data = JSON.parse(document.getElementById("data").textContent);
const films = data.films; // [{name, path, start, end, strip: [file, width, height, seconds], missing, label}]
const $ = (id) => document.getElementById(id);

// An element. Text goes in as text nodes, so that no name is ever read as HTML.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false)
      element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

// ---------------------------------------------------------------------------------------------------------------------
// Similarities
// ---------------------------------------------------------------------------------------------------------------------
const unpacked = new Map();

// Features of a view as support/page.py packs them: scale [n], offset [n], rows int16 [n, dim].
function features(view) {
  if (!unpacked.has(view)) {
    const text = atob($(`features-${data.views.indexOf(view)}`).textContent);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    const n = films.length;
    const rows = new Int16Array(bytes.buffer, 8 * n);
    unpacked.set(view, {
      scale: new Float32Array(bytes.buffer, 0, n),
      offset: new Float32Array(bytes.buffer, 4 * n, n),
      rows,
      dim: rows.length / n,
    });
  }
  return unpacked.get(view);
}

// Inner products of film i with all, Float64Array [n].
function similarities(view, i) {
  const { scale, offset, rows, dim } = features(view);
  const own = Float64Array.from(rows.subarray(i * dim, (i + 1) * dim));
  const out = new Float64Array(films.length);
  for (let j = 0, at = 0; j < out.length; j++) {
    let sum = 0;
    for (let d = 0; d < dim; d++) sum += own[d] * rows[at++];
    out[j] = scale[i] * scale[j] * sum + offset[i] + offset[j];
  }
  return out;
}

// The k nearest films of film i, best first -> [{film, similarity}]. others: leave out pieces of the same file.
function nearest(view, i, k, others = false) {
  const all = similarities(view, i);
  const answers = films
    .map((_, j) => j)
    .filter((j) => j !== i && (!data.gallery || data.gallery[j]) && !(others && films[j].path === films[i].path));
  answers.sort((a, b) => all[b] - all[a] || a - b);
  return answers.slice(0, k).map((j) => ({ film: j, similarity: all[j] }));
}

// ---------------------------------------------------------------------------------------------------------------------
// A film
// ---------------------------------------------------------------------------------------------------------------------
const clock = (s) => `${Math.floor(s / 60)}:${String(Math.floor(s % 60)).padStart(2, "0")}`;
const tenths = (s) => `${Math.floor(s / 60)}:${(s % 60).toFixed(1).padStart(4, "0")}`;

// The time range of a piece of a film, "" of a whole one.
function range(film) {
  if (film.end === null) return "";
  const show = Number.isInteger(film.start) && Number.isInteger(film.end) ? clock : tenths;
  return `${show(film.start)}–${show(film.end)}`;
}

const full = (film) => [film.name, range(film)].filter(Boolean).join(" ");

// The frames of all films have one shape, that of most of them; others stand within it.
const shapes = films
  .filter((film) => film.strip)
  .map((film) => film.strip[1] / film.strip[2])
  .sort((a, b) => a - b);
const shape = Math.min(2.4, Math.max(0.6, shapes[shapes.length >> 1] || 4 / 3));
document.documentElement.style.setProperty("--shape", shape);

const stripUrl = (film) => "previews/" + encodeURIComponent(film.strip[0]);

// A film's picture is fetched when it is first seen, and plays while it is seen.
const sight = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      const image = target.querySelector("img");
      if (isIntersecting && !image.src) image.src = image.dataset.src;
      target.classList.toggle("seen", isIntersecting);
    }
  },
  { rootMargin: "0px" },
);

// The moving picture: a window before the strip, which the style sheet moves on by a frame at a time.
function picture(i) {
  const film = films[i];
  if (!film.strip) return make("span", { class: "frame none" }, make("span", {}, "no preview"));
  const [, width, height, seconds] = film.strip;
  const own = width / height;
  const image = make("img", { alt: "", "data-src": stripUrl(film), draggable: "false" });
  image.style.width = `${data.frames * 100}%`;
  image.style.animationDuration = `${Math.max(seconds, 0.3)}s`;
  image.style.animationTimingFunction = `steps(${data.frames})`;
  const view = make("span", { class: "window" }, image);
  view.style.width = `${100 * Math.min(1, own / shape)}%`;
  view.style.height = `${100 * Math.min(1, shape / own)}%`;
  const frame = make("span", { class: "frame" }, view);
  sight.observe(frame);
  return frame;
}

// Its name, with its similarity where it is a neighbour; below, its folder and time range.
function caption(i, similarity = null) {
  const film = films[i];
  const slash = film.name.lastIndexOf("/");
  return make(
    "span",
    { class: "caption", title: full(film) },
    make(
      "span",
      {},
      make("b", {}, film.name.slice(slash + 1)),
      similarity === null ? null : make("i", {}, similarity.toFixed(2)),
    ),
    make("small", {}, [film.name.slice(0, Math.max(0, slash)), range(film)].filter(Boolean).join(" · ") || "\u00a0"),
  );
}

// A card that opens film i. rank, similarity: as a neighbour. mark: "right", "wrong" or "". note: a line more.
function card(i, { rank = null, similarity = null, mark = "", note = "" } = {}) {
  const film = films[i];
  const said = { right: "✓ same class", wrong: "✗ other class" }[mark];
  const label = [
    rank !== null && `${rank}.`,
    full(film),
    film.label,
    similarity !== null && `similarity ${similarity.toFixed(2)}`,
    said && said.slice(2),
    film.missing && "film missing",
    note,
  ]
    .filter(Boolean)
    .join(", ");
  return make(
    "button",
    {
      type: "button",
      class: `card ${mark}`,
      "data-film": i,
      "aria-label": label,
      onclick: (event) => choose(i, event.detail === 0),
    },
    picture(i),
    film.missing ? make("span", { class: "badge" }, "missing") : null,
    caption(i, similarity),
    said || note ? make("span", { class: "facts" }, said ? make("span", { class: "mark" }, said) : null, note) : null,
  );
}

// ---------------------------------------------------------------------------------------------------------------------
// The grid: only the rows near the window are in the document
// ---------------------------------------------------------------------------------------------------------------------
class Grid {
  constructor(list) {
    this.list = list;
    this.ids = [];
    this.cells = new Map(); // place -> its element
    this.at = 0; // the place that Tab reaches
    new ResizeObserver(() => this.measure()).observe(list);
    addEventListener("scroll", () => this.draw(), { passive: true });
    list.addEventListener("keydown", (event) => this.key(event));
    list.addEventListener("focusin", (event) => {
      const cell = event.target.closest("li");
      if (cell) this.stop(Number(cell.dataset.place));
    });
  }

  show(ids) {
    this.ids = ids;
    this.at = Math.min(this.at, Math.max(0, ids.length - 1));
    this.clear();
    this.measure();
  }

  clear() {
    this.list.replaceChildren();
    this.cells.clear();
  }

  measure() {
    const width = this.list.clientWidth;
    if (!width) return;
    const gap = width < 500 ? 10 : 16;
    const columns = Math.max(2, Math.floor((width + gap) / ((width < 500 ? 150 : 184) + gap)));
    const cell = Math.floor((width - gap * (columns - 1)) / columns);
    const row = Math.round(cell / shape) + 48 + gap;
    const changed = cell !== this.cell || columns !== this.columns;
    const focused = this.list.contains(document.activeElement);
    const before = this.inView(this.at) ? this.topOf(this.at) : null;
    Object.assign(this, { gap, columns, cell, row });
    this.list.style.height = `${Math.ceil(this.ids.length / columns) * row}px`;
    if (changed) this.clear();
    if (changed && before !== null) scrollBy(0, this.topOf(this.at) - before); // the film one looks at stays in place
    this.draw();
    if (changed && focused) this.focus(this.at);
  }

  // Where the row of a place begins, px below the window's upper edge.
  topOf(place) {
    return this.list.getBoundingClientRect().top + Math.floor(place / this.columns) * this.row;
  }

  inView(place) {
    const top = this.columns ? this.topOf(place) : -1;
    return top >= 0 && top < innerHeight;
  }

  draw() {
    if (!this.list.clientWidth || !this.row) return;
    const top = this.list.getBoundingClientRect().top;
    const last = this.ids.length;
    const from = Math.max(0, Math.floor(-top / this.row) - 2) * this.columns;
    const to = Math.min(last, (Math.ceil((innerHeight - top) / this.row) + 2) * this.columns);
    for (const [place, cell] of this.cells) {
      if ((place < from || place >= to) && !cell.contains(document.activeElement)) {
        cell.remove();
        this.cells.delete(place);
      }
    }
    for (let place = from; place < to; place++) if (!this.cells.has(place)) this.add(place);
    if (!this.cells.has(this.at) && from < last) this.stop(from);
  }

  add(place) {
    const button = card(this.ids[place]);
    button.tabIndex = place === this.at ? 0 : -1;
    const cell = make(
      "li",
      { "data-place": place, "aria-setsize": this.ids.length, "aria-posinset": place + 1 },
      button,
    );
    const column = place % this.columns;
    const row = Math.floor(place / this.columns);
    cell.style.cssText = `width:${this.cell}px;left:${column * (this.cell + this.gap)}px;top:${row * this.row}px`;
    this.cells.set(place, cell);
    const next = [...this.cells.keys()].filter((p) => p > place).sort((a, b) => a - b)[0];
    this.list.insertBefore(cell, next === undefined ? null : this.cells.get(next)); // read aloud in order
  }

  // Tab reaches this place from now on.
  stop(place) {
    for (const p of [this.at, place]) {
      if (this.cells.has(p)) this.cells.get(p).firstChild.tabIndex = p === place ? 0 : -1;
    }
    this.at = place;
  }

  key(event) {
    const page = this.columns * Math.max(1, Math.floor(innerHeight / this.row) - 1);
    const step = {
      ArrowLeft: -1,
      ArrowRight: 1,
      ArrowUp: -this.columns,
      ArrowDown: this.columns,
      PageUp: -page,
      PageDown: page,
      Home: -this.ids.length,
      End: this.ids.length,
    }[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.focus(Math.min(this.ids.length - 1, Math.max(0, this.at + step)));
  }

  focus(place) {
    const top = this.topOf(place);
    const head = Math.max(0, document.querySelector("header").getBoundingClientRect().bottom) + 8;
    if (top < head) scrollBy(0, top - head);
    else if (top + this.row > innerHeight) scrollBy(0, top + this.row - innerHeight);
    this.draw();
    if (!this.cells.has(place)) this.add(place);
    this.stop(place);
    this.cells.get(place).firstChild.focus({ preventScroll: true });
  }
}
