// Click a patch: how similar it is to all patches of this image, and of the most similar images of a collection.

import { collectionPath, json } from "../api.js";
import { announce, busy, el, errorBox, field, fill, select } from "../dom.js";
import { decoded, itemImage } from "../images.js";
import { actionButton, collectionField, itemLink, regionSearchProblem, searchRegion, sizeField } from "./image-common.js";
import { patchFeatures, patchVector, similarities } from "./image-features.js";
import { drawHeat, heatLegend, heatMap, opacitySlider, rangeOf } from "./image-heat.js";
import { arrow } from "./image-stage.js";
import { resultCards } from "./image-results.js";

const KEPT = 60; // images of a collection whose features are kept

export async function mount(place, context) {
  const { stage, signal } = context;
  const readout = el("output", { id: "patch-readout", class: "readout" }, "Computing the patch features...");
  const legend = heatLegend();
  const opacity = opacitySlider(() => stage.drawSoon());
  const range = select([["image", "lowest to highest of this image"], ["fixed", "0 to 1"]], { id: "heat-range", onchange: () => choose() });
  const size = sizeField(() => load());
  const map = { features: null, row: 0, column: 0, at: null, values: null, range: [0, 1], heat: el("canvas"), others: new Set() };
  let turn = 0;

  stage.paint = (canvas, scale) => {
    if (!map.values) return;
    drawHeat(canvas, map.heat, Number(opacity.value));
    outline(canvas, scale, map.row, map.column, 3);
    if (map.at) outline(canvas, scale, ...map.at, 1);
  };

  function patchSize() {
    return [stage.width / map.features.width, stage.height / map.features.height];
  }

  function outline(canvas, scale, row, column, line) {
    const [w, h] = patchSize();
    for (const [colour, width] of [["#000000", line + 2], ["#ffffff", line]]) {
      canvas.strokeStyle = colour;
      canvas.lineWidth = width;
      canvas.strokeRect(column * w * scale, row * h * scale, w * scale, h * scale);
    }
  }

  /** Compare the chosen patch with all patches, and draw the result at once. */
  function choose(row = map.row, column = map.column) {
    if (!map.features) return;
    const started = performance.now();
    map.row = row;
    map.column = column;
    const vector = patchVector(map.features, row, column);
    map.values = similarities(map.features, vector);
    map.range = range.value === "fixed" ? [0, 1] : rangeOf(map.values);
    heatMap(map.values, map.features.height, map.features.width, map.range, map.heat);
    stage.draw();
    const elapsed = performance.now() - started;
    legend.show(map.range);
    for (const draw of map.others) draw(vector, map.range);
    readout.dataset.ms = elapsed.toFixed(2);
    describe();
  }

  function describe() {
    const { height, width } = map.features;
    const [row, column] = map.at ?? [map.row, map.column];
    const value = map.values[row * width + column];
    const [low, high] = rangeOf(map.values);
    Object.assign(readout.dataset, { row: map.row, column: map.column, atRow: row, atColumn: column, similarity: value });
    Object.assign(readout.dataset, { low, high, grid: `${height}x${width}` });
    readout.textContent =
      `Chosen: row ${map.row + 1}, column ${map.column + 1} of ${height} × ${width} patches. ` +
      `Similarity at row ${row + 1}, column ${column + 1}: ${value.toFixed(3)}. ` +
      `All patches: ${low.toFixed(3)} to ${high.toFixed(3)}.`;
    stage.label(`The image with the similarity to a patch. ${readout.textContent} Arrow keys choose a patch, Shift and arrow keys read the similarity of another one.`);
  }

  const patchAt = (x, y) => {
    const [w, h] = patchSize();
    return [Math.floor(y / h), Math.floor(x / w)];
  };
  let pending = null;
  stage.point = (kind, x, y) => {
    if (!map.features) return;
    if (kind === "down") {
      map.at = null;
      choose(...patchAt(x, y));
    } else if (kind === "move") {
      if (!pending) requestAnimationFrame(() => {
        const patch = pending;
        pending = null;
        if (!signal.aborted) choose(...patch);
      });
      pending = patchAt(x, y);
    } else if (kind === "over" || kind === "out") {
      map.at = kind === "over" ? patchAt(x, y) : null;
      describe();
      stage.drawSoon();
    }
  };
  stage.key = (event) => {
    const step = arrow(event);
    if (!step || !map.features) return false;
    const [row, column] = event.shiftKey ? (map.at ?? [map.row, map.column]) : [map.row, map.column];
    const to = [within(row + step[1], map.features.height), within(column + step[0], map.features.width)];
    if (event.shiftKey) {
      map.at = to;
      describe();
      stage.drawSoon();
    } else {
      map.at = null;
      choose(...to);
    }
    announce(readout.textContent);
    return true;
  };

  async function load() {
    const mine = ++turn;
    delete readout.dataset.ready;
    readout.textContent = "Computing the patch features...";
    try {
      const features = await context.features(size.control.value);
      if (mine !== turn || signal.aborted) return;
      map.features = features;
      map.at = null;
      choose(Math.floor(features.height / 2), Math.floor(features.width / 2));
      readout.dataset.ready = size.control.value;
    } catch (error) {
      if (error.name !== "AbortError" && mine === turn) fill(readout, errorBox(error));
    }
  }

  place.append(
    el("p", {}, "Click a patch, or choose one with the arrow keys. The colours show the cosine similarity of its features to those of all other patches."),
    el("div", {}, size.element, field("Range of colours", range), field("Opacity", opacity)),
    legend,
    readout,
  );
  const regionBox = (side) => {
    const [w, h] = patchSize();
    const half = (side - 1) / 2;
    const left = Math.max(0, (map.column - half) * w);
    const top = Math.max(0, (map.row - half) * h);
    const right = Math.min(stage.width, (map.column + half + 1) * w);
    const bottom = Math.min(stage.height, (map.row + half + 1) * h);
    return [left, top, right - left, bottom - top].map((value) => Math.round(value));
  };
  const others = el("section", { "aria-label": "In a collection" });
  place.append(others);
  load();
  await fillOthers(others, context, map, { choose, regionBox, size: size.control });
}

const within = (value, size) => Math.min(Math.max(value, 0), size - 1);

/** The part about a collection: the most similar images with their heat maps, and the search by the region. */
async function fillOthers(place, context, map, { choose, regionBox, size }) {
  const { image, signal } = context;
  const note = el("p", { class: "quiet", id: "region-note" });
  const side = select([["1", "the patch"], ["3", "3 × 3 patches"], ["5", "5 × 5 patches"], ["7", "7 × 7 patches"]], { id: "region-side" });
  side.value = "3";
  const count = el("input", { type: "number", min: 1, max: 50, ".value": "6", id: "similar-count" });
  const results = el("div", { id: "patch-results" });
  const known = itemFeatures(size, signal);
  const byRegion = actionButton("Search by this region", signal, (own) => busy(results, async () => {
    map.others.clear();
    const answer = await searchRegion(collection.current().name, image.blob, { box: regionBox(Number(side.value)) }, Number(count.value), own);
    fill(results, el("h3", {}, "Images with a similar region"), resultCards(collection.current().name, answer.data));
    announce(`${answer.data.length} results`);
  }), { id: "search-region" });
  const bySimilar = actionButton("Show in similar images", signal, (own) => busy(results, async () => {
    map.others.clear();
    const { name } = collection.current();
    const form = [["file", image.blob], ["k", count.value]];
    const answer = await json({ method: "POST", path: collectionPath(name, "search"), form, signal: own });
    const cards = answer.data.map((hit) => similarCard(name, hit, map, choose, own, () => known(name, hit.id)));
    fill(results, el("h3", {}, "The same patch in similar images"), el("ul", { class: "results" }, ...cards));
    announce(`${answer.data.length} similar images`);
  }), { id: "show-similar", class: "primary" });
  const change = (current) => {
    const problem = regionSearchProblem(current);
    byRegion.disabled = Boolean(problem);
    note.textContent = problem;
  };
  const collection = await collectionField("patch-collection", signal, change);
  fill(place, el("h3", {}, "In a collection"), collection.element);
  if (!collection.current()) return;
  place.append(
    field("Number of images", count),
    el("div", { class: "row" }, bySimilar),
    field("Region", side, "around the chosen patch"),
    el("div", { class: "row" }, byRegion),
    note,
    results,
  );
}

/** A function that fetches the image and the features of an item, once for each size. It keeps the last ones. */
function itemFeatures(size, signal) {
  const kept = new Map();
  const fetchItem = async (collection, id, side) => {
    const { blob } = await itemImage(collection, id);
    const [bitmap, features] = await Promise.all([decoded(blob), patchFeatures(blob, side, { signal, shown: false })]);
    return { bitmap, features };
  };
  return (collection, id) => {
    const key = JSON.stringify([collection, id, size.value]);
    if (!kept.has(key)) {
      if (kept.size >= KEPT) kept.delete(kept.keys().next().value);
      const promise = fetchItem(collection, id, size.value);
      kept.set(key, promise);
      promise.catch(() => kept.delete(key));
    }
    return kept.get(key);
  };
}

/** A result, whose features are fetched when it comes into view. It shows how similar its patches are to the chosen one. */
function similarCard(collection, hit, map, choose, signal, fetched) {
  const canvas = el("canvas", { role: "img", "aria-label": hit.id });
  const text = el("small", {}, "waits until it is in view");
  const card = el(
    "li",
    { class: "card", "data-id": hit.id },
    canvas,
    el("a", { href: itemLink(collection, hit.id) }, hit.id),
    el("small", {}, `score ${hit.score.toFixed(3)}`),
    text,
  );
  const load = async () => {
    text.textContent = "computing the patch features...";
    const { bitmap, features } = await fetched();
    if (signal.aborted) return;
    const scale = Math.min(1, 400 / Math.max(bitmap.width, bitmap.height));
    canvas.width = Math.round(bitmap.width * scale);
    canvas.height = Math.round(bitmap.height * scale);
    const heat = el("canvas");
    map.others.add((vector, range) => {
      const values = similarities(features, vector);
      const drawing = canvas.getContext("2d");
      drawing.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      drawHeat(drawing, heatMap(values, features.height, features.width, range, heat), 0.6);
      const highest = rangeOf(values)[1];
      card.dataset.highest = highest;
      text.textContent = `highest similarity ${highest.toFixed(3)}`;
    });
    choose();
  };
  const observer = new IntersectionObserver(async (entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    try {
      await load();
    } catch (error) {
      if (error.name !== "AbortError") text.textContent = `no heat map: ${error.message}`;
    }
  }, { rootMargin: "200px" });
  observer.observe(card);
  signal.addEventListener("abort", () => observer.disconnect());
  return card;
}
