// Keys, for admins: make one, see it once, revoke it.
import { all, call, token } from "../api.js";
import { may, SCOPES } from "../scopes.js";
import { Copyable, Field, html, Loading, Scroll, Tag, Time, Trouble, useAction, useConfirm, useEffect, useLoad, useMemo, useRef, useState } from "../ui.js";

export default function Keys({ session, onKeysChanged }) {
  const { data: keys, error, reload } = useLoad(() => (may(session, "admin") ? all("/keys") : Promise.resolve([])));
  const [made, setMade] = useState(null);
  if (!may(session, "admin")) return html`<h1>Keys</h1><p>Only a key with the scope <code>admin</code> may see and make keys; you are signed in with <code>${session.scope}</code>.</p>`;
  const changed = () => {
    reload();
    onKeysChanged();
  };
  return html`<h1>Keys</h1>
    ${!session.keys_exist && html`<div class="notice"><p><strong>This service is open.</strong> Without any key, everybody who can reach it on this machine may do everything. The first key closes it: from then on every call needs one. This browser is signed in with it at once; programs need it in their <code>Authorization</code> header.</p></div>`}
    ${made && html`<${Made} key=${made.id} made=${made} onDone=${() => setMade(null)} />`}
    <${Create} isFirst=${!session.keys_exist} onMade=${setMade} onChanged=${changed} />
    ${error ? html`<${Trouble} error=${error} /><button type="button" onClick=${reload}>Try again</button>` : !keys ? html`<${Loading} what="the keys" />` : keys.length > 0 && html`<${List} keys=${keys} session=${session} onChanged=${changed} />`}`;
}

function Made({ made, onDone }) {
  const heading = useRef(null);
  useEffect(() => heading.current.focus(), []);
  return html`<section class="verdict">
    <h2 tabindex="-1" ref=${heading}>The key <bdi>${made.name}</bdi></h2>
    <p>Copy it now: it is shown this once and stored nowhere.</p>
    <${Copyable} text=${made.key} label="Copy the key" />
    <div class="actions"><button type="button" onClick=${onDone}>I have it</button></div>
  </section>`;
}

function Create({ isFirst, onMade, onChanged }) {
  const [name, setName] = useState("");
  const [scope, setScope] = useState("predict");
  const [days, setDays] = useState("");
  const once = useMemo(token, [name, scope, days]); // sent again after a lost answer, it makes no second key
  const [send, busy, error] = useAction(async () => {
    const made = await call("POST", "/keys", { key: once, json: { name: name.trim(), scope: isFirst ? "admin" : scope, ...(days && { expires_days: Number(days) }) } });
    setName("");
    onMade(made); // before all else: whatever fails from here on, the secret is on the page
    // The service is closed now: sign in before anything else is asked.
    if (isFirst) await call("POST", "/session", { json: { key: made.key } });
    onChanged();
  });
  return html`<section class="gap" aria-labelledby="create">
    <h2 id="create">${isFirst ? "Make the first key" : "Make a key"}</h2>
    <form onSubmit=${(event) => { event.preventDefault(); send(); }}>
      <${Field} label="Name" hint="Who or what uses it, such as: shop backend."><input name="name" required maxlength="200" autocomplete="off" value=${name} onInput=${(event) => setName(event.target.value)} /><//>
      ${isFirst
        ? html`<p>Its scope is <code>admin</code>, so that somebody can make the others.</p>`
        : html`<fieldset><legend>Scope</legend>${SCOPES.map(([value, means]) => html`<label class="check"><input type="radio" name="scope" value=${value} checked=${scope === value} onChange=${() => setScope(value)} /> <span><strong>${value}</strong> ${means}</span></label>`)}</fieldset>`}
      <${Field} label="Expires in days" hint="Left empty, it lasts until it is revoked."><input type="number" name="days" min="1" max="36500" step="1" value=${days} onInput=${(event) => setDays(event.target.value)} /><//>
      <${Trouble} error=${error} />
      <div class="actions"><button type="submit" class="primary" disabled=${busy}>Make the key</button></div>
    </form>
  </section>`;
}

function List({ keys, session, onChanged }) {
  const [dialog, ask] = useConfirm();
  const [said, setSaid] = useState("");
  const revoke = (key) => async () => {
    await call("DELETE", `/keys/${key.id}`);
    setSaid(`${key.name} is revoked.`);
    onChanged();
  };
  const isOver = (key) => key.revoked_at || (key.expires_at && new Date(key.expires_at) <= new Date());
  return html`<section class="gap" aria-labelledby="list">
    <h2 id="list">All keys</h2>
    <${Scroll} label="Keys"><table>
      <caption class="hidden">Keys, newest first</caption>
      <thead><tr><th scope="col">Name</th><th scope="col">Scope</th><th scope="col">Made</th><th scope="col">Expires</th><th scope="col">State</th></tr></thead>
      <tbody>${keys.map((key) => {
        const isOwn = key.id === session.key?.id;
        const detail = isOwn ? "It is the one this browser is signed in with: you will be signed out." : "Programs that use it are refused from then on.";
        return html`<tr>
          <th scope="row"><bdi>${key.name}</bdi> ${isOwn && html`<${Tag} kind="accent">yours<//>`}<span class="sub">${key.id}</span></th>
          <td>${key.scope}</td><td><${Time} at=${key.created_at} /></td>
          <td>${key.expires_at ? html`<${Time} at=${key.expires_at} />` : "never"}</td>
          <td>${isOver(key) ? html`<${Tag}>${key.revoked_at ? "revoked" : "expired"}<//>` : html`<button type="button" class="quiet danger" aria-label=${`Revoke ${key.name}`} onClick=${() => ask(`Revoke ${key.name}?`, "Revoke", revoke(key), detail)}>Revoke</button>`}</td>
        </tr>`;
      })}</tbody>
    </table><//>
    <p role="status">${said}</p>
    ${dialog}
  </section>`;
}
