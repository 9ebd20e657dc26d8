// One shard, opened from the map or the table: everything known of it, two minutes of its rates, and where to go next.

import { $, count, h, rate, setText, span } from "./dom.js";
import { waiting } from "./map.js";
import { spark } from "./spark.js";

const FIELDS = [
  ["Slot", (s) => `${s.slot}`], ["Node", (s) => s.node || "none"], ["State", (s) => `${s.state}${waiting(s)}${s.up ? "" : ", not read now"}`],
  ["Owner", (s) => s.owner || "none"], ["Lease", (s) => (s.lease || "no group") + (s.still_s ? `, not renewed for ${s.still_s} s` : "")],
  ["Epoch", (s) => (s.epoch ? `${s.epoch}` : "-")], ["Backlog", (s) => count(s.backlog)], ["Pending", (s) => count(s.pel)],
  ["Waiting for a retry", (s) => count(s.waiting)], ["Delayed", (s) => count(s.delayed)], ["Dead letters", (s) => count(s.dead)],
  ["Oldest unfinished", (s) => span(s.oldest_s)], ["Stored in all", (s) => count(s.appended)], ["Handled in all", (s) => count(s.acked)],
];
const CHARTS = [["stored", "Stored", (s) => `${rate(s.stored_rate)}/s`], ["handled", "Handled", (s) => `${rate(s.handled_rate)}/s`], ["backlog", "Backlog", (s) => count(s.backlog)]];

export class Detail {
  constructor({ closed, peek, dead }) {
    this.id = null;
    this.place = $("detail");
    this.does = { closed, peek, dead };
    this.place.addEventListener("keydown", (event) => { if (event.key === "Escape") this.close(); });
    this.nothing();
  }

  nothing() {
    this.id = null;
    this.place.replaceChildren(h("h2", { id: "detail-title", text: "One shard" }),
      h("p", { class: "hint", text: "Choose a shard to see its slot, node, owner, lease and rates here." }));
  }

  close() {
    this.nothing();
    this.does.closed();
  }

  open(store, id) {
    this.store = store;
    this.id = id;
    this.values = FIELDS.map(() => h("dd", { class: "isolate" }));
    this.figures = CHARTS.map(([, title]) => ({ value: h("b", { class: "num" }), canvas: h("canvas", { "aria-hidden": "true" }), title }));
    this.place.replaceChildren(
      h("div", { class: "head" }, h("h2", { id: "detail-title", text: `Shard ${id}` }), h("button", { type: "button", class: "quiet", click: () => this.close() }, "Close")),
      h("dl", {}, ...FIELDS.flatMap(([name], index) => [h("dt", { text: name }), this.values[index]])),
      ...this.figures.map(({ title, value, canvas }) => h("figure", {}, h("figcaption", {}, title, value), canvas)),
      h("div", { class: "actions" }, h("button", { type: "button", click: () => this.does.peek(id) }, "Its messages"), h("button", { type: "button", click: () => this.does.dead(id) }, "Its dead letters")),
    );
    this.update();
  }

  update() {
    const shard = this.id === null ? null : this.store.shard(this.id);
    if (!shard) return;
    FIELDS.forEach(([, text], index) => setText(this.values[index], text(shard)));
    this.figures.forEach(({ value, canvas }, index) => {
      setText(value, CHARTS[index][2](shard));
      spark(canvas, this.store.shardLine(this.id, CHARTS[index][0]));
    });
  }
}
