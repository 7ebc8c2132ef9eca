// Writes a call of api.js as a curl command and as Python.

import { address, apiKey } from "./api.js";

const shell = (text) => `'${String(text).replaceAll("'", `'\\''`)}'`;
const nameOf = (blob) => blob.name || "image.jpg";

const JSON_WORDS = { null: "null", true: "true", false: "false" };
const PYTHON_WORDS = { null: "None", true: "True", false: "False" };
const MOST_LETTERS = 400;
const MOST_ELEMENTS = 50;

/** A value as JSON or Python writes it. Long texts and lists are cut: the dots outside of quotes are an error in both, so a
 * command that is copied with them does not do something else. */
function written(value, words) {
  if (typeof value === "string") return value.length > MOST_LETTERS ? `${JSON.stringify(value.slice(0, 40))}...` : JSON.stringify(value);
  if (Array.isArray(value)) {
    const parts = value.slice(0, MOST_ELEMENTS).map((inner) => written(inner, words));
    return `[${[...parts, ...(value.length > MOST_ELEMENTS ? ["..."] : [])].join(", ")}]`;
  }
  if (value && typeof value === "object") {
    const pairs = Object.entries(value).filter(([, inner]) => inner !== undefined);
    return `{${pairs.map(([name, inner]) => `${JSON.stringify(name)}: ${written(inner, words)}`).join(", ")}}`;
  }
  return words[value] ?? JSON.stringify(value);
}

/** A value as Python writes it. */
const literal = (value) => written(value, PYTHON_WORDS);

/** The curl command of a call. The API key is not part of it. */
export function curl(call) {
  const url = location.origin + address(call);
  const words = ["curl -s"];
  if (call.method && call.method !== "GET" && !(call.method === "POST" && (call.json || call.form || call.image))) {
    words.push(`-X ${call.method}`);
  }
  if (apiKey.get()) words.push('-H "Authorization: Bearer $DINOV2_API_KEY"');
  if (call.json !== undefined) {
    words.push("-H 'Content-Type: application/json'", `-d ${shell(written(call.json, JSON_WORDS))}`);
  } else if (call.form) {
    for (const [name, value] of call.form) {
      if (value instanceof Blob) words.push(`-F ${shell(`${name}=@"${nameOf(value).replace(/["\\]/g, "\\$&")}"`)}`);
      else words.push(`--form-string ${shell(`${name}=${value}`)}`); // -F would read files, and cut the value at a semicolon
    }
  } else if (call.image) {
    words.push(`-H ${shell(`Content-Type: ${call.image.type || "application/octet-stream"}`)}`);
    words.push(`--data-binary ${shell(`@${nameOf(call.image)}`)}`);
  }
  words.push(shell(url));
  return words.join(" ");
}

/** The Python lines of a call, with httpx. */
export function python(call) {
  const lines = ["import httpx", ""];
  const options = [];
  const headers = [];
  if (apiKey.get()) {
    lines.splice(0, 1, "import os", "", "import httpx");
    headers.push(`"Authorization": f"Bearer {os.environ['DINOV2_API_KEY']}"`);
  }
  if (call.json !== undefined) options.push(`json=${literal(call.json)}`);
  else if (call.form) {
    const files = call.form.filter(([, value]) => value instanceof Blob);
    const data = call.form.filter(([, value]) => !(value instanceof Blob));
    if (files.length) {
      const pairs = files.map(([name, blob]) => `(${literal(name)}, open(${literal(nameOf(blob))}, "rb"))`);
      options.push(`files=[${pairs.join(", ")}]`);
    }
    if (data.length) options.push(`data=${literal(merged(data))}`);
  } else if (call.image) {
    options.push(`content=open(${literal(nameOf(call.image))}, "rb").read()`);
    headers.push(`"Content-Type": ${literal(call.image.type || "application/octet-stream")}`);
  }
  if (headers.length) options.push(`headers={${headers.join(", ")}}`);
  const method = (call.method ?? "GET").toLowerCase();
  const url = literal(location.origin + address(call));
  const asJson = call.accept ? ".content" : ".json()";
  const called =
    method === "delete" && call.json !== undefined
      ? `httpx.request("DELETE", ${[url, ...options].join(", ")})`
      : `httpx.${method}(${[url, ...options, "timeout=60"].join(", ")})`;
  lines.push(`answer = ${called}`, `print(answer.raise_for_status()${asJson})`);
  return lines.join("\n");
}

/** Form fields as an object. A field that occurs several times has a list of values. */
function merged(fields) {
  const values = {};
  for (const [name, value] of fields) (values[name] ??= []).push(value);
  return Object.fromEntries(Object.entries(values).map(([name, list]) => [name, list.length > 1 ? list : list[0]]));
}
