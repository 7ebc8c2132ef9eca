// Shows the items of a collection page by page, and lets the user choose one.

import { collectionPath, json } from "./api.js";
import { announce, busy, el, fill } from "./dom.js";
import { itemPicture } from "./images.js";

const PAGE = 24;

/** A list of the items of the collection that `collection()` names. `onpick` gets the item that is chosen, `onpage` the
 * items of a page. Nothing is loaded before the list is opened. Call `.reset()` when the collection changes, and
 * `.stop()` at the end. */
export function itemChooser({ collection, onpick, onpage = () => {}, title = "Choose an item of the collection" }) {
  let abort = new AbortController();
  let cursor = null;
  const prefix = el("input", { type: "search", "aria-label": "Beginning of the item's id", placeholder: "id begins with", spellcheck: "false" });
  const list = el("ul", { class: "choices" });
  const more = el("button", { type: "button", hidden: true, onclick: () => load() }, "more items");
  const note = el("div");
  const element = el("details", { class: "chooser", ontoggle: () => element.open && !list.children.length && load() },
    el("summary", {}, title),
    el("form", { class: "row", onsubmit: (event) => { event.preventDefault(); start(); } }, prefix, el("button", { type: "submit" }, "find")),
    note, list, more);

  async function load() {
    abort.abort();
    abort = new AbortController();
    const name = collection();
    if (!name) return fill(note, el("p", {}, "Choose a collection first."));
    const filter = prefix.value ? { field: "id", prefix: prefix.value } : undefined;
    const body = { limit: PAGE, cursor: cursor ?? undefined, filter };
    const call = { method: "POST", path: collectionPath(name, "items", "scroll"), json: body, shown: false, signal: abort.signal };
    const page = await busy(note, () => json(call));
    if (!page) return;
    onpage(page.data);
    cursor = page.cursor;
    more.hidden = !cursor;
    fill(note, page.data.length || list.children.length ? null : el("p", {}, "No item has this beginning."));
    list.append(...page.data.map((item) => el("li", {}, el("button", { type: "button", onclick: () => onpick(item) },
      itemPicture(name, item.id, { alt: "" }), el("span", {}, item.id)))));
    announce(`${list.children.length} items are listed`);
  }

  function start() {
    cursor = null;
    fill(list);
    more.hidden = true;
    return load();
  }

  element.reset = () => {
    abort.abort();
    cursor = null;
    fill(list);
    fill(note);
    more.hidden = true;
    prefix.value = "";
    if (element.open) load();
  };
  element.stop = () => abort.abort();
  return element;
}
