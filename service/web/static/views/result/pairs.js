// Methods two by two on the same rows, and the rows that changed sides.
import { get } from "../../api.js";
import { PARTS, pValue, whyUnclear } from "../../figures.js";
import { Field, html, Loading, METHODS, number, points, Scroll, Tag, Trouble, useEffect, useLoad, useRef, useState } from "../../ui.js";

const PAGE = 25;
const span = (ends) => ends.map(points).join(" to ");
const VERDICTS = { candidate_wins: ["better", "good"], baseline_wins: ["worse", "bad"], inconclusive: ["not clear", ""] };

export function Pairs({ metrics, onShow }) {
  const show = (pair) => {
    onShow(pair);
    document.getElementById("flips").focus();
  };
  return html`<section class="gap" aria-labelledby="pairs">
    <h2 id="pairs">Pair by pair, on the same rows</h2>
    <p class="soft">Is the first method better than the second? Differences are in percentage points, first minus second, with the 95 % interval. <em>Fixed</em> rows only the first has right, <em>broken</em> rows only the second. <em>p</em>, corrected for the number of comparisons (Holm), decides below 0.05. Not clear does not mean equal: a difference smaller than the <em>detectable</em> one would often go unseen.</p>
    <${Scroll} label="Paired comparisons"><table>
      <caption>Paired comparisons</caption>
      <thead><tr><th scope="col">Methods</th><th scope="col">Verdict</th>${["Accuracy", "Macro-F1", "Fixed, broken", "p", "Detectable", "Rows"].map((name) => html`<th scope="col" class="number">${name}</th>`)}</tr></thead>
      <tbody>${metrics.comparison.map((pair) => {
        const [word, kind] = VERDICTS[pair.verdict], why = whyUnclear(pair, metrics, METHODS);
        return html`<tr>
          <th scope="row">${METHODS[pair.candidate]}<span class="sub">against ${METHODS[pair.baseline]}</span></th>
          <td><${Tag} kind=${kind}>${word}<//>${why && html`<span class="sub">${why}</span>`}</td>
          <td class="number">${points(pair.accuracy_delta)}<span class="sub">${span(pair.accuracy_delta_ci95)}</span></td>
          <td class="number">${points(pair.macro_f1_delta)}<span class="sub">${span(pair.macro_f1_delta_ci95)}</span></td>
          <td class="number"><button type="button" class="quiet" aria-label=${`${number(pair.n_fixed)}, ${number(pair.n_broken)}: show the rows fixed and broken`} onClick=${() => show(pair)}>${number(pair.n_fixed)}, ${number(pair.n_broken)}</button></td>
          <td class="number">${pValue(pair.mcnemar_p_holm)}<span class="sub">alone ${pValue(pair.mcnemar_p)}</span></td>
          <td class="number">${(100 * pair.minimum_detectable_difference).toFixed(1)}</td>
          <td class="number">${number(pair.n)}<span class="sub">${PARTS[pair.on]}${pair.n_texts < pair.n ? `, ${number(pair.n_texts)} texts` : ""}</span></td>
        </tr>`;
      })}</tbody>
    </table><//>
  </section>`;
}

export function Flips({ job, metrics, pair, onPair }) {
  const [filter, setFilter] = useState({ label: "", flip: "" });
  const [starts, setStarts] = useState([0]); // where each page up to this one begins
  useEffect(() => setStarts([0]), [pair]);
  const asked = { candidate: pair.candidate, baseline: pair.baseline, ...filter };
  const page = useLoad((signal) => get(`/jobs/${job.id}/flips`, { ...asked, after: starts.at(-1), limit: PAGE }, signal), [job.id, JSON.stringify(asked), starts]);
  const heading = useRef(null);
  const change = (what) => (event) => {
    setFilter({ ...filter, [what]: event.target.value });
    setStarts([0]);
  };
  const turn = (to) => {
    setStarts(to);
    heading.current.focus();
  };
  const rows = page.data?.data ?? [];
  let body;
  if (page.error?.status === 404) body = html`<p>The rows went with the dataset, which has been deleted; the figures above stay.</p>`;
  else if (page.error) body = html`<${Trouble} error=${page.error} /><button type="button" onClick=${page.reload}>Try again</button>`;
  else
    body = html`<div class="grid">
        <${Field} label="Comparison"><select value=${metrics.comparison.indexOf(pair)} onChange=${(event) => onPair(metrics.comparison[event.target.value])}>
          ${metrics.comparison.map((one, i) => html`<option value=${i}>${METHODS[one.candidate]} against ${METHODS[one.baseline]}</option>`)}
        </select><//>
        <${Field} label="True label"><select value=${filter.label} onChange=${change("label")}><option value="">All</option>${metrics.labels.map((label) => html`<option value=${label}>${label}</option>`)}</select><//>
        <${Field} label="Which"><select value=${filter.flip} onChange=${change("flip")}>
          <option value="">Fixed and broken</option><option value="fixed">Fixed: only ${METHODS[pair.candidate]} is right</option><option value="broken">Broken: only ${METHODS[pair.baseline]} is right</option>
        </select><//>
      </div>
      ${!page.data ? html`<${Loading} what="the rows" />` : rows.length ? html`<${FlipTable} rows=${rows} pair=${pair} busy=${page.loading} />` : html`<p>No such row.</p>`}
      ${(starts.length > 1 || page.data?.has_more) && html`<div class="actions">
        <button type="button" disabled=${page.loading || starts.length < 2} onClick=${() => turn(starts.slice(0, -1))}>Previous</button>
        <button type="button" disabled=${page.loading || !page.data?.has_more} onClick=${() => turn([...starts, rows.at(-1).id])}>Next</button>
        <span class="soft" role="status">Page ${starts.length}</span>
      </div>`}`;
  return html`<section class="gap" aria-labelledby="flips">
    <h2 id="flips" tabindex="-1" ref=${heading}>Rows that changed sides</h2>${body}
  </section>`;
}

const FlipTable = ({ rows, pair, busy }) => html`<${Scroll} label=${`${METHODS[pair.candidate]} against ${METHODS[pair.baseline]}`}><table aria-busy=${String(busy)}>
  <caption>Rows are counted from 0, the header not included</caption>
  <thead><tr><th scope="col" class="number">Row</th><th scope="col" class="text">Text</th><th scope="col">Label</th><th scope="col">${METHODS[pair.candidate]}</th><th scope="col">${METHODS[pair.baseline]}</th><th scope="col">Flip</th></tr></thead>
  <tbody>${rows.map((row) => html`<tr>
    <th scope="row" class="number">${row.row_id}</th><td class="text"><${Text} of=${row.text} /></td><td><bdi>${row.label}</bdi></td>
    <td><${Answer} of=${row.candidate_answer} /></td><td><${Answer} of=${row.baseline_answer} /></td><td><${Tag} kind=${row.flip === "fixed" ? "good" : "bad"}>${row.flip}<//></td>
  </tr>`)}</tbody>
</table><//>`;

const LONG = 300;
const Text = ({ of }) => (of.length <= LONG ? html`<bdi>${of}</bdi>` : html`<details class="long"><summary><bdi>${of.slice(0, LONG)}…</bdi></summary><bdi>${of.slice(LONG)}</bdi></details>`);
const Answer = ({ of }) => (of == null ? html`<span class="soft">no answer</span>` : html`<bdi>${of}</bdi>`);
