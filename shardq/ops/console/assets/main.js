// Puts the page together: choosers, tabs, totals, and the one stream that all parts are updated from.

import { access, get, post, setToken, stream, takeToken, whyNot } from "./api.js";
import { DeadLetters } from "./dead.js";
import { Detail } from "./detail.js";
import { $, ask, count, h, plural, rate, say, setText, span } from "./dom.js";
import { ShardMap } from "./map.js";
import { Messages } from "./messages.js";
import { recolour, spark } from "./spark.js";
import { Store } from "./store.js";
import { ShardTable, pressPause, showWorkers } from "./tables.js";

const TABS = ["shards", "workers", "dead", "messages"];
const HIDDEN_S = 20;  // a tab that nobody sees for so long reads nothing
const QUEUES_S = 5;

const TILES = [
  ["Stored", (t) => [rate(t.stored), "/s"], "stored"], ["Handled", (t) => [rate(t.handled), "/s"], "handled"],
  ["Backlog", (t) => [count(t.backlog), ""], "backlog"], ["Pending (PEL)", (t) => [count(t.pel), ""], "pel"],
  ["Dead letters", (t) => [count(t.dead), ""], "dead"], ["Oldest unfinished", (t) => [span(t.oldest), ""], "oldest"],
  ["Leases held", (t, store) => [count(t.held), ` of ${count(store.rows.size)}`], null],
];

let store = null;
let source = null;
let tab = "shards";
let asTable = false;
let tiles = [];

const detail = new Detail({
  closed: () => { map.select(null); map.look(null); remember(); if (!asTable) map.cells.get(map.current)?.element.focus(); },
  peek: (id) => { $("peek-form").elements.shard.value = id; choose("messages"); messages.look(); },
  dead: (id) => { $("dead-form").elements.shard.value = id; choose("dead"); dead.find(); },
});
const map = new ShardMap(openShard);
const table = new ShardTable((id) => { map.select(id); openShard(id); });
const dead = new DeadLetters();
const messages = new Messages();

/** For whoever measures: how many readings came, and the ms of script that each of the last ones took. */
export const measured = { readings: 0, update_ms: [] };
globalThis.shardqConsole = measured;

// -- what is shown ------------------------------------------------------------------------------------------------------

function remember() {
  const query = new URLSearchParams({ queue: store?.queue ?? "", group: store?.group ?? "", tab });
  if (detail.id !== null) query.set("shard", detail.id);
  history.replaceState(null, "", `${location.pathname}?${query}`);
}

function openShard(id) {
  detail.open(store, id);
  remember();
  if (asTable || matchMedia("(max-width: 1080px)").matches) {
    $("detail").scrollIntoView({ block: "nearest" });
    $("detail").focus({ preventScroll: true });
  }
}

function choose(name, focus = false) {
  tab = TABS.includes(name) ? name : "shards";
  for (const each of TABS) {
    const button = $(`tab-${each}`);
    button.setAttribute("aria-selected", `${each === tab}`);
    button.tabIndex = each === tab ? 0 : -1;
    $(`panel-${each}`).hidden = each !== tab;
  }
  if (focus) $(`tab-${tab}`).focus();
  if (store?.rows.size) { drawTab(null); remember(); }
}

function drawTab(changed, about = true) {
  if (tab === "workers") showWorkersGently();
  if (tab === "dead") dead.update();
  if (tab !== "shards") return;
  if (asTable) changed ? table.update(changed) : table.show(store);
  else changed ? map.update(changed, about) : map.all();
  if (asTable) map.band();
  detail.update();
}

/** The table of workers is made anew, unless somebody marks text in it. */
function showWorkersGently() {
  if (!getSelection()?.toString()) showWorkers(store);
}

function drawTiles() {
  TILES.forEach(([, value, line], index) => {
    const [figure, unit] = value(store.totals, store);
    setText(tiles[index].figure, figure);
    setText(tiles[index].unit, unit);
    if (line) spark(tiles[index].canvas, store.line(line));
  });
  const { members } = store.about;
  setText(tiles.at(-1).note, members.length ? `by ${plural(members.length, "member")}` : "no worker");
  setText($("dead-count"), store.totals.dead ? count(store.totals.dead) : "");
  const bad = store.totals.dead > 0;
  if (tiles[4].tile.classList.contains("bad") === bad) return;
  tiles[4].tile.classList.toggle("bad", bad);
  recolour(tiles[4].canvas);
}

function makeTiles() {
  tiles = TILES.map(([title, , line]) => {
    const figure = h("span");
    const unit = h("small");
    const canvas = line ? h("canvas", { "aria-hidden": "true" }) : null;
    const note = line ? null : h("p", { class: "isolate" });
    const tile = h("div", { class: "tile" }, h("dt", { text: title }), h("dd", {}, figure, unit, canvas), note && h("dd", {}, note));
    return { tile, figure, unit, canvas, note };
  });
  $("tiles").replaceChildren(...tiles.map(({ tile }) => tile));
}

function live(state, text) {
  $("live").dataset.state = state;
  setText($("live"), text);
}

function trouble(text) {
  setText($("trouble"), text);
  $("trouble").hidden = !text;
}

// -- readings -----------------------------------------------------------------------------------------------------------

function heard(event) {
  const started = performance.now();
  const first = !store.rows.size;
  const changed = store.apply(event);
  trouble(store.about.trouble);
  setText($("reshard"), store.about.reshard);
  $("reshard").hidden = !store.about.reshard;
  live(store.about.trouble ? "bad" : "live", store.about.trouble ? "not all could be read" : "live");
  if (event.about) groups();
  if (!store.rows.size) return;
  if (first) start();
  else { drawTiles(); drawTab(changed, Boolean(event.about || event.columns)); }
  measured.readings += 1;
  measured.update_ms.push(performance.now() - started);
  if (measured.update_ms.length > 200) measured.update_ms.shift();
}

/** The first reading of a queue is there. */
function start() {
  $("content").hidden = false;
  drawTiles();
  map.show(store);
  choose(tab);
  const wanted = Number(new URLSearchParams(location.search).get("shard") ?? NaN);
  if (store.rows.has(wanted)) { map.select(wanted); detail.open(store, wanted); map.look(wanted); }
}

function groups() {
  const names = store.about.groups;
  options($("group"), names, store.group, "no group yet");
  if (names.length && !names.includes(store.group)) watch(store.queue, names[0]);
}

function options(select, names, chosen, none) {
  const shown = JSON.stringify([names, chosen]);
  if (select.dataset.shown === shown) return;
  select.dataset.shown = shown;
  select.replaceChildren(...(names.length ? names.map((name) => h("option", { value: name, text: name })) : [h("option", { value: "", text: none })]));
  select.disabled = !names.length;
  if (names.includes(chosen)) select.value = chosen;
}

function watch(queue, group) {
  const changedQueue = store?.queue !== queue;
  source?.close();
  store = new Store(queue, group);
  if (changedQueue) map.chosen = null;
  detail.nothing();
  dead.show(store);
  messages.show(store);
  live("", "connecting");
  document.title = `${queue} - shardq console`;
  const mine = store;
  source = stream(queue, group, (event) => { if (mine === store) heard(event); }, () => live("bad", "connection lost, trying again"));
}

async function queues() {
  try {
    const names = (await get("queues")).queues;
    const wanted = store?.queue ?? new URLSearchParams(location.search).get("queue");
    const chosen = names.includes(wanted) ? wanted : names[0];
    options($("queue"), names, chosen, "no queue yet");
    $("empty").hidden = names.length > 0;
    if (!store && names.length) watch(chosen, new URLSearchParams(location.search).get("group") ?? "");
    if (!store) { trouble(""); $("reshard").hidden = true; live("live", "live"); }
  } catch (error) {
    if (!store) { trouble(error.message); live("bad", "not connected"); }
  }
}

/** Reads nothing while nobody looks. */
function watchVisibility() {
  let sleep = null;
  document.addEventListener("visibilitychange", () => {
    clearTimeout(sleep);
    if (document.hidden) sleep = setTimeout(() => { source?.close(); source = null; live("", "asleep"); }, HIDDEN_S * 1000);
    else if (store && !source) {
      const mine = store;
      source = stream(mine.queue, mine.group, (event) => { if (mine === store) heard(event); }, () => live("bad", "connection lost, trying again"));
    }
  });
  setInterval(() => { if (!document.hidden) queues(); }, QUEUES_S * 1000);
}

// -- switches -----------------------------------------------------------------------------------------------------------

function showAccess() {
  const button = $("mode");
  button.textContent = !access.write ? "Read-only" : access.token ? "May write" : "Enter token";
  button.title = whyNot() || "Press to forget the token in this tab.";
}

async function pressAccess() {
  if (!access.write) return say("Read-only: start the console with --write to replay, purge and pause.");
  if (access.token) {
    setToken(null);
    say("The token is forgotten in this tab.");
  } else {
    const token = await ask({ title: "Enter the token", text: "The one that `shardq console --write` printed behind #token=, or SHARDQ_CONSOLE_TOKEN. It is kept for this tab only.", yes: "Use it", input: true });
    if (token) await tryToken(token);
  }
  document.dispatchEvent(new Event("access"));
}

async function tryToken(token) {
  setToken(token);
  try {
    await post("token");
  } catch (error) {
    setToken(null);
    say(`Not taken: ${error.message}`);
  }
}

function wire() {
  $("queue").addEventListener("change", (event) => { watch(event.target.value, ""); queues(); remember(); });
  $("group").addEventListener("change", (event) => { watch(store.queue, event.target.value); remember(); });
  $("mode").addEventListener("click", pressAccess);
  $("pause").addEventListener("click", () => pressPause(store));
  document.addEventListener("access", () => { if (store?.rows.size) showWorkers(store); });
  document.addEventListener("access", showAccess);
  const themed = () => {
    $("theme").textContent = document.documentElement.dataset.theme === "dark" ? "Light" : "Dark";
    $("theme").setAttribute("aria-label", `Switch to the ${$("theme").textContent.toLowerCase()} theme`);
    if (store?.rows.size) { drawTiles(); drawTab(null); }
  };
  document.addEventListener("theme", themed);
  $("theme").addEventListener("click", () => document.dispatchEvent(new Event("switch-theme")));
  themed();
  for (const name of TABS) $(`tab-${name}`).addEventListener("click", () => choose(name));
  document.querySelector(".tabs").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) choose(TABS[(TABS.indexOf(tab) + step + TABS.length) % TABS.length], true);
  });
  for (const [id, on] of [["as-map", false], ["as-table", true]]) $(id).addEventListener("click", () => showAs(on));
}

function showAs(on) {
  asTable = on;
  $("as-map").setAttribute("aria-pressed", `${!on}`);
  $("as-table").setAttribute("aria-pressed", `${on}`);
  $("map").hidden = $("measures").hidden = on;
  $("shard-table").hidden = !on;
  if (store?.rows.size) drawTab(null);
}

async function begin() {
  takeToken();
  makeTiles();
  wire();
  const given = new URLSearchParams(location.search);
  choose(given.get("tab") ?? "shards");
  live("", "connecting");
  try {
    access.write = (await get("about")).write;
  } catch (error) {
    trouble(error.message);
  }
  if (access.write && access.token) await tryToken(access.token);
  document.dispatchEvent(new Event("access"));
  await queues();
  watchVisibility();
}

begin();
