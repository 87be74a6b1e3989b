// The frame: who is here, which page, the menu. Pages are modules of `views/`, loaded when opened.
import { render } from "./vendor/preact.js";
import { call, get } from "./api.js";
import { may } from "./scopes.js";
import { html, Loading, Trouble, useAction, useEffect, useLoad, useRef, useState } from "./ui.js";
import { SignIn } from "./views/sign-in.js";

const VIEWS = { new: "start", jobs: "jobs", job: "job", datasets: "datasets", dataset: "dataset", models: "models", model: "model", keys: "keys" };
const MENU = [["new", "New"], ["jobs", "Jobs"], ["datasets", "Datasets"], ["models", "Models"], ["keys", "Keys"]];
const IN_MENU = { job: "jobs", dataset: "datasets", model: "models" };

function readable(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part; // typed by hand: not an address of ours
  }
}

/** `#/job/job_1` -> `{ name: "job", id: "job_1" }`; the empty hash is the start page. */
function here() {
  const [name = "", id = ""] = location.hash.replace(/^#\/?/, "").split("/").map(readable);
  return { name: name || "new", id };
}

function useHere() {
  const [place, setPlace] = useState(here());
  useEffect(() => {
    const moved = () => setPlace(here());
    addEventListener("hashchange", moved);
    return () => removeEventListener("hashchange", moved);
  }, []);
  return place;
}

function App() {
  const place = useHere();
  const session = useLoad(() => get("/session"));
  const [out, setOut] = useState(false);
  useEffect(() => {
    const ended = () => setOut(true);
    addEventListener("signed-out", ended);
    return () => removeEventListener("signed-out", ended);
  }, []);
  // Once it is known who came back, and not before: what was refused is then asked for in that one's name.
  useEffect(() => {
    if (session.data) dispatchEvent(new Event("signed-in"));
  }, [session.data]);
  const back = () => {
    setOut(false);
    session.reload();
  };
  const view = session.data && html`<${View} key=${`${place.name}/${place.id}`} ...${place} session=${session.data} onKeysChanged=${session.reload} />`;
  // A session that ends by itself takes nothing from the page: a dropped file, or a key that is shown this once.
  if (out || session.error?.status === 401) return html`<${Frame} place=${place}><${SignIn} key="sign-in" onDone=${back} />${view}<//>`;
  if (session.error && !session.data) return html`<${Frame} place=${place}><h1>tuneproof</h1><${Trouble} error=${session.error} /><button type="button" onClick=${session.reload}>Try again</button><//>`;
  if (!session.data) return html`<${Loading} />`;
  // `null` stands where the sign-in stands, so that the view keeps its place, and with it what was typed.
  return html`<${Frame} place=${place} session=${session.data} onLeft=${() => location.reload()}>${null}${view}<//>`;
}

function Frame({ place, session, onLeft, children }) {
  const main = useRef(null);
  const first = useRef(true);
  useEffect(() => {
    if (!first.current) main.current.focus(); // a screen reader goes on at the new page
    first.current = false;
    scrollTo(0, 0);
  }, [place.name, place.id]);
  const [leave, leaving, stayed] = useAction(async () => {
    await call("DELETE", "/session");
    onLeft();
  });
  const current = IN_MENU[place.name] || place.name;
  const menu = MENU.filter(([name]) => may(session, name === "keys" ? "admin" : "read"));
  return html`
    <a class="skip" href="#main" onClick=${(event) => { event.preventDefault(); main.current.focus(); }}>Skip to the page</a>
    <header class="top">
      <a class="brand" href="#/"><img src="icon.svg" alt="" width="24" height="24" /> tuneproof</a>
      ${session && html`<nav aria-label="Pages">${menu.map(([name, text]) => html`<a href=${`#/${name}`} aria-current=${current === name ? "page" : null}>${text}</a>`)}</nav>`}
      ${session?.key && html`<div class="who"><span class="soft"><bdi>${session.key.name}</bdi> (${session.scope})</span><button type="button" class="quiet" disabled=${leaving} onClick=${leave}>Sign out</button></div>`}
    </header>
    ${stayed && html`<div class="top"><${Trouble} error=${stayed} /></div>`}
    <main id="main" ref=${main} tabindex="-1">${children}</main>
    <footer><a href="../docs">HTTP API</a>. Guides lie in <code>docs/</code> of the source.</footer>`;
}

function View({ name, id, ...given }) {
  const known = Object.hasOwn(VIEWS, name) && VIEWS[name];
  const { data: page, error } = useLoad(() => (known ? import(`./views/${known}.js`) : Promise.resolve(null)), [name]);
  useEffect(() => {
    // A page draws its heading when it knows it, which may be well after it was opened.
    const name = () => {
      const heading = document.querySelector("main h1");
      document.title = heading ? `${heading.textContent} – tuneproof` : "tuneproof";
    };
    const observer = new MutationObserver(name);
    observer.observe(document.querySelector("main"), { childList: true, characterData: true, subtree: true });
    name();
    return () => observer.disconnect();
  }, []);
  if (error) return html`<${Trouble} error=${error} />`;
  if (!known) return html`<h1>No such page</h1><p><a href="#/">Start anew</a></p>`;
  return page ? html`<${page.default} id=${id} ...${given} />` : html`<${Loading} />`;
}

const app = document.getElementById("app");
app.textContent = "";
render(html`<${App} />`, app);
