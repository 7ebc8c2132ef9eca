// Groups of duplicates in a collection: keep one item of a group, and delete the others.

import { collectionPath, json } from "../api.js";
import { announce, askingButton, busy, el, field, fill, select, slider } from "../dom.js";
import { itemPicture } from "../images.js";
import { matchLink, removed } from "./map-selection.js";

/** Make the panel. `collection()` is the name of the collection, `onselect` gets the ids of a group that is to be shown on the
 * map, and `ondelete` the ids of deleted items. */
export function duplicatesPanel({ collection, onselect, ondelete }) {
  const by = select([["similarity", "similar vectors"], ["content", "equal bytes of the images"]], { id: "duplicates-by" });
  const threshold = slider("Lowest similarity", { id: "duplicates-threshold", min: 0.5, max: 1, step: 0.005, value: 0.95, digits: 3 });
  const note = el("p", { id: "duplicates-note", role: "status" });
  const groups = el("ol", { class: "duplicates" });
  const faults = el("div");
  let running = null;

  const find = async () => {
    running?.abort();
    const { signal } = (running = new AbortController());
    const name = collection();
    fill(groups);
    fill(faults);
    note.textContent = "Comparing...";
    const body = by.value === "content" ? { by: "content" } : { by: "similarity", threshold: Number(threshold.input.value) };
    const path = collectionPath(name, "duplicates");
    const answer = await busy(faults, () => json({ method: "POST", path, json: body, signal }));
    if (signal.aborted) return;
    note.textContent = answer ? summary(answer) : "";
    if (answer) fill(groups, ...answer.groups.map((group) => groupCard(name, group)));
  };
  const groupCard = (name, group) => {
    const ids = group.items.map((item) => item.id);
    const fault = el("div");
    const keep = `keep-${(duplicatesPanel.count = (duplicatesPanel.count ?? 0) + 1)}`;
    const cards = group.items.map((item, i) =>
      el("li", { class: "card" },
        itemPicture(name, item.id, { alt: "" }),
        el("label", {}, el("input", { type: "radio", name: keep, value: item.id, ".checked": i === 0 }), ` keep ${item.id}`),
        el("small", {}, `similarity to the first: ${item.score.toFixed(3)}`),
      ));
    const place = el("li", { class: "duplicate-group" },
      el("ul", { class: "results small-results" }, ...cards),
      el("div", { class: "row" },
        askingButton("Delete the others", () => `Delete ${ids.length - 1} items of ${name}?`, () => keepOne()),
        el("button", { type: "button", onclick: () => onselect(ids) }, "Show on the map"),
        ids.length === 2 ? matchLink(name, ids) : null,
      ),
      fault,
    );
    const keepOne = async () => {
      const others = ids.filter((id) => id !== place.querySelector("input:checked").value);
      const answer = await busy(fault, () => removed(name, others));
      if (!answer) return;
      place.remove();
      note.focus();
      ondelete(others);
      announce(`${answer.deleted} items are deleted`);
    };
    return place;
  };
  note.tabIndex = -1;
  by.addEventListener("change", () => (threshold.input.disabled = by.value === "content"));
  const element = el("section", { "aria-label": "Duplicates" },
    el("h3", {}, "Duplicates"),
    el("div", { class: "row ends" },
      field("Duplicates have", by),
      threshold,
      el("button", { type: "button", id: "duplicates-find", onclick: find }, "Find duplicates"),
    ),
    note, faults, groups,
  );
  const clear = () => {
    running?.abort();
    note.textContent = "";
    fill(groups);
    fill(faults);
  };
  return { element, clear };
}

function summary(answer) {
  const parts = [`${answer.total_groups} ${answer.total_groups === 1 ? "group" : "groups"} among ${answer.compared} items.`];
  if (answer.groups.length < answer.total_groups) parts.push(`The ${answer.groups.length} largest are shown.`);
  if (answer.without_digest) parts.push(`${answer.without_digest} items have no stored digest.`);
  if (answer.truncated) parts.push("Some groups may belong together, because an item has too many neighbours.");
  return parts.join(" ");
}
