// What happened, newest first, so that what is new is at hand; long logs are drawn a piece at a time.
import { html, number, Said, Scroll, Tag, useState } from "../../ui.js";

const STEP = 100;
const isStep = (event) => event.type === "metric" && "learning_rate" in event.data;
const KIND = { warning: "warn", error: "bad" };
const clock = (at) => new Date(at).toLocaleTimeString("en-GB");

export function Log({ story }) {
  const [steps, setSteps] = useState(false);
  const [shown, setShown] = useState(STEP);
  const events = steps ? story.log : story.log.filter((event) => !isStep(event));
  const newest = events.slice(-shown).reverse();
  return html`<section>
    <h2>Log</h2>
    <label class="check"><input type="checkbox" checked=${steps} onChange=${(event) => setSteps(event.target.checked)} /> Training steps too</label>
    ${events.length === 0 ? html`<p class="soft">Nothing yet.</p>` : html`<${Scroll} label="Log, newest first"><ul class="log">
      ${newest.map((event) => html`<li key=${event.id}><time class="soft" datetime=${event.created_at} title=${event.created_at}>${clock(event.created_at)}</time> ${event.level !== "info" && html`<${Tag} kind=${KIND[event.level]}>${event.level}<//> `}<${Said} text=${event.message} /></li>`)}
    </ul><//>`}
    ${events.length > shown && html`<p><button type="button" class="quiet" onClick=${() => setShown(shown + STEP)}>Earlier ones (${number(events.length - shown)})</button></p>`}
  </section>`;
}

/** What the job warned of, each message once. */
export function JobWarnings({ story }) {
  const messages = [...new Set(story.log.filter((event) => event.level === "warning").map((event) => event.message))];
  return messages.length > 0 && html`<section class="notice" aria-label="Warnings"><strong>${messages.length === 1 ? "A warning" : `${messages.length} warnings`}</strong><ul>${messages.map((message) => html`<li key=${message}><${Said} text=${message} /></li>`)}</ul></section>`;
}
