"use strict";

// Draws the report. Whatever comes from the store is put in as text, never as markup. Of a long
// table only the rows in sight are in the document.

const report = JSON.parse(document.getElementById("data").textContent);
const ROW = 30; // the height of a row, as in the style sheet
const SPARE = 10; // rows beyond what is in sight, on both sides
const MOST_BARS = 100;
const WIDEST = 40; // of a bar, where there are few
const MOST_OPEN = 200; // a tree of more branches is closed at first
const HOUR = 3600;
const DAY = 24 * HOUR;
const STEPS = [HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR, DAY, 2 * DAY, 7 * DAY, 28 * DAY];
const SVG = "http://www.w3.org/2000/svg";

// Words and numbers

const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const order = new Intl.Collator("en", { numeric: true }).compare;

function number(value) {
  return value === null ? "–" : grouped.format(value);
}

function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (bytes >= 1000 && unit < units.length - 1) {
    bytes /= 1000;
    unit += 1;
  }
  return `${unit ? bytes.toFixed(1) : bytes} ${units[unit]}`;
}

function duration(seconds) {
  if (seconds >= 2 * HOUR) return `${grouped.format(seconds / HOUR)} h`;
  if (seconds >= 120) return `${grouped.format(seconds / 60)} min`;
  return `${grouped.format(seconds)} s`;
}

function moment(seconds) {
  const date = new Date(seconds * 1000);
  if (!seconds || Number.isNaN(date.getTime())) return "–";
  return date.toISOString().slice(0, 16).replace("T", " ");
}

function label(state) {
  return state.name ?? state.snapshot;
}

function sum(rows, of) {
  return rows.reduce((total, row) => total + of(row), 0);
}

// Elements

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function draw(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function button(text, act, attributes = {}) {
  const made = make("button", { type: "button", ...attributes }, text);
  made.addEventListener("click", act);
  return made;
}

// A table whose rows are in the document while they are in sight. A column has a title, the value
// that it is sorted by, and what is shown: a text, or an element.

class Table {
  constructor(host, name, columns, rows) {
    this.columns = columns;
    this.all = rows;
    this.rows = rows;
    this.words = [];
    this.sorted = null;
    this.first = -1;
    this.body = make("tbody");
    this.heads = columns.map((column) => this.head(column));
    const head = make("thead", {}, make("tr", { "aria-rowindex": "1" }, ...this.heads));
    this.table = make("table", { "aria-label": name }, head, this.body);
    this.window = make("div", { class: "window", tabindex: "0", role: "region", "aria-label": name });
    this.window.append(this.table);
    this.window.addEventListener("scroll", () => this.show());
    host.append(this.window);
  }

  head(column) {
    const made = make("th", { scope: "col" });
    if (column.number) made.className = "number";
    if (column.value) made.append(button(column.title, () => this.turn(column)));
    else made.textContent = column.title;
    return made;
  }

  // Sort by a column: by one of numbers from the largest on first; the other way when asked again.
  turn(column) {
    const again = this.sorted && this.sorted.column === column;
    this.sort(column, again ? !this.sorted.down : Boolean(column.number));
  }

  sort(column, down) {
    this.sorted = { column, down };
    this.columns.forEach((other, i) => {
      if (other !== column) this.heads[i].removeAttribute("aria-sort");
      else this.heads[i].setAttribute("aria-sort", down ? "descending" : "ascending");
    });
    this.update();
  }

  filter(words) {
    this.words = words;
    this.update();
  }

  update() {
    this.rows = this.chosen();
    if (this.sorted) this.rows = this.inOrder(this.rows);
    this.table.setAttribute("aria-rowcount", this.rows.length + 1);
    this.window.scrollTop = 0;
    this.first = -1;
    this.show();
  }

  chosen() {
    if (!this.words.length) return this.all;
    return this.all.filter((row) => this.words.every((word) => row.search.includes(word)));
  }

  // Rows without a value come last, whichever way.
  inOrder(rows) {
    const { column, down } = this.sorted;
    const sign = down ? -1 : 1;
    const compare = column.number ? (a, b) => a - b : order;
    const keyed = rows.map((row) => ({ row, value: column.value(row) }));
    const known = keyed.filter(({ value }) => value !== null);
    const unknown = keyed.filter(({ value }) => value === null);
    known.sort((a, b) => sign * compare(a.value, b.value));
    return [...known, ...unknown].map(({ row }) => row);
  }

  show() {
    const seen = Math.ceil((this.window.clientHeight || 800) / ROW);
    const above = Math.max(0, Math.floor(this.window.scrollTop / ROW) - SPARE);
    const first = above - (above % 2); // so that bands do not jump
    if (first === this.first) return;
    this.first = first;
    const last = Math.min(this.rows.length, first + seen + 2 * SPARE + 2);
    const shown = this.rows.slice(first, last).map((row, i) => this.row(row, first + i));
    this.body.replaceChildren(
      this.space(first),
      ...shown,
      this.space(this.rows.length - last),
    );
  }

  space(rows) {
    const made = make("tr", { class: "space", "aria-hidden": "true" });
    made.append(make("td", { colspan: this.columns.length }));
    made.style.height = `${Math.max(0, rows) * ROW}px`;
    return made;
  }

  row(row, index) {
    const made = make("tr", { "aria-rowindex": index + 2 });
    if (index % 2) made.className = "band";
    this.columns.forEach((column, i) => {
      const cell = i ? make("td") : make("th", { scope: "row" });
      cell.className = [column.number ? "number" : "wide", column.kind ? column.kind(row) : ""]
        .join(" ").trim();
      cell.append(column.show(row));
      made.append(cell);
    });
    return made;
  }
}

// States

function named(state) {
  return button(label(state), () => tell(state));
}

const STATE = [
  { title: "name", value: label, show: named },
  { title: "status", value: (s) => s.status, show: (s) => s.status, kind: (s) => s.status },
  { title: "tokens", number: true, value: (s) => s.tokens, show: (s) => number(s.tokens) },
  { title: "own bytes", number: true, value: (s) => s.bytes, show: (s) => size(s.bytes) },
  {
    title: "shared bytes", number: true, value: (s) => s.shared_bytes,
    show: (s) => size(s.shared_bytes),
  },
  { title: "in memory", number: true, value: (s) => s.raw_bytes, show: (s) => size(s.raw_bytes) },
  { title: "hits", number: true, value: (s) => s.hits, show: (s) => number(s.hits) },
  {
    title: "time saved", number: true, value: (s) => s.saved_seconds,
    show: (s) => duration(s.saved_seconds),
  },
  { title: "took", number: true, value: (s) => s.seconds, show: (s) => duration(s.seconds) },
  { title: "made (UTC)", number: true, value: (s) => s.created, show: (s) => moment(s.created) },
  {
    title: "last use (UTC)", number: true, value: (s) => s.last_used,
    show: (s) => moment(s.last_used),
  },
  {
    title: "goes", number: true, value: (s) => s.goes,
    show: (s) => (s.goes === null ? "stays" : number(s.goes + 1)),
  },
];

const PROBLEM = [
  STATE[0],
  STATE[1],
  { title: "reason", value: (s) => s.reason ?? "", show: (s) => s.reason ?? "" },
];

function tell(state) {
  const facts = {
    snapshot: state.snapshot,
    status: state.reason ? `${state.status}: ${state.reason}` : state.status,
    tokens: number(state.tokens),
    "own bytes": number(state.bytes),
    "shared bytes": number(state.shared_bytes),
    "bytes in memory": number(state.raw_bytes),
    "computing it took": duration(state.seconds),
    hits: number(state.hits),
    "time saved": duration(state.saved_seconds),
    "made (UTC)": moment(state.created),
    "last use (UTC)": moment(state.last_used),
  };
  const parts = state.model === null ? {} : report.models[state.model];
  document.getElementById("details-title").textContent = label(state);
  const rows = [...Object.entries(facts), ...Object.entries(parts)].flatMap(([name, value]) => [
    make("dt", {}, name),
    make("dd", {}, String(value)),
  ]);
  document.getElementById("facts").replaceChildren(...rows);
  const text = document.getElementById("text");
  text.hidden = !state.text;
  text.textContent = state.text ?? "";
  document.getElementById("details").showModal();
}

// The tree of prefixes: the rows are the branches that are in sight.

class Tree extends Table {
  constructor(host, name, branches) {
    super(host, name, [], branches);
    this.columns = [
      { title: "prefix", show: (branch) => this.branch(branch) },
      { title: "tokens", number: true, show: (branch) => number(branch.end - branch.start) },
      { title: "up to", number: true, show: (branch) => number(branch.end) },
      { title: "states", number: true, show: (branch) => number(branch.below) },
      { title: "bytes", number: true, show: (branch) => size(branch.bytes) },
      { title: "with all below", number: true, show: (branch) => size(branch.total) },
      { title: "hits", number: true, show: (branch) => number(branch.hits) },
    ];
    this.heads = this.columns.map((column) => this.head(column));
    this.table.tHead.rows[0].replaceChildren(...this.heads);
    this.table.setAttribute("role", "treegrid");
    this.count();
    this.open(branches.length <= MOST_OPEN);
  }

  // What is below a branch. A branch stands after the one that it begins at.
  count() {
    const counted = new Set();
    for (const branch of this.all) {
      branch.depth = branch.parent < 0 ? 1 : this.all[branch.parent].depth + 1;
      branch.parts = 0;
      branch.below = branch.states.length;
      branch.total = branch.bytes;
      branch.hits = 0;
      branch.search = branch.states.map((i) => report.states[i].search).join("\n");
      for (const state of branch.states.map((i) => report.states[i])) {
        if (!counted.has(state.snapshot)) branch.hits += state.hits;
        counted.add(state.snapshot);
      }
    }
    for (const branch of [...this.all].reverse()) {
      if (branch.parent < 0) continue;
      const parent = this.all[branch.parent];
      parent.parts += 1;
      parent.below += branch.below;
      parent.total += branch.total;
      parent.hits += branch.hits;
    }
  }

  open(opened) {
    for (const branch of this.all) branch.opened = opened;
    this.update();
  }

  // What a filter finds is shown with all that leads to it.
  chosen() {
    const found = new Set();
    if (this.words.length) {
      super.chosen().forEach((branch) => {
        for (let at = branch; at && !found.has(at); at = this.all[at.parent]) found.add(at);
      });
    }
    const shown = new Set();
    return this.all.filter((branch) => {
      const parent = this.all[branch.parent];
      const seen = !parent || (shown.has(parent) && (parent.opened || this.words.length > 0));
      const is = seen && (!this.words.length || found.has(branch));
      if (is) shown.add(branch);
      return is;
    });
  }

  branch(branch) {
    const made = make("span");
    made.style.paddingLeft = `${Math.min(branch.depth - 1, 40) * 1.1}rem`;
    made.append(this.toggle(branch));
    const states = branch.states.map((i) => report.states[i]);
    states.slice(0, 3).forEach((state, i) => made.append(i ? ", " : "", named(state)));
    if (states.length > 3) made.append(` and ${states.length - 3} more`);
    if (!states.length) made.append(`shared by ${number(branch.below)}`);
    return made;
  }

  toggle(branch) {
    if (!branch.parts) return make("span", { class: "toggle" });
    const at = `from token ${branch.start}`;
    const name = branch.opened ? `Close the branch ${at}` : `Open the branch ${at}`;
    const act = () => {
      branch.opened = !branch.opened;
      const top = this.window.scrollTop;
      this.update();
      this.window.scrollTop = top;
      this.show();
    };
    return button(branch.opened ? "▾" : "▸", act, { class: "toggle", "aria-label": name });
  }

  row(branch, index) {
    const made = super.row(branch, index);
    made.setAttribute("aria-level", branch.depth);
    if (branch.parts) made.setAttribute("aria-expanded", String(branch.opened));
    return made;
  }
}

// Charts

// Sums of points, each a time and a value, in at most MOST_BARS equal stretches of time.
function bars(points, least) {
  if (!points.length) return [];
  const times = points.map(([time]) => time);
  const [begin, end] = [times.reduce((a, b) => Math.min(a, b)), times.reduce((a, b) => Math.max(a, b))];
  let step = STEPS.find((s) => s >= least && (end - begin) / s < MOST_BARS - 1) ?? STEPS.at(-1);
  while ((end - begin) / step >= MOST_BARS - 1) step *= 2;
  const from = Math.floor(begin / step) * step;
  const made = Array.from({ length: Math.floor((end - from) / step) + 1 }, (_, i) => ({
    time: from + i * step, value: 0,
  }));
  for (const [time, value] of points) made[Math.floor((time - from) / step)].value += value;
  return made.map((bar) => ({ ...bar, step }));
}

function chart(title, points, least, show) {
  const found = bars(points, least);
  const figure = make("figure", {}, make("figcaption", {}, title));
  if (!found.length) {
    figure.append(make("p", {}, "Nothing is known yet."));
    return figure;
  }
  const [width, height, left, foot] = [720, 150, 60, 20];
  const most = found.reduce((high, bar) => Math.max(high, bar.value), 0) || 1;
  const total = show(sum(found, (bar) => bar.value));
  const named = (bar) => (bar.step < DAY ? moment(bar.time) : moment(bar.time).slice(0, 10));
  const svg = draw("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `${title}: ${total} from ${named(found[0])} to ${named(found.at(-1))}`,
  });
  const each = Math.min(WIDEST, (width - left) / found.length);
  const floor = height - foot;
  found.forEach((bar, i) => {
    const tall = (bar.value / most) * (floor - 14);
    const rect = draw("rect", {
      class: "bar", x: left + i * each, y: floor - tall, width: Math.max(1, each - 1), height: tall,
    });
    rect.append(draw("title", {}, `${named(bar)}: ${show(bar.value)}`));
    svg.append(rect);
  });
  svg.append(
    draw("line", { class: "axis", x1: left, x2: width, y1: floor, y2: floor }),
    draw("text", { x: left - 6, y: 22, "text-anchor": "end" }, show(most)),
    draw("text", { x: left, y: height - 5 }, named(found[0])),
  );
  if (found.length > 1) {
    const end = { x: Math.max(left + 240, left + each * found.length), y: height - 5 };
    svg.append(draw("text", { ...end, "text-anchor": "end" }, named(found.at(-1))));
  }
  const rows = found.filter((bar) => bar.value).map((bar) =>
    make("tr", {}, make("th", { scope: "row" }, named(bar)), make("td", {}, show(bar.value))));
  const table = make("table", { "aria-label": title }, make("tbody", {}, ...rows));
  figure.append(svg, make("details", {}, make("summary", {}, `As a table (${total} in all)`), table));
  return figure;
}

// All of it

const NEXT = [
  { title: "place", number: true, value: (n) => n.place, show: (n) => number(n.place) },
  { title: "what", value: (n) => n.kind, show: (n) => n.kind },
  { title: "of", value: (n) => n.of ?? "", show: (n) => n.of ?? "no state" },
  { title: "token", number: true, value: (n) => n.end, show: (n) => number(n.end) },
  { title: "bytes on disk", number: true, value: (n) => n.bytes, show: (n) => size(n.bytes) },
  {
    title: "freed by then", number: true, value: (n) => n.freed_bytes,
    show: (n) => size(n.freed_bytes),
  },
  {
    title: "last use (UTC)", number: true, value: (n) => n.last_used,
    show: (n) => moment(n.last_used),
  },
];

function about() {
  const { states, hits, budget } = report;
  const told = [
    ["states", number(states.length)],
    ["blocks", number(report.blocks)],
    ["on disk", `${size(budget.taken_bytes)} of ${size(budget.max_bytes)}`],
    ["hits", number(sum(hits, (hour) => hour.hits))],
    ["time saved", duration(sum(hits, (hour) => hour.seconds))],
    ["damaged or stale", number(states.filter((s) => s.status !== "ok").length)],
  ];
  const made = `${report.store}, as of ${moment(report.made)} UTC, by mlx-promptcache ${report.version}`;
  document.getElementById("store").textContent = made;
  document.getElementById("sums").append(
    ...told.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))),
  );
}

function plan() {
  const { prune, reason, taken_bytes: taken, max_bytes: most } = report.budget;
  const sentences = [`The store takes ${size(taken)} of the ${size(most)} that it may take.`];
  if (!prune) sentences.push(`What prune would delete is not known: ${reason}.`);
  else if (!prune.freed_bytes) sentences.push("prune would delete nothing now.");
  else {
    sentences.push(`prune would delete ${prune.snapshots} snapshots, ${prune.blocks} blocks and ` +
      `${prune.leftovers} leftovers now: ${size(prune.freed_bytes)}.`);
  }
  if (report.next_unknown) sentences.push(`The order is not known: ${report.next_unknown}.`);
  else sentences.push("Below stands in which order states and blocks without a name would go.");
  document.getElementById("budget").textContent = sentences.join(" ");
}

function begin() {
  const { states } = report;
  for (const state of states) {
    const words = [state.name, state.snapshot, state.status, state.reason, state.text];
    state.search = words.filter(Boolean).join("\n").toLowerCase();
  }
  report.next.forEach((row, i) => {
    row.place = i + 1;
    row.search = [row.kind, row.id, row.of].filter(Boolean).join("\n").toLowerCase();
  });
  about();
  plan();
  const wrong = states.filter((state) => state.status !== "ok");
  const at = (id) => document.getElementById(id);
  const tables = [new Table(at("states"), "States", STATE, states)];
  tables[0].sort(STATE[9], true);
  const tree = new Tree(at("tree"), "Prefixes", report.tree);
  tables.push(tree, new Table(at("next"), "What goes next", NEXT, report.next));
  at("problems-part").hidden = !wrong.length && !report.aside.length;
  if (wrong.length) tables.push(new Table(at("problems"), "Damaged and stale", PROBLEM, wrong));
  tables.slice(2).forEach((table) => table.update());
  at("aside").append(...report.aside.map((file) =>
    make("li", {}, `moved aside: ${file.file}, ${size(file.bytes)}`)));
  at("charts").append(
    chart("Hits", report.hits.map((h) => [h.hour, h.hits]), HOUR, number),
    chart("Time saved", report.hits.map((h) => [h.hour, h.seconds]), HOUR, duration),
    chart("Bytes written", Object.entries(report.written).map(([day, bytes]) =>
      [Date.parse(`${day}T00:00:00Z`) / 1000, bytes]).filter(([day]) => !Number.isNaN(day)), DAY, size),
  );
  const filter = () => {
    const words = at("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    tables.forEach((table) => table.filter(words));
    at("found").textContent = words.length ? `${number(tables[0].rows.length)} states` : "";
  };
  at("filter").addEventListener("input", filter);
  at("find").addEventListener("submit", (event) => event.preventDefault());
  at("open-all").addEventListener("click", () => tree.open(true));
  at("close-all").addEventListener("click", () => tree.open(false));
  window.addEventListener("resize", () => tables.forEach((table) => {
    table.first = -1;
    table.show();
  }));
}

begin();
