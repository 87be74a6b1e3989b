// The confusion matrix as a grid: pointed at, or walked through with the arrow keys.
import { html, number, percent, Scroll, useEffect, useMemo, useRef, useState } from "../../ui.js";

const STEPS = {
  ArrowUp: (i, j) => [i - 1, j], ArrowDown: (i, j) => [i + 1, j], ArrowLeft: (i, j) => [i, j - 1], ArrowRight: (i, j) => [i, j + 1],
  PageUp: (i, j) => [i - 10, j], PageDown: (i, j) => [i + 10, j], Home: (i) => [i, 0], End: (i) => [i, Infinity],
};
const sum = (numbers) => numbers.reduce((total, n) => total + n, 0);

/**
 * @param matrix `(K, K+1)` counts, [true][answer], the last column no answer.
 * @param order ids of the labels to show, in this order; answers outside it are one column.
 */
export function Matrix({ matrix, labels, order, caption }) {
  const body = useRef(null), isMoving = useRef(false);
  const [{ at, byKey }, setAt] = useState({ at: [0, 0] });
  const rows = useMemo(() => {
    const elsewhere = labels.map((_, id) => id).filter((id) => !order.includes(id));
    return order.map((of) => [...order.map((as) => matrix[of][as]), sum(elsewhere.map((as) => matrix[of][as])), matrix[of][labels.length]]);
  }, [matrix, order]);
  const names = [...order.map((id) => labels[id]), ...(order.length < labels.length ? ["(another label)"] : []), "(no answer)"];
  const shown = useMemo(() => (order.length < labels.length ? rows : rows.map((row) => row.toSpliced(-2, 1))), [rows]);
  // The cells are built once: pointing at one must not go through thousands.
  const cells = useMemo(() => shown.map((row, i) => {
    const total = sum(matrix[order[i]]);
    return html`<tr><th scope="row"><bdi title=${names[i]}>${names[i]}</bdi></th>${row.map((n, j) => html`<td tabindex="-1" class=${`${i === j ? "hit " : ""}${n ? `s${Math.ceil((5 * n) / total)}` : "zero"}`}>${n || "·"}</td>`)}</tr>`;
  }), [shown]);
  useEffect(() => setAt({ at: [0, 0] }), [shown]);

  const [i, j] = [Math.min(at[0], shown.length - 1), Math.min(at[1], names.length - 1)];
  const n = shown[i][j], total = sum(matrix[order[i]]), [of, as] = [names[i], names[j]];
  const answered = j >= order.length ? as : null;
  const words = (mark) => {
    const how = answered === "(no answer)" ? ["got no answer"] : answered ? ["were given a label not shown here"] : i === j ? ["were rightly called so"] : ["were called ", mark(as)];
    return [`${number(n)} of ${number(total)} rows of `, mark(of), " ", ...how, `: ${percent(total ? n / total : 0)}`];
  };
  const said = words((text) => text).join("");
  useEffect(() => {
    const cell = body.current.rows[i]?.cells[j + 1];
    if (!cell) return undefined;
    cell.tabIndex = 0;
    cell.setAttribute("aria-label", said);
    isMoving.current = true;
    if (byKey) cell.focus();
    isMoving.current = false;
    return () => {
      cell.tabIndex = -1;
      cell.removeAttribute("aria-label");
    };
  }, [i, j, said, cells, byKey]);

  const point = (event) => {
    const cell = event.target.closest("td");
    // Focus that came by a key is known: told again, it would undo a key that came in between.
    if (cell && !isMoving.current) setAt({ at: [cell.parentNode.sectionRowIndex, cell.cellIndex - 1] });
  };
  const walk = (event) => {
    const step = STEPS[event.key];
    if (!step || !event.target.closest("td")) return;
    event.preventDefault();
    // From where it is now: a key held down comes faster than the page is drawn.
    setAt((now) => ({ at: step(...now.at).map((to, axis) => Math.max(0, Math.min((axis ? names : shown).length - 1, to))), byKey: true }));
  };
  return html`<p class="said">${words((text) => html`<em><bdi>${text}</bdi></em>`)}</p>
    <${Scroll} label="Confusion matrix"><table role="grid" class="matrix" onPointerOver=${point} onFocusIn=${point} onKeyDown=${walk}>
      <caption>${caption}</caption>
      <colgroup><col />${names.map((_, column) => html`<col class=${column === j ? "at" : ""} />`)}</colgroup>
      <thead><tr><th scope="col">True label</th>${names.map((name, column) => html`<th scope="col" class=${column === j ? "at" : ""}><bdi title=${name}>${name}</bdi></th>`)}</tr></thead>
      <tbody ref=${body}>${cells}</tbody>
    </table><//>`;
}
