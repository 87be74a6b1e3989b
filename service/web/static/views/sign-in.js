// Turns a key into a session's cookie; the key itself is kept nowhere.
import { call } from "../api.js";
import { Field, html, Trouble, useAction, useState } from "../ui.js";

export function SignIn({ onDone }) {
  const [key, setKey] = useState("");
  const [send, busy, error] = useAction(async () => {
    await call("POST", "/session", { json: { key: key.trim() } });
    onDone();
  });
  return html`<h1>Sign in</h1>
    <p class="soft">With a key of this service. Whoever runs it makes one with <code>tuneproof keys create</code>.</p>
    <form class="narrow" onSubmit=${(event) => { event.preventDefault(); send(); }}>
      <input hidden type="text" name="username" autocomplete="username" value="tuneproof" readonly />
      <${Field} label="Key"><input type="password" name="key" autocomplete="current-password" required spellcheck="false" value=${key} onInput=${(event) => setKey(event.target.value)} /><//>
      <${Trouble} error=${error} />
      <button type="submit" class="primary" disabled=${busy}>Sign in</button>
    </form>`;
}
