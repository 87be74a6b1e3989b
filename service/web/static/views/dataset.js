// One dataset: how it was read, what is in it, and a start from it.
import { call, get } from "../api.js";
import { may } from "../scopes.js";
import { html, Loading, Time, Trouble, useConfirm, useLoad } from "../ui.js";
import { LOST } from "./datasets.js";
import { Found } from "./start/found.js";

const CELLS = { ",": "comma", ";": "semicolon", "\t": "tab", "|": "vertical bar" };

export default function Dataset({ id, session }) {
  const { data: dataset, error } = useLoad((signal) => get(`/datasets/${id}`, {}, signal), [id]);
  const [dialog, ask] = useConfirm();
  if (error) return html`<h1>Dataset</h1><${Trouble} error=${error} /><p><a href="#/datasets">All datasets</a></p>`;
  if (!dataset) return html`<${Loading} what="the dataset" />`;
  const remove = () =>
    ask(html`Delete <bdi>${dataset.name}</bdi>?`, "Delete", async () => {
      await call("DELETE", `/datasets/${id}`);
      location.hash = "#/datasets";
    }, LOST);
  return html`
    <h1><bdi>${dataset.name}</bdi></h1>
    <p class="soft">Uploaded <${Time} at=${dataset.created_at} />. Cells cut by ${CELLS[dataset.delimiter] || dataset.delimiter}, ${dataset.has_header ? "the first row names the columns" : "no header"}, ${dataset.encoding}${dataset.split_column && html`, split by column <bdi>${dataset.split_column}</bdi>`}. Read wrongly? <a href="#/">Upload it again</a> and say how.</p>
    <${Found} dataset=${dataset} session=${session} />
    <section class="actions">
      <a class="button" href=${`#/jobs/${id}`}>Its jobs</a>
      ${may(session, "write") && html`<button type="button" class="danger" onClick=${remove}>Delete the dataset</button>`}
    </section>
    <details><summary>Identity</summary><dl><div><dt>Id</dt><dd><code>${dataset.id}</code></dd></div><div><dt>SHA-256 of the file</dt><dd><code>${dataset.sha256}</code></dd></div></dl></details>
    ${dialog}
  `;
}
