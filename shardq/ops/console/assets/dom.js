// Elements, numbers and times as text. Whatever comes from Redis gets into the page here alone, and as text only.

export const $ = (id) => document.getElementById(id);

/** An element: attributes (functions are listeners, false and null are left out) and children, strings as text. */
export function h(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(key, value);
    else if (key === "text") element.textContent = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Sets text only where it differs: a write that changes nothing still costs a layout. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

/** A count: 1,204 up to ten thousand, then 12.3K, 4.56M. */
export const count = (n) => (Math.abs(n) < 10_000 ? whole.format(Math.round(n)) : short.format(n));

/** 1 dead letter, 2 dead letters. */
export const plural = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

/** A rate: one decimal below ten. */
export const rate = (n) => (n > 0 && n < 9.95 ? n.toFixed(1) : count(n));

/** Seconds as 0.4 s, 12 s, 3 min, 2.5 h, 6 d; "-" for none. */
export function span(seconds) {
  if (seconds === null || seconds === undefined) return "-";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172_800) return `${(seconds / 3600).toFixed(1)} h`;
  return `${Math.round(seconds / 86_400)} d`;
}

export const ago = (ms) => `${span(Math.max(0, (Date.now() - ms) / 1000))} ago`;

/** A Unix time in ms as ISO text; an id that another client chose need not be a time. */
export function moment(ms) {
  const date = new Date(ms);
  return Number.isNaN(date.getTime()) ? `${ms} ms` : date.toISOString().replace("T", " ").replace("Z", " UTC");
}

let silence;
/** Says what was done, to eyes and to screen readers. */
export function say(text) {
  clearTimeout(silence);
  $("said").textContent = text;
  silence = setTimeout(() => { $("said").textContent = ""; }, 8000);
}

/** Asks in a dialog; resolves to true, or to what was typed where `label` asks for it, or to null. */
export function ask({ title, text, yes, danger = false, input = false }) {
  const dialog = $("ask");
  $("ask-title").textContent = title;
  $("ask-text").textContent = text;
  $("ask-yes").textContent = yes;
  $("ask-yes").className = danger ? "danger" : "primary";
  $("ask-label").hidden = !input;
  $("ask-input").value = "";
  dialog.returnValue = "no";
  dialog.showModal();
  $("ask-no").onclick = () => dialog.close("no");  // no submit button: Enter in the field means yes
  if (!input) $("ask-no").focus();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      const agreed = dialog.returnValue === "yes";
      resolve(agreed ? (input ? $("ask-input").value.trim() : true) : null);
    }, { once: true });
  });
}
