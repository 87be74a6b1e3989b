// The values of a job one may want to change, each explained in a sentence. What is left empty has its default.
import { Field, html, number, useState } from "../../ui.js";

const CURVE = [0.1, 0.25, 0.5, 1.0];
const FIRST_LABELS = 20;

const whole = (text) => (text ? Number(text) : undefined);
const option = ({ name, at_hand: here }) => html`<option value=${name}>${name}${here ? "" : " (not at hand: fetched when needed)"}</option>`;
const filled = (fields) => {
  const kept = Object.entries(fields).filter(([, value]) => value !== undefined && value !== "");
  return kept.length ? Object.fromEntries(kept) : undefined;
};

/** A label may have any name, that of something every object has as well. */
const described = (descriptions, label) => (Object.hasOwn(descriptions, label) ? descriptions[label] : "");

/** Of the form's values, the spec's fields that differ from their defaults; descriptions of the dataset's own `labels`. */
export function specOf(values, labels) {
  const descriptions = labels.map(({ label }) => [label, described(values.descriptions, label).trim()]);
  return filled({
    name: values.name?.trim(),
    base_model: values.base_model,
    seed: whole(values.seed),
    baseline: filled({
      prompt_model: values.prompt_model,
      few_shot: whole(values.few_shot),
      sample_size: whole(values.sample_size),
      label_descriptions: filled(Object.fromEntries(descriptions)),
    }),
    train: filled({ epochs: whole(values.epochs), max_length: whole(values.max_length), class_weights: values.class_weights }),
    learning_curve: values.learning_curve ? CURVE : undefined,
    margin: values.margin ? Number(values.margin) / 100 : undefined,
    webhook_url: values.webhook_url?.trim(),
  });
}

/** `known` is what /base-models says, null until it has. */
export function Options({ dataset, known, values, onChange }) {
  const bases = known?.data ?? [];
  const set = (name) => (event) => onChange({ ...values, [name]: event.target.value });
  const text = (name, label, hint, given = {}) => html`<${Field} label=${label} hint=${hint}><input name=${name} value=${values[name] || ""} onInput=${set(name)} ...${given} /><//>`;
  const count = (name, label, hint, min, max, step = 1) => text(name, label, hint, { type: "number", inputmode: "numeric", min, max, step });
  const longest = bases.find((base) => base.name === (values.base_model || "minilm"))?.max_length || 32768;
  return html`<div class="grid">
      ${text("name", "Name", "The job's, and its models' versions are counted under it; left empty, the dataset's.", { maxlength: 200, placeholder: dataset.name })}
      <${Field} label="Base model" hint="What is fine-tuned; auto takes the best one at hand."><select name="base_model" value=${values.base_model || ""} onChange=${set("base_model")}>
        <option value="">auto</option>${bases.map(option)}</select><//>
      <${Field} label="Prompt model" hint="What is prompted: a generative model, or a remote endpoint that the operator set up."><select name="prompt_model" value=${values.prompt_model || ""} onChange=${set("prompt_model")}>
        <option value="">auto: ${known?.auto_prompt_model ?? "the base model if it is generative"}</option>${bases.filter((base) => base.generative).map(option)}
        ${known?.prompt_endpoints.map((name) => html`<option value=${name}>${name}</option>`)}</select><//>
      ${count("few_shot", "Examples in the prompt", "Above 0, a prompt with that many examples of your rows is compared too. Default 0.", 0, 64)}
      ${count("sample_size", "Rows to prompt", "Prompts are slow, so they are asked about this many of the test rows. Default 300.", 10, 10000)}
      ${count("epochs", "Epochs", "Passes over the training rows; left empty, as many as suit their number. It stops early when nothing improves.", 1, 100)}
      ${count("max_length", "Longest text, in tokens", "What is beyond it is cut off; longer is slower. Default 192.", 8, longest)}
      <${Field} label="Class weights" hint="Balanced makes rare labels count as much as frequent ones in training."><select name="class_weights" value=${values.class_weights || ""} onChange=${set("class_weights")}>
        <option value="">none</option><option value="balanced">balanced</option></select><//>
      ${count("margin", "Margin, in points of accuracy", "What you would give up for a cheaper method. Default 2.", 0, 50, 0.1)}
      ${count("seed", "Seed", "The same seed gives the same split and the same run. Default 42.", 0, 4294967295)}
      ${text("webhook_url", "Webhook", "This address is told when the job has ended; the operator says which hosts are allowed.", { type: "url", maxlength: 2000 })}
      <div class="field"><label class="check"><input type="checkbox" name="learning_curve" aria-describedby="curve-hint" checked=${values.learning_curve || false} onChange=${(event) => onChange({ ...values, learning_curve: event.target.checked })} /> Learning curve</label>
        <small id="curve-hint">Also trains on 10, 25 and 50 % of the rows, to show what more labels would bring; it takes about twice as long.</small></div>
    </div>
    <${Descriptions} labels=${dataset.labels} values=${values.descriptions} onChange=${(descriptions) => onChange({ ...values, descriptions })} />`;
}

function Descriptions({ labels, values, onChange }) {
  const [open, setOpen] = useState(false);
  const [all, setAll] = useState(false);
  const shown = all ? labels : labels.slice(0, FIRST_LABELS);
  return html`<details onToggle=${(event) => setOpen(event.target.open)}>
    <summary>What the labels mean</summary>
    <p class="soft">A sentence on a label helps a prompt where its name says little.</p>
    ${open && html`<div class="grid">${shown.map(({ label }) => html`<${Field} key=${label} label=${html`<bdi>${label}</bdi>`}><input maxlength="500" value=${described(values, label)} onInput=${(event) => onChange({ ...values, [label]: event.target.value })} /><//>`)}</div>`}
    ${open && !all && labels.length > FIRST_LABELS && html`<p><button type="button" class="quiet" onClick=${() => setAll(true)}>Show all ${number(labels.length)}</button></p>`}
  </details>`;
}
