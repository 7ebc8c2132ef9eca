// What several tabs of the view "Image" need: the size of the input, collections, base64, and pictures of items.

import { base64, collectionPath, json } from "../api.js";
import { currentCollection, setCollection } from "../state.js";
import { el, field, select } from "../dom.js";

const SIZES = ["224", "336", "448", "560"];

/** A field for the short side of the network's input. */
export function sizeField(onchange, value = "336") {
  const control = select(SIZES.map((size) => [size, `${size} pixels`]), { id: "input-size", ".value": value, onchange });
  control.value = value;
  return { control, element: field("Size of the input", control, "A larger input has more, smaller patches, and takes longer.") };
}

/** A field for a collection. `change` is called with the collection (name, pooling, originals) or null if there are none. */
export async function collectionField(id, signal, change = () => {}) {
  const { data } = await json({ path: "/v1/collections", shown: false, signal });
  if (!data.length) {
    const link = el("a", { href: "#collections" }, "Create a collection");
    return { element: el("p", {}, "There are no collections. ", link, " first."), current: () => null };
  }
  const control = select(data.map((one) => one.name), { id });
  if (data.some((one) => one.name === currentCollection())) control.value = currentCollection();
  const current = () => data.find((one) => one.name === control.value);
  control.addEventListener("change", () => {
    setCollection(control.value);
    change(current());
  });
  change(current());
  return { element: field("Collection", control), current };
}

/** The address of this view for an item. */
export function itemLink(collection, id) {
  return `#image?${new URLSearchParams({ collection, item: id })}`;
}

/** Whether a collection can be searched by a region, and if not, why. */
export function regionSearchProblem(collection) {
  if (!collection) return "There is no collection.";
  if (collection.pooling === "mean") return "";
  return (
    `The collection ${collection.name} has the pooling ${collection.pooling}. The vector of a region is a mean of patches, ` +
    "so it can only be compared in a collection with the pooling mean: choose it when you create one in Collections. " +
    "Find everywhere, in the tab Mark, works with every collection that stores its images."
  );
}

/** Search a collection by a region ({ box } or { mask }) of an image. */
export async function searchRegion(collection, blob, region, k, signal) {
  const image = await base64(blob);
  const path = collectionPath(collection, "search");
  return json({ method: "POST", path, json: { region: { image, ...region }, k }, signal });
}

/** A button that runs `work(signal)`, and ends in dots meanwhile. A new run, or the end of `signal`, aborts the one before it. */
export function actionButton(text, signal, work, attributes = {}) {
  const next = latest(signal);
  const run = async () => {
    const own = next();
    button.textContent = `${text}...`;
    try {
      await work(own);
    } finally {
      if (!own.aborted) button.textContent = text;
    }
  };
  const button = el("button", { type: "button", ...attributes, onclick: run }, text);
  return button;
}

/** A function that returns a signal for each new request. It aborts the request before it; the end of `signal` aborts
 * them all. */
export function latest(signal) {
  let running = null;
  return () => {
    running?.abort();
    running = new AbortController();
    return AbortSignal.any([running.signal, signal]);
  };
}

/** A table of rows of text. */
export function textTable(caption, head, rows) {
  const line = (tag, cells) => el("tr", {}, ...cells.map((cell) => el(tag, tag === "th" ? { scope: "col" } : {}, cell)));
  return el(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", {}, el("caption", { class: "hidden-text" }, caption), el("thead", {}, line("th", head)), el("tbody", {}, ...rows.map((row) => line("td", row)))),
  );
}
