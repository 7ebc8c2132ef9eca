// The map of a collection: similar items are near each other.

import { announce, busy, download, el, errorBox, field, fill, select } from "../dom.js";
import { filterForm, keyList } from "../filters.js";
import { collectionNames, itemPicture } from "../images.js";
import { currentCollection, setCollection } from "../state.js";
import { layOut, loadItems } from "./map-data.js";
import { duplicatesPanel } from "./map-duplicates.js";
import { dividingKey, groupsOf, legend, metadataKeys } from "./map-legend.js";
import { mapPlot } from "./map-plot.js";
import { selectionPanel } from "./map-selection.js";

const ROUNDING = 1e-4;

export async function mount(place, parameters) {
  const map = makeMap();
  fill(place, el("h2", {}, "Map: which items are similar?"), map.element);
  const names = await busy(map.faults, collectionNames);
  if (!names) return map.stop;
  if (!names.length) {
    fill(map.status, "There is no collection yet. ", el("a", { href: "#collections" }, "Create one and add images."));
    return map.stop;
  }
  map.open(names, parameters);
  return map.stop;
}

function makeMap() {
  const collection = select([], { id: "map-collection" });
  const layout = select([["neighbours", "neighbours stay near"], ["pca", "principal components"]], { id: "map-layout" });
  const key = select([], { id: "map-key" });
  const progress = el("progress", { id: "map-progress", max: 1, "aria-label": "Progress", hidden: true });
  const stopButton = el("button", { type: "button", hidden: true, onclick: () => cancel("Stopped.") }, "Stop");
  const status = el("p", { id: "map-status", role: "status" });
  const legendList = el("ul", { class: "legend", "aria-label": "Legend: select the items with a value" });
  const hovered = el("div", { id: "map-hovered", class: "card", role: "status" });
  const faults = el("div");
  let data = { items: [], vectors: new Float32Array(0), dimension: 0, total: 0 };
  let positions = new Float32Array(0);
  let chosen = []; // indexes of the selected items
  let [loading, stopLayout, hoverTimer, filterTimer] = [null, () => {}, 0, 0];
  const filterKeys = keyList("map-filter-keys");
  const filter = filterForm({ keys: filterKeys, onchange: () => {
    clearTimeout(filterTimer);
    filterTimer = setTimeout(load, 400); // when the user has stopped typing
  } });

  const plot = mapPlot({ onfocus: (i) => showHovered(i), onselect: (indexes, isAdded) => choose(indexes, isAdded) });
  const selection = selectionPanel({ onclear: () => choose([]), ondelete: (ids) => remove(ids) });
  const duplicates = duplicatesPanel({ collection: () => collection.value, onselect: (ids) => chooseIds(ids), ondelete: (ids) => remove(ids) });

  const load = async () => {
    cancel("");
    const { signal } = (loading = new AbortController());
    const name = collection.value;
    setCollection(name);
    use({ items: [], vectors: new Float32Array(0), dimension: 0, total: 0 });
    duplicates.clear();
    fill(faults);
    working(0, "reading the vectors");
    const loaded = await busy(faults, () => loadItems(name, { signal, filter: filter.value, onprogress: (done, all) => working(done / (all || 1), `${done} of ${all} vectors`) }));
    if (signal.aborted) return;
    if (!loaded?.items.length) return done(loaded ? `${name} has no items${filter.value ? " that match the filter" : ""}.` : "");
    use(loaded);
    place();
  };
  const place = () => {
    stopLayout();
    if (!data.items.length) return;
    const { vectors, dimension } = data;
    working(0, "computing the map");
    stopLayout = layOut({
      vectors, dimension, layout: layout.value,
      onerror: (error) => (fill(faults, errorBox(error)), done("")),
      onmessage: (message) => {
        if (!message.positions) return working(message.progress, message.text);
        positions = message.positions;
        plot.show(positions, null);
        if (message.isFinal) done(described(data));
      },
    });
  };
  const use = (newData) => {
    data = newData;
    positions = new Float32Array(2 * data.items.length);
    const keys = metadataKeys(data.items);
    filterKeys.see(...data.items.slice(0, 100).map((item) => item.metadata));
    const before = key.value;
    fill(key, el("option", { value: "" }, "(one colour)"), ...keys.map((name) => el("option", { value: name }, name)));
    key.value = before && keys.includes(before) ? before : dividingKey(data.items, keys);
    colour();
    choose([]);
  };
  const colour = () => {
    const groups = groupsOf(data.items, key.value);
    const colours = new Array(data.items.length);
    for (const group of groups) for (const i of group.indexes) colours[i] = group.colour;
    plot.show(positions, colours);
    fill(legendList, ...(data.items.length ? legend(groups, (indexes, isAdded) => choose(indexes, isAdded)) : []));
  };
  const choose = (indexes, isAdded = false) => {
    chosen = isAdded ? [...new Set([...chosen, ...indexes])] : indexes;
    plot.select(chosen);
    selection.show(collection.value, chosen.map((i) => data.items[i].id));
    if (chosen.length) announce(`${chosen.length} items are selected`);
  };
  const chooseIds = (ids) => {
    const wanted = new Set(ids);
    choose(data.items.flatMap((item, i) => (wanted.has(item.id) ? [i] : [])));
  };
  const remove = (ids) => {
    const gone = new Set(ids);
    const kept = data.items.flatMap((item, i) => (gone.has(item.id) ? [] : [i]));
    if (kept.length === data.items.length) return;
    const d = data.dimension;
    const oldPositions = positions;
    const vectors = new Float32Array(kept.length * d);
    kept.forEach((i, to) => vectors.set(data.vectors.subarray(i * d, (i + 1) * d), to * d));
    stopLayout();
    use({ ...data, items: kept.map((i) => data.items[i]), vectors, total: data.total - (data.items.length - kept.length) });
    kept.forEach((i, to) => positions.set(oldPositions.subarray(2 * i, 2 * i + 2), 2 * to));
    colour();
    done(described(data));
  };
  const showHovered = (i) => {
    clearTimeout(hoverTimer);
    // The image is loaded when the pointer has rested on the item.
    hoverTimer = setTimeout(() => {
      if (i < 0 || !data.items[i]) return;
      const { id, metadata } = data.items[i];
      fill(hovered, itemPicture(collection.value, id, { alt: "" }), el("strong", {}, id), key.value in metadata ? el("span", {}, `${key.value}: ${String(metadata[key.value])}`) : null);
    }, 80);
  };
  const working = (share, text) => {
    progress.hidden = stopButton.hidden = false;
    progress.value = share;
    status.textContent = `${text[0].toUpperCase()}${text.slice(1)}...`;
  };
  const done = (text) => {
    progress.hidden = stopButton.hidden = true;
    status.textContent = text;
  };
  const cancel = (text) => {
    loading?.abort();
    stopLayout();
    done(text);
  };
  const save = () => {
    // Spreadsheets would run a text that begins with one of these characters as a formula.
    const quoted = (text) => `"${text.replace(/^[=+\-@]/, "'$&").replaceAll('"', '""')}"`;
    const lines = data.items.map(({ id }, i) => `${quoted(id)},${positions[2 * i]},${positions[2 * i + 1]}`);
    download(new Blob([["id,x,y", ...lines, ""].join("\n")], { type: "text/csv" }), `${collection.value}-map.csv`);
  };
  collection.addEventListener("change", () => {
    filterKeys.clear();
    load();
  });
  layout.addEventListener("change", place);
  key.addEventListener("change", colour);
  const rectangle = rectangleForm((left, right, top, bottom, isAdded) => {
    const [l, r, t, b] = [left - ROUNDING, right + ROUNDING, top - ROUNDING, bottom + ROUNDING]; // with the items on its border
    choose(plot.inside([[l, t], [r, t], [r, b], [l, b]]), isAdded);
  });
  const element = el("div", {},
    el("div", { class: "row ends" }, field("Collection", collection), field("Layout", layout), field("Colours by", key), el("button", { type: "button", onclick: load }, "Read again"), el("button", { type: "button", onclick: save }, "Save the positions (CSV)")),
    el("details", { id: "map-filter" }, el("summary", {}, "Filter"), filterKeys, filter),
    el("div", { class: "row" }, status, progress, stopButton), faults,
    el("div", { class: "map-parts" },
      el("div", {}, toolbar(plot), plot.element,
        el("p", { id: "map-keys", class: "quiet" }, "Arrow keys: next item in a direction. Shift and arrows: move the map. + and -: zoom, 0: everything. Enter: add the item to the selection, Escape: select nothing.")),
      el("div", {}, el("h3", {}, "Legend"), legendList, hovered)),
    rectangle,
    el("div", { class: "columns" }, selection.element, duplicates.element));
  const open = (names, parameters) => {
    fill(collection, ...names.map((name) => el("option", { value: name }, name)));
    const wanted = parameters.get("collection") ?? currentCollection();
    if (names.includes(wanted)) collection.value = wanted;
    if (parameters.get("layout") === "pca") layout.value = "pca";
    load();
  };
  const stop = () => {
    cancel("");
    clearTimeout(hoverTimer);
    clearTimeout(filterTimer);
    duplicates.clear();
    plot.stop();
  };
  return { element, faults, status, open, stop };
}

const described = ({ items, total }) => (items.length < total ? `The first ${items.length} of ${total} items.` : `${items.length} ${items.length === 1 ? "item" : "items"}.`);

function toolbar(plot) {
  const lasso = el("button", { type: "button", id: "map-lasso", "aria-pressed": "false" }, "Lasso");
  lasso.addEventListener("click", () => {
    plot.lasso = !plot.lasso;
    lasso.setAttribute("aria-pressed", String(plot.lasso));
  });
  const button = (text, label, onclick) => el("button", { type: "button", "aria-label": label, title: label, onclick }, text);
  return el("div", { class: "row", role: "toolbar", "aria-label": "Map" }, lasso,
    button("+", "Zoom in", () => plot.zoom(1.5)), button("−", "Zoom out", () => plot.zoom(1 / 1.5)), button("All", "All items", () => plot.fit()));
}

/** Fields that select the items in a rectangle, for those who cannot draw an outline. */
function rectangleForm(onrectangle) {
  const number = (id, value) => el("input", { id, type: "number", step: "any", required: true, ".value": value });
  const [left, right, top, bottom] = [number("map-left", "-10"), number("map-right", "0"), number("map-top", "-10"), number("map-bottom", "10")];
  const isAdded = el("input", { type: "checkbox", id: "map-added" });
  const form = el("form", { class: "row ends" }, field("x from", left), field("x to", right), field("y from (top)", top), field("y to (bottom)", bottom),
    field("Add to the selection", isAdded), el("button", { type: "submit" }, "Select the rectangle"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    onrectangle(...[left, right, top, bottom].map((input) => Number(input.value)), isAdded.checked);
  });
  return el("details", { id: "map-rectangle" }, el("summary", {}, "Select a rectangle by numbers"), el("p", { class: "quiet" }, "Coordinates go from -10 to 10."), form);
}
