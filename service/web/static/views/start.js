// From a file to a started comparison. The file stays in the page, so that it can be sent again, read another way.
import { call, token, upload } from "../api.js";
import { may } from "../scopes.js";
import { html, Trouble, useAction, useEffect, useRef, useState } from "../ui.js";
import { Drop } from "./start/drop.js";
import { Found } from "./start/found.js";
import { Reading } from "./start/reading.js";

export default function Start({ session }) {
  const [file, setFile] = useState(null);
  const [read, setRead] = useState(null); // { dataset, asked }: the last that was taken, and the form fields of it
  const [tried, setTried] = useState({});
  const [fraction, setFraction] = useState(0);
  const sending = useRef({});

  const [send, busy, problem] = useAction(async (given, asked, before) => {
    const name = JSON.stringify(asked);
    const again = sending.current.file === given && sending.current.name === name;
    const { key } = (sending.current = { file: given, name, key: again ? sending.current.key : token(), control: new AbortController() });
    setFile(given);
    setTried(asked);
    setFraction(0);
    const form = new FormData();
    for (const field of Object.entries(asked)) form.append(...field);
    form.append("file", given);
    try {
      const dataset = await upload("/datasets", form, { onProgress: setFraction, signal: sending.current.control.signal, key });
      sending.current = {};
      setRead({ dataset, asked });
      // What was read wrongly is of no use. Where it cannot be deleted it stays in the list, and can be deleted there.
      if (before) await call("DELETE", `/datasets/${before.dataset.id}`).catch(console.warn);
    } catch (error) {
      if (error.name !== "AbortError") throw error;
      if (!before) setFile(null);
    }
  });

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
    send(given, {}, null);
  };
  const dataset = read?.dataset;
  const refused = !busy && problem;
  return html`
    <h1>Is prompting good enough, or should you fine-tune?</h1>
    ${!file && html`<p class="soft">Bring a CSV or TSV with a column of texts and a column of labels. It stays on this service.</p>`}
    <${Drop} file=${file} fraction=${busy ? fraction : null} onFile=${take} onStop=${() => sending.current.control.abort()} />
    ${refused && html`<${Trouble} error=${problem} />`}
    ${refused && dataset && html`<p class="soft">What stands below is as it was read before.</p>`}
    ${refused && problem.code === "rare_labels" && html`<p><button type="button" class="primary" onClick=${() => send(file, { ...tried, rare_labels: "drop" }, read)}>Drop those rows and go on</button></p>`}
    ${refused && (problem.status === 0 || problem.status >= 429) && html`<p><button type="button" onClick=${() => send(file, tried, read)}>Send it again</button></p>`}
    ${dataset
      ? html`<${Title} key=${dataset.id} dataset=${dataset} />
          <${Reading} key=${`how ${dataset.id}`} dataset=${dataset} columns=${dataset.columns || []} asked=${read.asked} busy=${busy} onApply=${(asked) => send(file, asked, read)} />
          <${Found} key=${`what ${dataset.id}`} dataset=${dataset} session=${session} />`
      : refused?.status === 422 && html`<${Reading} key=${JSON.stringify(tried)} dataset=${null} columns=${problem.columns} asked=${tried} onApply=${(asked) => send(file, asked, null)} />`}
  `;
}

/** Takes the focus: the button that sent the file is gone, and reading goes on here. */
function Title({ dataset }) {
  const heading = useRef(null);
  useEffect(() => heading.current.focus(), []);
  return html`<h2 class="gap" ref=${heading} tabindex="-1"><bdi>${dataset.name}</bdi></h2>`;
}
