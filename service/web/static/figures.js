// What metrics.json says, put the way people ask for it. Pure: no page, no request.

/** As the report names them, in the order of what they take; a test holds both to the worker's. */
export const METHODS = {
  majority: "Always answering the most common label",
  tfidf_logreg: "TF-IDF with logistic regression",
  embedding_logreg: "Embeddings with logistic regression",
  zero_shot_similarity: "Similarity to the label names",
  zero_shot_prompt: "Zero-shot prompting",
  few_shot_prompt: "Few-shot prompting",
  lora: "LoRA fine-tuning",
};
export const ORDER = Object.keys(METHODS);
export const PARTS = { test: "test rows", baseline_subset: "baseline subset" };
const Z95 = 1.959963984540054;

/** 95 % interval of a share, `right` of `n` (Wilson 1927), as the report has it. */
export function wilson(right, n) {
  const share = right / n, spread = Z95 ** 2 / n;
  const centre = (share + spread / 2) / (1 + spread);
  const half = Math.sqrt(spread * share * (1 - share) + spread ** 2 / 4) / (1 + spread);
  return [Math.max(0, centre - half), Math.min(1, centre + half)];
}

/** The methods that were run, cheapest first: `{ method, on, figures, interval, subset }`, on the most rows each has. */
export const ladder = (metrics) =>
  ORDER.filter((method) => metrics.methods?.[method]).map((method) => {
    const parts = metrics.methods[method];
    const on = parts.test ? "test" : "baseline_subset";
    const figures = parts[on];
    const interval = figures.accuracy == null ? [0, 1] : wilson(Math.round(figures.accuracy * figures.n), figures.n);
    return { method, on, figures, interval, subset: parts.baseline_subset };
  });

/** The comparison whose rows to look at first: one with rows, the recommended method's with a prompt before others. */
export function mainPair(metrics, recommended) {
  const pairs = metrics.comparison.filter((pair) => [pair.candidate, pair.baseline].includes(recommended));
  const other = (pair) => (pair.candidate === recommended ? pair.baseline : pair.candidate);
  const worth = (pair) => (other(pair).endsWith("_prompt") ? 2 : 0) + (metrics.methods[other(pair)][pair.on].accuracy ?? 0);
  const changed = (pair) => pair.n_fixed + pair.n_broken > 0;
  const best = pairs.sort((a, b) => worth(b) - worth(a));
  return best.find(changed) ?? metrics.comparison.find(changed) ?? best[0] ?? metrics.comparison[0];
}

export const pValue = (p) => (p < 0.001 ? "< 0.001" : p.toFixed(3));

/** Why a pair with a small p is still not clear; empty where the p says it. */
export function whyUnclear(pair, metrics, names) {
  if (pair.verdict !== "inconclusive" || pair.mcnemar_p_holm >= 0.05) return "";
  const ahead = pair.n_fixed > pair.n_broken ? pair.candidate : pair.baseline;
  const constant = metrics.comparison.find((other) => other.baseline === "majority" && other.candidate === ahead);
  const unproven = constant ? constant.verdict !== "candidate_wins" : !metrics.methods.majority;
  return unproven ? `${names[ahead]} is not shown to beat a constant answer` : "too few distinct texts";
}

/** `[{ of, as, n, share }]`: label ids of rows that were given another label, most rows first. `as` may be K, no answer. */
export const confusions = (matrix) =>
  matrix
    .flatMap((row, of) => {
      const total = row.reduce((sum, n) => sum + n, 0);
      return row.map((n, as) => ({ of, as, n, share: n / total })).filter((cell) => cell.n && cell.of !== cell.as);
    })
    .sort((a, b) => b.n - a.n);

/** `[{ id, support, errors }]`: rows that have the label, and rows wrong on either side of it. */
export function labelErrors(matrix) {
  const taken = new Array(matrix.length).fill(0);
  for (const [of, row] of matrix.entries()) for (let as = 0; as < matrix.length; as++) if (as !== of) taken[as] += row[as];
  return matrix.map((row, id) => {
    const support = row.reduce((sum, n) => sum + n, 0);
    return { id, support, errors: support - row[id] + taken[id] };
  });
}
