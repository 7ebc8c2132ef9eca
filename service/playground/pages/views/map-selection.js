// The selected items of the map, and what can be done with them.

import { collectionPath, json } from "../api.js";
import { announce, askingButton, busy, copyText, el, fill } from "../dom.js";
import { itemPicture } from "../images.js";
import { setCollection, setFilter } from "../state.js";

const SHOWN = 12;

/** Make the panel. `onclear` is called by a button, `ondelete` with the ids of deleted items. */
export function selectionPanel({ onclear, ondelete }) {
  const count = el("p", { id: "map-selected", role: "status" });
  const pictures = el("ul", { class: "results small-results" });
  const faults = el("div");
  const actions = el("div", { class: "row" });
  const element = el("section", { "aria-label": "Selection" }, el("h3", {}, "Selection"), count, actions, faults, pictures);

  const show = (collection, ids) => {
    fill(faults);
    count.textContent = ids.length
      ? `${ids.length} ${ids.length === 1 ? "item is" : "items are"} selected.`
      : "Nothing is selected. Draw an outline with the lasso, choose a value of the legend, or enter a rectangle.";
    fill(pictures, ...ids.slice(0, SHOWN).map((id) => el("li", { class: "card" }, itemPicture(collection, id, { alt: "" }), el("span", {}, id))));
    if (ids.length > SHOWN) pictures.append(el("li", { class: "quiet" }, `and ${ids.length - SHOWN} more`));
    fill(actions, ...(ids.length ? buttons(collection, ids) : []));
  };
  const buttons = (collection, ids) => [
    el("button", { type: "button", class: "primary", onclick: () => searchIn(collection, ids) }, "Search only in these"),
    ids.length === 2 ? matchLink(collection, ids) : null,
    el("button", { type: "button", onclick: () => copyText(ids.join("\n"), `${ids.length} ids are`) }, "Copy the ids"),
    askingButton("Delete", () => `Delete ${ids.length} items of ${collection}?`, () => deleteItems(collection, ids)),
    el("button", { type: "button", onclick: onclear }, "Select nothing"),
  ];
  const deleteItems = async (collection, ids) => {
    const answer = await busy(faults, () => removed(collection, ids));
    if (!answer) return;
    ondelete(ids);
    announce(`${answer.deleted} items are deleted`);
  };
  return { element, show };
}

/** A link to the view that shows why two items are similar. */
export function matchLink(collection, [a, b]) {
  return el("a", { href: `#match?${new URLSearchParams({ collection, a, b })}` }, "Why are these two similar?");
}

/** Delete items. Return the answer, which has their number. */
export function removed(collection, ids) {
  return json({ method: "POST", path: collectionPath(collection, "items", "delete"), json: { ids } });
}

function searchIn(collection, ids) {
  setCollection(collection);
  setFilter({ field: "id", in: ids });
  location.hash = "#search";
}
