// Depth in metres, if the model has a depth head.

import { request } from "../api.js";
import { announce, busy, el, field, fill } from "../dom.js";
import { parseNpy } from "../npy.js";
import { actionButton, sizeField } from "./image-common.js";
import { drawHeat, heatLegend, heatMap, opacitySlider, rangeOf } from "./image-heat.js";

const metres = (value) => `${value.toFixed(2)} m`;

export async function mount(place, { image, stage, signal }) {
  const opacity = opacitySlider(() => stage.drawSoon(), 0.8);
  const legend = heatLegend();
  legend.hidden = true;
  const size = sizeField(() => {});
  const result = el("div", { id: "depth-result" });
  const readout = el("output", { id: "depth-readout", class: "readout", hidden: true });
  const run = actionButton("Estimate the depth", signal, (own) => busy(result, async () => {
    const form = [["file", image.blob], ["format", "npy"], ["size", size.control.value]];
    const call = { method: "POST", path: "/v1/depth", form, accept: "application/x-npy, */*", signal: own };
    let response;
    try {
      response = await request(call);
    } catch (error) {
      if (error.status === 422 && error.problem.param === "head") return fill(result, withoutHead(error.message));
      throw error;
    }
    const { shape: [height, width], data } = parseNpy(await response.arrayBuffer());
    const range = rangeOf(data);
    const heat = heatMap(data, height, width, range);
    stage.paint = (canvas) => drawHeat(canvas, heat, Number(opacity.value));
    stage.draw();
    legend.hidden = readout.hidden = false;
    legend.show(range, metres);
    const median = data.slice().sort()[Math.floor(data.length / 2)];
    const text = `Depth from ${metres(range[0])} to ${metres(range[1])}, median ${metres(median)}.`;
    stage.label(`The image with its depth. ${text}`);
    fill(result, el("p", {}, text));
    fill(readout, "Point at the image to read the depth.");
    stage.point = (kind, x, y) => {
      const value = data[Math.floor(y) * width + Math.floor(x)];
      if (kind !== "out") fill(readout, `x ${Math.floor(x)}, y ${Math.floor(y)}: ${metres(value)}`);
    };
    announce(text);
  }), { id: "estimate-depth", class: "primary" });
  place.append(el("p", {}, "The distance of every pixel in metres, estimated by a depth head of the model."), el("div", {}, size.element, field("Opacity", opacity)), el("div", { class: "row" }, run), legend, readout, result);
}

function withoutHead(detail) {
  return el(
    "div",
    { role: "status", id: "depth-help" },
    el("p", {}, `The live model has no head for depth (${detail.split(";")[0]}). Add one of Meta's heads if it is a published model, or train one on your own images and depth maps. Then try again; no restart is needed:`),
    el("pre", { tabindex: "0", "aria-label": "Commands" }, "dinov2 heads add --help\ndinov2 train-head depth --help"),
  );
}
