// A form that starts a job. Its fields come from the schema in /openapi.json, so it has the parameters of every kind.

import { json, parsed } from "../api.js";
import { busy, el, field, fill, select } from "../dom.js";

const LATER = ["not_before", "every", "zone", "schedule"];
const FIRST = ["retrain", "train", "evaluate", "export", "reindex"];
const NEEDS = {
  train: "torch", retrain: "torch", evaluate: "torch", curate: "torch and pyarrow", "build-engine": "TensorRT and an NVIDIA GPU",
};

/** Return the form. `parameters` are those of the address: `start` is a kind, and others are values of its fields.
 * `onstarted` gets the job or the schedule that was created. */
export async function jobForm({ parameters, onstarted, signal }) {
  const api = await json({ path: "/openapi.json", shown: false, signal });
  const kinds = kindsOf(api);
  const names = [...kinds.keys()].sort((a, b) => rank(a) - rank(b));
  const kind = select(names, { id: "job-kind" });
  if (kinds.has(parameters.get("start"))) kind.value = parameters.get("start");
  const place = el("div");
  const note = el("div");
  let inputs = new Map();

  function show() {
    const schema = kinds.get(kind.value);
    const required = new Set(schema.required ?? []);
    inputs = new Map();
    const make = (name) => {
      const input = inputOf(name, schema.properties[name], required.has(name), api, parameters.get(name));
      inputs.set(name, input);
      return input.element;
    };
    const own = Object.keys(schema.properties).filter((name) => name !== "kind" && !LATER.includes(name));
    own.sort((a, b) => Number(required.has(b)) - Number(required.has(a)));
    fill(place,
      el("p", {}, schema.description),
      NEEDS[kind.value] ? el("p", { class: "quiet", id: "job-needs" },
        `This kind needs a worker with ${NEEDS[kind.value]}. Without one, the job stays queued and says so.`) : null,
      el("div", { class: "form-grid" }, own.map(make)),
      el("details", {}, el("summary", {}, "Later, or again and again"), LATER.filter((name) => name in schema.properties).map(make)));
    fill(note);
  }

  async function send() {
    const body = { kind: kind.value };
    for (const [name, input] of inputs) {
      const value = input.value();
      if (value !== undefined) body[name] = value;
    }
    onstarted(await json({ method: "POST", path: "/v1/jobs", json: body }));
  }

  kind.addEventListener("change", show);
  show();
  const start = el("button", { class: "primary" }, "Start");
  const submit = async (event) => {
    event.preventDefault();
    fill(note, el("p", { role: "status" }, "The parameters are being checked..."));
    start.disabled = true; // the check takes seconds, and a second click would start a second job
    if (await busy(note, async () => (await send(), true))) fill(note);
    start.disabled = false;
  };
  return el("form", { id: "job-form", onsubmit: submit }, field("Kind", kind), place, note, el("div", { class: "row" }, start));
}

const rank = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);

/** The schemas of the bodies, by the kind of job. */
function kindsOf(api) {
  const body = resolved(api.paths["/v1/jobs"].post.requestBody.content["application/json"].schema, api);
  const found = new Map();
  for (const one of body.anyOf ?? body.oneOf ?? [body]) {
    const schema = resolved(one, api);
    const kind = resolved(schema.properties.kind, api);
    found.set(kind.const ?? kind.enum[0], schema);
  }
  return found;
}

function resolved(schema, api) {
  return schema.$ref ? { ...api.components.schemas[schema.$ref.split("/").pop()], ...schema } : schema;
}

/** A control for a parameter. `value()` returns undefined for a field that keeps its default. */
function inputOf(name, given, isRequired, api, preset) {
  const outer = resolved(given, api);
  const variants = (outer.anyOf ?? [outer]).map((one) => resolved(one, api)).filter((one) => one.type !== "null");
  const schema = variants.find((one) => one.type === "array") ?? variants.find((one) => one.enum) ?? variants[variants.length - 1];
  const standard = outer.default;
  const id = `job-${name}`;
  const shown = `${name}${isRequired ? " (required)" : ""}`;
  const hint = [outer.description, standardText(standard)].filter(Boolean).join("; ");
  if (schema.type === "boolean") {
    const box = el("input", { type: "checkbox", id, ".checked": preset ? preset === "true" : standard === true, "aria-describedby": `${id}-hint` });
    return {
      element: el("div", { class: "field" }, el("span", {}, box, " ", el("label", { for: id }, shown)), el("small", { id: `${id}-hint` }, outer.description ?? "")),
      value: () => (box.checked === (standard === true) ? undefined : box.checked),
    };
  }
  let control;
  let read = (text) => text;
  if (schema.enum) {
    control = select([...(isRequired ? [] : [["", "default"]]), ...schema.enum], { id });
  } else if (schema.type === "array") {
    control = el("textarea", { id, rows: "2", spellcheck: "false" });
    read = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
  } else if (schema.type === "object" || schema.properties) {
    control = el("textarea", { id, rows: "2", spellcheck: "false" });
    read = (text) => parsed(text);
  } else if (schema.type === "integer" || (schema.type === "number" && variants.length === 1)) {
    control = el("input", { type: "number", id, step: schema.type === "integer" ? "1" : "any" });
    read = Number;
  } else {
    control = el("input", { id, spellcheck: "false", autocomplete: "off" });
  }
  if (preset) control.value = preset;
  control.required = isRequired;
  const kind = schema.type === "array" ? "one per line" : schema.type === "object" ? "a JSON object" : "";
  return {
    element: field(shown, control, [hint, kind].filter(Boolean).join("; ")),
    value: () => (control.value.trim() === "" ? undefined : read(control.value.trim())),
  };
}

function standardText(value) {
  if (value === undefined || value === null || value === "" || JSON.stringify(value) === "[]" || JSON.stringify(value) === "{}") return "";
  return `default: ${typeof value === "string" ? value : JSON.stringify(value)}`;
}
