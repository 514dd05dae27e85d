// The page: its tabs, the switch of views, the filter, and the panel with the nearest of a chosen film.

const SIDE_BY_SIDE = "side by side";
const state = {
  tab: "",
  view: data.views[0] || "",
  film: -1,
  filter: "",
  group: null,
  near: {},
  more: 12,
  others: false,
};
const tabs = [...document.querySelectorAll("section.tab")].filter(
  (tab) =>
    ({
      films: films.length || !document.querySelector(".tab:not([id])"),
      groups: Object.keys(data.groups).length,
      map: Object.keys(data.maps).length,
    })[tab.id] ?? true,
);
const narrow = matchMedia("(max-width: 800px)"); // as in page.css
const grid = new Grid($("grid"));
const words = { rgb: "RGB", "rgb+flow": "RGB + flow" };
const title = (view) => words[view] || view;
const capital = (text) => text.slice(0, 1).toUpperCase() + text.slice(1);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let matching = new Set(films.keys()),
  maps = [];

// The views on show: the chosen one, or all of them side by side. has: {view: ...}, of which only these can be shown.
function shownViews(has = null) {
  const views = state.view === SIDE_BY_SIDE ? data.views : [state.view];
  const able = has ? views.filter((view) => has[view]) : views;
  return able.length || !has ? able : Object.keys(has).slice(0, 1);
}

const shown = (i) => matching.has(i);

// ---------------------------------------------------------------------------------------------------------------------
// State and address: back and forward work, and a link opens what it showed
// ---------------------------------------------------------------------------------------------------------------------
function address() {
  const parts = new URLSearchParams();
  if (state.tab !== tabs[0].id) parts.set("tab", state.tab);
  if (state.view !== (data.views[0] || "")) parts.set("view", state.view);
  if (state.film >= 0) parts.set("film", state.film);
  if (state.filter) parts.set("filter", state.filter);
  if (state.group) parts.set("group", state.group.join(":"));
  return "#" + parts;
}

function remember(replace = false) {
  const to = address();
  if (to === (location.hash || "#")) return;
  if (replace) history.replaceState(null, "", to);
  else history.pushState(null, "", to);
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const views = [...data.views, SIDE_BY_SIDE];
  const film = parts.get("film");
  state.tab = tabs.some((tab) => tab.id === parts.get("tab")) ? parts.get("tab") : tabs[0].id;
  state.view = views.includes(parts.get("view")) ? parts.get("view") : data.views[0] || "";
  state.film = film !== null && films[film] ? Number(film) : -1;
  state.filter = parts.get("filter") || "";
  const [view, g] = (parts.get("group") || "").split(/:(?=\d+$)/);
  state.group = data.groups[view]?.[g] ? [view, Number(g)] : null;
  $("filter").value = state.filter;
  sift();
  openTab();
  openPanel();
  checkView();
}

// ---------------------------------------------------------------------------------------------------------------------
// Filter
// ---------------------------------------------------------------------------------------------------------------------
const haystack = films.map((film) => `${full(film)} ${film.label}`.toLowerCase());

// Whether the filter, whatever the group, lets film i through: its name or class holds every word.
function passes(i) {
  return state.filter
    .toLowerCase()
    .split(/\s+/)
    .every((word) => haystack[i].includes(word));
}

function sift() {
  const group = state.group && data.groups[state.group[0]][state.group[1]];
  const among = group ? group.members : [...films.keys()];
  const ids = among.filter(passes);
  matching = new Set(ids);
  const all = films.length.toLocaleString("en");
  const pieces = films.some((film) => film.end !== null) ? "pieces of films" : "films";
  $("count").textContent =
    ids.length === films.length ? `${all} ${pieces}` : `${ids.length.toLocaleString("en")} of ${all} ${pieces}`;
  $("nothing").hidden = ids.length > 0 || !films.length;
  $("chip").hidden = !group;
  if (group)
    $("chip").replaceChildren(
      `${group.title} by ${title(state.group[0])} `,
      make("span", { "aria-hidden": "true" }, "✕"),
    );
  $("chip").setAttribute("aria-label", "Show the films of all groups");
  grid.show(ids);
  for (const map of maps) map.ask();
  if (state.tab === "groups") drawGroups();
}

// ---------------------------------------------------------------------------------------------------------------------
// Tabs
// ---------------------------------------------------------------------------------------------------------------------
const places = new Map(); // tab -> how far it was scrolled

function openTab() {
  for (const tab of tabs) {
    tab.hidden = tab.id !== state.tab;
    const button = $(`tab-${tab.id}`);
    const own = tab.id === state.tab;
    button.setAttribute("aria-selected", own);
    button.tabIndex = own ? 0 : -1;
  }
  document.body.dataset.tab = state.tab;
  hideHover();
  if (state.tab === "films") grid.measure();
  if (state.tab === "groups") drawGroups();
  if (state.tab === "map") drawMaps();
  fillSections();
}

function go(tab) {
  if (tab === state.tab) return;
  places.set(state.tab, scrollY);
  state.tab = tab;
  openTab();
  scrollTo(0, places.get(tab) || 0);
  remember();
}

function makeTabs() {
  for (const [k, tab] of tabs.entries()) {
    tab.id ||= `section-${k}`;
    tab.setAttribute("role", "tabpanel");
    tab.setAttribute("aria-labelledby", `tab-${tab.id}`);
    $("tabs").append(
      make(
        "button",
        { type: "button", role: "tab", id: `tab-${tab.id}`, "aria-controls": tab.id, onclick: () => go(tab.id) },
        tab.dataset.title,
      ),
    );
  }
  $("tabs").addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = tabs.findIndex((tab) => tab.id === state.tab);
    const to = tabs[(at + step + tabs.length) % tabs.length].id;
    go(to);
    $(`tab-${to}`).focus();
  });
  $("tabs").hidden = tabs.length < 2;
}

// Films that a section of the page's own names: see `film` and `nearest` of support/page.py.
function fillSections() {
  for (const place of document.querySelectorAll("section.tab:not([hidden]) span[data-film]:empty")) {
    place.append(card(Number(place.dataset.film), { mark: place.dataset.mark, note: place.dataset.note }));
  }
  for (const place of document.querySelectorAll("section.tab:not([hidden]) span[data-nearest]:empty")) {
    const { view, nearest: i, k } = place.dataset;
    place.append(neighbours(view, Number(i), nearest(view, Number(i), Number(k))));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Groups
// ---------------------------------------------------------------------------------------------------------------------
const TYPICAL = 12; // films of a group that its row shows

const lazy = new IntersectionObserver(
  (entries) => {
    for (const { target, isIntersecting } of entries) {
      if (isIntersecting && !target.childElementCount) {
        target.append(...target.members.slice(0, TYPICAL).map((i) => make("li", {}, card(i))));
      }
    }
  },
  { rootMargin: "400px" },
);

function drawGroups() {
  $("groups").replaceChildren();
  for (const view of shownViews(data.groups)) {
    $("groups").append(make("h2", {}, `Groups by ${title(view)}`));
    for (const [g, group] of data.groups[view].entries()) {
      const members = group.members.filter(passes);
      const few = members.length === 1 ? "1 film" : `${members.length} films`;
      if (!members.length) continue;
      const row = make("ul", { class: "row", tabindex: -1, "aria-label": `${group.title}, most typical first` });
      row.members = members;
      const all = make(
        "button",
        { type: "button", class: "plain", onclick: () => openGroup(view, g) },
        members.length === 1 ? "Show it" : `Show all ${members.length}`,
      );
      $("groups").append(
        make(
          "section",
          { class: "group", "aria-label": group.title },
          make(
            "div",
            { class: "heading" },
            make("h3", {}, group.title),
            make("p", {}, [few, group.note].filter(Boolean).join(" · ")),
            all,
          ),
          row,
        ),
      );
      lazy.observe(row);
    }
  }
}

function openGroup(view, g) {
  state.group = [view, g];
  sift();
  go("films");
  scrollTo(0, 0);
}

// ---------------------------------------------------------------------------------------------------------------------
// Maps
// ---------------------------------------------------------------------------------------------------------------------
// What the colours of all maps mean: the classes where there are some, else the groups of the view on show, of several
// those of the last.
function kinds(views) {
  const labels = [...new Set(films.map((film) => film.label))].filter(Boolean).sort();
  if (labels.length) return { what: "Classes", names: labels, of: films.map((film) => labels.indexOf(film.label)) };
  const view = views[views.length - 1];
  const groups = data.groups[view] || [];
  const of = films.map(() => -1);
  groups.forEach((group, g) =>
    group.members.forEach((i) => {
      of[i] = g;
    }),
  );
  return { what: `Groups by ${title(view)}`, names: groups.map((group) => group.title), of };
}

// Distinct hues: evenly spaced where few, else by the golden angle, so that those in a row differ.
function hues(many) {
  const angle = (k) => Math.round(many <= 12 ? (360 * k) / many : k * 137.5) % 360;
  return Array.from({ length: many }, (_, k) => `hsl(${angle(k)} 55% ${style("--dot")})`);
}

function drawMaps() {
  const views = shownViews(data.maps);
  if ($("maps").dataset.views !== views.join()) {
    const { what, names, of } = kinds(views);
    const colours = hues(names.length);
    const quiet = style("--quiet");
    const each = of.map((k) => (k < 0 ? quiet : colours[k]));
    maps = views.map((view) => new FilmMap(data.maps[view], each, view, capital(title(view))));
    $("maps").replaceChildren(...maps.map((map) => map.element));
    $("maps").className = `of-${maps.length}`;
    $("maps").dataset.views = views.join();
    $("legend").replaceChildren(...(names.length && names.length <= 24 ? [make("li", {}, what)] : []));
    if (names.length <= 24)
      $("legend").append(
        ...names.map((name, k) => {
          const dot = make("span", { class: "dot" });
          dot.style.background = colours[k];
          return make("li", {}, dot, name);
        }),
      );
  }
  for (const map of maps) map.resize();
}

function showHover(i, x, y) {
  if (i < 0) return hideHover();
  const box = $("hover");
  box.replaceChildren(picture(i), caption(i), films[i].label ? make("span", { class: "facts" }, films[i].label) : "");
  box.hidden = false;
  const width = box.offsetWidth;
  const height = box.offsetHeight;
  const gap = 36;
  const beside = x + gap + width > innerWidth ? x - gap - width : x + gap;
  const within = (at, size, room) => `${Math.min(room - size - 8, Math.max(8, at))}px`;
  box.style.left = within(beside, width, innerWidth);
  box.style.top = within(y - height / 2, height, innerHeight);
}

function hideHover() {
  $("hover").hidden = true;
}

// ---------------------------------------------------------------------------------------------------------------------
// The panel: a film and its nearest
// ---------------------------------------------------------------------------------------------------------------------
// found: of `nearest`, for film i.
function neighbours(view, i, found) {
  const own = films[i].label;
  if (!found.length) return make("p", { class: "empty" }, "There is no other film.");
  return make(
    "ol",
    { class: "near", "aria-label": `Nearest by ${title(view)}` },
    ...found.map(({ film, similarity }, r) => {
      const mark = own && films[film].label ? (films[film].label === own ? "right" : "wrong") : "";
      return make("li", { "data-near": film }, card(film, { rank: r + 1, similarity, mark }));
    }),
  );
}

// What is known of film i.
function aboutFilm(i) {
  const film = films[i];
  const facts = [
    ["", range(film)],
    ["", film.label],
    ["path", film.path === film.name ? "" : film.path],
    ["warning", film.missing && `Missing: ${film.missing}`],
  ].filter(([, text]) => text);
  const lines = facts.map(([kind, text]) => make("p", { class: kind }, text));
  return make(
    "div",
    { class: "about" },
    picture(i),
    make("div", {}, make("h2", { tabindex: -1 }, film.name), ...lines),
  );
}

function drawPanel() {
  const i = state.film;
  const views = shownViews().filter(Boolean);
  const several = views.length > 1;
  const k = several ? Math.ceil(state.more / 2) : state.more;
  const found = new Map(views.map((view) => [view, nearest(view, i, k, state.others)]));
  state.near = Object.fromEntries(views.map((view) => [view, found.get(view).map((near) => near.film)]));
  const lists = views.map((view) => {
    const heading = several ? capital(title(view)) : `Nearest by ${title(view)}`;
    return make("section", {}, make("h3", {}, heading), neighbours(view, i, found.get(view)));
  });
  const button = (attributes, text) => make("button", { type: "button", ...attributes }, text);
  const addMore = () => redraw(() => (state.more += 12), ":scope > .plain");
  const more = views.some((view) => found.get(view).length === k);
  const parts = [
    button({ class: "close", "aria-label": "Close", onclick: () => choose(-1) }, "✕"),
    aboutFilm(i),
    viewSwitch("panel-view"),
    othersBox(films[i]),
    make("div", { class: several ? "lists several" : "lists" }, ...lists),
    more ? button({ class: "plain", onclick: addMore }, "Show more") : null,
  ];
  $("panel").replaceChildren(...parts.filter(Boolean));
  checkView();
}

// Draw the panel after a change, with the focus where it was.
function redraw(change, focused) {
  change();
  openPanel();
  $("panel").querySelector(focused)?.focus();
}

// Where films are in pieces, a box that leaves the film's own other pieces out.
function othersBox(film) {
  if (!film.path || films.filter((other) => other.path === film.path).length < 2) return null;
  const flip = (event) =>
    redraw(() => {
      state.others = event.target.checked;
    }, ".others input");
  return make(
    "label",
    { class: "others" },
    make("input", { type: "checkbox", checked: state.others, onchange: flip }),
    "other films only",
  );
}

function openPanel() {
  const open = state.film >= 0;
  if (open) drawPanel();
  else state.near = {};
  $("panel").hidden = !open;
  document.body.classList.toggle("chosen", open);
  for (const part of document.querySelectorAll("header, main")) part.inert = open && narrow.matches; // it covers them
  for (const map of maps) map.ask();
}

let opener = null; // what had the focus before the panel opened

// byKey: from the keyboard. Of groups, whose many films lie between, the focus then goes on to the panel.
function choose(i, byKey = false) {
  const inside = $("panel").contains(document.activeElement);
  const before = state.film;
  if (i < 0) {
    state.film = -1;
    openPanel();
    const card = document.querySelector(`main .card[data-film="${before}"]`);
    if (inside) (opener?.isConnected ? opener : card)?.focus();
  } else {
    if (!inside) opener = document.activeElement;
    Object.assign(state, { film: i, more: 12 });
    openPanel();
    $("panel").scrollTop = 0;
    $("live").textContent = `Nearest films of ${full(films[i])}`;
    const far = byKey && opener?.closest("#groups");
    if (inside || narrow.matches || far) $("panel").querySelector("h2").focus({ preventScroll: true });
  }
  if (before !== state.film) remember();
}

// ---------------------------------------------------------------------------------------------------------------------
// Start
// ---------------------------------------------------------------------------------------------------------------------
// The switch of views. It is in the header, and on a phone in the panel too, which covers the header there.
function viewSwitch(name) {
  const turn = (view) => () => {
    state.view = view;
    openTab();
    openPanel();
    checkView();
    if (name !== "view") $("panel").querySelector(".views :checked").focus();
    remember();
  };
  const all = [...data.views, SIDE_BY_SIDE].map((view) =>
    make(
      "label",
      {},
      make("input", { type: "radio", name, value: view, onchange: turn(view) }),
      make("span", {}, capital(title(view))),
    ),
  );
  return make(
    "fieldset",
    { class: "views", hidden: data.views.length < 2 },
    make("legend", {}, "Similar by"),
    ...all,
  );
}

function checkView() {
  for (const input of document.querySelectorAll(".views input")) input.checked = input.value === state.view;
}

function setMotion(on) {
  document.body.classList.toggle("still", !on);
  $("motion").setAttribute("aria-pressed", on);
}

function showMissing() {
  const named = (film) => film.path || film.name; // a film of several pieces is one film
  const gone = [...new Map(films.filter((film) => film.missing).map((film) => [named(film), film])).values()];
  if (!gone.length) return;
  $("missing").hidden = false;
  $("missing").querySelector("summary").textContent =
    `${gone.length === 1 ? "1 film" : `${gone.length} films`} can't be read any more`;
  $("missing")
    .querySelector("ul")
    .append(...gone.map((film) => make("li", {}, make("b", {}, full(film)), ` ${film.missing}`)));
}

function start() {
  makeTabs();
  $("tabs").after(viewSwitch("view"));
  new ResizeObserver(([{ target }]) =>
    document.documentElement.style.setProperty("--head", `${target.offsetHeight}px`),
  ).observe(document.querySelector("header"));
  showMissing();
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  setMotion(!calm.matches);
  calm.addEventListener("change", () => setMotion(!calm.matches));
  $("motion").addEventListener("click", () => setMotion(document.body.classList.contains("still")));
  $("chip").addEventListener("click", () => {
    state.group = null;
    sift();
    remember();
  });
  $("filter").addEventListener("input", () => {
    state.filter = $("filter").value;
    sift();
    remember(true);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    $("maps").dataset.views = "";
    openTab();
  });
  addEventListener("keydown", (event) => {
    if (event.key === "Escape" && state.film >= 0) choose(-1);
    if (event.key === "/" && !event.target.closest("input")) {
      event.preventDefault();
      $("filter").focus();
    }
  });
  narrow.addEventListener("change", openPanel);
  addEventListener("popstate", recall);
  addEventListener("scroll", hideHover, { passive: true });
  recall();
  if (data.reload) setTimeout(() => location.reload(), 1000 * data.reload);
}

if (tabs.length) start();
