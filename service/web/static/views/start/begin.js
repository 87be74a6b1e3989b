// One button with good defaults; what can be changed is folded away under it.
import { call, get, token } from "../../api.js";
import { html, Trouble, useAction, useLoad, useRef } from "../../ui.js";
import { Options, specOf } from "./options.js";

export function Begin({ dataset, values, onChange }) {
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
      <button type="submit" class="primary large" disabled=${busy}>Compare prompting and fine-tuning</button>
      <p class="soft">Trains and prompts on the same rows, and says which is worth it. Good defaults; nothing has to be set.</p>
      <${Trouble} error=${error} />
      <details ref=${folded}>
        <summary>Options</summary>
        <${Options} dataset=${dataset} bases=${bases.data?.data || []} values=${values} onChange=${onChange} />
      </details>
    </form>
  </section>`;
}
