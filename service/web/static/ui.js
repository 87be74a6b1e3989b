// What every page is made of.
import { h } from "./vendor/preact.js";
import { useCallback, useEffect, useId, useRef, useState } from "./vendor/hooks.js";
import htm from "./vendor/htm.js";
import { get } from "./api.js";

export { METHODS } from "./figures.js";
export { Fragment } from "./vendor/preact.js";
export { useEffect, useId, useMemo, useRef, useState } from "./vendor/hooks.js";
export const html = htm.bind(h);

export const number = (value) => (value == null ? "–" : value.toLocaleString("en"));
export const percent = (share, digits = 1) => (share == null ? "–" : `${(100 * share).toFixed(digits)}\u00a0%`);
export const points = (share) => `${share >= 0 ? "+" : "−"}${Math.abs(100 * share).toFixed(1)}`;
export const bytes = (size) => {
  const units = ["B", "KB", "MB", "GB", "TB"];
  const step = size ? Math.min(Math.floor(Math.log10(size) / 3), 4) : 0;
  return `${(size / 1000 ** step).toFixed(step ? 1 : 0)} ${units[step]}`;
};
export const duration = (seconds) => {
  if (seconds == null) return "";
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  return whole < 3600 ? `${Math.floor(whole / 60)} min ${whole % 60} s` : `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
};

/** `load` is called at first and whenever a value of `inputs` changes; an answer that came too late is dropped. */
export function useLoad(load, inputs = []) {
  const [state, setState] = useState({ data: null, error: null, loading: true, of: inputs });
  const [round, setRound] = useState(0);
  useEffect(() => {
    const control = new AbortController();
    setState((before) => ({ ...before, loading: true, of: inputs }));
    load(control.signal).then(
      (data) => control.signal.aborted || setState({ data, error: null, loading: false, of: inputs }),
      (error) => control.signal.aborted || setState((before) => ({ ...before, error, loading: false })),
    );
    return () => control.abort();
  }, [...inputs, round]);
  const reload = useCallback(() => setRound((n) => n + 1), []);
  useSignedIn(state.error, reload);
  // The page is drawn once before the effect runs: what is there then is of the inputs before.
  return { ...state, loading: state.loading || inputs.some((one, i) => one !== state.of[i]), reload };
}

/** Calls `again` as it was when `error` came, once somebody has signed in, where the error is that nobody was. */
export function useSignedIn(error, again) {
  useEffect(() => {
    if (error?.status === 401) addEventListener("signed-in", again);
    return () => removeEventListener("signed-in", again);
  }, [error]);
}

/** A list, page by page, newest first; a reload asks for as many pages as are shown. */
export function usePages(path, query = {}) {
  const [pages, setPages] = useState(1);
  const load = async (signal) => {
    const found = { data: [], has_more: true };
    for (let page = 0; page < pages && found.has_more; page += 1) {
      const next = await get(path, { ...query, after: found.data.at(-1)?.id }, signal);
      found.data.push(...next.data);
      found.has_more = next.has_more;
    }
    return found;
  };
  const state = useLoad(load, [path, JSON.stringify(query), pages]);
  return { ...state, items: state.data?.data, more: state.data?.has_more, next: () => setPages((n) => n + 1) };
}

/** Looks again every so many seconds while `active`, but not while the page cannot be seen. */
export function useEvery(seconds, look, active = true) {
  const latest = useRef(look);
  latest.current = look;
  useEffect(() => {
    if (!active) return undefined;
    const turn = () => document.hidden || latest.current();
    const timer = setInterval(turn, 1000 * seconds);
    document.addEventListener("visibilitychange", turn);
    return () => {
      clearInterval(timer);
      document.removeEventListener("visibilitychange", turn);
    };
  }, [seconds, active]);
}

/**
 * Runs one action at a time: `[run, busy, error]`. What it threw is kept for `Trouble` as long as `about`, what it was
 * done to, stays the same, and until somebody signs in, where nobody was.
 */
export function useAction(action, about) {
  const [state, setState] = useState({ busy: false, error: null });
  const running = useRef(false);
  const run = async (...given) => {
    if (running.current) return;
    running.current = true;
    setState({ busy: true, error: null });
    const error = await action(...given).then(() => null, (thrown) => thrown);
    running.current = false;
    setState({ busy: false, error, about });
  };
  useSignedIn(state.error, () => setState({ busy: false, error: null }));
  return [run, state.busy, state.about === about ? state.error : null];
}

/**
 * A sentence of the service: commands and fields in backticks as code, no break between a number and its sign. All else
 * stays to the letter, for it may be a label or a column's name.
 */
export const Said = ({ text = "" }) =>
  text.split(/(`(?:errors|model|(?:tuneproof |hf |baseline\.|train\.|Authorization: )[^`]+)`|[\d.]+ %)/).map((part, i) => (i % 2 === 0 ? part : part[0] === "`" ? html`<code>${part.slice(1, -1)}</code>` : html`<span class="number">${part}</span>`));

/** A method's name in the API; it may break after an underscore. */
export const Slug = ({ of }) => of.split(/(?<=_)/).map((part, i) => html`${i > 0 && html`<wbr />`}${part}`);

const FIELDS = {
  text_column: "Column of the texts", label_column: "Column of the labels", split_column: "Column of the file's own split", delimiter: "Delimiter", encoding: "Encoding",
  base_model: "Base model", prompt_model: "Prompt model", few_shot: "Examples in the prompt", sample_size: "Rows to prompt", max_length: "Longest text", webhook_url: "Webhook",
};
const fieldOf = (name) => (Object.hasOwn(FIELDS, name) ? FIELDS[name] : null);

// What the API says to programs, and how a reader of these pages would have it: whole phrases, since labels and names
// of columns stand in the same sentences.
const PHRASES = [
  [/ (?:List them with|Send "force")[^.]*\.|[;,] GET [^.]* lists? them| See `errors`, and \/docs for what is expected\./g, ""],
  [/^(?:baseline\.|train\.)?(\w+)(?= (?:must be|names|is no) )/, (name, field) => (fieldOf(field) ? `“${fieldOf(field)}”` : name)],
  [/^Expected \w+_column to be a column's name or 0-based index/, "Expected the name of a column"],
  [/Pass (\w+_column) with one of them\.$/, (_, field) => `Choose one of them as “${fieldOf(field)}”.`],
  ["Pass another label_column", `Choose another “${FIELDS.label_column}”`],
  ["leave split_column out to", `leave “${FIELDS.split_column}” out to`],
  [/or pass rare_labels=drop\.$/, "or leave those rows out."],
  [/or pass has_header=false if the first row is data\.$/, "or choose “First row: is data”."],
  [/(; is the file UTF-16\? then )pass encoding=/, "$1choose the encoding "],
  [/Pass encoding=(?=[\w-]+\.$)/, "Choose the encoding "],
  [/Pass (?=the file's encoding |delimiter if cells are cut)/, "Choose "],
  [/or pass (?=the delimiter\.$)/, "or choose "],
];
const plain = (text) => PHRASES.reduce((so, [said, meant]) => so.replace(said, meant), text);

const At = ({ of: { row, loc = [], message } }) => html`<li>${row != null ? `Row ${row}` : (fieldOf(loc.at(-1)) ?? loc.join("."))}: <${Said} text=${plain(message)} /></li>`;
const FIRST_ERRORS = 10;

/** What went wrong, with the fields or rows at fault; read out at once. */
export const Trouble = ({ error }) =>
  error &&
  html`<div class="trouble" role="alert">
    <p><strong><${Said} text=${plain(error.message)} /></strong></p>
    ${error.errors?.length > 0 && html`<ul>${error.errors.slice(0, FIRST_ERRORS).map((e) => html`<${At} of=${e} />`)}</ul>`}
    ${error.errors?.length > FIRST_ERRORS && html`<details><summary>and ${error.errors.length - FIRST_ERRORS} more</summary><ul>${error.errors.slice(FIRST_ERRORS).map((e) => html`<${At} of=${e} />`)}</ul></details>`}
  </div>`;

export const Loading = ({ what = "" }) => html`<p class="soft" role="status">Loading ${what}…</p>`;

export const Tag = ({ kind = "", children }) => html`<span class=${`tag ${kind}`}>${children}</span>`;

const STATUS = { queued: "", running: "accent", cancelling: "warn", succeeded: "good", failed: "bad", cancelled: "" };
export const Status = ({ of }) => html`<${Tag} kind=${STATUS[of] || ""}>${of}<//>`;

export const Time = ({ at }) =>
  at
    ? html`<time datetime=${at} title=${at}>${new Date(at).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" })}</time>`
    : html`<span>–</span>`;

/** A label over one input, select or textarea; `hint` explains it in a sentence and is read with it. */
export function Field({ label, hint, children }) {
  const id = useId();
  const control = children;
  control.props.id = id;
  if (hint) control.props["aria-describedby"] = `${id}-hint`;
  return html`<div class="field"><label for=${id}>${label}</label>${control}${hint && html`<small id=${`${id}-hint`}>${hint}</small>`}</div>`;
}

/** A table that scrolls by itself where it is too wide, and fades at the edge behind which there is more. */
export function Scroll({ label, children }) {
  const box = useRef(null);
  const look = () => {
    const seen = box.current; // null once it is taken away
    seen?.classList.toggle("more", seen.scrollLeft + seen.clientWidth < seen.scrollWidth - 1);
  };
  useEffect(() => {
    const watch = new ResizeObserver(look);
    for (const seen of [box.current, ...box.current.children]) watch.observe(seen);
    return () => watch.disconnect();
  }, []);
  return html`<div class="box" ref=${box} onScroll=${look} role="region" aria-label=${label} tabindex="0">${children}</div>`;
}

/** Text with a button that copies it. */
export function Copyable({ text, label = "Copy" }) {
  const [said, setSaid] = useState("");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text); // on https and localhost alone
      setSaid("Copied");
    } catch {
      setSaid("Select the text and copy it");
    }
    setTimeout(() => setSaid(""), 2500);
  };
  return html`<div class="copyable"><pre tabindex="0">${text}</pre><button type="button" class="quiet" onClick=${copy}>${label}</button><span role="status">${said}</span></div>`;
}

/** Asks before something that cannot be undone. `ask(question, action)` opens it. */
export function useConfirm() {
  const [asked, setAsked] = useState(null);
  const dialog = useRef(null);
  useEffect(() => {
    if (asked && !dialog.current.open) dialog.current.showModal();
  }, [asked]);
  const close = () => dialog.current?.close(); // which gives the focus back to what opened it
  const [act, busy, error] = useAction(async () => {
    await asked.action();
    close();
  });
  const element =
    asked &&
    html`<dialog ref=${dialog} onClose=${() => setAsked(null)} aria-labelledby="asked">
      <h2 id="asked">${asked.question}</h2>
      ${asked.detail && html`<p>${asked.detail}</p>`}
      <${Trouble} error=${error} />
      <div class="actions"><button type="button" class="danger" disabled=${busy} onClick=${act}>${asked.verb}</button><button type="button" onClick=${close}>Keep</button></div>
    </dialog>`;
  return [element, (question, verb, action, detail) => setAsked({ question, verb, action, detail })];
}
