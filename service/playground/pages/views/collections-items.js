// The items of a collection page by page: filter, order, edit and delete them, and look at their images.

import { collectionPath, json } from "../api.js";
import { announce, busy, dialog, download, el, errorBox, field, fill, select } from "../dom.js";
import { filterForm } from "../filters.js";
import { decoded, itemImage, itemPicture } from "../images.js";
import { itemEditor } from "./collections-edit.js";
import { metadataList } from "./search-results.js";

/** The part of the page with the items. `.load()` reads the page again, `.useFilter(filter)` shows the items that match.
 * `onchange` is called when items were deleted. Call `.stop()` when it is left. */
export function itemsPanel({ collection, keys, originals, onchange }) {
  let running = new AbortController();
  let timer = 0;
  let cursors = [undefined]; // of the pages up to this one
  let following = null; // the cursor of the next page
  const chosen = new Set();

  const filter = filterForm({ keys, onchange: () => later() });
  const order = el("input", { id: "items-order", list: keys.id, autocomplete: "off", spellcheck: "false", oninput: () => later() });
  const direction = select([["asc", "smallest first"], ["desc", "largest first"]], { id: "items-direction", onchange: () => later() });
  const limit = select(["24", "96", "384"], { id: "items-limit", onchange: () => later() });
  const summary = el("p", { id: "items-summary", tabindex: "-1" });
  const list = el("ul", { class: "results", id: "items" });
  const note = el("div");
  const previous = el("button", { id: "items-previous", type: "button", onclick: () => { cursors.pop(); load(true); } }, "Previous");
  const next = el("button", { id: "items-next", type: "button", onclick: () => { cursors.push(following); load(true); } }, "Next");
  const all = el("button", { id: "items-all", type: "button", onclick: () => chooseAll() }, "select all of this page");
  const removeChosen = el("button", { id: "items-delete", type: "button", disabled: true, onclick: () => confirmDelete([...chosen]) }, "Delete the selected items");
  const element = el("section", { "aria-labelledby": "items-title" }, el("h3", { id: "items-title" }, "Items"),
    el("details", { id: "items-options" }, el("summary", {}, "Filter and order"), filter,
      field("Order by", order, "a metadata key"), field("Direction", direction), field("Items per page", limit)),
    el("div", { class: "row" }, all, removeChosen), summary, note, list,
    el("nav", { class: "row", "aria-label": "Pages of items" }, previous, next));

  function later() {
    clearTimeout(timer);
    running.abort();
    timer = setTimeout(() => { cursors = [undefined]; load(true); }, 250);
  }

  /** Read the page. With `shown`, the call is shown as code. */
  async function load(shown = false) {
    running.abort();
    running = new AbortController();
    const { signal } = running;
    const by = order.value.trim();
    const body = {
      limit: Number(limit.value), filter: filter.value ?? undefined, cursor: cursors.at(-1),
      order_by: by ? { key: by, direction: direction.value } : undefined,
    };
    const call = { method: "POST", path: collectionPath(collection, "items", "scroll"), json: body, signal, shown };
    const page = await busy(note, () => json(call));
    if (!page || signal.aborted) return;
    fill(note);
    chosen.clear();
    following = page.cursor;
    keys.see(...page.data.map((item) => item.metadata));
    fill(list, page.data.map(card));
    if ((document.activeElement === next && !following) || (document.activeElement === previous && cursors.length < 2)) summary.focus();
    next.disabled = !following;
    previous.disabled = cursors.length < 2;
    fill(summary, page.data.length ? `Page ${cursors.length}: ${page.data.length} ${page.data.length === 1 ? "item" : "items"}${following ? ", more on the next page" : ""}` : filter.value ? "No item matches." : "There are no items yet.");
    all.disabled = !page.data.length;
    showChosen();
    if (shown) announce(summary.textContent);
  }

  function card(item) {
    const box = el("input", { type: "checkbox", onchange: () => { box.checked ? chosen.add(item.id) : chosen.delete(item.id); showChosen(); } });
    const element = el("li", { class: "card", "data-id": item.id });
    const named = (text) => [text, el("span", { class: "hidden-text" }, `: ${item.id}`)];
    const show = () => fill(element,
      originals ? itemPicture(collection, item.id) : el("span", { class: "no-image" }, "no stored image"),
      el("label", {}, box, " ", el("strong", { class: "id" }, item.id)), metadataList(item.metadata, item.source),
      el("div", { class: "actions" },
        el("button", { type: "button", onclick: () => edit() }, named("edit")),
        originals && el("button", { type: "button", onclick: () => showImage(collection, item.id) }, named("show the image")),
        el("a", { href: `#search?${new URLSearchParams({ collection, id: item.id })}` }, named("search by this")),
        originals && el("a", { href: `#image?${new URLSearchParams({ collection, item: item.id })}` }, named("look at it")),
        el("button", { type: "button", onclick: () => confirmDelete([item.id]) }, named("delete"))));
    const edit = () => itemEditor({ collection, item, onsaved: (saved) => {
      item = saved;
      keys.see(item.metadata);
      show();
      element.querySelector("button")?.focus();
    } });
    show();
    return element;
  }

  function chooseAll() {
    const boxes = [...list.querySelectorAll("input[type=checkbox]")];
    const check = boxes.some((box) => !box.checked);
    for (const box of boxes) {
      box.checked = check;
      box.dispatchEvent(new Event("change"));
    }
  }

  function showChosen() {
    removeChosen.disabled = !chosen.size;
    fill(removeChosen, chosen.size ? `Delete the ${chosen.size} selected` : "Delete the selected items");
  }

  function confirmDelete(ids) {
    const what = ids.length === 1 ? "this item" : `these ${ids.length} items`;
    dialog(`Delete ${what}?`, (close) => {
      const problem = el("div");
      const work = async () => {
        const call = { method: "POST", path: collectionPath(collection, "items", "delete"), json: { ids } };
        const done = await busy(problem, () => json(call));
        if (!done) return;
        close();
        await load();
        announce(`${done.deleted} deleted`);
        summary.focus();
        onchange();
      };
      return [el("ul", {}, ids.slice(0, 10).map((id) => el("li", {}, id)), ids.length > 10 && el("li", {}, `and ${ids.length - 10} more`)),
        el("p", {}, "Stored images are kept until they are erased (dinov2 originals erase --unreferenced)."), problem, el("button", { type: "button", class: "confirm", onclick: work }, `Delete ${what}`)];
    });
  }

  element.load = () => load();
  element.useFilter = (given) => {
    filter.set(given);
    document.getElementById("items-options").open = true;
    cursors = [undefined];
    return load(true);
  };
  element.stop = () => {
    clearTimeout(timer);
    running.abort();
  };
  return element;
}

async function showImage(collection, id) {
  const place = el("div", { "aria-live": "polite" });
  let url = "";
  dialog(`Image of ${id}`, () => place).addEventListener("close", () => URL.revokeObjectURL(url));
  try {
    const { blob } = await itemImage(collection, id);
    const bitmap = await decoded(blob);
    url = URL.createObjectURL(blob);
    fill(place, el("img", { class: "picture", alt: id, src: url }),
      el("p", {}, `${bitmap.width} × ${bitmap.height} pixels, ${Math.ceil(blob.size / 1000)} KB, ${blob.type}`),
      el("button", { type: "button", onclick: () => download(blob, blob.name) }, "Download"));
    bitmap.close();
  } catch (error) {
    fill(place, errorBox(error));
  }
}
