// The shards and the workers as tables: the same figures as the map, for screen readers and for who likes rows.

import { post, whyNot } from "./api.js";
import { $, ask, count, h, rate, say, setText, span } from "./dom.js";

const SHARDS = [
  ["Shard", "shard", String], ["Slot", "slot", String], ["Node", "node", (v) => v || "none"], ["Backlog", "backlog", count], ["Pending", "pel", count],
  ["Waiting", "waiting", count], ["Dead", "dead", count], ["Stored/s", "stored_rate", rate], ["Handled/s", "handled_rate", rate],
  ["Oldest", "oldest_s", span], ["Owner", "owner", (v) => v || "-"], ["Lease", "lease", (v) => v || "-"], ["Epoch", "epoch", String],
];
const TEXT = new Set(["node", "owner", "lease"]);

/** The shards; sorted when a heading is pressed, not with every reading: rows that run away can't be read. */
export class ShardTable {
  constructor(opened) {
    this.opened = opened;
    this.sort = ["shard", 1];
    this.rows = new Map();
  }

  show(store) {
    this.store = store;
    this.rows.clear();
    const [by, sign] = this.sort;
    const value = (row) => store.get(row, by) ?? -1;
    const order = [...store.rows.values()].sort((a, b) => (value(a) < value(b) ? -sign : value(a) > value(b) ? sign : a[0] - b[0]));
    const headings = SHARDS.map(([title, name]) => h("th", { scope: "col", class: TEXT.has(name) ? null : "r", "aria-sort": name === by ? (sign > 0 ? "ascending" : "descending") : "none" },
      h("button", { type: "button", click: () => this.by(name) }, title)));
    $("shard-table").replaceChildren(h("table", {}, h("caption", { class: "hint", text: `${order.length} shards of ${store.queue}` }), h("thead", {}, h("tr", {}, ...headings)), h("tbody", {}, ...order.map((row) => this.row(row)))));
  }

  by(name) {
    const [before, sign] = this.sort;
    this.sort = [name, name === before ? -sign : TEXT.has(name) || name === "shard" || name === "slot" ? 1 : -1];
    this.show(this.store);
    const index = SHARDS.findIndex(([, each]) => each === name);
    $("shard-table").querySelectorAll("th button")[index].focus();
  }

  row(row) {
    const [, ...rest] = SHARDS;
    const cells = rest.map(([, name]) => h("td", { class: TEXT.has(name) ? "nowrap isolate" : "r" }));
    this.rows.set(row[0], cells);
    this.fill(row, cells);
    return h("tr", {}, h("th", { scope: "row", class: "r" }, h("button", { type: "button", class: "link", click: () => this.opened(row[0]) }, `${row[0]}`)), ...cells);
  }

  fill(row, cells) {
    cells.forEach((cell, index) => {
      const [, name, text] = SHARDS[index + 1];
      setText(cell, text(this.store.get(row, name)));
    });
  }

  update(changed) {
    if (this.rows.size !== this.store.rows.size) return this.show(this.store);
    for (const id of changed) if (this.rows.has(id)) this.fill(this.store.rows.get(id), this.rows.get(id));
  }
}

const WORKERS = ["Worker", "Role", "Shards", "Which", "Backlog", "Pending", "Handled/s", "Oldest", "Lease renewed"];

/** 0-3, 7, 9-11 of sorted numbers. */
export function ranges(numbers) {
  const found = [];
  for (const number of numbers) {
    if (found.length && found.at(-1)[1] === number - 1) found.at(-1)[1] = number;
    else found.push([number, number]);
  }
  return found.map(([low, high]) => (low === high ? `${low}` : `${low}-${high}`)).join(", ");
}

function workerRow(store, name, rows) {
  const sum = (column) => rows.reduce((total, row) => total + store.get(row, column), 0);
  const ages = rows.map((row) => store.get(row, "oldest_s")).filter((age) => age !== null);
  const still = Math.max(0, ...rows.map((row) => store.get(row, "still_s")));
  const member = store.about.members.includes(name);
  const tags = [member || !rows.length ? null : h("span", { class: "tag bad", text: "not a member: gone?" }),
    member && name === store.about.leader ? h("span", { class: "tag good", text: "leads" }) : null,
    member && !rows.length ? h("span", { class: "tag", text: "no shards" }) : null,
    member && rows.length && name !== store.about.leader ? h("span", { class: "tag", text: "works" }) : null];
  return h("tr", {}, h("th", { scope: "row", class: "isolate", text: name }), h("td", {}, ...tags.filter(Boolean)), h("td", { class: "r", text: count(rows.length) }),
    h("td", { class: "text", text: ranges(rows.map((row) => row[0])) || "-" }), h("td", { class: "r", text: count(sum("backlog")) }), h("td", { class: "r", text: count(sum("pel")) }),
    h("td", { class: "r", text: rate(sum("handled_rate")) }), h("td", { class: "r nowrap", text: ages.length ? span(Math.max(...ages)) : "-" }),
    h("td", { class: "nowrap", text: !rows.length ? "-" : still ? `${still} s ago` : "in time" }));
}

function showPause({ paused }) {
  setText($("pause"), paused ? "Resume the group" : "Pause the group");
  $("pause").classList.toggle("primary", paused);
  $("pause").setAttribute("aria-disabled", `${Boolean(whyNot())}`);
  setText($("pause-note"), paused ? "Paused: workers hold no shard, messages wait." : "");
}

/** Asks before it stops anybody; a pause is over at once. */
export async function pressPause({ queue, group, about }) {
  if (whyNot()) return say(whyNot());
  const verb = about.paused ? "resume" : "pause";
  const text = `Queue ${queue}, group ${group}: its workers finish what they are at, give their shards back and take none until it is resumed. Nothing is lost.`;
  if (verb === "pause" && !(await ask({ title: "Pause the group?", text, yes: "Pause", danger: true }))) return;
  try {
    await post(`group/${verb}`, { queue, group });
    say(verb === "pause" ? "Paused. Its workers give their shards back." : "Resumed. Its workers take their shards again.");
  } catch (error) {
    say(`Not done: ${error.message}`);
  }
}

export function showWorkers(store) {
  showPause(store.about);
  const found = store.workers();
  const free = [...store.rows.values()].filter((row) => store.get(row, "lease") === "free").map((row) => row[0]);
  const numbers = new Set(["Shards", "Backlog", "Pending", "Handled/s", "Oldest"]);
  const table = h("table", {}, h("thead", {}, h("tr", {}, ...WORKERS.map((title) => h("th", { scope: "col", class: numbers.has(title) ? "r" : null, text: title })))),
    h("tbody", {}, ...found.map(([name, rows]) => workerRow(store, name, rows))));
  const note = free.length ? h("p", { class: "hint", text: `Shards that nobody holds: ${ranges(free)}` }) : null;
  const none = h("p", { class: "nothing", text: "No worker is a member of this group, and nobody holds a lease." });
  $("workers").replaceChildren(...[found.length ? table : none, note].filter(Boolean));
}
