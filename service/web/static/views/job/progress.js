// Where a job stands: its stages as steps, how far it is, how long it will take.
import { duration, html, percent } from "../../ui.js";

const STAGES = { prepare: "Prepare", baseline: "Baselines", train: "Fine-tuning", evaluate: "Judgement", publish: "Publishing" };
const WITHOUT = { train: ["baseline"], baseline: ["train"], predict: ["baseline", "train"] }; // what a kind of job leaves out
const SAID = { queued: "Waits for a worker to be free.", cancelling: "Stops at the next opportunity." };
const said = (job, stage) => (job.kind === "predict" && stage === "evaluate" ? "Predictions" : STAGES[stage]);

export function Steps({ job }) {
  const names = Object.keys(STAGES).filter((name) => !(WITHOUT[job.kind] || []).includes(name) || name === job.stage);
  const now = job.status === "succeeded" ? names.length : names.indexOf(job.stage);
  const state = (i) => (i < now ? "done" : i > now ? "" : job.terminal ? "ended" : "now");
  return html`<ol class="steps" aria-label="Stages">${names.map((name, i) => html`<li key=${name} class=${state(i)} aria-current=${state(i) === "now" ? "step" : null}>${said(job, name)}${state(i) && html`<span class="hidden">, ${state(i) === "ended" ? "ended here" : state(i)}</span>`}</li>`)}</ol>`;
}

export function Progress({ job }) {
  if (job.terminal) return null;
  const { fraction, message, eta_seconds } = job.progress;
  const eta = eta_seconds == null ? "" : `, about ${duration(eta_seconds)} left`;
  return html`<progress max="1" value=${fraction} aria-label="Progress"></progress>
    <p class="soft">${SAID[job.status] || `${percent(fraction, 0)}${eta}${message ? `: ${message}` : ""}`}</p>`;
}

/** Read out when the job enters another stage, and not at every step. */
export const Spoken = ({ job, state }) => html`<p class="hidden" role="status">${state === "lost" ? "Connection lost" : `${job.status}${job.stage && !job.terminal ? `, ${said(job, job.stage)}` : ""}`}</p>`;
