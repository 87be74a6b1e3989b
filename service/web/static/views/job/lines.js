// Small charts as SVG, drawn at the width there is, each with its figures in words.
import { html, useEffect, useRef, useState } from "../../ui.js";

const HEIGHT = 200;
const MARGIN = { top: 10, right: 12, bottom: 34, left: 46 };

/** About `count` round numbers from `low` to `high`. */
export function ticks(low, high, count = 4) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(Number((k * step).toPrecision(12)));
  return found;
}

/** Pixels of width of the element that `ref` is put on. */
function useWidth() {
  const ref = useRef(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const observer = new ResizeObserver(([entry]) => setWidth(Math.floor(entry.contentRect.width)));
    observer.observe(ref.current);
    return () => observer.disconnect();
  }, []);
  return [ref, width];
}

/**
 * Lines over one axis. `series`: `[{ name, points: [[x, y], …], dots }]`; the second is dashed, so that no reader has
 * to tell colours apart. The axis goes from 0 to `right`, or as far as there are points. `said` puts the picture into
 * words.
 */
export function Lines({ title, series, xLabel, right, said }) {
  const [ref, width] = useWidth();
  const drawn = series.filter(({ points }) => points.length > 0);
  const all = drawn.flatMap(({ points }) => points);
  return html`<figure ref=${ref} class="lines">
    <figcaption><strong>${title}</strong>${series.length > 1 && drawn.map((line) => html`<span class=${`legend line-${series.indexOf(line)}`}>${line.name}</span>`)}</figcaption>
    ${width > 0 && all.length > 0 && html`<${Plot} width=${width} series=${series} all=${all} xLabel=${xLabel} right=${right} name=${`${title}. ${said}`} />`}
  </figure>`;
}

function Plot({ width, series, all, xLabel, right: planned, name }) {
  const [xs, ys] = [all.map(([x]) => x), all.map(([, y]) => y)];
  const right = Math.max(...xs, Number(planned) || 1);
  let [low, high] = [Math.min(...ys), Math.max(...ys)];
  if (high - low < 1e-3) [low, high] = [low - 0.05, high + 0.05];
  const pad = 0.06 * (high - low);
  [low, high] = [low - pad, high + pad];
  const x = (value) => MARGIN.left + (value / right) * (width - MARGIN.left - MARGIN.right);
  const y = (value) => HEIGHT - MARGIN.bottom - ((value - low) / (high - low)) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  const at = ([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`;
  return html`<svg role="img" aria-label=${name} width=${width} height=${HEIGHT} viewBox=${`0 0 ${width} ${HEIGHT}`}>
    ${ticks(low, high).map((value) => html`<line class="rule" x1=${MARGIN.left} x2=${width - MARGIN.right} y1=${y(value)} y2=${y(value)} /><text class="soft" text-anchor="end" x=${MARGIN.left - 6} y=${y(value) + 4}>${value}</text>`)}
    ${ticks(0, right, width < 500 ? 4 : 8).map((value) => html`<text class="soft" text-anchor="middle" x=${x(value)} y=${HEIGHT - MARGIN.bottom + 16}>${value}</text>`)}
    <text class="soft" text-anchor="end" x=${width - MARGIN.right} y=${HEIGHT - 3}>${xLabel}</text>
    ${series.map(({ points, dots }, i) => html`<polyline class=${`line-${i}`} points=${points.map(at).join(" ")} />${dots && points.map(([a, b]) => html`<circle class=${`line-${i}`} cx=${x(a)} cy=${y(b)} r="3" />`)}`)}
  </svg>`;
}
