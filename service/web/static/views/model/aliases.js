// The names that programs call: point one to this model, point it back, delete it.
import { all, call, get } from "../../api.js";
import { pValue } from "../../figures.js";
import { may } from "../../scopes.js";
import { Field, html, Loading, number, percent, points, Said, Scroll, Time, Trouble, useAction, useConfirm, useId, useLoad, useState } from "../../ui.js";

const PATTERN = "[a-z0-9][a-z0-9._\\-]{0,63}";
const point = (alias, model_id, force = false) => call("PUT", `/aliases/${alias}`, { json: force ? { model_id, force } : { model_id } });

export function Aliases({ model, session, onMoved }) {
  const { data, error, reload } = useLoad((signal) => Promise.all([get("/aliases", {}, signal), all("/models")]));
  const [said, setSaid] = useState("");
  const [dialog, ask] = useConfirm();
  const moved = (text) => {
    setSaid(text);
    reload();
    onMoved();
  };
  let body;
  if (error) body = html`<${Trouble} error=${error} />`;
  else if (!data) body = html`<${Loading} what="the aliases" />`;
  else {
    const [{ data: aliases }, models] = data;
    const known = new Map(models.map((one) => [one.id, one]));
    const own = aliases.filter((one) => one.model_id === model.id);
    body = html`
      ${own.length ? html`<${Own} aliases=${own} known=${known} session=${session} ask=${ask} onMoved=${moved} />` : html`<p>None points here.</p>`}
      ${may(session, "write") && html`<${Promote} key=${data} model=${model} aliases=${aliases} known=${known} ask=${ask} onMoved=${moved} />`}`;
  }
  return html`<section class="gap" aria-labelledby="aliases">
    <h2 id="aliases">Aliases</h2>
    <p class="soft">An alias is a name for programs to call, such as <code>production</code>. Point it to a new version and every later call gets that one.</p>
    ${body}
    <div role="status">${said}</div>
    ${dialog}
  </section>`;
}

const named = (model) => (model ? `${model.name}, version ${model.version}` : "a model that was deleted");

function Own({ aliases, known, session, ask, onMoved }) {
  const back = (alias, to) => async () => {
    await point(alias, to.id, true);
    onMoved(html`<p>${alias} points back to <bdi>${named(to)}</bdi>.</p>`);
  };
  const remove = (alias) => async () => {
    await call("DELETE", `/aliases/${alias}`);
    onMoved(html`<p>${alias} is deleted.</p>`);
  };
  return html`<${Scroll} label="Aliases of this model"><table>
    <caption class="hidden">Aliases that point to this model</caption>
    <thead><tr><th scope="col">Alias</th><th scope="col">Since</th><th scope="col">Before</th>${may(session, "write") && html`<th scope="col">Change</th>`}</tr></thead>
    <tbody>${aliases.map(({ alias, model_id, updated_at, history }) => {
      // The newest other model it pointed to that is still there.
      const to = known.get(history.find((move) => move.model_id !== model_id && known.has(move.model_id))?.model_id);
      return html`<tr>
        <th scope="row"><code>${alias}</code></th><td><${Time} at=${updated_at} /></td>
        <td>${to ? html`<a href=${`#/model/${to.id}`}><bdi>${named(to)}</bdi></a>` : html`<span class="soft">nothing to go back to</span>`}</td>
        ${may(session, "write") && html`<td>
          ${to && html`<button type="button" class="quiet" onClick=${() => ask(`Point ${alias} back to ${named(to)}?`, "Point back", back(alias, to), "Calls answered from then on come from that version; it is not compared first.")}>Point back to <bdi>${named(to)}</bdi></button> `}
          <button type="button" class="quiet danger" aria-label=${`Delete the alias ${alias}`} onClick=${() => ask(`Delete the alias ${alias}?`, "Delete", remove(alias), "Programs that call it get a 404 from then on. The model stays.")}>Delete</button>
        </td>`}
      </tr>`;
    })}</tbody>
  </table><//>`;
}

function Promote({ model, aliases, known, ask, onMoved }) {
  const list = useId();
  const [alias, setAlias] = useState("");
  const held = aliases.find((one) => one.alias === alias);
  const incumbent = held && held.model_id !== model.id ? held : null;
  const gate = useLoad((signal) => (incumbent ? get(`/aliases/${alias}/gate`, { model_id: model.id }, signal) : Promise.resolve(null)), [incumbent?.alias]);
  const differ = incumbent && html`<${Differ} ours=${model} theirs=${known.get(incumbent.model_id)} />`;
  const [send, busy, error] = useAction(async () => {
    const moved = await point(alias, model.id);
    onMoved(html`<p>${alias} points to this model now.</p>${differ}<${Gate} of=${{ data: moved.gate }} other="the one before" />`);
  }, alias);
  const force = async () => {
    await point(alias, model.id, true);
    onMoved(html`<p>${alias} points to this model now, though it was shown to be worse.</p>${differ}`);
  };
  const found = gate.loading || gate.error ? null : gate.data; // else it may be of the alias typed before
  const refused = incumbent && (error?.code === "promotion_refused" || found?.verdict === "incumbent_wins");
  return html`<form onSubmit=${(event) => { event.preventDefault(); send(); }}>
    <h3>Point an alias to this model</h3>
    <${Field} label="Alias" hint="One there is, or a new one: lower-case letters, digits, and . _ - after the first.">
      <input name="alias" list=${list} required pattern=${`(?!mdl_)${PATTERN}`} autocomplete="off" autocapitalize="none" spellcheck="false" value=${alias} onInput=${(event) => { event.target.setCustomValidity(""); setAlias(event.target.value.trim()); }}
        onInvalid=${(event) => event.target.setCustomValidity("An alias begins with a lower-case letter or a digit, and goes on with those and . _ -, 64 characters at most; it does not begin with mdl_.")} />
    <//>
    <datalist id=${list}>${aliases.map((one) => html`<option value=${one.alias}>${named(known.get(one.model_id))}</option>`)}</datalist>
    ${held && !incumbent && html`<p>It points here already.</p>`}
    ${incumbent && html`<p>It points to <a href=${`#/model/${incumbent.model_id}`}><bdi>${named(known.get(incumbent.model_id))}</bdi></a> now.</p>${differ}<${Gate} of=${gate} />`}
    ${!(refused && found) && html`<${Trouble} error=${error} />`}
    <div class="actions">
      ${refused
        ? html`<button type="button" class="danger" onClick=${() => ask(`Point ${alias} to the worse model?`, "Promote all the same", force, "On rows that neither model was trained on, this one was shown to be worse than the one in its place.")}>Promote all the same…</button>`
        : html`<button type="submit" class="primary" disabled=${busy || (held && !incumbent)}>${busy ? "Comparing…" : "Promote"}</button>`}
    </div>
  </form>`;
}

/** Which labels two models do not share; nothing where they share all. */
function Differ({ ours, theirs }) {
  if (!theirs) return null;
  const [here, there] = [[ours, theirs], [theirs, ours]].map(([one, other]) => one.labels.filter((label) => !other.labels.includes(label)));
  if (!here.length && !there.length) return null;
  const listed = (labels) => labels.length > 0 && html` (${labels.slice(0, 5).map((label, i) => html`${i > 0 && ", "}<bdi>${label}</bdi>`)}${labels.length > 5 && ", …"})`;
  return html`<p class="notice"><strong>These models have different labels:</strong> ${number(here.length)} only in this one${listed(here)}, ${number(there.length)} only in <bdi>${named(theirs)}</bdi>${listed(there)}. Programs that call the alias will meet ${!here.length ? "fewer" : there.length ? "other" : "more"} labels than before.</p>`;
}

const VERDICTS = {
  candidate_wins: "This model is shown to be better.",
  incumbent_wins: "This model is shown to be worse, so promoting it is refused.",
  inconclusive: "Neither is shown to be better.",
};

/** What the gate says of this model and of the `other` one. */
function Gate({ of: { data, error, loading }, other = "the one in its place" }) {
  if (loading) return html`<${Loading} what="the comparison of the two" />`;
  if (error) return html`<p class="notice">They could not be compared beforehand: <${Said} text=${error.message} /> Promoting compares them again.</p>`;
  if (!data) return null;
  if (!data.checked) return html`<p class="notice"><${Said} text=${data.note} /></p>`;
  return html`<div class="notice">
    <p><strong>${VERDICTS[data.verdict]}</strong></p>
    <p>On ${number(data.n)} rows that neither was trained on, this model is right on ${percent(data.candidate_accuracy)}, ${other} on ${percent(data.incumbent_accuracy)}: ${points(data.accuracy_delta)} points (95 % interval ${data.accuracy_delta_ci95.map(points).join(" to ")}; p ${pValue(data.mcnemar_p)}). <${Said} text=${data.note ?? ""} /></p>
  </div>`;
}
