// The documentation of the REST API, made from /openapi.json. Every request can be tried.

import { apiKey, json, parsed, request, root } from "./api.js";
import { curl, python } from "./code.js";
import { append, busy, el, errorBox, field, fill, select } from "./dom.js";
import { EXAMPLE_IMAGE, exampleBody, exampleImage, examplePath, withImage } from "./examples.js";

const main = document.getElementById("main");

async function start() {
  const api = await json({ path: "/openapi.json", shown: false });
  const operations = Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]) => ({ path, method: method.toUpperCase(), ...operation })),
  );
  const tags = [...new Set(operations.map((operation) => operation.tags?.[0] ?? "other"))];
  const wanted = el("input", { type: "search", id: "wanted", placeholder: "embeddings, filter, POST ..." });
  const key = el("input", { type: "password", id: "key-input", autocomplete: "off", pattern: "\\s*[!-~]*\\s*", title: "letters, digits and signs of ASCII", ".value": apiKey.get() });
  key.addEventListener("change", () => key.reportValidity() && apiKey.set(key.value.trim()));
  const list = el("div");
  wanted.addEventListener("input", () => narrow(list, wanted.value));
  fill(
    main,
    ...prose(api.info.description),
    el("p", { class: "quiet" }, `Version ${api.info.version}. The examples use a collection named demo and a drawn image.`),
    el("div", { class: "row" }, field("Find a route", wanted), field("API key, kept until this tab is closed", key)),
    list,
  );
  for (const tag of tags) {
    append(list, el("h2", { id: `tag-${tag}` }, tag));
    for (const operation of operations.filter((one) => (one.tags?.[0] ?? "other") === tag)) {
      append(list, entry(operation, api));
    }
  }
  document.getElementById(location.hash.slice(1))?.setAttribute("open", "");
  document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

/** Hide the entries that do not contain all words, and the headings without an entry. */
function narrow(list, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  let heading = null;
  for (const child of list.children) {
    if (child.tagName === "H2") {
      heading = child;
      heading.hidden = true;
    } else {
      child.hidden = !words.every((word) => child.dataset.text.includes(word));
      if (!child.hidden) heading.hidden = false;
    }
  }
}

function entry(operation, api) {
  const details = el(
    "details",
    {
      class: "operation",
      id: operation.operationId,
      "data-text": `${operation.method} ${operation.path} ${operation.summary}`.toLowerCase(),
    },
    el("summary", {}, el("strong", {}, operation.method), " ", el("code", {}, operation.path), " ", operation.summary),
  );
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) append(details, content(operation, api));
  });
  return details;
}

function content(operation, api) {
  const bodies = Object.entries(operation.requestBody?.content ?? {});
  return [
    ...prose(operation.description ?? ""),
    operation.parameters?.length ? [el("h3", {}, "Parameters"), parameters(operation.parameters, api)] : null,
    ...bodies.map(([type, { schema }]) => [el("h3", {}, "Body as ", el("code", {}, type)), schemaView(schema, api)]),
    el("h3", {}, "Answers"),
    answers(operation.responses, api),
    tryIt(operation, api),
  ];
}

function parameters(all, api) {
  return el("ul", { class: "fields" }, all.map((one) =>
    described(one.name, one.required, `${typeOf(one.schema ?? {}, api)}, in the ${one.in}`, one.description)));
}

/** A parameter or a field as an element of a list. A star marks the required ones. */
function described(name, isRequired, type, description, nested) {
  return el("li", {}, el("code", {}, name), isRequired ? " * " : " ", el("span", { class: "quiet" }, type), " ", inline(description ?? ""), nested);
}

/** The fields of a schema. Schemas inside it are shown when they are opened. */
function schemaView(given, api) {
  const schema = resolved(given, api);
  const variants = (schema.oneOf ?? schema.anyOf ?? []).filter((one) => one.type !== "null");
  const properties = Object.entries(schema.properties ?? {});
  if (!properties.length && variants.length) {
    return el("div", {}, variants.map((one, i) => opened(one.title ?? refName(one) ?? `form ${i + 1}`, one, api)));
  }
  if (!properties.length && schema.items) return opened("each element", schema.items, api);
  if (!properties.length) return el("p", {}, typeOf(given, api), " ", inline(schema.description ?? ""));
  return el(
    "ul",
    { class: "fields" },
    properties.map(([name, inner]) => {
      const nested = nestedOf(inner, api);
      return described(name, schema.required?.includes(name), typeOf(inner, api), inner.description,
        nested && opened(`fields of ${name}`, nested, api));
    }),
  );
}

function opened(title, schema, api) {
  const details = el("details", {}, el("summary", {}, title));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) append(details, schemaView(schema, api));
  });
  return details;
}

/** The schema inside a field that has fields of its own, or null. */
function nestedOf(given, api) {
  const schema = resolved(given, api);
  if (schema.properties) return schema;
  if (schema.items) return nestedOf(schema.items, api);
  const variants = (schema.anyOf ?? schema.oneOf ?? []).filter((one) => nestedOf(one, api));
  return variants.length === 1 ? nestedOf(variants[0], api) : variants.length ? { oneOf: variants } : null;
}

function resolved(schema, api) {
  const name = refName(schema);
  return name ? { ...api.components.schemas[name], ...schema } : schema;
}

const refName = (schema) => schema.$ref?.split("/").pop() ?? null;

function typeOf(given, api) {
  const schema = resolved(given, api);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((one) => JSON.stringify(one)).join(" | ");
  const variants = schema.anyOf ?? schema.oneOf;
  if (variants) return variants.map((one) => refName(one) ?? typeOf(one, api)).join(" | ");
  if (schema.type === "array") return `list of ${refName(schema.items ?? {}) ?? typeOf(schema.items ?? {}, api)}`;
  const limits = [schema.minimum, schema.maximum].every((one) => one !== undefined)
    ? `, ${schema.minimum} to ${schema.maximum}` : "";
  return `${refName(given) ?? (schema.format === "binary" ? "file" : schema.type) ?? "any"}${limits}`;
}

function answers(responses, api) {
  return el("ul", { class: "fields" }, Object.entries(responses).map(([status, response]) => {
    const schema = response.content?.["application/json"]?.schema;
    return el("li", {}, el("code", {}, status), " ", inline(response.description ?? ""),
      schema && status < 400 ? opened("fields of the answer", schema, api) : null);
  }));
}

/** A form with which the request is sent, and the answer. */
function tryIt(operation, api) {
  const inputs = (operation.parameters ?? []).filter((one) => one.in !== "header").map((one) => ({
    ...one,
    control: el("input", { ".value": one.in === "path" ? examplePath(one.name) : "", required: one.in === "path", spellcheck: "false" }),
  }));
  const types = Object.keys(operation.requestBody?.content ?? {});
  const type = select(types, { "aria-label": "Body" });
  const text = el("textarea", { rows: "6", cols: "60", spellcheck: "false", "aria-label": "Body" });
  const file = el("input", { type: "file", accept: "image/*", "aria-label": "File" });
  if (types.includes("application/json")) {
    text.value = JSON.stringify(exampleBody(operation.operationId, operation.requestBody.content["application/json"].schema, api), null, 1);
  }
  const showControls = () => {
    text.hidden = type.value !== "application/json";
    file.hidden = types.length === 0 || !text.hidden;
  };
  type.addEventListener("change", showControls);
  showControls();
  const place = el("div", { class: "answer" });
  const send = async () => {
    const call = { method: operation.method, path: operation.path, query: {}, accept: "*/*" };
    for (const { name, in: where, control } of inputs) {
      if (where === "path") call.path = call.path.replace(`{${name}}`, encodeURIComponent(control.value));
      else if (control.value !== "") call.query[name] = control.value;
    }
    if (type.value === "application/json") {
      if (text.value.trim()) call.json = parsed(text.value);
    } else if (type.value === "multipart/form-data") {
      const many = operation.requestBody.content[type.value].schema.properties?.files ? 2 : 1;
      call.form = file.files.length ? [["file", file.files[0]]] : [...Array(many)].map(() => ["file", exampleImage()]);
    } else if (type.value) call.image = file.files[0] ?? exampleImage();
    if (call.image || call.form) Object.assign(call, await readyFiles(call));
    const panes = [el("h4", {}, "curl"), el("pre", { tabindex: "0" }, curl(call)), el("h4", {}, "Python"), el("pre", { tabindex: "0" }, python(call))];
    fill(place, panes);
    const result = el("div");
    append(place, result);
    await busy(result, async () => {
      await show(result, call.json === undefined ? call : { ...call, json: await withImage(call.json) });
    });
  };
  return el(
    "form",
    { class: "try", onsubmit: (event) => { event.preventDefault(); send().catch((error) => fill(place, errorBox(error))); } },
    el("h3", {}, "Try it"),
    inputs.map((one) => field(`${one.name}${one.required ? " *" : ""}`, one.control)),
    types.length ? el("div", {}, types.length > 1 ? field("Body", type) : null, text, file,
      types.includes("application/json") ? el("p", { class: "quiet" }, `"${EXAMPLE_IMAGE}" stands for a drawn image in base64.`) : null) : null,
    el("div", { class: "row" }, el("button", { class: "primary" }, "Send")),
    place,
  );
}

/** Wait for the drawn image in a call with files. */
async function readyFiles(call) {
  if (call.image) return { image: await call.image };
  return { form: await Promise.all(call.form.map(async ([name, value]) => [name, await value])) };
}

async function show(place, call) {
  const response = await request({ ...call, shown: false });
  const type = response.headers.get("Content-Type") ?? "";
  const head = el("p", {}, el("strong", {}, String(response.status)), ` ${type} `,
    el("span", { class: "quiet" }, response.headers.get("Server-Timing") ?? ""));
  if (type.startsWith("image/")) {
    const picture = el("img", { alt: "the answer", class: "picture", ".src": URL.createObjectURL(await response.blob()) });
    picture.addEventListener("load", () => URL.revokeObjectURL(picture.src), { once: true });
    fill(place, head, picture);
  } else if (type.startsWith("text/event-stream")) {
    await response.body.cancel();
    fill(place, head, el("p", {}, "a stream of events; see docs/jobs.md"));
  } else {
    let text = await response.text();
    if (type.includes("json") && text) text = JSON.stringify(parsed(text), null, 1);
    fill(place, head, el("pre", { tabindex: "0" }, text.length > 20_000 ? `${text.slice(0, 20_000)}\n...` : text));
  }
}

/** Paragraphs of a description. */
function prose(text) {
  return text.split(/\n\s*\n/).filter(Boolean).map((paragraph) => el("p", {}, inline(paragraph)));
}

/** Text in which words between backticks are code. */
function inline(text) {
  return text.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

start().catch((error) => fill(main, errorBox(error), el("p", {}, el("a", { href: `${root}/openapi.json` }, "openapi.json"))));
