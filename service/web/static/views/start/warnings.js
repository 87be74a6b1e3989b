// Warnings, each of which opens to the rows it means.
import { get } from "../../api.js";
import { html, Loading, number, Said, Tag, Trouble, useLoad, useState } from "../../ui.js";
import { RowTable } from "./rows.js";

const NEAR = 100; // rows between two that are still fetched in one go

/** The rows of these numbers, in their order; neighbours in one call, since each call reads the file from its start. */
async function rowsOf(datasetId, numbers, signal) {
  const sorted = [...new Set(numbers)].sort((a, b) => a - b);
  const runs = [];
  for (const row of sorted) {
    const run = runs.at(-1);
    if (run && row - run.at(-1) <= NEAR && row - run[0] < 200) run.push(row);
    else runs.push([row]);
  }
  const found = new Map();
  for (const run of runs) {
    const page = await get(`/datasets/${datasetId}/rows`, { offset: run[0], limit: run.at(-1) - run[0] + 1 }, signal);
    for (const row of page.data) found.set(row.row_id, row);
  }
  return numbers.map((row) => found.get(row)).filter(Boolean);
}

export const Warnings = ({ dataset, warnings }) =>
  warnings.length > 0 && html`<ul class="plain">${warnings.map((warning) => html`<li key=${warning.code}><${Warning} dataset=${dataset} warning=${warning} /></li>`)}</ul>`;

function Warning({ dataset, warning }) {
  const [open, setOpen] = useState(false);
  return html`<details class="notice slim" onToggle=${(event) => setOpen(event.target.open)}>
    <summary><${Said} text=${warning.message} /> ${warning.count > 0 && html`<${Tag} kind="warn">${number(warning.count)} ${warning.count === 1 ? "row" : "rows"}<//>`}</summary>
    ${open && html`<${WarnedRows} dataset=${dataset} warning=${warning} />`}
  </details>`;
}

function WarnedRows({ dataset, warning }) {
  const { data, error } = useLoad((signal) => rowsOf(dataset.id, warning.rows, signal), [dataset.id, warning.code]);
  if (error) return html`<${Trouble} error=${error} />`;
  if (!data) return html`<${Loading} what="rows" />`;
  return html`${warning.count > warning.rows.length && html`<p class="soft">The first ${warning.rows.length}:</p>`}<${RowTable} label=${`Rows: ${warning.message}`} rows=${data} />`;
}
