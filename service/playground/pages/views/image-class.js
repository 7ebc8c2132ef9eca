// The class of the image by the nearest items of a collection, or the answer that it is unknown.

import { collectionPath, json } from "../api.js";
import { announce, busy, el, field, fill } from "../dom.js";
import { actionButton, collectionField, textTable } from "./image-common.js";
import { resultCards } from "./image-results.js";

export async function mount(place, { image, stage, signal }) {
  const label = el("input", { id: "class-label", list: "class-keys", autocomplete: "off", spellcheck: "false" });
  const keys = el("datalist", { id: "class-keys" });
  const k = el("input", { type: "number", id: "class-k", min: 1, max: 100, ".value": "10" });
  const rate = el("input", { type: "number", id: "class-rate", min: 0.001, max: 0.5, step: 0.001, ".value": "0.05" });
  const result = el("div", { id: "class-result" });
  const collection = await collectionField("class-collection", signal, (current) => fillKeys(current.name, keys, label, signal));
  const run = actionButton("Classify", signal, (own) => busy(result, async () => {
    const { name } = collection.current();
    const form = [["file", image.blob], ["collection", name], ["label", label.value], ["k", k.value], ["error_rate", rate.value]];
    if (image.item?.collection === name) form.push(["filter", JSON.stringify({ not: { field: "id", eq: image.item.id } })]); // not by itself
    const answer = await json({ method: "POST", path: "/v1/classify", form, signal: own });
    fill(result, ...verdict(answer, name));
    const text = result.querySelector("h3").textContent;
    stage.label(`The image. ${text}`);
    announce(text);
  }), { id: "classify", class: "primary" });
  fill(place, el("p", {}, "The nearest items of a collection vote for a class. An image that resembles none of them is unknown."), collection.element);
  if (!collection.current()) return;
  place.append(
    keys,
    field("Metadata key of the class", label),
    field("Neighbours", k),
    field("Error rate", rate, "share of images of known classes that may be called unknown"),
    el("div", { class: "row" }, run),
    result,
  );
}

/** Suggest the metadata keys of the collection's items. */
async function fillKeys(name, keys, label, signal) {
  try {
    const { data } = await json({ method: "POST", path: collectionPath(name, "items", "scroll"), json: { limit: 20 }, shown: false, signal });
    const found = [...new Set(data.flatMap((item) => Object.keys(item.metadata ?? {})))].sort();
    fill(keys, ...found.map((key) => el("option", { value: key })));
    if (!found.includes(label.value)) label.value = found.find((key) => /class|label|categor/i.test(key)) ?? found[0] ?? "";
  } catch (error) {
    if (error.name !== "AbortError") fill(keys);
  }
}

function verdict({ data: [image], calibration }, collection) {
  const title = image.unknown ? "Unknown: the image resembles none of the classes" : `Class: ${image.label}`;
  const rows = image.scores.map(({ label, score }) => [
    String(label),
    el("meter", { min: 0, max: 1, value: score, "aria-label": `Score of ${label}` }),
    score.toFixed(3),
  ]);
  const note = calibration?.note ? el("p", { class: "quiet" }, calibration.note) : null;
  const value = image.p_value === null || image.p_value === undefined ? null : `p-value ${image.p_value.toFixed(3)}, error rate ${calibration.error_rate}`;
  const hits = image.neighbours ?? [];
  return [
    el("h3", { "data-label": image.label ?? "", "data-unknown": String(image.unknown) }, title),
    value ? el("p", {}, value) : null,
    note,
    textTable("Scores of the classes", ["Class", "", "Score"], rows),
    hits.length ? el("h3", {}, "Nearest items") : null,
    hits.length ? resultCards(collection, hits) : null,
  ];
}
