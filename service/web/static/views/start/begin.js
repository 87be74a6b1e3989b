// One button with good defaults; what can be changed is folded away under it.
import { call, token } from "../../api.js";
import { html, Trouble, useAction, useRef } from "../../ui.js";
import { Options, specOf } from "./options.js";

/** What is said of a job that would not prompt, where it is known before. */
export function promptless(values, { data: bases, auto_prompt_model: auto }) {
  if (values.prompt_model || auto || bases.find((base) => base.name === values.base_model)?.generative) return null;
  const generative = bases.filter((base) => base.generative);
  const here = generative.filter((base) => base.at_hand).map((base) => base.name);
  const fetched = generative.find((base) => !base.at_hand)?.name; // what has no hub is always at hand: this is auto's
  return html`<p class="notice">With the prompt model left at auto, <strong>prompting will not be tested</strong>${fetched && html`, unless the worker has a GPU and can fetch <code>${fetched}</code>`}; the similarity to the label names stands in its place. To test it, ${here.length > 0 ? `choose ${here.join(" or ")} as the prompt model under Options` : html`run <code>tuneproof models pull ${fetched}</code> on the worker's machine, or choose a remote prompt model under Options`}.</p>`;
}

export function Begin({ dataset, known, busy: reading, values, onChange, onStarting = () => {} }) {
  const folded = useRef(null);
  const last = useRef({});
  const [begin, busy, error] = useAction(async () => {
    const spec = { dataset_id: dataset.id, ...specOf(values, dataset.labels) };
    // The same click, sent again after an answer that was lost, must not start a second job.
    if (last.current.spec !== JSON.stringify(spec)) last.current = { spec: JSON.stringify(spec), key: token() };
    onStarting(true);
    const job = await call("POST", "/jobs", { json: spec, key: last.current.key }).finally(() => onStarting(false));
    last.current = {};
    location.hash = `#/job/${job.id}`;
  }, dataset.id);
  if (dataset.labels.length === 0) return html`<p class="notice">Without labels there is nothing to compare. Upload the file with its labels.</p>`;
  // A field that holds nonsense cannot be pointed at while it is folded away.
  const unfold = () => (folded.current.open = true);
  return html`<section class="begin" aria-label="Start">
    <form onSubmit=${(event) => { event.preventDefault(); begin(); }} onInvalidCapture=${unfold}>
      <button type="submit" class="primary large" disabled=${busy || reading}>Compare prompting and fine-tuning</button>
      <p class="soft">Trains and prompts on the same rows, and says which is worth it. Good defaults; nothing has to be set.</p>
      ${known && promptless(values, known)}
      <${Trouble} error=${error} />
      <details ref=${folded}>
        <summary>Options</summary>
        <${Options} dataset=${dataset} known=${known} values=${values} onChange=${onChange} />
      </details>
    </form>
  </section>`;
}
