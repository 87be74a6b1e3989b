// How the file was read, recognised or as said; whatever is changed, it is read again at once.
import { Field, html } from "../../ui.js";

const DELIMITERS = { ",": "Comma", ";": "Semicolon", "\t": "Tab", "|": "Vertical bar" };
const ENCODINGS = ["utf-8", "utf-16", "cp1252", "iso-8859-1", "iso-8859-15", "cp1250", "cp1251", "gb18030", "shift_jis", "euc-kr", "big5"];
const COLUMNS = ["text_column", "label_column", "split_column"];

const valuesOf = (from) => ({
  text_column: from.text_column || "",
  label_column: from.label_column || "",
  split_column: from.split_column || "",
  has_header: from.has_header == null ? "" : String(from.has_header),
  delimiter: from.delimiter || "",
  encoding: from.encoding || "",
});

/**
 * The form fields for another upload: those said before, and the one changed now. Columns said before go with a change
 * of what the columns are; two roles that would fall on one column change places.
 */
function changed(asked, before, name, value) {
  const fields = { ...asked };
  if (!COLUMNS.includes(name)) for (const field of [...COLUMNS, "rare_labels"]) delete fields[field];
  fields[name] = value;
  const [text, label] = COLUMNS;
  const is = (column) => fields[column] || before[column];
  if (is(text) && is(text) === is(label)) fields[name === text ? label : text] = before[name === text ? text : label];
  if (fields[label] !== asked[label]) delete fields.rare_labels; // it was said of other labels
  return fields;
}

/**
 * `dataset` is null where the file was refused; `columns` are its columns, as far as they are known. `asked` are the
 * form fields of the reading that is shown or under way. `disabled` while a job starts on what was read.
 */
export function Reading({ dataset, columns, asked, disabled, onChange }) {
  const now = { ...valuesOf(dataset || {}), ...asked };
  const set = (name) => (event) => onChange(changed(asked, now, name, event.target.value));
  const hint = (name) => (asked[name] ? "As you said" : dataset?.inferred.includes(name) ? "Recognised" : null);
  const choice = (name, label, options, explained) => html`<${Field} label=${label} hint=${[hint(name), explained].filter(Boolean).join(". ") || null}>
    <select name=${name} value=${now[name]} onChange=${set(name)}>${options.map(([value, text]) => html`<option value=${value}>${text}</option>`)}</select><//>`;
  const named = columns.map((name) => [name, name]);
  const recognise = (options) => (dataset ? options : [["", "Recognise it"], ...options]);
  const known = (options, value) => (!value || options.some(([option]) => option === value) ? options : [...options, [value, value]]);
  return html`<fieldset disabled=${disabled} aria-label="How the file is read">
    ${columns.length > 0 &&
    html`<div class="grid">
      ${choice("text_column", "Column of the texts", known(recognise(named), now.text_column))}
      ${choice("label_column", "Column of the labels", known(recognise(named), now.label_column))}
    </div>`}
    <details open=${!dataset && columns.length === 0}>
      <summary>More about how it is read</summary>
      <div class="grid">
        ${choice("has_header", "First row", recognise([["true", "Names the columns"], ["false", "Is data"]]))}
        ${choice("delimiter", "Delimiter", known(recognise(Object.entries(DELIMITERS)), now.delimiter))}
        ${choice("encoding", "Encoding", known(recognise(ENCODINGS.map((name) => [name, name])), now.encoding), "Files from older Excel are often cp1252")}
        ${columns.length > 0 && choice("split_column", "Column of the file's own split", [["", "None: split the rows anew"], ...named], "Says train, validation or test in each row")}
      </div>
    </details>
  </fieldset>`;
}
