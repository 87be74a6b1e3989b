// What a key may do. Each scope holds those before it.
export const SCOPES = [
  ["predict", "Ask for predictions, nothing else: for an app that calls a model."],
  ["read", "Also see everything: datasets, jobs, results, models."],
  ["write", "Also upload, start jobs, move aliases and delete: for people who work here."],
  ["admin", "Also make and revoke keys."],
];
const NAMES = SCOPES.map(([name]) => name);

export const may = (session, scope) => NAMES.indexOf(session?.scope) >= NAMES.indexOf(scope);
