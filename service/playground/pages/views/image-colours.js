// The patch features as colours: their first three principal components are red, green and blue.

import { request } from "../api.js";
import { announce, busy, el, field, fill } from "../dom.js";
import { parseNpy } from "../npy.js";
import { latest, sizeField } from "./image-common.js";
import { drawHeat, opacitySlider } from "./image-heat.js";
import { arrow } from "./image-stage.js";

export async function mount(place, { image, stage, signal }) {
  const shown = { data: null, height: 0, width: 0, at: null, canvas: el("canvas") };
  const readout = el("output", { id: "colours-readout", class: "readout" });
  const opacity = opacitySlider(() => stage.drawSoon(), 1);
  const smooth = el("input", { type: "checkbox", id: "colours-smooth", onchange: () => stage.drawSoon() });
  const foreground = el("input", { type: "checkbox", id: "colours-foreground", onchange: () => load() });
  const size = sizeField(() => load());
  const next = latest(signal);
  stage.paint = (canvas) => {
    if (shown.data) drawHeat(canvas, shown.canvas, Number(opacity.value), smooth.checked);
  };

  async function load() {
    const own = next();
    delete readout.dataset.grid;
    fill(readout, "Computing the colours...");
    await busy(readout, async () => {
      const form = [["file", image.blob], ["format", "pca_npy"], ["size", size.control.value], ["foreground", String(foreground.checked)]];
      const response = await request({ method: "POST", path: "/v1/features", form, accept: "application/x-npy, */*", signal: own });
      const { shape, data } = parseNpy(await response.arrayBuffer());
      if (own.aborted) return;
      const factor = data instanceof Uint8Array ? 1 : 255;
      Object.assign(shown, { height: shape[0], width: shape[1], at: null, data: Uint8ClampedArray.from(data, (value) => value * factor) });
      paint();
      describe();
      stage.drawSoon();
    });
  }

  function paint() {
    const pixels = new ImageData(shown.width, shown.height);
    for (let i = 0; i < shown.width * shown.height; i++) {
      pixels.data.set(shown.data.subarray(3 * i, 3 * i + 3), 4 * i);
      pixels.data[4 * i + 3] = 255;
    }
    shown.canvas.width = shown.width;
    shown.canvas.height = shown.height;
    shown.canvas.getContext("2d").putImageData(pixels, 0, 0);
  }

  function describe() {
    const [row, column] = shown.at ?? [0, 0];
    const colour = [...shown.data.subarray(3 * (row * shown.width + column)).slice(0, 3)];
    Object.assign(readout.dataset, { grid: `${shown.height}x${shown.width}`, row, column, colour: colour.join(" ") });
    fill(readout, `${shown.height} × ${shown.width} patches. Row ${row + 1}, column ${column + 1}: red ${colour[0]}, green ${colour[1]}, blue ${colour[2]} of 255.`);
    stage.label(`The image with the colours of its patch features. ${readout.textContent} Arrow keys read other patches.`);
  }

  stage.point = (kind, x, y) => {
    if (!shown.data || kind === "out") return;
    shown.at = [Math.floor((y / stage.height) * shown.height), Math.floor((x / stage.width) * shown.width)];
    describe();
  };
  stage.key = (event) => {
    const step = arrow(event);
    if (!step || !shown.data) return false;
    const [row, column] = shown.at ?? [0, 0];
    shown.at = [Math.min(Math.max(row + step[1], 0), shown.height - 1), Math.min(Math.max(column + step[0], 0), shown.width - 1)];
    describe();
    announce(readout.textContent);
    return true;
  };

  place.append(
    el("p", {}, "Patches with similar features have similar colours: the first three principal components are red, green and blue."),
    el("div", {}, size.element, field("Opacity", opacity), field("Smooth", smooth), field("Foreground only", foreground)),
    readout,
  );
  await load();
}
