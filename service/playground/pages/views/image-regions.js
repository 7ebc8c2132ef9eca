// Draws masks and boxes over an image, lists them as text, and offers them for download.

import { download, el } from "../dom.js";
import { decodeMask } from "../rle.js";
import { textTable } from "./image-common.js";

const COLOURS = [
  [230, 60, 50], [40, 130, 230], [250, 200, 40], [60, 180, 90], [170, 80, 220],
  [250, 140, 40], [40, 200, 210], [240, 110, 180], [150, 200, 50], [150, 110, 80],
];

/** The colour [red, green, blue] of a region. */
export const colourOf = (index) => COLOURS[index % COLOURS.length];
const css = (index) => `rgb(${colourOf(index).join(" ")})`;

/** A canvas of the size of the image, in which a mask (pixels, 0 or 1) has a colour, and the rest is transparent. */
export function maskCanvas(pixels, height, width, [red, green, blue]) {
  const canvas = el("canvas", { width, height });
  const words = new Uint32Array(height * width);
  const colour = (255 << 24) | (blue << 16) | (green << 8) | red;
  for (let i = 0; i < words.length; i++) if (pixels[i]) words[i] = colour;
  canvas.getContext("2d").putImageData(new ImageData(new Uint8ClampedArray(words.buffer), width, height), 0, 0);
  return canvas;
}

/** Draw a mask in COCO RLE over a canvas that shows the whole image. */
export function drawMask(context, segmentation, index, opacity) {
  const [height, width] = segmentation.size;
  drawPixels(context, maskCanvas(decodeMask(segmentation), height, width, colourOf(index)), opacity);
}

export function drawPixels(context, mask, opacity) {
  context.globalAlpha = opacity;
  context.drawImage(mask, 0, 0, context.canvas.width, context.canvas.height);
  context.globalAlpha = 1;
}

/** Draw a box with its number. */
export function drawBox(context, scale, [x, y, width, height], index, label) {
  context.lineWidth = 5;
  context.strokeStyle = "#000000";
  context.strokeRect(x * scale, y * scale, width * scale, height * scale);
  context.lineWidth = 3;
  context.strokeStyle = css(index);
  context.strokeRect(x * scale, y * scale, width * scale, height * scale);
  if (label) drawLabel(context, x * scale + 4, y * scale + 4, label);
}

export function drawLabel(context, x, y, label) {
  context.font = "bold 14px system-ui, sans-serif";
  context.textBaseline = "top";
  const { width } = context.measureText(label);
  context.fillStyle = "#000000";
  context.fillRect(x - 2, y - 2, width + 6, 19);
  context.fillStyle = "#ffffff";
  context.fillText(label, x + 1, y);
}

/** A painter for regions with a `segmentation` or a `box`. Masks are decoded once. */
export function regionPainter(regions, opacity, hasBoxes = false) {
  const masks = regions.map((region, index) => {
    if (!region.segmentation) return null;
    const [height, width] = region.segmentation.size;
    return maskCanvas(decodeMask(region.segmentation), height, width, colourOf(index));
  });
  return (context, scale) => {
    for (const mask of masks) if (mask) drawPixels(context, mask, Number(opacity.value));
    regions.forEach((region, index) => {
      if (hasBoxes) drawBox(context, scale, region.box, index, String(index + 1));
      else if (region.box) drawLabel(context, centre(region.box, 0) * scale, centre(region.box, 1) * scale, String(index + 1));
    });
  };
}

const centre = (box, axis) => box[axis] + box[axis + 2] / 2;

/** The regions as a table. */
export function regionTable(regions) {
  const swatch = (index) => {
    const mark = el("span", { class: "swatch", "aria-hidden": "true" });
    mark.style.backgroundColor = css(index);
    return mark;
  };
  const rows = regions.map((region, index) => [
    [swatch(index), ` ${index + 1}`],
    region.score === undefined ? "-" : region.score.toFixed(3),
    String(region.area),
    region.box ? region.box.join(", ") : "-",
  ]);
  return textTable("Regions", ["Region", "Score", "Area in pixels", "Box: x, y, width, height"], rows);
}

/** Buttons that download regions as COCO annotations (JSON) and as a PNG mask. */
export function downloadButtons(regions, imageName, idPrefix) {
  const stem = imageName.replace(/\.[^.]*$/, "") || "image";
  const asJson = () => download(new Blob([JSON.stringify(annotations(regions, imageName), null, 1)], { type: "application/json" }), `${stem}-masks.json`);
  const asPng = async () => download(await maskPng(regions), `${stem}-mask.png`);
  return el(
    "div",
    { class: "row" },
    el("button", { type: "button", id: `${idPrefix}-json`, onclick: asJson }, "Download COCO RLE (JSON)"),
    el("button", { type: "button", id: `${idPrefix}-png`, onclick: asPng }, "Download mask (PNG)"),
  );
}

/** The regions of one image in COCO's format. */
function annotations(regions, imageName) {
  const [height, width] = regions[0].segmentation.size;
  return {
    images: [{ id: 1, file_name: imageName, height, width }],
    categories: [{ id: 1, name: "region" }],
    annotations: regions.map((region, index) => ({
      id: index + 1,
      image_id: 1,
      category_id: 1,
      iscrowd: 1,
      area: region.area,
      bbox: region.box,
      segmentation: region.segmentation,
      ...(region.score === undefined ? {} : { score: region.score }),
    })),
  };
}

/** A PNG in which the inside of the regions is white and the rest is black. */
function maskPng(regions) {
  const [height, width] = regions[0].segmentation.size;
  const canvas = el("canvas", { width, height });
  const context = canvas.getContext("2d");
  context.fillRect(0, 0, width, height);
  for (const { segmentation } of regions) {
    context.drawImage(maskCanvas(decodeMask(segmentation), height, width, [255, 255, 255]), 0, 0);
  }
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

/** The area and the box [x, y, width, height] of a mask. The box is null if the mask is empty. */
export function measure(pixels, width) {
  let area = 0;
  let [left, top, right, bottom] = [Infinity, Infinity, -1, -1];
  for (let i = 0; i < pixels.length; i++) {
    if (!pixels[i]) continue;
    const x = i % width;
    const y = (i - x) / width;
    area++;
    left = Math.min(left, x);
    right = Math.max(right, x);
    top = Math.min(top, y);
    bottom = y;
  }
  return { area, box: area ? [left, top, right - left + 1, bottom - top + 1] : null };
}
