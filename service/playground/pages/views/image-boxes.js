// Boxes around objects, without labels and without a trained detector.

import { json } from "../api.js";
import { announce, busy, el, field, fill, select } from "../dom.js";
import { actionButton, sizeField } from "./image-common.js";
import { opacitySlider } from "./image-heat.js";
import { regionPainter, regionTable } from "./image-regions.js";

export async function mount(place, { image, stage, signal }) {
  const method = select([["cut", "Repeated cuts"], ["lost", "LOST"]], { id: "box-method" });
  const score = el("input", { type: "number", id: "box-score", min: 0, max: 1, step: 0.05, ".value": "0.7" });
  const count = el("input", { type: "number", id: "box-count", min: 1, max: 32, ".value": "10" });
  const overlap = el("input", { type: "number", id: "box-overlap", min: 0, max: 1, step: 0.05, ".value": "0.5" });
  const size = sizeField(() => {});
  const result = el("div", { id: "box-result" });
  const run = actionButton("Find objects", signal, (own) => busy(result, async () => {
    const form = [["file", image.blob], ["method", method.value], ["min_score", score.value], ["max_objects", count.value]];
    form.push(["max_overlap", overlap.value], ["size", size.control.value]);
    const { objects } = await json({ method: "POST", path: "/v1/detect", form, signal: own });
    stage.paint = regionPainter(objects, opacitySlider(() => {}), true);
    stage.draw();
    const text = objects.length ? `${objects.length} object${objects.length > 1 ? "s" : ""}` : "No object reaches the lowest score.";
    stage.label(`The image with boxes: ${text}`);
    fill(result, el("h3", {}, text), objects.length ? regionTable(objects) : null);
    announce(text);
  }), { id: "find-objects", class: "primary" });
  place.append(
    el("p", {}, "Boxes around objects that stand out, found without labels or a trained detector."),
    el("div", {}, field("Method", method), field("Lowest score", score), field("Highest number", count), field("Highest overlap", overlap), size.element),
    el("div", { class: "row" }, run),
    result,
  );
}
