// Draws a grid of numbers as a heat map, with a scale of colours.

import { el } from "../dom.js";

const COLOURS = [
  [68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142],
  [31, 158, 137], [53, 183, 121], [109, 205, 89], [180, 222, 44], [253, 231, 37],
];
const STEPS = 256;
const TABLE = new Uint32Array(STEPS);
for (let i = 0; i < STEPS; i++) {
  const at = (i / (STEPS - 1)) * (COLOURS.length - 1);
  const [from, to] = [COLOURS[Math.floor(at)], COLOURS[Math.ceil(at)]];
  const [r, g, b] = from.map((value, channel) => Math.round(value + (to[channel] - value) * (at % 1)));
  TABLE[i] = (255 << 24) | (b << 16) | (g << 8) | r;
}

/** The smallest and the largest of some numbers. */
export function rangeOf(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

/** A canvas with one pixel per number. `values` are [height * width]. */
export function heatMap(values, height, width, [low, high], canvas = el("canvas")) {
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
  const pixels = new Uint32Array(height * width);
  const factor = high > low ? (STEPS - 1) / (high - low) : 0;
  for (let i = 0; i < pixels.length; i++) {
    pixels[i] = TABLE[Math.min(STEPS - 1, Math.max(0, Math.round((values[i] - low) * factor)))];
  }
  const data = new ImageData(new Uint8ClampedArray(pixels.buffer), width, height);
  canvas.getContext("2d").putImageData(data, 0, 0);
  return canvas;
}

/** Draw a heat map smoothly over a whole canvas. */
export function drawHeat(context, heat, opacity, isSmooth = true) {
  context.globalAlpha = opacity;
  context.imageSmoothingEnabled = isSmooth;
  context.imageSmoothingQuality = "high";
  context.drawImage(heat, 0, 0, context.canvas.width, context.canvas.height);
  context.globalAlpha = 1;
  context.imageSmoothingEnabled = true;
}

/** The scale of colours with its ends as text. `.show([low, high], digits)` changes them. */
export function heatLegend() {
  const ramp = Float32Array.from({ length: STEPS }, (_, i) => i);
  const canvas = heatMap(ramp, 1, STEPS, [0, STEPS - 1]);
  canvas.className = "heat-ramp";
  canvas.setAttribute("aria-hidden", "true");
  const [low, high] = [el("span"), el("span")];
  const legend = el("div", { class: "row heat-legend" }, low, canvas, high);
  legend.show = (range, text = (value) => value.toFixed(2)) => {
    low.textContent = text(range[0]);
    high.textContent = text(range[1]);
  };
  return legend;
}

/** A slider for the opacity. */
export function opacitySlider(onchange, value = 0.65) {
  return el("input", { type: "range", min: 0, max: 1, step: 0.05, ".value": String(value), oninput: onchange });
}
