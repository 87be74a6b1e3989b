// Small charts: SVG drawn at the width there is, so that letters keep their size. Series differ by mark and dash, never
// by colour alone; a table beside each chart says the same.
import { METHODS, ORDER } from "./figures.js";
import { html, percent, useEffect, useRef, useState } from "./ui.js";

const MOST_WIDTH = 768;
const DASHES = ["", "7 3", "2 3", "7 3 2 3", "10 2", "4 4", "1 5", "12 4 1 4"];
// One for each method, so that it looks the same in every chart; the last for one that is not known here.
const SHAPES = ["M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0Z", "M-4-4h8v8h-8Z", "M0-5l5 9h-10Z", "M0-5.5l5.5 5.5-5.5 5.5-5.5-5.5Z", "M0 5l5-9h-10Z", "M-5 0h10M0-5v10", "M-5 0l2.5-4.4h5l2.5 4.4-2.5 4.4h-5Z", "M-5-5l10 10M5-5l-10 10"];
export const markOf = (method) => ORDER.indexOf(method);
/** What a series of `Lines` has of its method; the recommended one is drawn in the accent. */
export const ofMethod = (method, recommended) => ({ name: METHODS[method] ?? method, at: markOf(method), chosen: method === recommended });

/** One picture. `draw(width)` gives its content, in pixels; `label` is what is said in its place. */
export function Chart({ label, height, draw, children }) {
  const frame = useRef(null);
  const [width, setWidth] = useState(0);
  useEffect(() => {
    const watch = new ResizeObserver(([seen]) => setWidth(Math.min(MOST_WIDTH, Math.floor(seen.contentRect.width))));
    watch.observe(frame.current);
    return () => watch.disconnect();
  }, []);
  return html`<figure ref=${frame}>
    ${width > 0 && html`<svg role="img" aria-label=${label} viewBox=${`0 0 ${width} ${height}`} width=${width} height=${height}>${draw(width)}</svg>`}
    ${children}
  </figure>`;
}

/** Maps `from` (low to high) to `to` (pixels); `log` where every doubling is as far as the next. */
export function scale([low, high], [start, end], log = false) {
  const at = log ? Math.log : (value) => value;
  const width = at(high) - at(low) || 1;
  return (value) => start + ((at(value) - at(low)) / width) * (end - start);
}

/** Round shares around `values`, each 0 to 1, four to seven of them: the first and last hold all values. */
export function shareTicks(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const step = [0.01, 0.02, 0.05, 0.1].find((one) => (high - low) / one <= 5) ?? 0.2;
  let first = Math.floor(low / step + 1e-9), last = Math.ceil(high / step - 1e-9);
  if (first === last) last += 1;
  if (last * step > 1 + 1e-9) (last -= 1), (first -= 1);
  return Array.from({ length: last - first + 1 }, (_, i) => (first + i) * step);
}

export const Mark = ({ at, x, y, colour, hollow }) =>
  html`<path d=${SHAPES.at(at % SHAPES.length)} transform=${`translate(${x} ${y})`} fill=${hollow ? "var(--paper)" : colour} stroke=${colour} stroke-width="1.5" />`;

const Key = ({ at, colour, level }) =>
  html`<svg class="key" viewBox="0 0 34 12" width="34" height="12" aria-hidden="true">
    <path d="M0 6h34" stroke=${colour} stroke-width="2" stroke-dasharray=${DASHES.at(at % DASHES.length)} />${!level && html`<${Mark} at=${at} x="17" y="6" colour=${colour} />`}
  </svg>`;

/**
 * Lines over a share's axis. `series`: `{ name, at, points: [[x, y]], chosen, level }`, `level` for a line that needs no x;
 * `at` is its mark and dash.
 * `x`: `{ title, domain, ticks, format, log }`; `also(toX, toY)` draws on top.
 */
export function Lines({ label, series, x, yTitle, height = 320, also }) {
  const shown = series.map((one) => ({ ...one, colour: one.chosen ? "var(--accent)" : one.level ? "var(--soft)" : "var(--ink)" }));
  const ticks = shareTicks(series.flatMap((one) => one.points.map(([, y]) => y)));
  const draw = (width) => {
    const toX = scale(x.domain, [52, width - 22], x.log);
    const toY = scale([ticks[0], ticks.at(-1)], [height - 44, 26]);
    let free = -Infinity; // labels that would run into the one before are left out
    return html`
      <text x="0" y="12" class="soft">${yTitle}</text>
      ${ticks.map((tick) => html`<g><line x1="52" x2=${width - 10} y1=${toY(tick)} y2=${toY(tick)} stroke="var(--line)" /><text x="44" y=${toY(tick) + 4} text-anchor="end" class="soft">${percent(tick, 0)}</text></g>`)}
      ${x.ticks.map((tick) => {
        const at = toX(tick), text = x.format(tick), half = text.length * 3.5;
        if (at - half < free) return null;
        free = at + half + 6;
        return html`<text x=${at} y=${height - 24} text-anchor="middle" class="soft">${text}</text>`;
      })}
      <text x=${(52 + width - 22) / 2} y=${height - 4} text-anchor="middle" class="soft">${x.title}</text>
      ${shown.map((one) => html`<g>
        <path d=${one.points.map(([px, py], i) => `${i ? "L" : "M"}${toX(px).toFixed(1)} ${toY(py).toFixed(1)}`).join("")} fill="none" stroke=${one.colour} stroke-width="2" stroke-dasharray=${DASHES.at(one.at % DASHES.length)} />
        ${!one.level && one.points.map(([px, py]) => html`<${Mark} at=${one.at} x=${toX(px)} y=${toY(py)} colour=${one.colour} />`)}
      </g>`)}
      ${also?.(toX, toY)}`;
  };
  return html`<${Chart} label=${label} height=${height} draw=${draw}>
    <ul class="keys">${shown.map((one) => html`<li><${Key} at=${one.at} colour=${one.colour} level=${one.level} /> ${one.name}</li>`)}</ul>
  <//>`;
}
