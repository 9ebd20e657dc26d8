// Requests to the console's server, and the token for writes. The token comes in the address's fragment, which no server
// and no log sees; it is kept for this tab only and taken out of the address at once.

const KEY = "shardq-token";

export const access = { write: false, token: sessionStorage.getItem(KEY) };

export function takeToken() {
  const found = /^#token=(.+)$/.exec(location.hash);
  if (!found) return;
  setToken(found[1]);
  history.replaceState(null, "", location.pathname + location.search);
}

export function setToken(token) {
  access.token = token;
  if (token) sessionStorage.setItem(KEY, token);
  else sessionStorage.removeItem(KEY);
}

/** Why writing is not possible right now, "" when it is. */
export function whyNot() {
  if (!access.write) return "Read-only: the console was started without --write.";
  return access.token ? "" : "To replay, purge or pause, enter the token that this console was started with (top right).";
}

async function answer(response) {
  const body = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  if (!response.ok) throw Object.assign(new Error(body.error), { status: response.status });
  return body;
}

export async function get(path, query = {}) {
  const given = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined);
  return answer(await fetch(`/api/${path}?${new URLSearchParams(given)}`));
}

export async function post(path, body = {}) {
  const headers = { "Content-Type": "application/json", Authorization: `Bearer ${access.token}` };
  try {
    return await answer(await fetch(`/api/${path}`, { method: "POST", headers, body: JSON.stringify(body) }));
  } catch (error) {
    if (error.status === 401) {
      setToken(null);
      document.dispatchEvent(new Event("access"));
    }
    throw error;
  }
}

/** A stream of readings until `close()`: it connects again by itself. `heard(event)`, and `lost()` when it broke off. */
export function stream(queue, group, heard, lost) {
  let source = null;
  let again = null;
  const open = () => {
    source = new EventSource(`/api/stream?${new URLSearchParams({ queue, group })}`);
    source.onmessage = (message) => heard(JSON.parse(message.data));
    source.onerror = () => {
      source.close();
      lost();
      again = setTimeout(open, 2000);
    };
  };
  open();
  return { close() { clearTimeout(again); source.close(); } };
}
