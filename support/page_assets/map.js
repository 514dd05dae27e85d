// A map of films: places [n, 2] in 0..1 on a canvas that one can move and zoom in. Where there is room, films show
// their pictures, the rest are dots.

const THUMB = 54; // px, the longer side of a picture on the map

class FilmMap {
  // places: [n, 2]. colours: [n]. view: what the map is of; name: the same, to be read.
  constructor(places, colours, view, name) {
    Object.assign(this, {
      places,
      colours,
      view,
      zoom: 1,
      x: 0.5,
      y: 0.5,
      over: -1,
      pointers: new Map(),
      images: new Map(),
    });
    this.canvas = make("canvas", {
      tabindex: 0,
      role: "application",
      "aria-label":
        `Map by ${name}: arrow keys move, plus and minus zoom, zero shows all, ` +
        "Enter opens the film at the centre",
    });
    const button = (text, label, act) =>
      make("button", { type: "button", "aria-label": `${label}, ${name}`, onclick: act }, text);
    this.element = make(
      "figure",
      { class: "map" },
      make("figcaption", {}, name),
      this.canvas,
      make(
        "div",
        { class: "zoom" },
        button("+", "Zoom in", () => this.zoomBy(1.6)),
        button("−", "Zoom out", () => this.zoomBy(1 / 1.6)),
        button("⤢", "Show all", () => this.all()),
      ),
    );
    new ResizeObserver(() => this.resize()).observe(this.canvas);
    for (const kind of [
      "pointerdown",
      "pointermove",
      "pointerup",
      "pointercancel",
      "pointerleave",
      "keydown",
      "wheel",
      "focus",
      "blur",
    ]) {
      this.canvas.addEventListener(kind, (event) => this[kind](event), { passive: false });
    }
  }

  resize() {
    const { clientWidth, clientHeight } = this.canvas;
    const dense = Math.min(2, devicePixelRatio || 1);
    if (!clientWidth) return;
    this.canvas.width = clientWidth * dense;
    this.canvas.height = clientHeight * dense;
    this.ask();
  }

  // Pixels of the canvas for a place, and back. The whole map fits the shorter side.
  get side() {
    return this.zoom * (Math.min(this.canvas.clientWidth, this.canvas.clientHeight) - THUMB - 16);
  }
  toScreen([x, y]) {
    return [
      this.canvas.clientWidth / 2 + (x - this.x) * this.wide,
      this.canvas.clientHeight / 2 + (y - this.y) * this.side,
    ];
  }
  fromScreen([x, y]) {
    return [
      this.x + (x - this.canvas.clientWidth / 2) / this.wide,
      this.y + (y - this.canvas.clientHeight / 2) / this.side,
    ];
  }
  // Wider than high where the canvas is, as far as it does not distort much.
  get wide() {
    return (
      this.side * Math.min(1.5, Math.max(0.8, (this.canvas.clientWidth - THUMB) / (this.canvas.clientHeight - THUMB)))
    );
  }

  all() {
    Object.assign(this, { zoom: 1, x: 0.5, y: 0.5 });
    this.ask();
  }

  zoomBy(factor, px = this.canvas.clientWidth / 2, py = this.canvas.clientHeight / 2) {
    const before = this.fromScreen([px, py]);
    this.zoom = Math.min(200, Math.max(0.7, this.zoom * factor));
    const after = this.fromScreen([px, py]);
    this.x += before[0] - after[0];
    this.y += before[1] - after[1];
    this.ask();
  }

  moveBy(dx, dy) {
    this.x = Math.min(1.2, Math.max(-0.2, this.x - dx / this.wide));
    this.y = Math.min(1.2, Math.max(-0.2, this.y - dy / this.side));
    this.ask();
  }

  // Draw once in the next frame.
  ask() {
    this.asked ||= requestAnimationFrame(() => {
      this.asked = 0;
      this.draw();
    });
  }

  image(i) {
    if (!this.images.has(i)) {
      const image = new Image();
      image.onload = () => this.ask();
      image.src = stripUrl(films[i]);
      this.images.set(i, image);
    }
    return this.images.get(i);
  }

  draw() {
    const { canvas } = this;
    const pen = canvas.getContext("2d");
    const dense = canvas.width / canvas.clientWidth;
    if (!canvas.clientWidth || !dense) return;
    pen.setTransform(dense, 0, 0, dense, 0, 0);
    pen.clearRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    const at = this.places.map((place) => this.toScreen(place));
    const inside = ([x, y]) =>
      x > -THUMB && y > -THUMB && x < canvas.clientWidth + THUMB && y < canvas.clientHeight + THUMB;
    const near = state.near[this.view] || [];
    const special = new Set(state.film >= 0 ? [state.film, ...near] : []);
    const order = [...special, ...at.keys()].filter((i) => inside(at[i]));
    const room = new Map(); // cell -> the pictures in it
    this.pictures = [];
    for (const i of new Set(order)) if (shown(i) && films[i].strip && this.fits(room, at[i])) this.pictures.push(i);
    const large = new Set(this.pictures);
    this.lines(pen, at, near);
    for (const i of order) {
      if (large.has(i)) continue;
      pen.globalAlpha = shown(i) ? 0.9 : 0.12;
      pen.fillStyle = this.colours[i];
      pen.beginPath();
      pen.arc(...at[i], 3.5, 0, 7);
      pen.fill();
    }
    pen.globalAlpha = 1;
    for (const i of [...this.pictures].reverse()) this.thumb(pen, i, at[i], special.has(i));
    if (this.over >= 0) this.ring(pen, at[this.over], THUMB / 2 + 4);
    if (document.activeElement === canvas && this.keyed) this.cross(pen);
  }

  // Whether a picture at [x, y] overlaps none that stands; it then stands.
  fits(room, [x, y]) {
    const size = THUMB + 6;
    const cx = Math.floor(x / size);
    const cy = Math.floor(y / size);
    for (let a = cx - 1; a <= cx + 1; a++) {
      for (let b = cy - 1; b <= cy + 1; b++) {
        const other = room.get(`${a},${b}`);
        if (other && Math.abs(other[0] - x) < size && Math.abs(other[1] - y) < size) return false;
      }
    }
    room.set(`${cx},${cy}`, [x, y]);
    return true;
  }

  // From the chosen film to its nearest.
  lines(pen, at, near) {
    pen.strokeStyle = style("--accent");
    pen.lineWidth = 1;
    pen.globalAlpha = 0.5;
    for (const j of near) {
      pen.beginPath();
      pen.moveTo(...at[state.film]);
      pen.lineTo(...at[j]);
      pen.stroke();
    }
    pen.globalAlpha = 1;
  }

  thumb(pen, i, [x, y], special) {
    const [, w, h] = films[i].strip;
    const scale = THUMB / Math.max(w, h);
    const image = this.image(i);
    const edge = special ? 3 : 1.5;
    pen.fillStyle = special ? style("--accent") : this.colours[i];
    pen.fillRect(x - (w * scale) / 2 - edge, y - (h * scale) / 2 - edge, w * scale + 2 * edge, h * scale + 2 * edge);
    if (image.complete && image.naturalWidth) {
      pen.drawImage(image, 0, 0, w, h, x - (w * scale) / 2, y - (h * scale) / 2, w * scale, h * scale);
    }
  }

  ring(pen, [x, y], radius) {
    pen.strokeStyle = style("--accent");
    pen.lineWidth = 2;
    pen.beginPath();
    pen.arc(x, y, radius, 0, 7);
    pen.stroke();
  }

  cross(pen) {
    const x = this.canvas.clientWidth / 2;
    const y = this.canvas.clientHeight / 2;
    pen.strokeStyle = style("--text");
    pen.lineWidth = 1.5;
    pen.beginPath();
    for (const [dx, dy] of [
      [1, 0],
      [-1, 0],
      [0, 1],
      [0, -1],
    ]) {
      pen.moveTo(x + 4 * dx, y + 4 * dy);
      pen.lineTo(x + 12 * dx, y + 12 * dy);
    }
    pen.stroke();
  }

  // The film at a point of the canvas, or -1: a picture that covers it, else the nearest dot within reach.
  find(px, py, reach = 14) {
    const within = (this.pictures || []).find((i) => {
      const [x, y] = this.toScreen(this.places[i]),
        [, w, h] = films[i].strip,
        scale = THUMB / Math.max(w, h) / 2;
      return Math.abs(px - x) <= w * scale && Math.abs(py - y) <= h * scale;
    });
    if (within !== undefined) return within;
    let best = -1,
      least = reach;
    this.places.forEach((place, i) => {
      const [x, y] = this.toScreen(place);
      const far = Math.hypot(px - x, py - y);
      if (far < least && shown(i)) [best, least] = [i, far];
    });
    return best;
  }

  // Show film i, in all maps, and its card beside it.
  hover(i) {
    if (i === this.over) return;
    for (const map of maps) {
      map.over = i;
      map.ask();
    }
    this.canvas.style.cursor = i >= 0 ? "pointer" : "";
    const [x, y] = i >= 0 ? this.toScreen(this.places[i]) : [0, 0];
    const box = this.canvas.getBoundingClientRect();
    showHover(i, box.left + x, box.top + y);
  }

  where(event) {
    const box = this.canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  pointerdown(event) {
    this.canvas.setPointerCapture(event.pointerId);
    this.pointers.set(event.pointerId, this.where(event));
    this.keyed = false;
    this.dragged = this.pointers.size > 1 ? Infinity : 0;
  }

  pointermove(event) {
    const now = this.where(event);
    const before = this.pointers.get(event.pointerId);
    if (!before) {
      if (event.pointerType === "mouse") this.hover(this.find(...now));
      return;
    }
    const other = [...this.pointers].find(([id]) => id !== event.pointerId)?.[1];
    this.pointers.set(event.pointerId, now);
    if (other) {
      const span = (p) => Math.max(1, Math.hypot(p[0] - other[0], p[1] - other[1]));
      this.zoomBy(span(now) / span(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    }
    this.dragged += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (this.dragged > 4) {
      this.hover(-1);
      this.moveBy((now[0] - before[0]) / this.pointers.size, (now[1] - before[1]) / this.pointers.size);
    }
  }

  pointerup(event) {
    if (this.pointers.delete(event.pointerId) && this.dragged <= 4) {
      const i = this.find(...this.where(event), 22);
      if (i >= 0) choose(i);
    }
  }

  pointercancel(event) {
    this.pointers.delete(event.pointerId);
  }
  pointerleave() {
    this.hover(-1);
  }

  wheel(event) {
    event.preventDefault();
    this.hover(-1);
    this.zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), ...this.where(event));
  }

  // The film nearest to the centre.
  centre() {
    return this.find(this.canvas.clientWidth / 2, this.canvas.clientHeight / 2, Infinity);
  }

  keydown(event) {
    const step = 60;
    const move = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] }[
      event.key
    ];
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (move) this.moveBy(...move);
    else if (event.key === "+" || event.key === "=") this.zoomBy(1.4);
    else if (event.key === "-") this.zoomBy(1 / 1.4);
    else if (event.key === "0") this.all();
    else if (event.key !== "Enter") return;
    event.preventDefault();
    if (event.key === "Enter") choose(this.centre());
    else this.look();
  }

  look() {
    this.keyed = true;
    this.hover(this.centre());
    if (this.over >= 0) $("live").textContent = full(films[this.over]);
    this.ask();
  }

  focus() {
    if (this.canvas.matches(":focus-visible")) this.look();
  }

  blur() {
    this.hover(-1);
    this.ask();
  }
}
