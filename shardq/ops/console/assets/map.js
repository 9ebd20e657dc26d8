// The shard map: the band of slots, and a grid of shards coloured by a measure. A cell is touched only when what it
// shows changed, so that an update of 1,024 shards costs a few milliseconds.

import { $, count, h, plural, rate, setText, span } from "./dom.js";
import { fit } from "./spark.js";

const decades = (value) => (value > 0 ? Math.min(7, 1 + Math.floor(Math.log10(Math.max(1, value)))) : 0);
const AGES = [1, 5, 30, 120, 600, 3600];
const COUNT_KEYS = ["0", "1+", "10+", "100+", "1K+", "10K+", "100K+", "1M+"];

/** What cells can be coloured by: value of a row, level 0..7 of a value, and text. */
export const MEASURES = {
  backlog: { title: "Backlog", level: decades, text: count, keys: COUNT_KEYS, of: "backlog" },
  pel: { title: "Pending", level: decades, text: count, keys: COUNT_KEYS, of: "pel" },
  rate: { title: "Handled/s", level: decades, text: rate, keys: COUNT_KEYS, of: "handled_rate" },
  oldest: {
    title: "Oldest", of: "oldest_s", text: span,
    level: (age) => (age === null ? 0 : 1 + AGES.filter((bound) => age >= bound).length),
    keys: ["none", "< 1 s", "1 s+", "5 s+", "30 s+", "2 min+", "10 min+", "1 h+"],
  },
  owner: { title: "Worker", of: "owner", text: (name) => name || "free", keys: null },
};

const COLOURS = 8;

/** What a shard waits for after a reshard, as the end of a sentence. */
export const waiting = (s) => (s.waits.length ? `, waits until the group has finished shard${s.waits.length > 1 ? "s" : ""} ${s.waits.slice(0, 8).join(", ")}` : "");

/** One line that says all of a shard that a person looks for first. */
export function describe(store, id) {
  const s = store.shard(id);
  if (!s) return "";
  const lease = s.lease ? `, ${s.owner ? `${s.owner}, lease ${s.lease}` : "lease free"}` : "";
  const down = s.up ? "" : ", not read now";
  const dead = s.dead ? `, ${plural(s.dead, "dead letter")}` : "";
  const retired = (s.state === "open" ? "" : ", retired") + waiting(s);
  return `Shard ${id}, slot ${s.slot} on ${s.node || "no node"}: backlog ${count(s.backlog)}, pending ${count(s.pel)}, `
    + `handled ${rate(s.handled_rate)}/s, oldest ${span(s.oldest_s)}${dead}${lease}${retired}${down}`;
}

export class ShardMap {
  constructor(opened) {
    this.opened = opened;
    this.measure = "backlog";
    this.cells = new Map();
    this.columns = 0;
    this.current = null;
    this.chosen = null;
    this.grid = $("grid");
    this.grid.addEventListener("keydown", (event) => this.key(event));
    this.grid.addEventListener("click", (event) => this.click(event));
    this.grid.addEventListener("pointerover", (event) => this.look(idOf(event.target)));
    this.grid.addEventListener("focusin", (event) => this.look(idOf(event.target)));
    this.grid.addEventListener("pointerleave", () => this.look(this.chosen));
    new ResizeObserver(() => this.resized()).observe(this.grid);
    for (const [name, { title }] of Object.entries(MEASURES)) {
      const press = () => this.by(name);
      $("measures").append(h("button", { type: "button", "aria-pressed": `${name === this.measure}`, "data-measure": name, click: press }, title));
    }
  }

  by(measure) {
    this.measure = measure;
    for (const button of $("measures").children) button.setAttribute("aria-pressed", `${button.dataset.measure === measure}`);
    this.all();
  }

  /** A queue or group is shown from here on. */
  show(store) {
    this.store = store;
    this.all();
  }

  all() {
    if (!this.store?.rows.size) return;
    this.build();
    for (const id of this.cells.keys()) this.paint(id);
    this.legend();
    this.band();
    this.look(this.chosen);
  }

  /** After a reading: only what changed. */
  update(changed, about) {
    if (this.cells.size !== this.store.rows.size) return this.all();
    if (about) { this.band(); this.legend(); for (const id of this.cells.keys()) this.paint(id); }
    else {
      for (const id of changed) this.paint(id);
      this.nodes();
      if (this.measure === "owner") this.legend();
    }
    if (this.looked !== null) this.look(this.looked);
  }

  // -- cells ----------------------------------------------------------------------------------------------------------

  size() {
    const shards = this.store.rows.size;
    const width = this.grid.clientWidth || 800;
    const [size, cell, least] = shards <= 64 ? ["l", 62, 76] : shards <= 300 ? ["m", 34, 44] : ["s", 16, 16];
    let columns = Math.max(4, Math.floor(width / (least + 4)));
    columns = Math.min(columns, shards);
    if (size === "l") columns = Math.ceil(shards / Math.ceil(shards / columns));
    else columns = [64, 56, 48, 40, 32, 24, 16, 12, 8].find((even) => even <= columns) ?? columns;
    return { size, cell, columns };
  }

  resized() {
    if (!this.store?.rows.size || !this.grid.clientWidth) return;
    if (this.size().columns !== this.columns) this.all();
    else this.band();
  }

  build() {
    const { size, cell, columns } = this.size();
    const ids = [...this.store.rows.keys()];
    if (columns === this.columns && ids.length === this.cells.size && ids.every((id) => this.cells.has(id))) return;
    const focused = this.grid.contains(document.activeElement);
    this.columns = columns;
    this.cells = new Map();
    this.grid.dataset.size = size;
    this.grid.style.setProperty("--columns", columns);
    this.grid.style.setProperty("--cell", `${cell}px`);
    const rows = [];
    for (let from = 0; from < ids.length; from += columns) rows.push(h("div", { role: "row" }, ...ids.slice(from, from + columns).map((id) => this.cell(id, size))));
    this.grid.setAttribute("aria-colcount", columns);
    this.grid.setAttribute("aria-rowcount", rows.length);
    this.grid.replaceChildren(...rows);
    if (!this.cells.has(this.current)) this.current = ids[0];
    this.cells.get(this.current).element.tabIndex = 0;
    if (focused) this.cells.get(this.current).element.focus();
  }

  cell(id, size) {
    const element = h("div", { role: "gridcell", tabindex: "-1", "data-shard": id, class: "cell", "aria-label": `Shard ${id}`, "aria-selected": `${id === this.chosen}` });
    const value = size === "l" ? h("b") : null;
    if (size !== "s") element.append(...[value, h("i", { text: size === "l" ? `shard ${id}` : `${id}` })].filter(Boolean));
    this.cells.set(id, { element, value, shown: "", text: "" });
    return element;
  }

  paint(id) {
    const cell = this.cells.get(id);
    const row = this.store.rows.get(id);
    if (!cell || !row) return;
    const shown = this.look_of(row);
    if (shown !== cell.shown) cell.element.className = cell.shown = shown;
    if (!cell.value) return;
    const { of, text } = MEASURES[this.measure];
    const said = of === "owner" ? short(this.store.get(row, of)) : text(this.store.get(row, of));
    if (said !== cell.text) cell.value.textContent = cell.text = said;
  }

  look_of(row) {
    const { at } = this.store;
    const measure = MEASURES[this.measure];
    const value = row[at[measure.of]];
    const colour = measure.keys ? `v${measure.level(value)}` : value ? `c${this.ownerIndex(value)}` : "v0";
    const free = row[at.lease] === "free" ? " free" : "";
    return `cell ${colour} n${this.nodeIndex(row[at.node])}${free}${row[at.dead] ? " dead" : ""}${row[at.up] ? "" : " down"}`;
  }

  nodeIndex(name) { return this.indices("node").get(name) ?? 0; }

  ownerIndex(name) { return this.indices("owner").get(name) ?? 0; }

  /** Colours by place in the sorted names; made anew with each reading that changes them. */
  indices(kind) {
    const { about, readings } = this.store;
    if (this.made?.about !== about || this.made.readings !== readings) {
      const numbered = (names) => new Map(names.map((name, index) => [name, index % COLOURS]));
      this.made = { about, readings, node: numbered(this.store.nodes().map(([name]) => name)), owner: numbered(this.store.workers().map(([name]) => name)) };
    }
    return this.made[kind];
  }

  // -- looking at one -------------------------------------------------------------------------------------------------

  look(id) {
    this.looked = id ?? null;
    const line = id === null || id === undefined ? "" : describe(this.store, id);
    setText($("readout"), line || "Point at a shard, or move to it with the arrow keys.");
    const row = this.store?.rows.get(id);
    const mark = $("band-mark");
    mark.hidden = !row;
    if (!row) return;
    mark.style.left = `${(this.store.get(row, "slot") / 16383) * 100}%`;
    this.cells.get(id)?.element.setAttribute("aria-label", line);
  }

  click(event) {
    const id = idOf(event.target);
    if (id === null) return;
    this.move(id);
    this.open(id);
  }

  open(id) {
    this.select(id);
    this.opened(id);
  }

  select(id) {
    this.cells.get(this.chosen)?.element.setAttribute("aria-selected", "false");
    this.chosen = id;
    this.cells.get(id)?.element.setAttribute("aria-selected", "true");
  }

  key(event) {
    const ids = [...this.cells.keys()];
    const at = ids.indexOf(this.current);
    const start = at - (at % this.columns);
    const far = this.columns * 5;
    const to = {
      ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - this.columns, ArrowDown: at + this.columns,
      PageUp: Math.max(at % this.columns, at - far), PageDown: Math.min(ids.length - 1, at + far),
      Home: event.ctrlKey ? 0 : start, End: event.ctrlKey ? ids.length - 1 : Math.min(ids.length, start + this.columns) - 1,
    }[event.key];
    if (event.key === "Enter" || event.key === " ") this.open(this.current);
    else if (to === undefined) return;
    else if (ids[to] !== undefined) this.move(ids[to]);
    event.preventDefault();
  }

  move(id) {
    this.cells.get(this.current).element.tabIndex = -1;
    this.current = id;
    const { element } = this.cells.get(id);
    element.tabIndex = 0;
    element.focus();
  }

  // -- band and legends -----------------------------------------------------------------------------------------------

  band() {
    const place = fit($("band"));
    this.nodes();
    if (!place) return;
    const { pen, width, height } = place;
    const style = getComputedStyle(document.documentElement);
    for (const [first, last, name] of this.store.about.slots) {
      pen.fillStyle = name ? style.getPropertyValue(`--n${this.nodeIndex(name)}`) : style.getPropertyValue("--edge");
      pen.fillRect((first / 16384) * width, 0, ((last - first + 1) / 16384) * width, height);
    }
    pen.fillStyle = style.getPropertyValue("--card");
    pen.globalAlpha = 0.75;
    const wide = this.store.rows.size > 200 ? 0.5 : 2;
    for (const row of this.store.rows.values()) pen.fillRect((this.store.get(row, "slot") / 16384) * width - wide / 2, height - 9, wide, 9);
    pen.globalAlpha = 1;
  }

  nodes() {
    const items = this.store.nodes().map(([name, node]) => `${name}|${node.slots}|${node.shards}|${node.backlog}`).join();
    if (items === this.nodesShown) return;
    this.nodesShown = items;
    const line = ([name, node]) => h("li", {}, h("span", { class: `swatch c${this.nodeIndex(name)}` }), h("b", { class: "isolate", text: name || "no node" }),
      ` ${plural(node.slots, "slot")}, ${plural(node.shards, "shard")}, backlog ${count(node.backlog)}`);
    $("nodes").replaceChildren(...this.store.nodes().map(line));
  }

  legend() {
    const { keys } = MEASURES[this.measure];
    const key = (kind, text) => h("span", {}, h("i", { class: `key ${kind}` }), text);
    const scale = keys ? keys.map((text, level) => key(`v${level}`, text))
      : this.store.workers().filter(([, rows]) => rows.length).slice(0, 24).map(([name]) => key(`c${this.ownerIndex(name)}`, name));
    const signs = [key("v0 free", "lease free"), key("v0 dead", "has dead letters")];
    if ([...this.store.rows.values()].some((row) => !this.store.get(row, "up"))) signs.push(key("v0 down", "not read now"));
    const shown = JSON.stringify([keys, this.store.workers().map(([name]) => name), signs.length]);
    if (shown === this.legendShown) return;
    this.legendShown = shown;
    $("legend").replaceChildren(...scale, ...signs);
  }
}

const idOf = (target) => { const cell = target.closest?.("[data-shard]"); return cell ? Number(cell.dataset.shard) : null; };
const short = (name) => (!name ? "free" : name.length > 9 ? `...${name.slice(-7)}` : name);
