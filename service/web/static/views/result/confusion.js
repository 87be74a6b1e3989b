// Where a method errs: the pairs it mixes up, the confusion matrix, label by label.
import { confusions, labelErrors, PARTS } from "../../figures.js";
import { Field, html, METHODS, number, percent, Scroll, useMemo, useState } from "../../ui.js";
import { Matrix } from "./matrix.js";

const PAIRS = 15;
const SIZES = [25, 50, 100, 150];
const SORTS = {
  errors: ["Errors, most first", (a, b) => b.errors - a.errors],
  support: ["Rows, most first", (a, b) => b.support - a.support],
  name: ["Label", null],
};

export function Confusion({ rungs, labels, first }) {
  const known = rungs.filter(({ figures }) => figures.n > 0);
  const [method, setMethod] = useState(first ?? known[0]?.method);
  const [sort, setSort] = useState("errors");
  const [most, setMost] = useState(SIZES[0]);
  const { figures, on } = known.find((rung) => rung.method === method) ?? known[0] ?? {};
  const matrix = figures?.confusion_matrix;
  const pairs = useMemo(() => (matrix ? confusions(matrix).slice(0, PAIRS) : []), [matrix]);
  const order = useMemo(() => {
    if (!matrix) return [];
    const worst = labelErrors(matrix).sort(SORTS.errors[1]).slice(0, most);
    return worst.sort(SORTS[sort][1] ?? ((a, b) => labels[a.id].localeCompare(labels[b.id]))).map((label) => label.id);
  }, [matrix, sort, most]);
  if (!matrix) return null;
  const caption = `${METHODS[method]} on ${number(figures.n)} ${PARTS[on]}`;
  const sizes = labels.length <= SIZES[0] ? [] : [...SIZES.filter((size) => size < labels.length), ...(labels.length <= SIZES.at(-1) ? [labels.length] : [])];
  const answer = (id) => (id === labels.length ? html`<span class="soft">no answer</span>` : html`<bdi>${labels[id]}</bdi>`);
  return html`<section class="gap" aria-labelledby="confused">
    <h2 id="confused">Where it errs</h2>
    <div class="grid">
      <${Field} label="Method"><select value=${method} onChange=${(event) => setMethod(event.target.value)}>${known.map((rung) => html`<option value=${rung.method}>${METHODS[rung.method]}</option>`)}</select><//>
      <${Field} label="Sort the matrix by"><select value=${sort} onChange=${(event) => setSort(event.target.value)}>${Object.entries(SORTS).map(([key, [name]]) => html`<option value=${key}>${name}</option>`)}</select><//>
      ${sizes.length > 0 && html`<${Field} label="Labels shown"><select value=${most} onChange=${(event) => setMost(Number(event.target.value))}>${sizes.map((size) => html`<option value=${size}>${size === labels.length ? `All ${size}` : `The ${size} most confused of ${number(labels.length)}`}</option>`)}</select><//>`}
    </div>
    <h3 id="matrix">Confusion matrix</h3>
    <p class="soft">Rows are true labels, columns answers. The darker a cell, the larger its share of the true label's rows; right answers are framed. Point at a cell, or walk with the arrow keys.</p>
    <div class="beside"><div><${Matrix} matrix=${matrix} labels=${labels} order=${order} caption=${caption} /></div>
    <div><h3>Most confused pairs</h3>
    ${pairs.length
      ? html`<${Scroll} label="Most confused pairs"><table>
          <caption>${caption}</caption>
          <thead><tr><th scope="col">True label</th><th scope="col">Answer</th><th scope="col" class="number">Rows</th><th scope="col" class="number">Of the label's rows</th></tr></thead>
          <tbody>${pairs.map((pair) => html`<tr><th scope="row"><bdi>${labels[pair.of]}</bdi></th><td>${answer(pair.as)}</td><td class="number">${number(pair.n)}</td><td class="number">${percent(pair.share)}</td></tr>`)}</tbody>
        </table><//>`
      : html`<p>None: every one of the ${number(figures.n)} rows is right.</p>`}</div></div>
    <${Labels} figures=${figures} caption=${caption} />
  </section>`;
}

const COLUMNS = [["label", "Label"], ["f1", "F1"], ["precision", "Precision"], ["recall", "Recall"], ["support", "Rows"]];

function Labels({ figures, caption }) {
  const [by, setBy] = useState({ key: "f1", up: true });
  const rows = useMemo(() => {
    const found = Object.entries(figures.per_label).map(([label, of]) => ({ label, ...of }));
    const sign = by.up ? 1 : -1;
    return found.sort((a, b) => sign * (by.key === "label" ? a.label.localeCompare(b.label) : a[by.key] - b[by.key]));
  }, [figures, by]);
  const choose = (key) => setBy({ key, up: by.key === key ? !by.up : key === "label" });
  return html`<h3>Label by label</h3>
    <p class="soft">Precision: of the rows given this label, the share that is right. Recall: of the rows that have it, the share found.</p>
    <${Scroll} label="Label by label"><table>
      <caption>${caption}</caption>
      <thead><tr>${COLUMNS.map(([key, name]) => html`<th scope="col" class=${key === "label" ? "" : "number"} aria-sort=${by.key === key ? (by.up ? "ascending" : "descending") : null}>
        <button type="button" class="sort" onClick=${() => choose(key)}>${name}<span aria-hidden="true">${by.key === key ? (by.up ? " ↑" : " ↓") : ""}</span></button></th>`)}</tr></thead>
      <tbody>${rows.map((row) => html`<tr key=${row.label}><th scope="row"><bdi>${row.label}</bdi></th>${["f1", "precision", "recall"].map((key) => html`<td class="number">${percent(row[key])}</td>`)}<td class="number">${number(row.support)}</td></tr>`)}</tbody>
    </table><//>`;
}
