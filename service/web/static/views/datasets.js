// Every dataset, newest first.
import { call } from "../api.js";
import { may } from "../scopes.js";
import { bytes, html, Loading, number, Time, Trouble, useConfirm, usePages } from "../ui.js";

export const LOST = "Its rows are gone for good, and with them the files of its jobs that hold texts: predictions, flips and reports. Models and figures stay.";

export default function Datasets({ session }) {
  const { items, more, next, error, loading, reload } = usePages("/datasets");
  const [dialog, ask] = useConfirm();
  const remove = (dataset) =>
    ask(html`Delete <bdi>${dataset.name}</bdi>?`, "Delete", async () => {
      await call("DELETE", `/datasets/${dataset.id}`);
      reload();
    }, LOST);
  return html`
    <h1>Datasets</h1>
    <${Trouble} error=${error} />
    ${!items && !error && html`<${Loading} what="datasets" />`}
    ${items?.length === 0 && html`<p>No dataset yet. <a href="#/">Upload a CSV</a>.</p>`}
    ${items?.length > 0 && html`<ul class="cards">${items.map((dataset) => html`<li key=${dataset.id}>
      <div class="line"><a href=${`#/dataset/${dataset.id}`}><strong><bdi>${dataset.name}</bdi></strong></a></div>
      <p class="soft">${number(dataset.n_rows)} rows, ${number(dataset.labels.length)} labels, ${bytes(dataset.size_bytes)}, uploaded <${Time} at=${dataset.created_at} /></p>
      <div class="actions">
        <a class="button quiet" href=${`#/jobs/${dataset.id}`}>Its jobs<span class="hidden"> (<bdi>${dataset.name}</bdi>)</span></a>
        ${may(session, "write") && html`<button type="button" class="quiet danger" onClick=${() => remove(dataset)}>Delete<span class="hidden"> <bdi>${dataset.name}</bdi></span></button>`}
      </div>
    </li>`)}</ul>`}
    ${more && html`<p><button type="button" disabled=${loading} onClick=${next}>More</button></p>`}
    ${dialog}
  `;
}
