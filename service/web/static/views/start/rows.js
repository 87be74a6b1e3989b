// Rows of a dataset, as they are read.
import { get } from "../../api.js";
import { html, Loading, number, Scroll, Tag, Trouble, useLoad, useState } from "../../ui.js";

const FIRST = 5;
const STEP = 20;
const MOST = 200; // what one call gives
const LONG = 400; // characters of a text that are shown at first

/** The first rows, and more of them on demand. */
export function Rows({ dataset }) {
  const [limit, setLimit] = useState(FIRST);
  const { data, error, loading } = useLoad((signal) => get(`/datasets/${dataset.id}/rows`, { limit }, signal), [dataset.id, limit]);
  if (error) return html`<${Trouble} error=${error} />`;
  if (!data) return html`<${Loading} what="rows" />`;
  const heads = [["Text", "text_column"], ["Label", "label_column"]].map(([role, field]) => html`${role}${" "}
    <span class="sub"><bdi>${dataset[field] || "none"}</bdi>${" "}${dataset.inferred.includes(field) && html`<${Tag} kind="accent">recognised<//>`}</span>`);
  return html`<${RowTable} label="First rows" rows=${data.data} heads=${heads} />
    ${data.has_more && limit < MOST && html`<p><button type="button" class="quiet" disabled=${loading} onClick=${() => setLimit(Math.min(limit + STEP, MOST))}>More rows</button></p>`}`;
}

/** Rows with their numbers, which count from 0 as everywhere in the API. */
export const RowTable = ({ label, rows, heads = ["Text", "Label"] }) => html`<${Scroll} label=${label}>
  <table class="rows">
    <thead><tr><th scope="col" class="number">Row</th>${heads.map((head) => html`<th scope="col">${head}</th>`)}</tr></thead>
    <tbody>${rows.map((row) => html`<tr key=${row.row_id}><td class="number">${row.row_id}</td><td><${Cut} text=${row.text} /></td><td><bdi>${row.label}</bdi></td></tr>`)}</tbody>
  </table>
<//>`;

function Cut({ text }) {
  const [whole, setWhole] = useState(false);
  if (whole || text.length <= LONG) return html`<bdi>${text}</bdi>`;
  return html`<bdi>${text.slice(0, LONG)}…</bdi> <button type="button" class="quiet" onClick=${() => setWhole(true)}>All ${number(text.length)} characters</button>`;
}
