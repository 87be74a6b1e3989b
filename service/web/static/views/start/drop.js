// Where a file comes in: chosen by its button, or dropped anywhere on the page.
import { bytes, html, useEffect, useId, useRef, useState } from "../../ui.js";

/** `fraction` is the share sent while a file is on its way, and null when none is; `held` while none is taken. */
export function Drop({ file, fraction, held, onFile, onStop }) {
  const id = useId();
  const [over, setOver] = useState(false);
  const busy = fraction != null;
  const take = useRef(onFile);
  take.current = (files) => files.length && !busy && !held && onFile(files[0]);
  useEffect(() => {
    const holdsFile = (event) => event.dataTransfer?.types.includes("Files");
    const listeners = {
      dragover: (event) => {
        if (!holdsFile(event)) return;
        event.preventDefault(); // or the browser opens the file in place of the page
        setOver(true);
      },
      dragleave: (event) => event.relatedTarget || setOver(false),
      drop: (event) => {
        if (!holdsFile(event)) return;
        event.preventDefault();
        setOver(false);
        take.current(event.dataTransfer.files);
      },
    };
    for (const [name, listener] of Object.entries(listeners)) addEventListener(name, listener);
    return () => {
      for (const [name, listener] of Object.entries(listeners)) removeEventListener(name, listener);
    };
  }, []);
  const chosen = (event) => {
    const files = [...event.target.files];
    event.target.value = ""; // so that the same file can be chosen again once it was corrected
    take.current(files);
  };
  const said = busy && (fraction < 1 ? "Sending the file…" : "The service reads it…");
  return html`<div class=${`drop ${over && !busy && !held ? "over" : ""} ${file ? "slim" : ""}`}>
    <p class="drop-file">${file ? html`<strong><bdi>${file.name}</bdi></strong> <span class="soft">${bytes(file.size)}</span>` : "Drop a file here, or"}</p>
    ${!busy &&
    html`<input class="hidden" type="file" id=${id} disabled=${held} accept=".csv,.tsv,.tab,.txt,text/csv,text/tab-separated-values,text/plain" onChange=${chosen} />
      <label for=${id} class=${file ? "button" : "button primary"}>${file ? "Choose another file" : "Choose a file"}</label>`}
    ${busy && html`<progress aria-label="Sent" max="1" value=${fraction < 1 ? fraction : null}></progress><button type="button" class="quiet" onClick=${onStop}>Stop</button>`}
    <p class="soft" role="status">${said}</p>
  </div>`;
}
