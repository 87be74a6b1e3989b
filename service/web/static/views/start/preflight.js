// What a job would meet, told before it starts: it may take a while, and nothing waits for it.
import { get, pause } from "../../api.js";
import { duration, html, METHODS, number, percent, Trouble, useEffect, useLoad, useState } from "../../ui.js";

const SECONDS_BETWEEN_TRIES = 3;
const SETTLED = 1000; // milliseconds without another key before what was typed is asked about

/**
 * `{ data, error, said }`, `said` while there is no answer yet to what is asked now. `asked`: the job's values that the split and its tokens
 * depend on, as far as they are set. Looks go one at a time on the service: while another is under way, it is asked again.
 */
export function usePreflight(dataset, asked) {
  const [query, setQuery] = useState(asked);
  const [waits, setWaits] = useState(false);
  useEffect(() => {
    const timer = setTimeout(() => setQuery(asked), SETTLED);
    return () => clearTimeout(timer);
  }, Object.values(asked));
  const look = async (signal) => {
    setWaits(false);
    if (!dataset?.labels.length) return null;
    for (;;) {
      try {
        return await get(`/datasets/${dataset.id}/preflight`, query, signal);
      } catch (error) {
        if (error.status !== 429) throw error;
        setWaits(true);
        await pause(error.retryAfter || SECONDS_BETWEEN_TRIES, signal);
      }
    }
  };
  const { data, error, loading } = useLoad(look, [dataset?.id, JSON.stringify(query)]);
  const said = waits ? "Another file is being looked at; this one is next, and is asked for by itself." : "Looking for texts that are almost the same across the split, and for texts that are too long…";
  if (dataset?.labels.length > 0 && (loading || JSON.stringify(query) !== JSON.stringify(asked))) return { said };
  return error ? { error } : { data };
}

/** `prompts` where a prompt will run: else its time is none to know. */
export function Preflight({ look: { data, error, said }, prompts }) {
  return html`
    ${said && html`<p class="soft">Not known yet.</p>`}
    <${Trouble} error=${error} />
    ${data && html`
      <p>${number(data.split.n_train)} rows to train on, ${number(data.split.n_validation)} to choose on, ${number(data.split.n_test)} to judge on.</p>
      <${Truncated} found=${data.truncation} />
      ${data.near_duplicates.count === 0 && !data.near_duplicates.sampled && html`<p>No text is almost the same as one of another part.</p>`}
      <${Eta} eta=${Object.entries(data.eta).filter(([method]) => prompts || !method.endsWith("_prompt"))} />`}
  `;
}

function Truncated({ found }) {
  if (!found || found.n_truncated === 0) return found && html`<p>Every text fits into ${number(found.max_length)} tokens.</p>`;
  const worst = found.by_label.slice(0, 5);
  return html`<p>${number(found.n_truncated)} of ${number(found.n_texts)} texts are longer than ${number(found.max_length)} tokens; what is beyond is not read. Most is lost with ${worst.map(({ label, share_of_tokens_lost: lost }, i) => html`${i > 0 && ", "}<bdi>${label}</bdi> (${percent(lost)})`)}.</p>`;
}

function Eta({ eta }) {
  const known = eta.filter(([, { seconds }]) => seconds != null);
  const unknown = eta.filter(([, { seconds }]) => seconds == null);
  if (known.length === 0) return html`<p>How long it will take is not known here yet: no job has finished on this base model.</p>`;
  const basis = known.map(([, found]) => found.basis).find((name) => name?.startsWith("job_"));
  return html`<table class="narrow">
      <caption>Time it takes, roughly: ${basis ? html`as <a href=${`#/job/${basis}`}>the newest job on this base model</a> took` : "as on two CPU cores"}. Loading models comes on top.</caption>
      <tbody>${known.map(([method, { seconds }]) => html`<tr key=${method}><th scope="row">${METHODS[method] || method}</th><td class="number">${seconds < 1 ? "under 1 s" : duration(seconds)}</td></tr>`)}</tbody>
    </table>
    ${unknown.length > 0 && html`<p class="soft">Not known here yet: ${unknown.map(([method]) => METHODS[method] || method).join(", ")}.</p>`}`;
}
