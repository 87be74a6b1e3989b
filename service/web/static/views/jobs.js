// Every job, newest first.
import { html, Field, Loading, percent, Said, Status, Time, Trouble, useEvery, usePages, useState } from "../ui.js";

const STATUSES = ["queued", "running", "cancelling", "succeeded", "failed", "cancelled"];
const SECONDS_BETWEEN_LOOKS = 3;

/** `id`: of the dataset whose jobs are wanted; empty for those of all. */
export default function Jobs({ id }) {
  const [status, setStatus] = useState("");
  const { items, more, next, error, loading, reload } = usePages("/jobs", { status, dataset_id: id });
  useEvery(SECONDS_BETWEEN_LOOKS, reload, !loading && (error?.status === 0 || items?.some((job) => !job.terminal)));
  return html`
    <h1>Jobs${id && " of a dataset"}</h1>
    ${id && html`<p><a href=${`#/dataset/${id}`}>The dataset</a>, or <a href="#/jobs">the jobs of all</a></p>`}
    <${Field} label="Status"><select value=${status} onChange=${(event) => setStatus(event.target.value)}>
      <option value="">all</option>${STATUSES.map((name) => html`<option value=${name}>${name}</option>`)}</select><//>
    <${Trouble} error=${error} />
    ${!items && !error && html`<${Loading} what="jobs" />`}
    ${items?.length === 0 && html`<p>${status ? `No job is ${status}.` : "No job yet."} <a href=${id ? `#/dataset/${id}` : "#/"}>Start one</a>.</p>`}
    ${items?.length > 0 && html`<ul class="cards">${items.map((job) => html`<li key=${job.id}><${Card} job=${job} /></li>`)}</ul>`}
    ${more && html`<p><button type="button" disabled=${loading} onClick=${next}>More</button></p>`}
  `;
}

function Card({ job }) {
  const running = job.status === "running" || job.status === "cancelling";
  return html`<div class="line"><a href=${`#/job/${job.id}`}><strong><bdi>${job.name}</bdi></strong></a> <${Status} of=${job.status} /></div>
    <p class="soft">${job.kind}, asked for <${Time} at=${job.created_at} />${running && `, ${job.stage}, ${percent(job.progress.fraction, 0)}`}</p>
    ${running && html`<progress max="1" value=${job.progress.fraction} aria-label=${`Progress of ${job.name}`}></progress>`}
    ${job.summary?.headline && html`<p><${Said} text=${job.summary.headline} /></p>`}
    ${job.error && html`<p><${Said} text=${job.error.message} /></p>`}`;
}
