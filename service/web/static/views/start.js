// From a file to a started comparison. The file stays in the page, so that it can be sent again, read another way.
import { call, get, pause, token, upload } from "../api.js";
import { may } from "../scopes.js";
import { html, Trouble, useAction, useEffect, useRef, useSignedIn, useState } from "../ui.js";
import { Drop } from "./start/drop.js";
import { Found } from "./start/found.js";
import { Reading } from "./start/reading.js";

const SETTLED = 0.4; // seconds without another choice, as the arrow keys make them, before the file is read again

/** Another reading of the same file takes the place of a dataset, but for one that has jobs and so has its uses. */
async function forget(id) {
  if ((await get("/jobs", { dataset_id: id, limit: 1 })).data.length === 0) await call("DELETE", `/datasets/${id}`);
}

export default function Start({ session }) {
  const [file, setFile] = useState(null);
  const [read, setRead] = useState(null); // { dataset, asked }: the last that was taken, and the form fields of it
  const [tried, setTried] = useState({});
  const [columns, setColumns] = useState(null); // null until it was read or refused
  const [fraction, setFraction] = useState(0);
  const [starting, setStarting] = useState(false);
  const sending = useRef({}); // what is wanted last; `key` is the same for the same file and fields
  const taken = useRef(null); // `read`, also once another file was chosen
  const answered = useRef(null); // the file that was read or refused last

  const once = async ({ given, asked, key, control: { signal } }) => {
    const form = new FormData();
    for (const field of Object.entries(asked)) if (field[1]) form.append(...field); // an empty one is recognised
    form.append("file", given);
    const dataset = await upload("/datasets", form, { onProgress: setFraction, signal, key });
    const before = taken.current;
    taken.current = { dataset, asked };
    answered.current = given;
    setRead(taken.current);
    setColumns(dataset.columns || []);
    // Where it cannot be deleted it stays in the list.
    const replaced = before?.dataset.sha256 === dataset.sha256 && before.dataset.id !== dataset.id;
    if (replaced) await forget(before.dataset.id).catch(console.warn);
  };
  const [run, busy, problem] = useAction(async () => {
    for (let sent = null; sent !== sending.current; ) {
      sent = sending.current;
      setFraction(0);
      try {
        if (answered.current === sent.given) await pause(SETTLED, sent.control.signal);
        await once(sent);
      } catch (error) {
        if (sending.current.control.signal.aborted) {
          if (answered.current !== sent.given) setFile(null);
          return;
        }
        if (sent !== sending.current) continue; // nobody wants it any more
        if (error.status === 422) answered.current = sent.given;
        setColumns((known) => error.columns?.length ? error.columns : (known ?? (error.status === 422 ? [] : null)));
        throw error;
      }
    }
  });
  const send = (given, asked) => {
    const name = JSON.stringify(asked);
    const { given: last, name: lastName, key, control } = sending.current;
    const again = last === given && lastName === name;
    const late = busy && fraction === 1; // the service has it all: what it makes of it is replaced once it is known
    sending.current = { given, asked, name, key: again ? key : token(), control: late ? control : new AbortController() };
    if (busy && !late) control.abort();
    setFile(given);
    setTried(asked);
    run();
  };
  useSignedIn(problem, () => send(file, tried));

  if (!may(session, "read")) {
    return html`<h1>This key is for predictions</h1>
      <p>It may call <code>POST /predict</code> and nothing else. To see or start comparisons, sign in with a key of scope <code>read</code> or <code>write</code>.</p>`;
  }
  if (!may(session, "write")) {
    return html`<h1>Start a comparison</h1>
      <p>Your key may look, but not change anything. To upload a file, sign in with a key of scope <code>write</code>.</p>
      <p><a href="#/jobs">See the jobs</a></p>`;
  }
  const take = (given) => {
    setRead(null); // another file: the one before stays in the list
    setColumns(null);
    send(given, {});
  };
  const dataset = read?.dataset;
  const shown = busy || !read ? tried : read.asked; // what was refused is not what stands below
  const refused = !busy && problem;
  return html`
    <h1>Is prompting good enough, or should you fine-tune?</h1>
    ${!file && html`<p class="soft">Bring a CSV or TSV with a column of texts and a column of labels. It stays on this service.</p>`}
    <${Drop} file=${file} fraction=${busy ? fraction : null} held=${starting} onFile=${take} onStop=${() => sending.current.control.abort()} />
    ${refused && html`<${Trouble} error=${problem} />`}
    ${refused && dataset && html`<p class="soft">What stands below is as it was read before.</p>`}
    ${refused && problem.code === "rare_labels" && html`<p><button type="button" class="primary" onClick=${() => send(file, { ...tried, rare_labels: "drop" })}>Drop those rows and go on</button></p>`}
    ${file && !busy && (problem ? problem.status === 0 || problem.status >= 429 : !dataset) && html`<p><button type="button" onClick=${() => send(file, tried)}>Send it again</button></p>`}
    ${dataset && html`<${Title} dataset=${dataset} />`}
    ${file && columns && html`<${Reading} key="how" dataset=${dataset} columns=${columns} asked=${shown} disabled=${starting} onChange=${(asked) => send(file, asked)} />`}
    ${dataset && html`<${Found} dataset=${dataset} session=${session} busy=${busy} onStarting=${setStarting} />`}
  `;
}

/** Takes the focus when it comes: the button that sent the file is gone, and reading goes on here. */
function Title({ dataset }) {
  const heading = useRef(null);
  useEffect(() => heading.current.focus(), []);
  return html`<h2 class="gap" ref=${heading} tabindex="-1"><bdi>${dataset.name}</bdi></h2>`;
}
