// A look at stored messages. Consumes nothing: what groups do with them is not touched.

import { get } from "./api.js";
import { $, ago, h, moment, say } from "./dom.js";

export class Messages {
  constructor() {
    this.open = new Set();
    this.found = [];
    $("peek-form").addEventListener("submit", (event) => { event.preventDefault(); this.look(); });
  }

  show(store) {
    this.store = store;
    this.found = [];
    this.open.clear();
    $("messages").replaceChildren(h("p", { class: "nothing", text: "Press Look to read." }));
  }

  async look() {
    const { from, n, key, shard } = $("peek-form").elements;
    try {
      const query = { queue: this.store.queue, from: from.value, n: n.value, key: key.value, shard: shard.value };
      this.found = (await get("messages", query)).messages;
      this.open.clear();
      this.draw();
      say(this.found.length === 1 ? "1 message." : `${this.found.length} messages.`);
    } catch (error) {
      say(`Not read: ${error.message}`);
    }
  }

  draw() {
    if (!this.found.length) return $("messages").replaceChildren(h("p", { class: "nothing", text: "No message found." }));
    const heads = ["Stored", "Key", "Value", "Id"].map((title) => h("th", { scope: "col", text: title }));
    $("messages").replaceChildren(h("table", {}, h("thead", {}, h("tr", {}, ...heads)), h("tbody", {}, ...this.found.flatMap((message) => this.rows(message)))));
  }

  rows(message) {
    const open = this.open.has(message.id);
    const first = (message.error ? `can't be read: ${message.error}` : message.value).slice(0, 300) || "(empty)";
    const toggle = h("button", { type: "button", class: "link", "aria-expanded": `${open}`, click: () => this.toggle(message.id) }, h("span", { class: "line isolate mono", text: first }));
    const row = h("tr", { "data-id": message.id }, h("td", { class: "nowrap", title: moment(message.stored_at_ms), text: ago(message.stored_at_ms) }), h("td", { class: "text" }, h("span", { class: "line", text: message.key ?? "-" })), h("td", { class: "text" }, toggle), h("td", { class: "nowrap mono", text: message.id }));
    return open ? [row, whole(message)] : [row];
  }

  toggle(id) {
    if (!this.open.delete(id)) this.open.add(id);
    this.draw();
    [...$("messages").querySelectorAll("tr[data-id]")].find((row) => row.dataset.id === id)?.querySelector("button").focus();
  }
}

function whole(message) {
  const part = (title, text) => (text ? [h("h3", { text: title }), h("pre", { text, tabindex: "0", "aria-label": title })] : []);
  const facts = [`stored ${moment(message.stored_at_ms)}`, message.sent_at_ms && `sent ${moment(message.sent_at_ms)}`].filter(Boolean).join(", ");
  return h("tr", { class: "open" }, h("td", { colspan: "4" }, h("div", { class: "whole" }, h("p", { class: "hint mono", text: facts }), ...part("Why it can't be read", message.error), ...part("Value", message.value), ...part("Headers", message.headers))));
}
