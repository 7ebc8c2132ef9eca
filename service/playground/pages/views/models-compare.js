// Compares the live model with another one: the nearest images of the same query, side by side.
//
// Up to 200 images from all over a collection are embedded with both models through the API, and ranked here. A model that is not
// loaded is loaded on trial first (docs/live-model.md).

import { collectionPath, json, request } from "../api.js";
import { announce, busy, el, field, fill, select } from "../dom.js";
import { pause } from "../events.js";
import { collectionNames, imagePicker, itemImage, itemPicture } from "../images.js";
import { itemChooser } from "../item-chooser.js";
import { currentCollection, currentImage, setCollection, setImage } from "../state.js";
import { compared, dot, keptShare } from "./models-ranks.js";

const MOST = 200;
const MOST_LISTED = 10_000;
const PAGE = 1000;
const BATCH = 8;
const ASK_MS = 400;

/** The comparison. `setModels` tells which models there are, `choose` which one to compare. `onchange` is called when a
 * model was loaded on trial. */
export function comparison({ signal, onchange }) {
  const other = el("select", { id: "compare-model" });
  const collection = el("select", { id: "compare-collection" });
  const count = el("input", { type: "number", id: "compare-count", value: "100", min: "3", max: String(MOST) });
  const wanted = el("input", { type: "number", id: "compare-k", value: "10", min: "1", max: "50" });
  const go = el("button", { class: "primary", id: "compare-go" }, "Compare");
  const stopButton = el("button", { type: "button", hidden: true, onclick: () => running.abort() }, "Stop");
  const bar = el("progress", { hidden: true, max: "1", "aria-label": "Progress of the comparison" });
  const status = el("p", { id: "compare-status", role: "status" });
  const place = el("div", { id: "compare-result" });
  const query = el("div", { class: "query", id: "compare-query" });
  const picker = imagePicker({ onimage: (image) => use(image) });
  const chooser = itemChooser({ collection: () => collection.value, onpick: (item) => useItem(collection.value, item.id) });
  let models = [];
  let running = new AbortController();
  let address = null;
  let turn = 0; // an item whose image is still on the way must not take the place of a newer image
  /** The vectors of images of collections, by model, collection and id. */
  const vectors = new Map();

  async function useItem(name, id) {
    const mine = ++turn;
    const image = await busy(query, () => itemImage(name, id, signal));
    if (image && mine === turn) use(image);
  }

  function use(image) {
    turn++;
    setImage(image);
    showQuery();
  }

  function showQuery() {
    if (address) URL.revokeObjectURL(address);
    address = null;
    const image = currentImage();
    if (!image) return fill(query, el("p", { class: "quiet" }, "Choose an image to search for."));
    address = URL.createObjectURL(image.blob);
    fill(query, el("img", { src: address, alt: "the query", class: "query-picture" }), el("p", {}, image.item ? image.item.id : image.blob.name));
  }

  function setModels(all) {
    models = all;
    const before = other.value;
    const others = all.filter((one) => one.state !== "live");
    fill(other, others.map((one) => el("option", { value: one.id }, `${one.id} (${one.state})`)));
    if (others.some((one) => one.id === before)) other.value = before;
    go.disabled = others.length === 0;
    if (!others.length) fill(status, "There is no other model here. Export one, or retrain.");
  }

  async function compare() {
    running.abort();
    running = new AbortController();
    const mine = AbortSignal.any([signal, running.signal]);
    const [image, name, k] = [currentImage(), collection.value, Number(wanted.value)];
    fill(place);
    if (!image || !name) {
      fill(status, image ? "There is no collection with images." : "Choose an image first.");
      return;
    }
    const pair = [models.find((one) => one.state === "live"), models.find((one) => one.id === other.value)];
    bar.hidden = stopButton.hidden = false;
    bar.removeAttribute("value");
    const tell = (text) => fill(status, text);
    const result = await busy(place, async () => {
      await ready(pair[1], tell, mine, onchange);
      tell("listing the images");
      const info = await json({ path: collectionPath(name), shown: false, signal: mine });
      const pooling = poolingOf(info);
      const ids = await idsOf(name, Math.min(MOST, Math.max(3, Number(count.value) || MOST)), mine);
      const known = await embedAll({ name, ids, pair, pooling, vectors, signal: mine, tell, onprogress: (share) => { bar.value = share; } });
      tell("embedding the query");
      const queries = [];
      for (const model of pair) queries.push((await embed([image.blob], model, pooling, mine, true))[0]);
      const self = image.item?.collection === name ? image.item.id : null;
      const found = known.ids.filter((id) => id !== self);
      const rankings = pair.map((model, i) => found.map((id) => ({ id, score: dot(queries[i], known.of(model, id)) })).sort((a, b) => b.score - a.score));
      const share = keptShare(pair.map((model) => known.ids.map((id) => known.of(model, id))), k);
      return { rankings, share, total: known.ids.length, missing: known.missing };
    });
    if (mine.aborted && running.signal !== mine && !signal.aborted && !result) fill(status, "stopped");
    bar.hidden = stopButton.hidden = true;
    if (result) showResult(place, status, { ...result, pair, name, k });
    else if (!mine.aborted) fill(status);
  }

  const form = el("form", { id: "compare", onsubmit: (event) => { event.preventDefault(); compare(); } },
    el("p", {}, "See what both models find for the same image before you promote one. The images of a collection are embedded with both models; nothing is stored. A model that is not loaded is loaded on trial, which takes the memory of a second model."),
    el("div", { class: "row" }, field("Other model", other), field("Collection", collection), field("Images", count, `at most ${MOST}, from all over the collection`), field("Neighbours", wanted)),
    el("div", { class: "columns" }, el("div", {}, picker, chooser), query),
    el("div", { class: "row" }, go, stopButton), bar, status);
  collection.addEventListener("change", () => {
    setCollection(collection.value);
    chooser.reset();
  });
  showQuery();
  busy(status, async () => {
    const names = await collectionNames();
    fill(collection, names.map((name) => el("option", { value: name }, name)));
    if (names.includes(currentCollection())) collection.value = currentCollection();
  });
  return {
    element: el("div", {}, form, place),
    setModels,
    choose(model) {
      other.value = model.id;
      form.scrollIntoView();
      other.focus();
      announce(`${model.id} is chosen for the comparison`);
    },
    stop() {
      running.abort();
      picker.stop();
      chooser.stop();
      if (address) URL.revokeObjectURL(address);
    },
  };
}

/** Load a model on trial, and wait until it is loaded. */
async function ready(model, tell, signal, onchange) {
  if (model.loaded) return;
  tell(`loading ${model.id}`);
  const path = `/v1/models/${encodeURIComponent(model.id)}`;
  let now = await json({ method: "POST", path: "/v1/models/load", json: { model: model.id }, signal });
  while (!now.loaded) {
    if (now.load_error) throw new Error(`${model.id} cannot be loaded: ${now.load_error}`);
    if (!["candidate", "former", "live"].includes(now.state)) throw new Error(`${model.id} is no longer on trial: another one was loaded`);
    await pause(ASK_MS, signal);
    signal.throwIfAborted();
    now = await json({ path, shown: false, signal });
  }
  Object.assign(model, { loaded: true, state: now.state });
  await onchange();
}

/** The pooling of a collection is part of its tag: fingerprint/pooling/... */
const poolingOf = (info) => info.tag?.split("/")[1] || undefined;

/** The ids of `count` items, at equal distances in the list of the first MOST_LISTED items of a collection. */
async function idsOf(name, count, signal) {
  const ids = [];
  let cursor;
  do {
    const body = cursor ? { limit: PAGE, cursor } : { limit: PAGE };
    const page = await json({ method: "POST", path: collectionPath(name, "items", "scroll"), json: body, shown: false, signal });
    ids.push(...page.data.map((item) => item.id));
    cursor = page.cursor;
  } while (cursor && ids.length < MOST_LISTED);
  const taken = Math.min(count, ids.length);
  return Array.from({ length: taken }, (_, i) => ids[Math.floor((i * ids.length) / taken)]);
}

/** Embed stored images with both models. Return the ids of those that have an image, and their vectors. */
async function embedAll({ name, ids, pair, pooling, vectors, signal, tell, onprogress }) {
  const key = (model, id) => JSON.stringify([model.fingerprint, model.precision, pooling, name, id]);
  const found = [];
  for (let start = 0; start < ids.length; start += BATCH) {
    tell(`embedding with both models: ${start} of ${ids.length} images`);
    onprogress(start / ids.length);
    const batch = ids.slice(start, start + BATCH);
    const images = new Map();
    await Promise.all(batch.map(async (id) => {
      if (pair.every((model) => vectors.has(key(model, id)))) return images.set(id, null);
      try {
        images.set(id, (await itemImage(name, id)).blob);
      } catch (error) {
        if (error.status !== 404) throw error; // without a stored image, it is left out
      }
    }));
    signal.throwIfAborted();
    const here = batch.filter((id) => images.has(id));
    for (const model of pair) {
      const todo = here.filter((id) => !vectors.has(key(model, id)));
      if (!todo.length) continue;
      const rows = await embed(todo.map((id) => images.get(id)), model, pooling, signal, false);
      todo.forEach((id, i) => vectors.set(key(model, id), rows[i]));
    }
    found.push(...here);
  }
  if (found.length < 3) throw new Error(`${found.length} items of ${name} have a stored image; at least three are needed. Collections store images with originals=true.`);
  return { ids: found, missing: ids.length - found.length, of: (model, id) => vectors.get(key(model, id)) };
}

/** Embed images. Return a Float32Array for each. */
async function embed(blobs, model, pooling, signal, shown) {
  const form = [...blobs.map((blob) => ["file", blob]), ["model", model.fingerprint], ["encoding_format", "base64"]];
  if (pooling) form.push(["pooling", pooling]);
  const response = await request({ method: "POST", path: "/v1/embeddings", form, signal, shown: shown ? undefined : false });
  const { data, fingerprint } = await response.json();
  if (fingerprint !== model.fingerprint) throw new Error(`the service has answered with another model: ${fingerprint}`);
  return data.map((one) => new Float32Array(Uint8Array.from(atob(one.embedding), (letter) => letter.charCodeAt(0)).buffer));
}

function showResult(place, status, { rankings, share, total, missing, pair, name, k }) {
  const { lists, kept } = compared(rankings, k);
  const percent = (value) => `${Math.round(value * 100)} %`;
  fill(status, `${kept} of the ${lists[0].length} nearest images are the same with both models (${percent(kept / lists[0].length)}). `
    + `With each of the ${total} images as the query, ${percent(share)} of the neighbours are kept.`
    + (missing ? ` ${missing} items without a stored image are left out.` : ""));
  const entry = (one) => el("li", { class: one.mark === "same rank" ? "" : "moved", "data-id": one.id },
    itemPicture(name, one.id, { alt: "" }),
    el("div", {}, el("strong", {}, `${one.rank}. `), one.id, el("br"), el("small", {}, `score ${one.score.toFixed(3)} · ${one.mark}`)));
  fill(place, el("div", { class: "pair" }, pair.map((model, i) => el("section", { "aria-labelledby": `compared-${i}` },
    el("h3", { id: `compared-${i}` }, model.id, " ", el("span", { class: "quiet" }, model.state)), el("ol", { class: "ranks" }, lists[i].map(entry))))));
}
