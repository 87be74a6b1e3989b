// What a dataset holds, the button that starts, and what a job on it would meet.
import { get } from "../../api.js";
import { may } from "../../scopes.js";
import { bytes, html, number, percent, Scroll, useLoad, useState } from "../../ui.js";
import { Begin, promptless } from "./begin.js";
import { Preflight, usePreflight } from "./preflight.js";
import { Rows } from "./rows.js";
import { Warnings } from "./warnings.js";

const FIRST_LABELS = 20;

/**
 * `busy` while the file is read again: what stands here is then on its way out, and nothing starts from it. What was set
 * for the job outlives a reading. `onStarting` is told whether a start is under way.
 */
export function Found({ dataset, session, busy = false, onStarting }) {
  const [values, setValues] = useState({ descriptions: {} });
  const { base_model, max_length, seed } = values;
  const look = usePreflight(dataset, { base_model, max_length, seed });
  const bases = useLoad(() => get("/base-models"));
  const prompts = bases.data && !promptless(values, bases.data);
  const unusable = dataset.n_rows - dataset.n_usable_rows;
  const { p50_chars: half, max_chars: longest } = dataset.text_length;
  return html`
    <section>
      <p>${number(dataset.n_rows)} rows${unusable > 0 && `, ${number(unusable)} of them not usable`}; ${number(dataset.labels.length)} labels; ${bytes(dataset.size_bytes)}. Half of the texts have at most ${number(half)} characters, the longest has ${number(longest)}.</p>
      <${Warnings} key=${`warnings of ${dataset.id}`} dataset=${dataset} warnings=${look.data?.warnings ?? dataset.warnings} />
      <p class="soft" role="status">${look.said}</p>
      <${Rows} key=${`rows of ${dataset.id}`} dataset=${dataset} />
    </section>
    ${may(session, "write") && html`<${Begin} dataset=${dataset} known=${bases.data} busy=${busy} onStarting=${onStarting} values=${values} onChange=${setValues} />`}
    ${dataset.labels.length > 0 &&
    html`<section><h2>Labels</h2><${Labels} key=${dataset.id} labels=${dataset.labels} /></section>
      <section><h2>What a comparison would meet</h2><${Preflight} look=${look} prompts=${prompts} /></section>`}
  `;
}

function Labels({ labels }) {
  const [whole, setWhole] = useState(false);
  const sorted = [...labels].sort((a, b) => b.count - a.count);
  const total = sorted.reduce((sum, { count }) => sum + count, 0);
  const shown = whole ? sorted : sorted.slice(0, FIRST_LABELS);
  return html`<${Scroll} label="Labels and their rows">
      <table class="counts">
        <thead><tr><th scope="col">Label</th><th scope="col" class="number">Rows</th><th scope="col" class="number">Share</th><td></td></tr></thead>
        <tbody>${shown.map(({ label, count }) => html`<tr key=${label}>
          <th scope="row"><bdi>${label}</bdi></th><td class="number">${number(count)}</td><td class="number">${percent(count / total)}</td>
          <td><span class="share" aria-hidden="true"><i style=${{ inlineSize: `${(100 * count) / sorted[0].count}%` }}></i></span></td>
        </tr>`)}</tbody>
      </table>
    <//>
    ${!whole && labels.length > FIRST_LABELS && html`<p><button type="button" class="quiet" onClick=${() => setWhole(true)}>Show all ${number(labels.length)} labels</button></p>`}`;
}
