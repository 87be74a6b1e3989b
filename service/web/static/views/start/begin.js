// One button with good defaults; what can be changed is folded away under it.
import { call, get, token } from "../../api.js";
import { html, Trouble, useAction, useLoad, useRef } from "../../ui.js";
import { Options, specOf } from "./options.js";

/** What is said of a job that would not prompt, where it is known before. */
function promptless(values, { data: bases, auto_prompt_model: auto }) {
  if (values.prompt_model || auto || bases.find((base) => base.name === values.base_model)?.generative) return null;
  return html`<p class="notice">No generative model is at hand here, so <strong>prompting will not be tested</strong>; the similarity to the label names stands in its place. To test it, run <code>tuneproof models pull ${bases.find((base) => base.generative)?.name}</code> on this machine, or choose a prompt model under Options.</p>`;
}

export function Begin({ dataset, busy: reading, values, onChange }) {
  const folded = useRef(null);
  const last = useRef({});
  const bases = useLoad(() => get("/base-models"));
  const [begin, busy, error] = useAction(async () => {
    const spec = { dataset_id: dataset.id, ...specOf(values) };
    // The same click, sent again after an answer that was lost, must not start a second job.
    if (last.current.spec !== JSON.stringify(spec)) last.current = { spec: JSON.stringify(spec), key: token() };
    const job = await call("POST", "/jobs", { json: spec, key: last.current.key });
    last.current = {};
    location.hash = `#/job/${job.id}`;
  });
  if (dataset.labels.length === 0) return html`<p class="notice">Without labels there is nothing to compare. Upload the file with its labels.</p>`;
  // A field that holds nonsense cannot be pointed at while it is folded away.
  const unfold = () => (folded.current.open = true);
  return html`<section class="begin" aria-label="Start">
    <form onSubmit=${(event) => { event.preventDefault(); begin(); }} onInvalidCapture=${unfold}>
      <button type="submit" class="primary large" disabled=${busy || reading}>Compare prompting and fine-tuning</button>
      <p class="soft">Trains and prompts on the same rows, and says which is worth it. Good defaults; nothing has to be set.</p>
      ${bases.data && promptless(values, bases.data)}
      <${Trouble} error=${error} />
      <details ref=${folded}>
        <summary>Options</summary>
        <${Options} dataset=${dataset} known=${bases.data} values=${values} onChange=${onChange} />
      </details>
    </form>
  </section>`;
}
