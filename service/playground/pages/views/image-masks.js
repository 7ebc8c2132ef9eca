// Masks without labels: the foreground, objects by cuts, or clusters of similar patches.

import { json } from "../api.js";
import { announce, busy, el, field, fill, select } from "../dom.js";
import { decodeMask } from "../rle.js";
import { actionButton, sizeField } from "./image-common.js";
import { opacitySlider } from "./image-heat.js";
import { downloadButtons, measure, regionPainter, regionTable } from "./image-regions.js";

const METHODS = [
  ["multi", "Objects (repeated cuts)"], ["cut", "The object that stands out (cut)"], ["cluster", "Groups of similar patches (cluster)"],
  ["foreground", "Foreground"], ["linear", "Classes (segmentation head)"],
];
const OPTIONS = { cluster: ["k"], multi: ["max_objects", "min_score"], cut: ["min_score"], foreground: [], linear: [] };

export async function mount(place, { image, stage, signal }) {
  const opacity = opacitySlider(() => stage.drawSoon(), 0.55);
  const method = select(METHODS, { id: "mask-method", onchange: () => showOptions() });
  const inputs = {
    k: el("input", { type: "number", id: "mask-k", min: 2, max: 32, placeholder: "automatic" }),
    max_objects: el("input", { type: "number", id: "mask-objects", min: 1, max: 32, ".value": "10" }),
    min_score: el("input", { type: "number", id: "mask-score", min: 0, max: 1, step: 0.05, ".value": "0.7" }),
  };
  const fields = {
    k: field("Number of groups", inputs.k),
    max_objects: field("Highest number of objects", inputs.max_objects),
    min_score: field("Lowest score", inputs.min_score),
  };
  const size = sizeField(() => {});
  const result = el("div", { id: "mask-result" });
  const showOptions = () => {
    for (const [name, element] of Object.entries(fields)) element.hidden = !OPTIONS[method.value].includes(name);
  };
  const run = actionButton("Compute masks", signal, (own) => busy(result, async () => {
    const options = OPTIONS[method.value].map((name) => [name, inputs[name].value]).filter(([, value]) => value !== "");
    const form = [["file", image.blob], ["method", method.value], ["format", "rle"], ["size", size.control.value], ...options];
    const answer = await json({ method: "POST", path: "/v1/segment", form, signal: own });
    const regions = answer.regions ?? [whole(answer.segmentation)];
    stage.paint = regionPainter(regions, opacity);
    stage.draw();
    const text = regions.length ? `${regions.length} region${regions.length > 1 ? "s" : ""}` : "No object reaches the lowest score.";
    stage.label(`The image with masks: ${text}`);
    fill(result, el("h3", {}, text), regions.length ? [regionTable(regions), downloadButtons(regions, image.blob.name, "mask")] : null);
    announce(text);
  }), { id: "compute-masks", class: "primary" });
  place.append(
    el("p", {}, "Regions that the model tells apart without labels. It may also find none."),
    el("div", {}, field("Method", method), ...Object.values(fields), size.element, field("Opacity", opacity)),
    el("div", { class: "row" }, run),
    result,
  );
  showOptions();
}

/** The mask of the foreground as a region. */
function whole(segmentation) {
  const { area, box } = measure(decodeMask(segmentation), segmentation.size[1]);
  return { segmentation, area, box };
}
