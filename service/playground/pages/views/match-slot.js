// One of the two images: chosen by the picker, from the other views, or from a collection.

import { collectionPath, json } from "../api.js";
import { busy, el, field, fill, select } from "../dom.js";
import { collectionNames, decoded, imagePicker, itemImage } from "../images.js";
import { currentCollection, currentImage } from "../state.js";

/** Make a slot. Its property `image` is { blob, item, bitmap } or null; `onchange` is called after it has changed. */
export function imageSlot({ name, onchange, takesPaste }) {
  const slot = { image: null };
  const note = el("p", { class: "quiet" }, "no image");
  const faults = el("div");
  let version = 0;
  let loading = null;

  slot.load = (get) => {
    const mine = ++version;
    loading?.abort();
    const { signal } = (loading = new AbortController());
    fill(faults);
    return busy(faults, async () => {
      const chosen = await get(signal);
      const bitmap = await decoded(chosen.blob);
      if (mine !== version) return bitmap.close();
      slot.image?.bitmap.close();
      slot.image = { ...chosen, bitmap };
      const origin = chosen.item ? `${chosen.item.id} of ${chosen.item.collection}` : chosen.blob.name;
      note.textContent = `${origin}, ${bitmap.width} × ${bitmap.height} pixels`;
      items.show(chosen.item);
      if (choice.contains(document.activeElement)) summary.focus();
      choice.open = false;
      summary.textContent = "Choose another image";
      onchange();
    });
  };
  const picker = imagePicker({ onimage: (chosen) => slot.load(() => chosen), takesPaste });
  const current = el("button", { type: "button", onclick: () => slot.load(() => currentImage()) }, "Use the image of the other views");
  current.hidden = !currentImage();
  const items = itemChooser((collection, id) => slot.load((signal) => itemImage(collection, id, signal)));
  const summary = el("summary", {}, "Choose an image");
  const choice = el("details", { open: true }, summary, picker, current, items.element);
  slot.element = el("section", { class: "match-slot", "aria-label": name }, el("h3", {}, name), note, choice, faults);
  slot.stop = () => {
    version++;
    loading?.abort();
    items.stop();
    picker.stop();
    slot.image?.bitmap.close();
  };
  return slot;
}

/** Fields to choose an item by its id, which is completed while the user types. */
function itemChooser(onitem) {
  const list = el("datalist", { id: `ids-${(itemChooser.count = (itemChooser.count ?? 0) + 1)}` });
  const collection = select([], {});
  const id = el("input", { type: "text", list: list.id, autocomplete: "off", spellcheck: "false" });
  let running = null;
  let wanted = ""; // the collection of the image, which may be known before the names of all collections
  const complete = async () => {
    running?.abort();
    const { signal } = (running = new AbortController());
    const filter = id.value ? { field: "id", prefix: id.value } : undefined;
    try {
      const path = collectionPath(collection.value, "items", "scroll");
      const { data } = await json({ method: "POST", path, json: { filter, limit: 50 }, signal, shown: false });
      fill(list, ...data.map((item) => el("option", { value: item.id })));
    } catch (error) {
      if (error.name !== "AbortError") fill(list); // only the completion is missing; the form reports errors of the item
    }
  };
  const form = el("form", { class: "row ends", hidden: true }, field("Collection", collection), field("Item", id), list,
    el("button", { type: "submit" }, "Use the item"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (id.value) onitem(collection.value, id.value);
  });
  id.addEventListener("input", complete);
  collection.addEventListener("change", complete);
  collectionNames().then((names) => {
    fill(collection, ...names.map((name) => el("option", { value: name }, name)));
    collection.value = names.includes(wanted) ? wanted : names.includes(currentCollection()) ? currentCollection() : names[0] ?? "";
    form.hidden = names.length === 0;
    if (names.length) complete();
  }, () => {}); // without collections, the form stays hidden
  const show = (item) => {
    if (!item) return;
    wanted = collection.value = item.collection;
    id.value = item.id;
  };
  return { element: form, show, stop: () => running?.abort() };
}
