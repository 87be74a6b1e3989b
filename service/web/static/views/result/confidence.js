// How far to trust a confidence, and what abstaining below one buys.
import { Lines, ofMethod } from "../../charts.js";
import { Field, html, METHODS, number, percent, Scroll, useState } from "../../ui.js";

const LEAST_ROWS_OF_A_BIN = 5;
const TENTHS = Array.from({ length: 6 }, (_, i) => i / 5);

export function Confidence({ rungs, recommended }) {
  const known = rungs.filter(({ figures }) => figures.n && "temperature" in figures);
  if (!known.length) return null;
  return html`<section class="gap" aria-labelledby="confidence">
    <h2 id="confidence">How far to trust a confidence</h2>
    <p class="soft">On the test rows, after a temperature fitted on the validation rows. <code>/predict</code> abstains below <code>min_confidence</code>.</p>
    <div class="side"><${Coverage} known=${known} recommended=${recommended} /><${Reliability} known=${known} recommended=${recommended} /></div>
  </section>`;
}

function Coverage({ known, recommended }) {
  const [method, setMethod] = useState((known.find((one) => one.method === recommended) ?? known.at(-1)).method);
  const [step, setStep] = useState(0);
  const curves = Object.fromEntries(known.map((one) => [one.method, one.figures.coverage.filter((point) => point.coverage > 0)]));
  // From "answer all" on to the right: surer and fewer.
  const steps = [...curves[method]].reverse();
  const at = Math.min(step, steps.length - 1), point = steps[at];
  const said = `${percent(point.coverage, 0)} of the rows are answered, ${percent(point.accuracy)} of those right`;
  const series = known.map((one) => ({ ...ofMethod(one.method, recommended), points: curves[one.method].map((p) => [p.coverage, p.accuracy]) }));
  const here = (toX, toY) => html`<circle cx=${toX(point.coverage)} cy=${toY(point.accuracy)} r="9" fill="none" stroke="var(--accent)" stroke-width="3" />`;
  return html`<div>
    <h3>What abstaining buys</h3>
    ${known.length > 1 && html`<${Field} label="Method"><select value=${method} onChange=${(event) => setMethod(event.target.value)}>${known.map((one) => html`<option value=${one.method}>${METHODS[one.method]}</option>`)}</select><//>`}
    <${Field} label="min_confidence"><input type="range" min="0" max=${steps.length - 1} value=${at} aria-valuetext=${`${point.threshold.toFixed(3)}: ${said}`} onInput=${(event) => setStep(Number(event.target.value))} /><//>
    <p><strong>At ${at ? point.threshold.toFixed(3) : "0"}:</strong> ${said}${point.coverage < 1 ? `; ${percent(1 - point.coverage, 0)} are left to you.` : "."}</p>
    <${Lines} label=${`Share right over the share of rows answered, ${series.map((one) => `${one.name}: ${one.points.filter((_, i) => i % 4 === 3).map(([x, y]) => `${percent(y)} right of ${percent(x, 0)}`).join(", ")}`).join("; ")}`}
      series=${series} yTitle="share right of those answered" also=${here} x=${{ title: "rows answered, the least sure left out", domain: [0, 1], ticks: TENTHS, format: (x) => percent(x, 0) }} />
    <details><summary>The same as a table</summary><${Scroll} label="Coverage"><table>
      <caption>${METHODS[method]}</caption><thead><tr>${["min_confidence", "Answered", "Right of those"].map((name) => html`<th scope="col" class="number">${name}</th>`)}</tr></thead>
      <tbody>${steps.map((one) => html`<tr><th scope="row" class="number">${one.threshold.toFixed(3)}</th><td class="number">${percent(one.coverage, 0)}</td><td class="number">${percent(one.accuracy)}</td></tr>`)}</tbody>
    </table><//></details>
  </div>`;
}

function Reliability({ known, recommended }) {
  const of = known.map(({ method, figures }) => ({ method, bins: figures.calibration.bins.filter((bin) => bin.n >= LEAST_ROWS_OF_A_BIN), error: figures.expected_calibration_error }));
  const series = [
    { name: "As right as it says", at: 0, level: true, points: [[0, 0], [1, 1]] },
    ...of.map(({ method, bins }) => ({ ...ofMethod(method, recommended), points: bins.map((bin) => [bin.mean_confidence, bin.accuracy]) })),
  ];
  const said = of.map(({ method, bins }) => `${METHODS[method]}: ${bins.map((bin) => `${percent(bin.accuracy, 0)} right at ${percent(bin.mean_confidence, 0)}`).join(", ")}`);
  return html`<div>
    <h3>Reliability</h3>
    <p class="soft">Below the line a method is surer than it is right. Expected calibration error: ${of.map(({ method, error }) => `${METHODS[method]} ${error == null ? "–" : error.toFixed(3)}`).join("; ")}.</p>
    <${Lines} label=${`Share right over confidence. ${said.join("; ")}`} series=${series} yTitle="share right" x=${{ title: "mean confidence", domain: [0, 1], ticks: TENTHS, format: (x) => percent(x, 0) }} />
    <details><summary>The same as a table</summary><${Scroll} label="Reliability"><table>
      <caption>In bins of ${LEAST_ROWS_OF_A_BIN} rows or more</caption>
      <thead><tr><th scope="col">Method</th>${["Confidence", "Right", "Rows"].map((name) => html`<th scope="col" class="number">${name}</th>`)}</tr></thead>
      <tbody>${of.flatMap(({ method, bins }) => bins.map((bin) => html`<tr><th scope="row">${METHODS[method]}</th><td class="number">${percent(bin.mean_confidence)}</td><td class="number">${percent(bin.accuracy)}</td><td class="number">${number(bin.n)}</td></tr>`))}</tbody>
    </table><//></details>
  </div>`;
}
