// Collections: a list of all, and one of them with its items, facets and uploads.

import { collectionPath, json } from "../api.js";
import { announce, busy, dialog, el, field, fill, select } from "../dom.js";
import { keyList } from "../filters.js";
import { currentCollection, setCollection } from "../state.js";
import { facetsPanel } from "./collections-facets.js";
import { itemsPanel } from "./collections-items.js";
import { fileInput, uploadPanel } from "./collections-upload.js";

const waiting = { files: [] }; // chosen before the collection was created

export function mount(place, parameters) {
  const leaving = new AbortController();
  const context = { place, signal: leaving.signal, parts: [] };
  const name = parameters.get("collection");
  if (name === null) showList(context);
  else showOne(context, name);
  return () => {
    leaving.abort();
    context.parts.forEach((part) => part.stop());
  };
}

const link = (name) => `#collections?${new URLSearchParams({ collection: name })}`;

async function showList({ place, signal }) {
  const list = el("div", { id: "collection-list" });
  fill(place, el("h2", {}, "Collections"), list);
  const load = async () => {
    const found = await busy(list, async () => [
      (await json({ path: "/v1/collections", signal })).data,
      (await json({ path: "/v1/models", signal, shown: false })).data,
    ]);
    if (found) fill(list, found[0].length ? tableOf(...found, load) : firstSteps(signal));
  };
  await load();
  if (place.isConnected) place.append(createForm(signal));
}

function tableOf(collections, models, reload) {
  const row = (one) => {
    const mine = models.find((model) => one.tag.startsWith(`${model.fingerprint}/`));
    const model = mine ? `${mine.id}${mine === models[0] ? " (live)" : ""}` : `${one.tag.slice(0, 8)} (not served)`;
    const bytes = one.count * one.dimension * (one.dtype === "float16" ? 2 : 4);
    return el("tr", { "data-name": one.name },
      el("th", { scope: "row" }, el("a", { href: link(one.name) }, one.name), one.damaged && " (damaged)"),
      el("td", {}, String(one.count)), el("td", {}, model), el("td", {}, `${one.pooling}, ${one.dimension} × ${one.dtype}`),
      el("td", {}, sizeText(bytes)), el("td", {}, one.index.kind), el("td", {}, one.originals ? "stored" : "not stored"),
      el("td", {}, one.aliases.join(", ")),
      el("td", {}, el("button", { type: "button", onclick: () => confirmDelete(one, reload) }, "delete", el("span", { class: "hidden-text" }, ` ${one.name}`))));
  };
  const titles = ["Name", "Items", "Model", "Vectors", "Size of the vectors", "Index", "Images", "Aliases", "Actions"];
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "All collections" },
    el("table", {}, el("thead", {}, el("tr", {}, titles.map((title) => el("th", { scope: "col" }, title)))), el("tbody", {}, collections.map(row))));
}

function firstSteps(signal) {
  const note = el("div");
  const input = fileInput("first-files", "Images for the first collection", (chosen) =>
    busy(note, async () => {
      await json({ method: "PUT", path: collectionPath("demo"), json: { originals: true }, signal });
      waiting.files = chosen;
      location.hash = link("demo");
    }));
  return el("div", { class: "first" },
    el("p", {}, "There is no collection yet. A collection holds the images that a search compares: create one, and add images to it."),
    el("button", { id: "first-collection", type: "button", class: "primary", onclick: () => input.click() }, "Create the collection demo and choose its images"),
    input, note);
}

function createForm(signal) {
  const name = el("input", { id: "create-name", required: true, pattern: "[a-z0-9][a-z0-9_\\-]{0,63}", title: "1 to 64 characters: a-z 0-9 _ -, and a letter or a digit at the beginning", autocomplete: "off", spellcheck: "false" });
  const pooling = select([["cls", "class token (cls)"], ["mean", "mean of the patches (mean)"], ["cls+mean", "both (cls+mean)"]], { id: "create-pooling" });
  const dtype = select(["float32", "float16"], { id: "create-dtype" });
  const kind = select([["auto", "auto: by the number of items"], "flat", "hnsw", "ivf_pq", "rabitq"], { id: "create-index" });
  const originals = el("input", { id: "create-originals", type: "checkbox", ".checked": true });
  const indexed = el("input", { id: "create-indexed", autocomplete: "off", spellcheck: "false" });
  const note = el("div");
  const create = async (event) => {
    event.preventDefault();
    const body = {
      pooling: pooling.value, dtype: dtype.value, index: { kind: kind.value }, originals: originals.checked,
      indexed: indexed.value.split(",").map((key) => key.trim()).filter(Boolean),
    };
    fill(note);
    const made = await busy(note, () => json({ method: "PUT", path: collectionPath(name.value), json: body, signal }));
    if (!made) return;
    announce(`Collection ${made.name} is created`);
    location.hash = link(made.name);
  };
  return el("details", { id: "create" }, el("summary", {}, "Create a collection"),
    el("form", { id: "create-form", onsubmit: create },
      field("Name", name, "a-z 0-9 _ -"), field("Vector of an image", pooling, "mean: needed for searches by region"),
      field("Numbers", dtype, "float16: half the size"), field("Index", kind),
      field("Indexed keys", indexed, "metadata keys, separated by commas: faster filters"),
      el("div", { class: "check" }, originals, el("label", { for: originals.id }, "Store the images"), el("small", {}, "they are shown here, and can be re-ranked and embedded again")),
      el("button", { type: "submit", class: "primary" }, "Create"), note));
}

function confirmDelete(one, ondone) {
  dialog(`Delete the collection ${one.name}?`, (close) => {
    const typed = el("input", { id: "confirm-name", autocomplete: "off", spellcheck: "false", oninput: () => { remove.disabled = typed.value !== one.name; } });
    const remove = el("button", { type: "submit", disabled: true }, "Delete the collection");
    const note = el("div");
    const submit = async (event) => {
      event.preventDefault();
      if (typed.value !== one.name) return;
      const done = await busy(note, () => json({ method: "DELETE", path: collectionPath(one.name) }));
      if (!done) return;
      if (currentCollection() === one.name) setCollection("");
      close();
      announce(`Collection ${one.name} is deleted`);
      ondone();
    };
    return el("form", { onsubmit: submit },
      el("p", {}, `Its ${one.count} items are deleted and cannot be restored without a snapshot. Stored images are kept until they are erased (dinov2 originals erase --unreferenced).`),
      field(`Type ${one.name} to confirm`, typed), el("div", { class: "row" }, remove), note);
  });
}

async function showOne({ place, signal, parts }, name) {
  const heading = el("h2", { tabindex: "-1" }, name);
  const facts = el("div", { id: "facts" });
  fill(place, el("p", {}, el("a", { href: "#collections" }, "All collections")), heading, facts);
  const load = (shown) => busy(facts, () => json({ path: collectionPath(name), signal, shown }));
  const info = await load(true);
  if (!info || !place.isConnected) return;
  setCollection(name);
  const keys = keyList("collection-keys");
  keys.add(info.indexed);
  const refresh = async () => {
    const now = await load(false);
    if (now) fill(facts, factsOf(now));
  };
  const items = itemsPanel({ collection: name, keys, originals: info.originals, onchange: refresh });
  const facets = facetsPanel({ collection: name, keys, onchoose: (filter) => items.useFilter(filter) });
  const panel = uploadPanel({ collection: name, ondone: () => { refresh(); items.load(); } });
  parts.push(items, facets, panel);
  fill(facts, factsOf(info));
  const remove = () => confirmDelete(info, () => { location.hash = "#collections"; });
  place.append(keys,
    el("p", { class: "row" }, el("a", { href: `#search?${new URLSearchParams({ collection: name })}` }, "Search in it"),
      el("button", { type: "button", onclick: remove }, "Delete the collection")),
    el("details", { id: "upload", open: info.count === 0 || waiting.files.length > 0 }, el("summary", {}, "Upload images"), panel),
    el("details", { id: "facets" }, el("summary", {}, "Count the values of a key"), facets), items);
  items.load();
  if (waiting.files.length) panel.start(waiting.files.splice(0));
}

function factsOf(info) {
  return el("p", {}, el("span", { id: "fact-count" }, `${info.count} ${info.count === 1 ? "item" : "items"}`),
    `, ${info.pooling}, ${info.dimension} × ${info.dtype}, index ${info.index.kind}, images ${info.originals ? "stored" : "not stored"}, `,
    info.indexed.length ? `indexed: ${info.indexed.join(", ")}` : "no indexed keys", `, model ${info.model ?? "not served"}`);
}

function sizeText(bytes) {
  const units = ["B", "KB", "MB", "GB", "TB"];
  const unit = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(bytes, 1)) / 3));
  return `${(bytes / 1000 ** unit).toFixed(unit ? 1 : 0)} ${units[unit]}`;
}
