// Builds elements. Text is always set as text and never parsed as HTML, so data cannot contain markup.

/** Create an element. Attributes with the value true are set without a value; null, undefined and false are left out;
 * a function is an event listener ("onclick"); `className`, `value` and other properties start with a dot (".value"). */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
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
    problem.request_id ? el("small", {}, `request ${problem.request_id}`) : null,
  );
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
