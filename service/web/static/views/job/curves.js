// How training goes: its loss as it falls, and what validation says after each epoch.
import { EpochLines } from "./lines.js";
import { html, percent, Scroll } from "../../ui.js";

const short = (value) => (value == null ? "–" : value.toFixed(3));

export function Curves({ story, epochs: planned }) {
  const { losses, epochs } = story;
  if (losses.length === 0 && epochs.length === 0) return null;
  const last = losses.at(-1);
  const best = epochs.reduce((a, b) => (b.validation_macro_f1 > (a?.validation_macro_f1 ?? -1) ? b : a), null);
  const lossSaid = last ? `Training loss was ${short(losses[0][1])} at first and is ${short(last[1])} at epoch ${last[0].toFixed(1)}.` : "";
  const judged = epochs.at(-1);
  const f1Said = judged ? `${short(judged.validation_macro_f1)} after epoch ${judged.epoch}, best ${short(best.validation_macro_f1)} after epoch ${best.epoch}.` : "";
  return html`<section>
    <h2>Training</h2>
    <div class="grid wide">
      <${EpochLines} title="Loss" right=${planned} said=${lossSaid} series=${[{ name: "training", points: losses }, { name: "validation", points: epochs.map((e) => [e.epoch, e.validation_loss]), dots: true }]} />
      <${EpochLines} title="Validation macro-F1" right=${planned} said=${f1Said} series=${[{ name: "macro-F1", points: epochs.map((e) => [e.epoch, e.validation_macro_f1]), dots: true }]} />
    </div>
    ${epochs.length > 0 && html`<details><summary>As a table</summary><${Scroll} label="Validation by epoch"><table>
      <caption>Epoch 0 is before the first step. Training loss counts smoothed labels, so it may stand above validation loss.</caption>
      <thead><tr><th scope="col" class="number">Epoch</th><th scope="col" class="number">Macro-F1</th><th scope="col" class="number">Validation loss</th><th scope="col" class="number">Training loss</th></tr></thead>
      <tbody>${epochs.map((e) => html`<tr key=${e.epoch} class=${e === best ? "chosen" : null}><th scope="row" class="number">${e.epoch}${e === best && " (best)"}</th><td class="number">${percent(e.validation_macro_f1)}</td><td class="number">${short(e.validation_loss)}</td><td class="number">${short(e.train_loss)}</td></tr>`)}</tbody>
    </table><//></details>`}
  </section>`;
}
