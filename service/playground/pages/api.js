// Calls the REST API of this service, with the API key of the session.

const KEY = "dinov2-api-key";

export const root = document.documentElement.dataset.root ?? "";

/** `localStorage` or `sessionStorage`. If the browser refuses it, as it does without cookies, values are kept until the page
 * is reloaded. */
export function storage(name) {
  try {
    return window[name];
  } catch {
    const kept = new Map();
    return { getItem: (key) => kept.get(key) ?? null, setItem: (key, value) => kept.set(key, value), removeItem: (key) => kept.delete(key) };
  }
}

const session = storage("sessionStorage");

/** The API key. It is kept until the tab is closed, and never stored on disk by this page. */
export const apiKey = {
  get: () => session.getItem(KEY) ?? "",
  set: (key) => (key ? session.setItem(KEY, key) : session.removeItem(KEY)),
};

/** An answer with an error. `problem` is the RFC 9457 document, or what could be read of it. */
export class ApiError extends Error {
  constructor(status, problem) {
    super(problem.detail ?? `HTTP ${status}`);
    this.name = "ApiError";
    this.status = status;
    this.problem = problem;
  }
}

/** Parse JSON. Integers that a number of JavaScript cannot represent become a BigInt, so that no digit is lost. */
export function parsed(text) {
  if (!JSON.rawJSON || !/(^|[\s:,[])-?\d{16}/.test(text)) return JSON.parse(text);
  return JSON.parse(text, (_, value, { source }) =>
    typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value) && /^-?\d+$/.test(source) ? BigInt(source) : value);
}

if (JSON.rawJSON) {
  BigInt.prototype.toJSON = function () {
    return JSON.rawJSON(String(this));
  };
}

/** Send a request. A call has:
 *   method, path ("/v1/models"), query {name: value}
 *   and one of: json (an object), form ([[name, value or File], ...]), image (a Blob, sent as the raw body)
 *   signal (to abort), accept, headers (further ones)
 *   shown: false for requests that a view makes for itself, which are not shown as code
 * Return the response. Raise ApiError for a status of 400 and above. */
export async function request(call) {
  const { url, headers, body } = prepared(call);
  let response;
  try {
    response = await fetch(url, { method: call.method ?? "GET", headers, body, signal: call.signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, { title: "No connection", detail: `the service does not answer: ${error.message}` });
  }
  if (!response.ok) {
    throw new ApiError(response.status, problemOf(await response.text(), response.status, response.statusText));
  }
  return response;
}

/** Send a request as `json` does, and call `onprogress` with the number of bytes sent so far and the size of the body.
 * An ApiError has `retryAfter`, the seconds after which the service wants to be asked again, or 0. */
export async function upload(call, onprogress) {
  const { url, headers, body } = prepared(call);
  const sender = new XMLHttpRequest();
  return new Promise((resolve, reject) => {
    const abort = () => sender.abort();
    const fail = (status, problem) => {
      const error = new ApiError(status, problem);
      error.retryAfter = Number(sender.getResponseHeader("Retry-After")) || 0;
      reject(error);
    };
    sender.open(call.method ?? "GET", url);
    for (const [name, value] of Object.entries(headers)) sender.setRequestHeader(name, value);
    sender.upload.addEventListener("progress", (event) => onprogress(event.loaded, event.total));
    sender.addEventListener("load", () => {
      if (sender.status >= 400) return fail(sender.status, problemOf(sender.responseText, sender.status, sender.statusText));
      try {
        resolve(sender.responseText ? parsed(sender.responseText) : null);
      } catch (error) {
        reject(error); // the answer is not from the service
      }
    });
    sender.addEventListener("error", () => fail(0, { title: "No connection", detail: "the service does not answer" }));
    sender.addEventListener("abort", () => reject(new DOMException("aborted", "AbortError")));
    sender.addEventListener("loadend", () => call.signal?.removeEventListener("abort", abort));
    if (call.signal?.aborted) return reject(new DOMException("aborted", "AbortError"));
    call.signal?.addEventListener("abort", abort);
    sender.send(body);
  });
}

/** The address, the headers and the body of a call. Shows the call as code. */
function prepared(call) {
  const url = address(call);
  if (call.shown !== false) window.dispatchEvent(new CustomEvent("api-request", { detail: call }));
  const headers = { Accept: call.accept ?? "application/json, */*", ...call.headers };
  if (apiKey.get()) headers.Authorization = `Bearer ${apiKey.get()}`;
  if (call.json !== undefined) {
    headers["Content-Type"] = "application/json";
    return { url, headers, body: JSON.stringify(call.json) };
  }
  if (call.form) {
    const body = new FormData();
    for (const [name, value] of call.form) {
      if (value instanceof File) body.append(name, value, value.name); // not its path below a chosen folder
      else body.append(name, value);
    }
    return { url, headers, body };
  }
  if (call.image) headers["Content-Type"] = call.image.type || "application/octet-stream";
  return { url, headers, body: call.image };
}

/** Send a request and return the JSON document of the answer, or null if it is empty. */
export async function json(call) {
  const text = await (await request(call)).text();
  return text ? parsed(text) : null;
}

/** The path and the query of a call, with the prefix under which the service is published. Raise Error if a part of the
 * path is "." or "..": browsers, curl and httpx would send the request to another path. */
export function address(call) {
  const part = call.path.split("/").find((one) => /^(\.|%2e){1,2}$/i.test(one));
  if (part) throw new Error(`“${part}” cannot be a part of an address, because browsers remove it`);
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(call.query ?? {})) {
    if (value !== undefined && value !== null && value !== "") query.append(name, value);
  }
  const text = query.toString();
  return root + call.path + (text ? `?${text}` : "");
}

/** A path below a collection: `collectionPath("shop", "items", "a/b")`. Slashes in an id are encoded. */
export function collectionPath(name, ...parts) {
  return ["/v1/collections", name, ...parts].map((part, i) => (i ? encodeURIComponent(part) : part)).join("/");
}

function problemOf(text, status, reason) {
  try {
    const body = JSON.parse(text);
    return body.error ? { title: body.error.type, detail: body.error.message } : body;
  } catch {
    return { title: `HTTP ${status}`, detail: text.slice(0, 500) || reason };
  }
}

/** The bytes of a file as base64 text. */
export function base64(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
