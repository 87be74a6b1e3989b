// Every method's accuracy with its interval, and what each costs.
import { Chart, Mark, markOf, scale, shareTicks } from "../../charts.js";
import { PARTS } from "../../figures.js";
import { html, METHODS, number, percent, Scroll, Slug, Tag } from "../../ui.js";

const ROW = 46;
const span = ([low, high]) => `${percent(low)} to ${percent(high)}`;

export function Ladder({ rungs, metrics, recommended }) {
  const drawn = rungs.filter(({ figures }) => figures.accuracy != null);
  const asks = rungs.some(({ method }) => method.endsWith("_prompt"));
  const said = drawn.map(({ method, figures, interval }) => `${METHODS[method]} ${percent(figures.accuracy)} (${span(interval)})`);
  return html`<section class="gap" aria-labelledby="ladder">
    <h2 id="ladder">The ladder of methods</h2>
    <p class="soft">From the least work to make and keep to the most; seconds per answer <a href="#costs" onClick=${(event) => { event.preventDefault(); document.getElementById("costs").scrollIntoView(); }}>stand below</a>. Accuracy is the share of rows answered right, with its 95 % interval; macro-F1 counts every label alike, however rare. Where the rows differ, compare by the next table, not by these.</p>
    ${drawn.length > 0 && html`<${Chart} label=${`Accuracy of every method: ${said.join("; ")}`} height=${drawn.length * ROW + 40} draw=${(width) => rungsDrawn(drawn, recommended, width)} />`}
    <${Scroll} label="Methods"><table>
      <caption>Every method on held-out rows: ${number(metrics.split.n_test)} test rows${asks && `, and the baseline subset of ${number(metrics.baseline_subset?.n)} of them`}</caption>
      <thead><tr><th scope="col">Method</th>${["Accuracy", "Macro-F1", "Rows", ...(asks ? ["On the subset", "No label given"] : [])].map((name) => html`<th scope="col" class="number">${name}</th>`)}</tr></thead>
      <tbody>${rungs.map(({ method, on, figures, interval, subset }) => html`<tr class=${method === recommended ? "chosen" : ""}>
        <th scope="row">${METHODS[method]} ${method === recommended && html`<${Tag} kind="accent">recommended<//>`}<span class="sub"><${Slug} of=${method} /></span></th>
        <td class="number">${percent(figures.accuracy)}${figures.accuracy != null && html`<span class="sub">${span(interval)}</span>`}</td>
        <td class="number">${percent(figures.macro_f1)}</td>
        <td class="number">${number(figures.n)}<span class="sub">${PARTS[on]}</span></td>
        ${asks && html`<td class="number">${percent(subset?.accuracy)}</td><td class="number">${percent(figures.invalid_rate)}</td>`}
      </tr>`)}</tbody>
    </table><//>
  </section>`;
}

function rungsDrawn(rungs, recommended, width) {
  const ticks = shareTicks(rungs.flatMap(({ interval }) => interval));
  const toX = scale([ticks[0], ticks.at(-1)], [14, width - 24]);
  const bottom = rungs.length * ROW + 8;
  return html`
    ${ticks.map((tick) => html`<g><line x1=${toX(tick)} x2=${toX(tick)} y1="4" y2=${bottom} stroke="var(--line)" /><text x=${toX(tick)} y=${bottom + 18} text-anchor="middle" class="soft">${percent(tick, 0)}</text></g>`)}
    ${rungs.map(({ method, on, figures, interval: [low, high] }, i) => {
      const y = i * ROW + 32, chosen = method === recommended, colour = chosen ? "var(--accent)" : "var(--ink)";
      const name = `${METHODS[method]}: ${percent(figures.accuracy)}`;
      return html`<g>
        <text x="2" y=${y - 13} class="halo" font-weight=${chosen ? 650 : 400}>${name}<tspan class="soft">${on === "test" ? "" : ` on ${number(figures.n)} rows`}</tspan></text>
        <path d=${`M${toX(low)} ${y}H${toX(high)}M${toX(low)} ${y - 5}v10M${toX(high)} ${y - 5}v10`} stroke=${colour} stroke-width="2" stroke-dasharray=${on === "test" ? "" : "5 3"} />
        <${Mark} at=${markOf(method)} x=${toX(figures.accuracy)} y=${y} colour=${colour} hollow=${!chosen} />
      </g>`;
    })}`;
}

export function Costs({ rungs }) {
  const asks = rungs.some(({ figures }) => "prompt_tokens" in figures);
  const of1000 = (value, n) => (value == null || !n ? "–" : number(Number(((1000 * value) / n).toPrecision(3))));
  return html`<section class="gap" aria-labelledby="costs">
    <h2 id="costs">What an answer costs</h2>
    <${Scroll} label="Costs"><table>
      <caption>For 1,000 texts, as measured on this job's machine${asks ? " and endpoint" : ""}</caption>
      <thead><tr><th scope="col">Method</th>${["Seconds", ...(asks ? ["Tokens", "Cost", "Half of the answers within", "95 % within"] : [])].map((name) => html`<th scope="col" class="number">${name}</th>`)}</tr></thead>
      <tbody>${rungs.map(({ method, figures: f }) => html`<tr>
        <th scope="row">${METHODS[method]}</th><td class="number">${of1000(f.seconds_per_row, 1)}</td>
        ${asks && html`<td class="number">${of1000(f.prompt_tokens == null ? null : f.prompt_tokens + f.completion_tokens, f.n)}</td><td class="number">${of1000(f.cost, f.n)}</td>
        ${[f.latency_p50_seconds, f.latency_p95_seconds].map((one) => html`<td class="number">${one == null ? "–" : `${one.toFixed(2)} s`}</td>`)}`}
      </tr>`)}</tbody>
    </table><//>
  </section>`;
}
