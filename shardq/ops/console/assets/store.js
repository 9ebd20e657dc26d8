// What the page knows of one queue and group: the rows of its shards, totals, and two minutes of both. No DOM here.

export const KEPT = 120;

export class Store {
  constructor(queue, group) {
    this.queue = queue;
    this.group = group;
    this.clear();
  }

  clear() {
    this.at = {};
    this.rows = new Map();
    this.about = { groups: [], members: [], slots: [], shards: 0, trouble: "", leader: "", rebalances: 0, paused: false, reshard: "" };
    this.totals = null;
    this.times = [];
    this.past = { stored: [], handled: [], backlog: [], pel: [], dead: [], oldest: [] };
    this.shardPast = new Map();
    this.readings = 0;
  }

  /** Takes an event; returns the ids of the shards that changed. */
  apply(event) {
    if (event.columns) {
      const past = this.readings ? [this.times, this.past, this.shardPast] : null;
      this.clear();
      if (past) [this.times, this.past, this.shardPast] = past;
      event.columns.forEach((name, index) => { this.at[name] = index; });
    }
    if (event.about) this.about = event.about;
    const changed = new Set(event.gone ?? []);
    for (const shard of event.gone ?? []) this.rows.delete(shard);
    for (const row of event.rows) {
      this.rows.set(row[0], row);
      changed.add(row[0]);
    }
    if (changed.size && event.columns) this.rows = new Map([...this.rows].sort(([a], [b]) => a - b));
    this.readings += 1;
    this.took_s = event.took_s;
    this.sum();
    this.remember(event.at_ms);
    return changed;
  }

  get(row, name) { return row[this.at[name]]; }

  /** One shard as an object, for whoever shows it whole. */
  shard(id) {
    const row = this.rows.get(id);
    return row && Object.fromEntries(Object.entries(this.at).map(([name, index]) => [name, row[index]]));
  }

  sum() {
    const { backlog, pel, waiting, dead, delayed, stored_rate, handled_rate, oldest_s, lease } = this.at;
    const t = { backlog: 0, pel: 0, waiting: 0, dead: 0, delayed: 0, stored: 0, handled: 0, oldest: null, held: 0 };
    for (const row of this.rows.values()) {
      t.backlog += row[backlog];
      t.pel += row[pel];
      t.waiting += row[waiting];
      t.dead += row[dead];
      t.delayed += row[delayed];
      t.stored += row[stored_rate];
      t.handled += row[handled_rate];
      if (row[oldest_s] !== null && (t.oldest === null || row[oldest_s] > t.oldest)) t.oldest = row[oldest_s];
      if (row[lease] === "held" || row[lease] === "moving") t.held += 1;
    }
    this.totals = t;
  }

  remember(at_ms) {
    this.times.push(at_ms);
    for (const name of Object.keys(this.past)) this.past[name].push(this.totals[name] ?? 0);
    const { stored_rate, handled_rate, backlog } = this.at;
    for (const [id, row] of this.rows) {
      let past = this.shardPast.get(id);
      if (!past) this.shardPast.set(id, past = { from: this.times.length - 1, stored: [], handled: [], backlog: [] });
      past.stored.push(row[stored_rate]);
      past.handled.push(row[handled_rate]);
      past.backlog.push(row[backlog]);
    }
    if (this.times.length > KEPT * 2) this.forget(this.times.length - KEPT);
  }

  /** Drops the first `n` points; all at once now and then, since a shift of each array each second costs more. */
  forget(n) {
    this.times.splice(0, n);
    for (const values of Object.values(this.past)) values.splice(0, n);
    for (const past of this.shardPast.values()) {
      const drop = Math.max(0, n - past.from);
      for (const name of ["stored", "handled", "backlog"]) past[name].splice(0, drop);
      past.from = Math.max(0, past.from - n);
    }
  }

  /** A line for spark(): [time, value] of the last two minutes. */
  line(name) { return this.points(this.past[name], 0); }

  shardLine(id, name) {
    const past = this.shardPast.get(id);
    return past ? this.points(past[name], past.from) : [];
  }

  points(values, from) {
    const start = Math.max(0, values.length - KEPT);
    return values.slice(start).map((value, index) => [this.times[from + start + index], value]);
  }

  /** Shards by owner, members without shards included: what the table of workers shows. */
  workers() {
    const found = new Map(this.about.members.map((name) => [name, []]));
    for (const row of this.rows.values()) {
      const owner = row[this.at.owner];
      if (!owner) continue;
      if (!found.has(owner)) found.set(owner, []);
      found.get(owner).push(row);
    }
    return [...found].sort(([a], [b]) => (a < b ? -1 : 1));
  }

  nodes() {
    const found = new Map();
    const of = (name) => found.get(name) ?? found.set(name, { slots: 0, shards: 0, backlog: 0 }).get(name);
    for (const [first, last, name] of this.about.slots) of(name).slots += last - first + 1;
    for (const row of this.rows.values()) {
      const node = of(row[this.at.node]);
      node.shards += 1;
      node.backlog += row[this.at.backlog];
    }
    return [...found].sort(([a], [b]) => (a < b ? -1 : 1));
  }
}
