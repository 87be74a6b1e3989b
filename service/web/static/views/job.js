// One job: while it goes, and what came of it.
import { call } from "../api.js";
import { may } from "../scopes.js";
import { Copyable, html, Loading, Said, Status, Time, Trouble, useAction, useConfirm, useLoad } from "../ui.js";
import { Curves } from "./job/curves.js";
import { useJob } from "./job/follow.js";
import { JobWarnings, Log } from "./job/log.js";
import { Progress, Spoken, Steps } from "./job/progress.js";

export default function Job({ id, session }) {
  const { job, story, error, state, restart } = useJob(id);
  if (error) return html`<h1>Job</h1><${Trouble} error=${error} /><p><a href="#/jobs">All jobs</a></p>`;
  if (!job) return html`<h1>Job</h1>${state === "lost" ? html`<p class="notice" role="status">The service cannot be reached, trying again…</p>` : html`<${Loading} what="the job" />`}`;
  const actions = may(session, "write") && html`<${Actions} job=${job} onChange=${restart} />`;
  return html`
    <h1><bdi>${job.name}</bdi></h1>
    <p class="line"><${Status} of=${job.status} /> <span class="soft">${job.kind} on <a href=${`#/dataset/${job.dataset_id}`}>its dataset</a>, asked for <${Time} at=${job.created_at} />${job.attempt > 1 && `, attempt ${job.attempt}`}</span></p>
    <${Spoken} job=${job} state=${state} />
    ${state === "lost" && html`<p class="notice">Connection lost, trying again…</p>`}
    ${job.status !== "succeeded" && html`<${Steps} job=${job} />`}
    <${Progress} job=${job} />
    ${job.status === "failed" && html`<${Failure} error=${job.error} />`}
    ${job.status === "cancelled" && html`<p>Cancelled. <em>Retry</em> goes on from its last checkpoint, where it has one.</p>`}
    ${job.status === "succeeded" ? html`<${Outcome} job=${job} session=${session} />` : actions}
    <${JobWarnings} story=${story} />
    <${Curves} story=${story} epochs=${job.terminal ? 1 : job.spec.train?.epochs} />
    <${Log} story=${story} />
    <section><details><summary>Values in force</summary><${Copyable} text=${JSON.stringify(job.spec, null, 2)} /></details></section>
    ${job.status === "succeeded" && actions}
  `;
}

const Failure = ({ error }) => html`<div class="trouble" role="alert">
  <p><strong><${Said} text=${error.message} /></strong></p>
  <p>${error.hint ? html`<${Said} text=${error.hint} />` : "The worker's log may say more."}</p>
  <p class="soft"><code>${error.code}</code></p>
</div>`;

function Actions({ job, onChange }) {
  const [dialog, ask] = useConfirm();
  const [retry, busy, error] = useAction(async () => onChange(await call("POST", `/jobs/${job.id}/retry`)));
  const cancel = () =>
    ask("Cancel this job?", "Cancel the job", async () => onChange(await call("POST", `/jobs/${job.id}/cancel`)), "It stops within seconds. A retry goes on from its last checkpoint.");
  const remove = () =>
    ask("Delete this job?", "Delete", async () => {
      await call("DELETE", `/jobs/${job.id}`);
      location.hash = "#/jobs";
    }, "Its log, figures and files are gone for good. Models that it published stay.");
  return html`<div class="actions">
      ${(job.status === "failed" || job.status === "cancelled") && html`<button type="button" class="primary" disabled=${busy} onClick=${retry}>Retry</button>`}
      ${job.terminal && html`<button type="button" class="danger" onClick=${remove}>Delete</button>`}
      ${!job.terminal && html`<button type="button" class="danger" disabled=${job.status === "cancelling"} onClick=${cancel}>Cancel</button>`}
    </div>
    <${Trouble} error=${error} />${dialog}`;
}

/** The result's own page, loaded once there is a result. */
function Outcome({ job, session }) {
  const { data: page, error } = useLoad(() => (job.kind === "predict" ? import("./labelled.js") : import("./result.js")), []);
  if (error) return html`<${Trouble} error=${error} />`;
  return page ? html`<${page.default} job=${job} session=${session} />` : html`<${Loading} what="the result" />`;
}
