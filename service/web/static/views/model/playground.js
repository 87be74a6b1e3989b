// Type a text, see what the model makes of it, and copy the same call for a program.
import { call, pause } from "../../api.js";
import { Snippets } from "../../snippets.js";
import { Field, html, number, percent, Tag, Trouble, useAction, useEffect, useRef, useState } from "../../ui.js";

const TOP = 5;
const MOST_TRIES = 60;
const SOON = ["base_loading", "engine_unavailable"]; // what waiting helps with

export function Playground({ model, session }) {
  const [text, setText] = useState("");
  const [byLine, setByLine] = useState(false);
  const [least, setLeast] = useState("0");
  const [waiting, setWaiting] = useState("");
  const [found, setFound] = useState(null);
  const control = useRef(null);
  useEffect(() => () => control.current?.abort(), []);
  const texts = byLine ? text.split("\n").filter((line) => line.trim()) : [text];
  const body = { model: model.id, texts, top_k: Math.min(TOP, model.labels.length), ...(Number(least) > 0 && { min_confidence: Number(least) }) };
  const [send, busy, error] = useAction(async () => {
    control.current = new AbortController();
    const { signal } = control.current;
    try {
      for (let tries = 1; ; tries++) {
        const start = performance.now();
        try {
          const answer = await call("POST", "/predict", { json: body, signal });
          setFound({ ...answer, texts, milliseconds: performance.now() - start });
          return;
        } catch (problem) {
          if (!SOON.includes(problem.code) || tries === MOST_TRIES) throw problem;
          setWaiting("The model is still being loaded; it is asked again by itself.");
          await pause(problem.retryAfter ?? 2, signal);
        }
      }
    } catch (problem) {
      if (problem.name !== "AbortError") throw problem;
    } finally {
      setWaiting("");
    }
  });
  const onKey = (event) => {
    if (event.key === "Enter" && (event.metaKey || event.ctrlKey)) event.currentTarget.form.requestSubmit();
  };
  return html`<section class="gap" aria-labelledby="playground">
    <h2 id="playground">Try it</h2>
    <form onSubmit=${(event) => { event.preventDefault(); send(); }}>
      <${Field} label="Text" hint="Ctrl + Enter (⌘ + Enter) sends it."><textarea name="text" dir="auto" required rows="4" value=${text} onInput=${(event) => setText(event.target.value)} onKeyDown=${onKey} /><//>
      <label class="check"><input type="checkbox" checked=${byLine} onChange=${(event) => setByLine(event.target.checked)} /> Each line is a text of its own</label>
      <${Field} label="min_confidence" hint="Below it the model abstains. 0 to 1; 0 answers everything."><input type="number" min="0" max="1" step="any" required value=${least} onInput=${(event) => setLeast(event.target.value)} /><//>
      <div class="actions">
        <button type="submit" class="primary" disabled=${busy}>Predict</button>
        ${waiting && html`<button type="button" onClick=${() => control.current.abort()}>Stop waiting</button>`}
        <span role="status">${waiting}${!busy && !error && found ? `Answered in ${number(Math.round(found.milliseconds))} ms, the way there and back included.` : ""}</span>
      </div>
      <${Trouble} error=${error} />
    </form>
    ${found && html`<ol class="answers" aria-label="Predictions">${found.predictions.map((one, i) => html`<li><${Prediction} of=${one} text=${found.texts.length > 1 ? found.texts[i] : null} /></li>`)}</ol>`}
    <details><summary>The same call for a program</summary><${Snippets} body=${text.trim() ? body : { ...body, texts: ["a text of yours"] }} session=${session} /></details>
  </section>`;
}

function Prediction({ of, text }) {
  return html`${text && html`<p class="soft"><bdi>${text}</bdi></p>`}
    <p><strong>${of.abstained ? "Abstained" : html`<bdi>${of.label}</bdi>`}</strong> at ${percent(of.confidence)} ${of.abstained && html`<${Tag} kind="warn">below min_confidence<//>`} ${of.truncated && html`<${Tag} kind="warn">only the beginning was read<//>`}</p>
    <table class="bars"><caption class="hidden">Most probable labels</caption><thead class="hidden"><tr><th scope="col">Label</th><th scope="col">Probability</th></tr></thead>
      <tbody>${Object.entries(of.probabilities).map(([label, p]) => html`<tr><th scope="row"><bdi>${label}</bdi></th><td><span class="track"><span class="bar" style=${{ inlineSize: `${100 * p}%` }}></span></span>${percent(p)}</td></tr>`)}</tbody>
    </table>`;
}
