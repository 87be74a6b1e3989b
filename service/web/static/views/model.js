// One model: how good it is, which names point to it, and a place to try it.
import { call, get, url } from "../api.js";
import { may } from "../scopes.js";
import { bytes, html, Loading, METHODS, number, percent, Tag, Time, Trouble, useConfirm, useLoad } from "../ui.js";
import { Aliases } from "./model/aliases.js";
import { Playground } from "./model/playground.js";

const FEW_LABELS = 30;

export default function ModelPage({ id, session }) {
  const { data: model, error, reload } = useLoad((signal) => get(`/models/${encodeURIComponent(id)}`, {}, signal), [id]);
  if (error?.status === 404) return html`<h1>No such model</h1><p>It may have been deleted. <a href="#/models">See the others</a></p>`;
  if (error) return html`<h1>Model</h1><${Trouble} error=${error} /><button type="button" onClick=${reload}>Try again</button>`;
  if (!model) return html`<${Loading} what="the model" />`;
  return html`<h1><bdi>${model.name}</bdi>, version ${model.version}</h1>
    <p>${METHODS[model.method]} on ${model.base_model} ${model.aliases.map((alias) => html`<${Tag} kind="accent">${alias}<//> `)}</p>
    <dl>
      <div><dt>Accuracy on the test rows</dt><dd>${percent(model.metrics.accuracy)}</dd></div>
      <div><dt>Macro-F1</dt><dd>${percent(model.metrics.macro_f1)}</dd></div>
      <div><dt>Labels</dt><dd>${number(model.labels.length)}</dd></div>
      <div><dt>Published</dt><dd><${Time} at=${model.created_at} /></dd></div>
      <div><dt>Size</dt><dd>${bytes(model.size_bytes)}</dd></div>
      <div><dt>Base revision</dt><dd><code title=${model.base_revision}>${model.base_revision.slice(0, 19)}${model.base_revision.length > 19 && "…"}</code></dd></div>
      <div><dt>Id</dt><dd><code>${model.id}</code></dd></div>
    </dl>
    <details open=${model.labels.length <= FEW_LABELS}><summary>Labels</summary><ul class="labels">${model.labels.map((label) => html`<li><bdi>${label}</bdi></li>`)}</ul></details>
    <${Playground} model=${model} session=${session} />
    <${Aliases} model=${model} session=${session} onMoved=${reload} />
    <${Keep} model=${model} session=${session} />`;
}

function Keep({ model, session }) {
  const [dialog, ask] = useConfirm();
  const remove = async () => {
    await call("DELETE", `/models/${model.id}`);
    location.hash = "#/models";
  };
  const detail = "Programs that call it by its id get a 404 from then on. Its job and figures stay.";
  return html`<section class="gap" aria-labelledby="keep">
    <h2 id="keep">Keep or delete</h2>
    <div class="actions">
      <a class="button" href=${`#/job/${model.job_id}`}>The job that made it</a>
      <a class="button" href=${url(`/models/${model.id}/download`)} download>Download (zip)</a>
      ${may(session, "write") && html`<button type="button" class="danger" onClick=${() => ask(`Delete ${model.name}, version ${model.version}?`, "Delete", remove, detail)}>Delete the model</button>`}
    </div>
    ${dialog}
  </section>`;
}
