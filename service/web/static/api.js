// The HTTP API, as the pages call it. A session's cookie goes with every call; nothing is kept here.

// `…/ui/api.js` -> `…/`: the service may stand behind a proxy's path.
export const root = new URL("..", import.meta.url);

/** An answer that is an error: RFC 9457, or the network's own. */
export class Problem extends Error {
  constructor(status, body) {
    super(body.detail || "The service cannot be reached. Is it running?");
    this.status = status;
    this.code = body.code || "unreachable";
    this.errors = body.errors || [];
    this.columns = body.columns || [];
    this.requestId = body.request_id;
    this.retryAfter = body.retryAfter; // seconds; null where the service names none
  }
}

export const url = (path, query = {}) => {
  const target = new URL(path.replace(/^\//, ""), root);
  for (const [name, value] of Object.entries(query)) if (value != null && value !== "") target.searchParams.set(name, value);
  return target.href;
};

/**
 * One call. `json` or `form` (a FormData) is the body. A POST carries an Idempotency-Key, which the caller may give so
 * that the same click, sent again after a lost answer, creates nothing twice.
 */
export async function call(method, path, { query, json, form, signal, key = token() } = {}) {
  const headers = { Accept: "application/json" };
  if (json !== undefined) headers["Content-Type"] = "application/json";
  if (method === "POST") headers["Idempotency-Key"] = key;
  const body = json === undefined ? form : JSON.stringify(json);
  let answer;
  try {
    answer = await fetch(url(path, query), { method, headers, body, signal, credentials: "same-origin" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, {});
  }
  if (answer.status === 204) return null;
  const data = await answer.json().catch(() => ({}));
  if (!answer.ok) throw refused(answer.status, data, answer.headers.get("Retry-After"));
  return data;
}

function refused(status, data, retryAfter) {
  if (status === 401) dispatchEvent(new Event("signed-out"));
  return new Problem(status, { detail: `The service answered ${status}.`, ...data, retryAfter: Number(retryAfter) || null });
}

/**
 * A POST with a file in its form, which the browser reads from the disk as it sends. `onProgress` gets the share that
 * is sent, 0 to 1: `fetch` cannot tell.
 */
export function upload(path, form, { onProgress, signal, key }) {
  return new Promise((done, fail) => {
    signal.throwIfAborted();
    const request = new XMLHttpRequest();
    request.open("POST", url(path));
    request.responseType = "json";
    request.setRequestHeader("Accept", "application/json");
    request.setRequestHeader("Idempotency-Key", key);
    request.upload.onprogress = (sent) => sent.lengthComputable && onProgress(sent.loaded / sent.total);
    request.onload = () => (request.status < 300 ? done(request.response) : fail(refused(request.status, request.response)));
    request.onabort = () => fail(new DOMException("stopped", "AbortError"));
    // A server that takes no file of this size may close the connection before its answer can be read.
    request.onerror = () => fail(new Problem(0, { detail: "The upload was cut off. Is the service running, the file still as it was when it was chosen, and not too large for the service?" }));
    signal.addEventListener("abort", () => request.abort());
    request.send(form);
  });
}

export const get = (path, query, signal) => call("GET", path, { query, signal });

/** Every item of a list, page by page, at most `most`. */
export async function all(path, query = {}, most = 2000) {
  const found = [];
  let page = { has_more: true };
  while (page.has_more && found.length < most) {
    const last = found.at(-1);
    page = await get(path, { limit: 200, ...query, after: last?.id ?? query.after });
    found.push(...page.data);
  }
  return found;
}

/** Waits; aborted, it throws as an aborted `fetch` does. */
export const pause = (seconds, signal) =>
  new Promise((done, stop) => {
    signal.throwIfAborted();
    const timer = setTimeout(done, 1000 * seconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      stop(signal.reason);
    });
  });

/** A random name; `crypto.randomUUID` is there on https and localhost alone. */
export const token = () => [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");

/**
 * A job's events as they come, from the first after number `after` on; the browser reconnects by itself and goes on
 * after the last one seen. Gives a function that stops it. `onState` gets "live", "lost" or, where the browser gives
 * up because the job has ended or the answer was no stream, "closed".
 */
export function follow(jobId, onEvent, onState = () => {}, after = 0) {
  const source = new EventSource(url(`/jobs/${encodeURIComponent(jobId)}/events`, { after }));
  source.onopen = () => onState("live");
  source.onmessage = (message) => onEvent(JSON.parse(message.data));
  source.onerror = () => onState(source.readyState === EventSource.CLOSED ? "closed" : "lost");
  return () => source.close();
}
