// How many labelled rows it takes.
import { Lines, ofMethod } from "../../charts.js";
import { html, METHODS, number, percent, Scroll } from "../../ui.js";

export function LearningCurve({ metrics, recommended }) {
  const { learning_curve: curve, overtakes: found, methods } = metrics;
  const trained = Object.keys(curve.at(-1).methods);
  const prompts = Object.keys(methods).filter((name) => name.endsWith("_prompt") && methods[name].baseline_subset.accuracy != null);
  const sizes = curve.map((point) => point.n_train);
  const ends = [sizes[0], sizes.at(-1)];
  const series = [
    ...trained.map((name) => ({ ...ofMethod(name, recommended), points: curve.map((point) => [point.n_train, point.methods[name].accuracy]) })),
    ...prompts.map((name) => ({ ...ofMethod(name, recommended), name: `${METHODS[name]} (no training)`, level: true, points: ends.map((x) => [x, methods[name].baseline_subset.accuracy]) })),
  ];
  const crossing = (toX) => {
    if (!found) return null;
    const x = toX(found.n_train), isLeft = found.n_train ** 2 < ends[0] * ends[1]; // of the middle of a log axis
    return html`<line x1=${x} x2=${x} y1="26" y2="276" stroke="var(--accent)" stroke-dasharray="2 4" />
      <text x=${isLeft ? x + 6 : x - 6} y="36" text-anchor=${isLeft ? "start" : "end"} class="halo">overtakes the prompt</text>`;
  };
  const said = series.map((one) => `${one.name}: ${one.level ? percent(one.points[0][1]) : one.points.map(([x, y]) => `${percent(y)} at ${number(x)}`).join(", ")}`);
  return html`<section class="gap" aria-labelledby="learning">
    <h2 id="learning">How many labels it takes</h2>
    <p>${inWords(found, prompts, methods, sizes[0])}</p>
    <${Lines} label=${`Accuracy over the number of train rows. ${said.join("; ")}`} series=${series} yTitle="accuracy on the test rows" also=${crossing}
      x=${{ title: "train rows", domain: ends[0] === ends[1] ? [ends[0] / 2, ends[1] * 2] : ends, ticks: sizes, format: number, log: true }} />
    <details><summary>The same as a table</summary><${Scroll} label="Learning curve"><table>
      <caption>Accuracy on the same test rows, by rows trained on</caption>
      <thead><tr><th scope="col">Method</th>${sizes.map((n) => html`<th scope="col" class="number">${number(n)}</th>`)}</tr></thead>
      <tbody>${trained.map((name) => html`<tr><th scope="row">${METHODS[name]}</th>${curve.map((point) => html`<td class="number">${percent(point.methods[name].accuracy)}</td>`)}</tr>`)}</tbody>
    </table><//></details>
  </section>`;
}

function inWords(found, prompts, methods, first) {
  if (!prompts.length) return "No prompt was run, so there is nothing for training to overtake.";
  if (found) return `${METHODS[found.method]} passes ${METHODS[found.prompt]} (${percent(found.prompt_accuracy)} of ${number(found.n)} rows) with ${found.n_train === first ? "at most " : ""}${number(found.n_train)} train rows. ${found.caveat}`;
  const best = prompts.reduce((a, b) => (methods[b].baseline_subset.accuracy > methods[a].baseline_subset.accuracy ? b : a));
  return `On no share of the train rows did a trained method pass ${METHODS[best]} (${percent(methods[best].baseline_subset.accuracy)}).`;
}
