// Dead letters: find, read, replay, purge. The list is asked for anew when the count changes; what is ticked stays ticked.

import { get, post, whyNot } from "./api.js";
import { $, ago, ask, count, h, moment, plural, say } from "./dom.js";

const WRITES = ["replay", "purge", "replay-all", "purge-all"];

export class DeadLetters {
  constructor() {
    this.letters = [];
    this.ticked = new Set();
    this.open = new Map();
    this.asked = 0;
    $("dead-form").addEventListener("submit", (event) => { event.preventDefault(); this.find(); });
    $("replay").addEventListener("click", () => this.write("replay"));
    $("purge").addEventListener("click", () => this.write("purge"));
    $("replay-all").addEventListener("click", () => this.writeAll("replay"));
    $("purge-all").addEventListener("click", () => this.writeAll("purge"));
    document.addEventListener("access", () => this.buttons());
  }

  show(store) {
    this.store = store;
    this.letters = [];
    this.ticked.clear();
    this.open.clear();
    this.total = null;
    this.draw();
  }

  /** After a reading, while this tab is seen. */
  update() {
    if (this.store.totals.dead === this.total) return;
    this.total = this.store.totals.dead;
    this.find();
  }

  filters() {
    const { error, key, shard } = $("dead-form").elements;
    return { error: error.value, key: key.value, shard: shard.value };
  }

  async find() {
    const { queue, group } = this.store;
    if (!group) return this.draw();
    const asked = this.asked += 1;
    try {
      const found = await get("dead", { queue, group, ...this.filters() });
      if (asked !== this.asked) return;  // an older question's answer came late
      this.letters = found.letters;
      this.more = found.more;
      const there = new Set(this.letters.map(({ id }) => id));
      this.ticked = new Set([...this.ticked].filter((id) => there.has(id)));
      this.draw();
    } catch (error) {
      say(`Not read: ${error.message}`);
    }
  }

  // -- the list -------------------------------------------------------------------------------------------------------

  draw() {
    $("dead-more").textContent = this.letters.length && this.more ? `These are the first ${this.letters.length} that were found. Filters choose among the others.` : "";
    if (!this.letters.length) $("dead").replaceChildren(h("p", { class: "nothing", text: "No dead letters found." }));
    else $("dead").replaceChildren(this.table());
    this.buttons();
  }

  table() {
    this.allBox = h("input", { type: "checkbox", "aria-label": "Select all shown", change: () => this.tickAll() });
    const heads = [h("th", { scope: "col" }, this.allBox), ...["Failed", "Error", "Key", "Tries", "Shard"].map((title) => h("th", { scope: "col", class: ["Tries", "Shard"].includes(title) ? "r" : null, text: title }))];
    return h("table", {}, h("thead", {}, h("tr", {}, ...heads)), h("tbody", {}, ...this.letters.flatMap((letter) => this.rows(letter))));
  }

  rows(letter) {
    const open = this.open.has(letter.id);
    const tick = h("input", { type: "checkbox", "aria-label": `Select dead letter ${letter.id}`, change: (event) => this.tick(letter.id, event.target.checked) });
    tick.checked = this.ticked.has(letter.id);
    const toggle = h("button", { type: "button", class: "link", "aria-expanded": `${open}`, click: () => this.toggle(letter.id) }, h("span", { class: "line isolate", text: letter.error || "(no text)" }));
    const row = h("tr", { "data-id": letter.id }, h("td", {}, tick), h("td", { class: "nowrap", title: moment(letter.failed_at_ms), text: ago(letter.failed_at_ms) }), h("td", { class: "text" }, toggle),
      h("td", { class: "text" }, h("span", { class: "line", text: letter.key ?? "-" })), h("td", { class: "r", text: count(letter.attempts) }), h("td", { class: "r", text: `${letter.shard}` }));
    return open ? [row, this.whole(this.open.get(letter.id))] : [row];
  }

  whole(letter) {
    const part = (title, text) => (text ? [h("h3", { text: title }), h("pre", { text, tabindex: "0", "aria-label": title })] : []);
    const facts = [`dead letter ${letter.id}`, letter.message_id && `message ${letter.message_id}`, letter.sent_at_ms && `sent ${moment(letter.sent_at_ms)}`, `failed ${moment(letter.failed_at_ms)}`];
    const inside = h("div", { class: "whole" }, h("p", { class: "hint mono", text: facts.filter(Boolean).join(", ") }), ...part("Error", letter.error), ...part("Value", letter.value), ...part("Headers", letter.headers), ...part("Traceback", letter.traceback));
    return h("tr", { class: "open" }, h("td"), h("td", { colspan: "5" }, inside));
  }

  async toggle(id) {
    if (!this.open.delete(id)) {
      try {
        this.open.set(id, await get("dead/one", { queue: this.store.queue, group: this.store.group, id }));
      } catch (error) {
        say(`Not read: ${error.message}`);
      }
    }
    this.draw();
    [...$("dead").querySelectorAll("tr[data-id]")].find((row) => row.dataset.id === id)?.querySelector("button").focus();
  }

  tick(id, on) {
    if (on) this.ticked.add(id);
    else this.ticked.delete(id);
    this.buttons();
  }

  tickAll() {
    this.ticked = new Set(this.allBox.checked ? this.letters.map(({ id }) => id) : []);
    const { checked } = this.allBox;
    for (const box of $("dead").querySelectorAll("tbody input")) box.checked = checked;
    this.buttons();
  }

  // -- writing --------------------------------------------------------------------------------------------------------

  buttons() {
    const why = whyNot();
    const off = { replay: !this.ticked.size, purge: !this.ticked.size, "replay-all": !this.letters.length, "purge-all": !this.letters.length };
    for (const name of WRITES) $(name).setAttribute("aria-disabled", `${Boolean(why || off[name])}`);
    $("replay").textContent = this.ticked.size ? `Replay selected (${this.ticked.size})` : "Replay selected";
    $("purge").textContent = this.ticked.size ? `Purge selected (${this.ticked.size})` : "Purge selected";
    $("dead-note").textContent = why || (this.ticked.size ? "" : "A replayed letter is handled again, its tries counted anew. A purged one is gone.");
    if (this.allBox) {
      this.allBox.checked = this.ticked.size > 0 && this.ticked.size === this.letters.length;
      this.allBox.indeterminate = this.ticked.size > 0 && !this.allBox.checked;
    }
  }

  may(name) {
    if ($(name).getAttribute("aria-disabled") !== "true") return true;
    say(whyNot() || "Select dead letters first.");
    return false;
  }

  async write(verb) {
    if (!this.may(verb)) return;
    const ids = [...this.ticked];
    const { queue, group } = this.store;
    const agreed = verb === "replay" || await ask({ title: `Purge ${plural(ids.length, "dead letter")}?`, text: `Forgotten for good: queue ${queue}, group ${group}.`, yes: "Purge", danger: true });
    if (agreed) await this.send(verb, { queue, group, ids });
  }

  async writeAll(verb) {
    if (!this.may(`${verb}-all`)) return;
    const { queue, group } = this.store;
    const { error, key, shard } = this.filters();
    if (shard) return say("All of one shard: tick them and use the buttons for what is selected.");
    const which = error || key ? `All that fit the filters${error ? `, error holds "${error}"` : ""}${key ? `, key "${key}"` : ""}` : "All of the group, whatever is shown here";
    const does = verb === "purge" ? "They are forgotten for good." : "They are handled again, tries counted anew.";
    const agreed = await ask({ title: verb === "purge" ? "Purge all found?" : "Replay all found?", text: `${which}: queue ${queue}, group ${group}. ${does}`, yes: verb === "purge" ? "Purge all" : "Replay all", danger: verb === "purge" });
    if (agreed) await this.send(verb, { queue, group, all: true, error, key: key || null });
  }

  async send(verb, body) {
    try {
      const { count: done } = await post(`dead/${verb}`, body);
      say(`${plural(done, "dead letter")} ${verb === "purge" ? "purged" : "replayed"}.`);
      this.ticked.clear();
    } catch (error) {
      say(`Not done: ${error.message}`);
    }
    await this.find();
  }
}
