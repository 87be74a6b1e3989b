// Lines that grow while a job trains, on axes that are its own.
import { Chart, scale } from "../../charts.js";
import { html } from "../../ui.js";

const HEIGHT = 200;

/** About `count` round numbers from `low` to `high`. */
function ticks(low, high, count = 4) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(Number((k * step).toPrecision(12)));
  return found;
}

/** What the values span, and a little more. */
function span(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const more = high - low < 1e-3 ? 0.05 : 0.06 * (high - low);
  return [low - more, high + more];
}

/**
 * Lines over epochs. `series`: `[{ name, points: [[epoch, value], …], dots }]`; the second is dashed, so that no reader
 * has to tell colours apart. The axis goes to epoch `right`, or as far as there are points. `said` is the picture in
 * words.
 */
export function EpochLines({ title, series, right, said }) {
  const points = series.flatMap((line) => line.points);
  if (points.length === 0) return null;
  const last = Math.max(...points.map(([epoch]) => epoch), Number(right) || 1);
  const values = span(points.map(([, value]) => value));
  const draw = (width) => {
    const x = scale([0, last], [46, width - 12]);
    const y = scale(values, [HEIGHT - 34, 10]);
    const at = ([epoch, value]) => `${x(epoch).toFixed(1)},${y(value).toFixed(1)}`;
    return html`
      ${ticks(...values).map((value) => html`<g><line x1="46" x2=${width - 12} y1=${y(value)} y2=${y(value)} stroke="var(--line)" /><text class="soft" text-anchor="end" x="40" y=${y(value) + 4}>${value}</text></g>`)}
      ${ticks(0, last, width < 500 ? 4 : 8).map((epoch) => html`<text class="soft" text-anchor="middle" x=${x(epoch)} y=${HEIGHT - 18}>${epoch}</text>`)}
      <text class="soft" text-anchor="end" x=${width - 12} y=${HEIGHT - 3}>epoch</text>
      ${series.map((line, i) => html`<g class=${`line-${i}`}><polyline points=${line.points.map(at).join(" ")} />${line.dots && line.points.map(([epoch, value]) => html`<circle cx=${x(epoch)} cy=${y(value)} r="3" />`)}</g>`)}`;
  };
  return html`<div class="lines">
    <p><strong>${title}</strong>${series.length > 1 && series.map((line, i) => line.points.length > 0 && html`<span class=${`legend line-${i}`}>${line.name}</span>`)}</p>
    <${Chart} label=${`${title}. ${said}`} height=${HEIGHT} draw=${draw} />
  </div>`;
}
