// Every published model, by name, newest version first.
import { all } from "../api.js";
import { bytes, html, Loading, METHODS, percent, Scroll, Tag, Time, Trouble, useLoad } from "../ui.js";

export default function Models() {
  const { data: models, error, reload } = useLoad(() => all("/models"));
  return html`<h1>Models</h1>
    ${error ? html`<${Trouble} error=${error} /><button type="button" onClick=${reload}>Try again</button>` : !models ? html`<${Loading} what="the models" />` : models.length ? groups(models).map((group) => html`<${Versions} key=${group[0].name} models=${group} />`) : html`<p>None yet. A job that fine-tunes publishes one: <a href="#/">compare prompting and fine-tuning</a> on a labelled CSV.</p>`}`;
}

/** By name, the name with the newest version first; `models` come newest first. */
const groups = (models) => Object.values(Object.groupBy(models, (model) => `name ${model.name}`)).map((group) => group.sort((a, b) => b.version - a.version));

const Versions = ({ models }) => html`<section class="gap">
  <h2><bdi>${models[0].name}</bdi></h2>
  <${Scroll} label=${`Versions of ${models[0].name}`}><table>
    <caption class="hidden">Versions of ${models[0].name}</caption>
    <thead><tr><th scope="col">Version</th><th scope="col">Aliases</th><th scope="col">Method</th><th scope="col" class="number">Accuracy</th><th scope="col" class="number">Macro-F1</th><th scope="col">Base</th><th scope="col" class="number">Size</th><th scope="col">Published</th></tr></thead>
    <tbody>${models.map((model) => html`<tr>
      <th scope="row"><a href=${`#/model/${model.id}`} aria-label=${`${model.name}, version ${model.version}`}>${model.version}</a></th>
      <td>${model.aliases.length ? model.aliases.map((alias) => html`<${Tag} kind="accent">${alias}<//> `) : html`<span class="soft">none</span>`}</td>
      <td>${METHODS[model.method]}</td>
      <td class="number">${percent(model.metrics.accuracy)}</td><td class="number">${percent(model.metrics.macro_f1)}</td>
      <td>${model.base_model}</td><td class="number">${bytes(model.size_bytes)}</td><td><${Time} at=${model.created_at} /></td>
    </tr>`)}</tbody>
  </table><//>
</section>`;
