// What a job that predicts left: how many rows got which label, and the file.
import { url } from "../api.js";
import { bytes, html, number, percent, Scroll } from "../ui.js";

export default function Labelled({ job }) {
  const { headline, labels, n_rows: rows, model_id: model, rows_per_second: rate } = job.summary;
  const file = job.artifacts.find((one) => one.name === "predictions.csv");
  return html`<section class="verdict" aria-labelledby="headline">
      <h2 id="headline">${headline}</h2>
      <p>By <a href=${`#/model/${model}`}>model <code>${model}</code></a>, ${number(rate < 10 ? Number(rate.toPrecision(2)) : Math.round(rate))} rows a second.</p>
      ${file ? html`<p><a class="button" href=${url(file.url)} download=${file.name}>Download predictions.csv</a> <span class="soft">${bytes(file.size_bytes)}</span></p>` : html`<p>The dataset of this job has been deleted, and with it the predictions, which hold its texts.</p>`}
    </section>
    <section class="gap" aria-labelledby="labels"><h2 id="labels">Labels given</h2>
      <${Scroll} label="Rows by label"><table>
        <thead><tr><th scope="col">Label</th><th scope="col" class="number">Rows</th><th scope="col" class="number">Share</th></tr></thead>
        <tbody>${labels.map((one) => html`<tr key=${one.label}><th scope="row"><bdi>${one.label}</bdi></th><td class="number">${number(one.count)}</td><td class="number">${percent(one.count / rows)}</td></tr>`)}</tbody>
      </table><//></section>`;
}
