// Builds elements. Text is always set as text and never parsed as HTML, so data cannot contain markup.

/** Create an element. Attributes with the value true are set without a value; null, undefined and false are left out;
 * a function is an event listener ("onclick"); `className`, `value` and other properties start with a dot (".value"). */
export function el(tag, attributes = {}, ...children) {
  return completed(document.createElement(tag), attributes, children);
}

/** Create an SVG element. Attributes as in `el`. */
export function svg(tag, attributes = {}, ...children) {
  return completed(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function completed(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.replace(/^on/, ""), value);
    else if (name.startsWith(".")) element[name.slice(1)] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  append(element, children);
  return element;
}

export function append(element, children) {
  for (const child of [children].flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) element.append(child);
  }
}

/** Replace the children of an element. */
export function fill(element, ...children) {
  element.replaceChildren();
  append(element, children);
}

/** Tell users of screen readers what has happened. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** A label around or beside a form control. */
export function field(text, control, hint) {
  const id = control.id || (control.id = `field-${(field.count = (field.count ?? 0) + 1)}`);
  const note = hint ? el("small", { id: `${id}-hint` }, hint) : null;
  if (note) control.setAttribute("aria-describedby", note.id);
  return el("div", { class: "field" }, el("label", { for: id }, text), control, note);
}

export function select(options, attributes = {}) {
  const items = options.map((option) => (typeof option === "string" ? [option, option] : option));
  return el("select", attributes, ...items.map(([value, text]) => el("option", { value }, text)));
}

/** Copy a text to the clipboard, and announce that `what` is copied. Without HTTPS, browsers offer `navigator.clipboard`
 * on localhost only. */
export async function copyText(text, what = "The text is") {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const before = document.activeElement;
    const area = el("textarea", { class: "hidden-text", "aria-hidden": "true", ".value": text });
    document.body.append(area);
    area.select();
    const isCopied = document.execCommand("copy");
    area.remove();
    before?.focus();
    if (!isCopied) return announce("The browser does not allow this page to copy.");
  }
  announce(`${what} copied`);
}

/** Offer a file for download. */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Show an error of `api.js` or of a script, with everything that helps to understand it. */
export function errorBox(error) {
  console.debug(error);
  const problem = error.problem ?? {};
  return el(
    "div",
    { class: "error", role: "alert" },
    el("strong", {}, problem.title ?? "Error"),
    el("p", {}, problem.detail ?? error.message),
    error.status === 401 ? el("p", {}, "This service needs an API key. Enter one above: ",
      el("button", { type: "button", onclick: () => (document.getElementById("key") ? document.getElementById("key").click() : document.getElementById("key-input")?.focus()) }, "Enter an API key")) : null,
    error.status === 403 ? el("p", {}, "The API key of this session does not allow it: see docs/security.md for its scopes.") : null,
    problem.request_id ? el("small", {}, `request ${problem.request_id}`) : null,
  );
}

/** Let files and items be dropped on an element. `ondrop` gets the event's DataTransfer; its errors are shown in `note`. */
export function acceptDrops(element, note, ondrop) {
  const mark = (isOver) => element.classList.toggle("over", isOver);
  element.addEventListener("dragover", (event) => {
    event.preventDefault();
    mark(true);
  });
  element.addEventListener("dragleave", () => mark(false));
  element.addEventListener("drop", async (event) => {
    event.preventDefault();
    mark(false);
    try {
      await ondrop(event.dataTransfer);
    } catch (error) {
      fill(note, errorBox(error));
    }
  });
}

/** Run `work`, show its errors in `place`, and mark the place as busy meanwhile. Return the result or undefined. */
export async function busy(place, work) {
  place.setAttribute("aria-busy", "true");
  try {
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") fill(place, errorBox(error));
    return undefined;
  } finally {
    place.removeAttribute("aria-busy");
  }
}

/** Open a dialog over the page. It is closed by Escape, by the button Close, or by `close()`. The focus returns to the
 * element that had it. `content` is called with `close` and returns the elements of the dialog. */
export function dialog(title, content) {
  const before = document.activeElement;
  const heading = el("h2", { id: "dialog-title" }, title);
  const box = el("dialog", { "aria-labelledby": "dialog-title" });
  const close = () => box.close();
  append(box, [heading, content(close), el("button", { type: "button", class: "close", onclick: close }, "Close")]);
  box.addEventListener("close", () => {
    box.remove();
    if (before?.isConnected) before.focus();
  });
  document.getElementById("main").append(box);
  box.showModal();
  return box;
}

/** A button that asks `question()` before it runs `action`. */
export function askingButton(text, question, action, attributes = {}) {
  const place = el("span", { class: "asking" });
  const button = el("button", { type: "button", onclick: () => ask(), ...attributes }, text);
  const restore = () => {
    fill(place, button);
    button.focus();
  };
  const ask = () => {
    const yes = el("button", { type: "button", class: "primary", onclick: () => (restore(), action()) }, "Yes");
    const no = el("button", { type: "button", onclick: restore }, "No");
    fill(place, el("span", { role: "alert" }, question()), " ", yes, " ", no);
    yes.focus();
  };
  fill(place, button);
  return place;
}

/** A labelled slider that shows its value. The input is the property `input` of the element. */
export function slider(text, { digits = 2, value, ...attributes }) {
  const input = el("input", { type: "range", ...attributes, ".value": String(value) });
  const output = el("output", { for: input.id }, Number(value).toFixed(digits));
  input.addEventListener("input", () => (output.value = Number(input.value).toFixed(digits)));
  const place = field(text, input);
  place.append(output);
  place.classList.add("slider");
  place.input = input;
  return place;
}

/** Ask in a dialog whether to go on. `fields` are elements that belong to the question. `work` is called after a click
 * on the button `action`; its errors are shown in the dialog, which stays open. Resolve with the result of `work`, or
 * with undefined if the user does not want to. */
export function confirmed(title, { text, action, fields = [], work }) {
  return new Promise((resolve) => {
    let result;
    const note = el("div");
    const box = dialog(title, (close) => {
      const button = el("button", { class: "primary" }, action);
      const submit = async (event) => {
        event.preventDefault();
        button.disabled = true;
        fill(note);
        try {
          result = (await work()) ?? true;
          close();
        } catch (error) {
          fill(note, errorBox(error));
          button.disabled = false;
        }
      };
      return el("form", { onsubmit: submit }, el("p", {}, text), fields, note, el("div", { class: "row" }, button));
    });
    box.addEventListener("close", () => resolve(result));
  });
}

/** A time of the API in the user's time zone, or a dash. */
export function timeText(time) {
  if (!time || Number.isNaN(Date.parse(time))) return time || "-";
  return el("time", { datetime: time, title: time }, new Date(time).toLocaleString());
}

/** A value of an answer as text or as elements: lists with their parts, objects as rows. */
export function valueText(value) {
  if (value === null || value === undefined || value === "") return "-";
  if (typeof value === "number") return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(5)));
  if (typeof value !== "object") return String(value);
  if (!Object.keys(value).length) return "-";
  if (Array.isArray(value)) return value.every((one) => typeof one !== "object") ? value.join(", ") : JSON.stringify(value);
  return facts(Object.entries(value));
}

/** A list of names and values. */
export function facts(pairs) {
  return el("dl", { class: "facts" }, pairs.map(([name, value]) => [el("dt", {}, name),
    el("dd", {}, value instanceof Node || Array.isArray(value) && value.some((one) => one instanceof Node) ? value : valueText(value))]));
}

/** The state of a job or of a model. */
export const stateBadge = (state) => el("span", { class: `state ${state}` }, state);
