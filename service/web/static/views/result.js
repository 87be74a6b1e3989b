// What a finished job found: the recommendation first, then what it rests on, then what to do with it.
import { get, url } from "../api.js";
import { ladder, mainPair } from "../figures.js";
import { Snippets } from "../snippets.js";
import { bytes, html, Loading, METHODS, number, percent, Said, Slug, Trouble, useLoad, useMemo, useState } from "../ui.js";
import { Confidence } from "./result/confidence.js";
import { Confusion } from "./result/confusion.js";
import { Costs, Ladder } from "./result/ladder.js";
import { LearningCurve } from "./result/learning-curve.js";
import { Flips, Pairs } from "./result/pairs.js";
import { usePreflight } from "./start/preflight.js";
import { Warnings } from "./start/warnings.js";

export default function Result({ job }) {
  const { data: metrics, error } = useLoad((signal) => get(`/jobs/${job.id}/artifacts/metrics.json`, {}, signal), [job.id]);
  const { recommendation, headline } = job.summary;
  return html`<section class="verdict" aria-labelledby="headline">
      <h2 id="headline"><${Said} text=${headline} /></h2>
      ${recommendation && html`<p><strong>Recommended: ${METHODS[recommendation.method]}</strong> <code><${Slug} of=${recommendation.method} /></code></p><p><${Said} text=${recommendation.reason} /></p>`}
    </section>
    <${Doubts} job=${job} />
    ${error ? html`<${Trouble} error=${error} />` : metrics ? html`<${Figures} job=${job} metrics=${metrics} recommended=${recommendation?.method} />` : html`<${Loading} what="the figures" />`}
    <${Use} job=${job} recommended=${recommendation?.method} />
    <${Files} job=${job} />`;
}

/** What the file itself makes doubtful, leaks across the split with it; the dataset may be gone. */
function Doubts({ job }) {
  const { split, base_model, seed, train } = job.spec;
  const { data: dataset, error } = useLoad((signal) => get(`/datasets/${job.dataset_id}`, {}, signal), [job.dataset_id]);
  const look = usePreflight(dataset, { base_model, seed, max_length: train?.max_length, ...split });
  if (error) return error.status !== 404 && html`<${Trouble} error=${error} />`;
  if (!dataset) return null;
  return html`<${Warnings} dataset=${dataset} warnings=${look.data?.warnings ?? dataset.warnings} />
    ${look.error ? html`<p class="soft">What the split makes doubtful cannot be told: <${Said} text=${look.error.message} /></p>` : html`<p class="soft" role="status">${look.said}</p>`}`;
}

function Figures({ job, metrics, recommended }) {
  const rungs = useMemo(() => ladder(metrics), [metrics]);
  const [pair, setPair] = useState(() => (metrics.comparison?.length ? mainPair(metrics, recommended) : null));
  if (!rungs.length) return null;
  return html`
    <${Ladder} rungs=${rungs} metrics=${metrics} recommended=${recommended} />
    ${pair && html`<${Pairs} metrics=${metrics} onShow=${setPair} /><${Flips} job=${job} metrics=${metrics} pair=${pair} onPair=${setPair} />`}
    <${Confusion} rungs=${rungs} labels=${metrics.labels} first=${recommended} />
    ${metrics.learning_curve?.length > 0 && html`<${LearningCurve} metrics=${metrics} recommended=${recommended} />`}
    <${Confidence} rungs=${rungs} recommended=${recommended} />
    <${Costs} rungs=${rungs} />
    <${Background} metrics=${metrics} />`;
}

function Use({ job, recommended }) {
  const served = Object.entries(job.summary.methods ?? {}).filter(([, of]) => of.model_id);
  const [method, { model_id: id }] = served.find(([name]) => name === recommended) ?? served.sort(([, a], [, b]) => b.accuracy - a.accuracy)[0] ?? [null, {}];
  const model = useLoad((signal) => (id ? get(`/models/${id}`, {}, signal) : Promise.resolve(null)), [id]);
  const session = useLoad((signal) => get("/session", {}, signal));
  let body;
  if (!id) body = html`<p>This job publishes no model: ${job.kind === "baseline" ? "a baseline only compares." : "none of its methods is served."} Run an experiment to get one.</p>`;
  else if (model.error?.status === 404) body = html`<p>The model of this job has been deleted. <a href="#/models">See the others</a></p>`;
  else if (model.error) body = html`<${Trouble} error=${model.error} />`;
  else if (!model.data) body = html`<${Loading} what="the model" />`;
  else
    body = html`<p>${METHODS[method]} is published as <a href=${`#/model/${id}`}><bdi>${model.data.name}</bdi>, version ${model.data.version}</a>: try it there, or give it an alias, a name that outlives versions.
        ${recommended && method !== recommended && ` ${METHODS[recommended]}, which is recommended, is compared but not served.`}</p>
      <${Snippets} body=${{ model: id, texts: ["a text of yours"] }} session=${session.data} />`;
  return html`<section class="gap" aria-labelledby="use"><h2 id="use">Call it</h2>${body}</section>`;
}

const Files = ({ job }) => html`<section class="gap" aria-labelledby="files">
  <h2 id="files">Everything it left</h2>
  ${job.artifacts.some((one) => one.name === "report.html")
    ? html`<p><a class="button" href=${url(`/jobs/${job.id}/report`)}>Open the report</a></p>`
    : html`<p>The dataset of this job has been deleted, and with it every file that holds its texts: predictions, changed rows, report, prompts.</p>`}
  <ul class="files">${job.artifacts.map((one) => html`<li><a href=${url(one.url)} download=${one.name.split("/").at(-1)}>${one.name}</a> <span class="soft">${bytes(one.size_bytes)}</span></li>`)}</ul>
</section>`;

/** Names and values, two by two. */
const Facts = ({ of }) => html`<dl>${of.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;

function Background({ metrics }) {
  const { training: t, split, dataset, environment = {} } = metrics;
  const words = (value) => (typeof value === "object" ? Object.entries(value).map((pair) => pair.join(" ")).join(", ") : String(value));
  return html`<section class="gap" aria-labelledby="background">
    <h2 id="background">How it was made</h2>
    ${t &&
    html`<details><summary>Training</summary><${Facts} of=${[
      ["Epochs run, best", `${t.epochs_run}, ${t.best_epoch}`],
      ["Best validation macro-F1", percent(t.best_validation_macro_f1)],
      ["Trainable weights", `${number(t.trainable_parameters)} of ${number(t.total_parameters)} (${percent(t.trainable_parameters / t.total_parameters, 2)})`],
      ["Training time", `${number(Math.round(t.train_seconds))} s at ${number(Math.round(t.tokens_per_second))} tokens/s`],
      ["Peak memory", bytes(t.peak_memory_bytes)],
      ["Precision, checkpointing", `${t.precision}, ${t.gradient_checkpointing ? "on" : "off"}`],
      ["Texts cut to the maximum length", number(t.truncated_texts)],
    ]} /></details>`}
    <details><summary>Data and split</summary><${Facts} of=${[
      ["Data set, sha256 of the file", html`<code>${dataset.sha256}</code>`],
      ["Rows in the file", number(dataset.n_rows)],
      ["Split", `${split.algorithm}, seed ${split.seed}`],
      ["Train, validation, test, dropped", [split.n_train, split.n_validation, split.n_test, split.n_dropped].map(number).join(", ")],
    ]} /></details>
    <details><summary>Environment</summary><${Facts} of=${Object.entries(environment).map(([name, value]) => [name.replaceAll("_", " "), words(value)])} /></details>
  </section>`;
}
