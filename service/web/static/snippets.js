// A call of /predict to copy: curl, Python, JavaScript. Each runs as it stands; none needs a package.
import { url } from "./api.js";
import { Copyable, html, useId, useRef, useState } from "./ui.js";

const KEY = "TUNEPROOF_API_KEY";
const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`; // for a shell

/** The programs by name. `body` is the call's JSON; with `hasKey` they take a key from the environment. */
export function programs(body, hasKey, target = url("/predict")) {
  const literal = JSON.stringify(body, null, 2); // the same in Python, JSON and JavaScript, as long as there is no null
  const inside = (indent) => literal.replaceAll("\n", `\n${indent}`);
  return {
    curl: [
      `curl ${quoted(target)}`,
      `-H 'Content-Type: application/json'`,
      ...(hasKey ? [`-H "Authorization: Bearer $${KEY}"`] : []),
      `-d ${quoted(JSON.stringify(body))}`,
    ].join(" \\\n  "),
    Python: `import json
${hasKey ? "import os\n" : ""}import urllib.request

request = urllib.request.Request(
    ${JSON.stringify(target)},
    json.dumps(${inside("    ")}).encode(),
    {"Content-Type": "application/json"${hasKey ? `, "Authorization": "Bearer " + os.environ["${KEY}"]` : ""}},
)
with urllib.request.urlopen(request) as answer:
    for prediction in json.load(answer)["predictions"]:
        print(prediction["label"], prediction["confidence"])`,
    JavaScript: `const answer = await fetch(${JSON.stringify(target)}, {
  method: "POST",
  headers: { "Content-Type": "application/json"${hasKey ? `, Authorization: \`Bearer \${process.env.${KEY}}\`` : ""} },
  body: JSON.stringify(${inside("  ")}),
});
const { predictions, detail } = await answer.json();
if (!answer.ok) throw new Error(detail);
for (const { label, confidence } of predictions) console.log(label, confidence);`,
  };
}

export function Snippets({ body, session }) {
  const id = useId();
  const [chosen, choose] = useState("curl");
  const tabs = useRef({});
  const shown = programs(body, Boolean(session?.keys_exist));
  const names = Object.keys(shown);
  const onKey = (event) => {
    const at = names.indexOf(chosen);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: names.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    const name = names.at(next % names.length);
    choose(name);
    tabs.current[name].focus();
  };
  return html`<div class="snippets">
    <div role="tablist" aria-label="Copy as" onKeyDown=${onKey}>
      ${names.map((name) => html`<button type="button" role="tab" id=${`${id}-${name}`} aria-selected=${String(name === chosen)} aria-controls=${`${id}-panel`} tabindex=${name === chosen ? 0 : -1} ref=${(tab) => { tabs.current[name] = tab; }} onClick=${() => choose(name)}>${name}</button>`)}
    </div>
    <div role="tabpanel" id=${`${id}-panel`} aria-labelledby=${`${id}-${chosen}`}><${Copyable} text=${shown[chosen]} label=${`Copy as ${chosen}`} /></div>
    ${session?.keys_exist && html`<p class="soft">Put a key into <code>${KEY}</code> first; the scope <code>predict</code> is enough.</p>`}
  </div>`;
}
