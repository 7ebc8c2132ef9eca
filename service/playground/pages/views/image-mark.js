// Mark a part of the image with a box, a brush or points, and segment it, search for it, or find it everywhere.

import { json } from "../api.js";
import { announce, busy, el, field, fill, select } from "../dom.js";
import { encodeMask } from "../rle.js";
import { actionButton, collectionField, regionSearchProblem, searchRegion, sizeField } from "./image-common.js";
import { findEverywhere } from "./image-find.js";
import { opacitySlider } from "./image-heat.js";
import { drawBox, drawPixels, downloadButtons, maskCanvas, measure, regionPainter, regionTable } from "./image-regions.js";
import { resultCards } from "./image-results.js";
import { arrow } from "./image-stage.js";

const TOOLS = [["box", "Box"], ["brush", "Brush"], ["erase", "Eraser"], ["positive", "Point inside"], ["negative", "Point outside"]];
const BLUE = [40, 130, 230];

export async function mount(place, context) {
  const { image, stage, signal } = context;
  const marks = { box: null, mask: null, points: [], cursor: [Math.floor(stage.width / 2), Math.floor(stage.height / 2)], start: null };
  let paintRegions = null;
  const opacity = opacitySlider(() => stage.drawSoon(), 0.6);
  const tool = select(TOOLS, { id: "mark-tool" });
  const brush = el("input", { type: "range", id: "brush-size", min: 2, max: 100, ".value": "20" });
  const numbers = ["x", "y", "width", "height"].map((name) =>
    el("input", { type: "number", min: 0, step: 1, id: `box-${name}`, "aria-label": `Box: ${name}`, onchange: () => readBox() }),
  );
  const summary = el("output", { id: "mark-summary", class: "readout" });
  const result = el("div", { id: "mark-result" });

  stage.paint = (canvas, scale) => {
    paintRegions?.(canvas, scale);
    if (marks.mask) drawPixels(canvas, maskLayer(), 0.5);
    if (marks.box) drawBox(canvas, scale, marks.box, 1);
    for (const point of marks.points) cross(canvas, point.x * scale, point.y * scale, point.positive);
    if (document.activeElement === stage.canvas) ring(canvas, marks.cursor[0] * scale, marks.cursor[1] * scale);
  };
  let layer = null;
  const maskLayer = () => (layer ??= maskCanvas(...reduced(marks.mask, stage), BLUE));

  /** Tell in words what is marked, and draw it. */
  function changed() {
    const parts = [];
    if (marks.box) parts.push(`a box at ${marks.box[0]}, ${marks.box[1]} of ${marks.box[2]} × ${marks.box[3]} pixels`);
    if (marks.mask) {
      const { area } = measure(marks.mask, stage.width);
      parts.push(`a mask of ${area} pixels`);
      summary.dataset.area = area;
    } else delete summary.dataset.area;
    for (const positive of [true, false]) {
      const points = marks.points.filter((point) => point.positive === positive).map(({ x, y }) => `(${x}, ${y})`);
      if (points.length) parts.push(`${points.length} point${points.length > 1 ? "s" : ""} ${positive ? "inside" : "outside"}: ${points.join(", ")}`);
    }
    summary.textContent = parts.length ? `Marked: ${parts.join("; ")}.` : "Nothing is marked.";
    stage.label(`The image. ${summary.textContent} Arrow keys move the cursor, Shift makes larger steps, Enter uses the tool.`);
    numbers.forEach((input, i) => (input.value = marks.box ? marks.box[i] : ""));
    stage.drawSoon();
  }

  function readBox() {
    if (numbers.some((input) => input.value === "")) return;
    const [x, y, width, height] = numbers.map((input) => Math.round(Number(input.value)));
    setBox(x, y, x + width, y + height);
  }

  function setBox(x0, y0, x1, y1) {
    const [left, right] = [x0, x1].sort((a, b) => a - b).map((value) => Math.min(Math.max(Math.round(value), 0), stage.width));
    const [top, bottom] = [y0, y1].sort((a, b) => a - b).map((value) => Math.min(Math.max(Math.round(value), 0), stage.height));
    marks.box = right > left && bottom > top ? [left, top, right - left, bottom - top] : null;
    if (marks.box) marks.mask = layer = null;
    changed();
  }

  /** Paint (or erase) along a line, with a round brush. */
  function stroke(from, to, value) {
    if (!marks.mask && !value) return;
    marks.mask ??= new Uint8Array(stage.width * stage.height);
    marks.box = null;
    const radius = (Number(brush.value) / 2) * Math.max(1, stage.width / 1024);
    const steps = Math.max(1, Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) / Math.max(1, radius / 2)));
    for (let step = 0; step <= steps; step++) {
      const [cx, cy] = [0, 1].map((axis) => from[axis] + ((to[axis] - from[axis]) * step) / steps);
      for (let y = Math.max(0, Math.ceil(cy - radius)); y <= Math.min(stage.height - 1, cy + radius); y++) {
        for (let x = Math.max(0, Math.ceil(cx - radius)); x <= Math.min(stage.width - 1, cx + radius); x++) {
          if ((x - cx) ** 2 + (y - cy) ** 2 <= radius ** 2) marks.mask[y * stage.width + x] = value;
        }
      }
    }
    layer = null;
    stage.drawSoon();
  }

  /** After a stroke: an empty mask is no mask. */
  function endStroke() {
    if (marks.mask && !marks.mask.includes(1)) marks.mask = layer = null;
    changed();
  }

  /** Use the chosen tool at a position. */
  function use(kind, x, y) {
    const here = [Math.floor(x), Math.floor(y)];
    marks.cursor = here;
    if (kind === "down") marks.start = here;
    if (tool.value === "box") {
      if (kind !== "down") setBox(...marks.start, ...here);
    } else if (tool.value === "brush" || tool.value === "erase") {
      if (kind === "up") endStroke();
      else stroke(marks.start, here, tool.value === "brush" ? 1 : 0);
      marks.start = here;
    } else if (kind === "down") {
      marks.points.push({ x: here[0], y: here[1], positive: tool.value === "positive" });
      changed();
    }
  }

  stage.point = (kind, x, y) => {
    if (kind === "down" || kind === "move" || kind === "up") use(kind, x, y);
  };
  let corner = null; // of a box that is drawn with the keyboard
  stage.key = (event) => {
    const step = arrow(event);
    if (step) {
      const length = event.shiftKey ? 20 : 4;
      const limit = [stage.width, stage.height];
      marks.cursor = marks.cursor.map((value, axis) => Math.min(Math.max(value + step[axis] * length, 0), limit[axis] - 1));
      announce(`x ${marks.cursor[0]}, y ${marks.cursor[1]}`);
      stage.drawSoon();
      return true;
    }
    if (event.key !== "Enter" && event.key !== " ") return false;
    if (tool.value === "box" && !corner) {
      corner = marks.cursor;
      announce("First corner set. Move to the opposite corner and press Enter.");
    } else if (tool.value === "box") {
      setBox(...corner, ...marks.cursor);
      corner = null;
      announce(summary.textContent);
    } else {
      use("down", ...marks.cursor);
      if (tool.value === "brush" || tool.value === "erase") endStroke();
      announce(summary.textContent);
    }
    return true;
  };
  const redraw = () => stage.drawSoon();
  stage.canvas.addEventListener("focus", redraw, { signal });
  stage.canvas.addEventListener("blur", redraw, { signal });

  const region = () => (marks.mask ? { mask: encodeMask(marks.mask, stage.height, stage.width) } : marks.box ? { box: marks.box } : null);
  const needsRegion = () => {
    if (region()) return false;
    fill(result, el("p", { role: "alert" }, "Mark a region first: draw a box, paint with the brush, or type the numbers of a box."));
    return true;
  };
  const clear = () => {
    marks.box = marks.mask = layer = paintRegions = corner = null;
    marks.points = [];
    fill(result);
    changed();
  };

  const size = sizeField(() => {});
  const showRegions = (regions) => {
    paintRegions = regionPainter(regions, opacity);
    stage.drawSoon();
  };
  const segment = actionButton("Segment", signal, (own) => busy(result, async () => {
    if (!region() && !marks.points.length) return needsRegion();
    const prompt = { ...region(), ...(marks.points.length ? { points: marks.points } : {}) };
    const form = [["file", image.blob], ["method", "prompt"], ["format", "rle"], ["size", size.control.value], ["prompts", JSON.stringify([prompt])]];
    const { regions } = await json({ method: "POST", path: "/v1/segment", form, signal: own });
    showRegions(regions);
    fill(result, el("h3", {}, "Segmented"), regionTable(regions), regions.length ? downloadButtons(regions, image.blob.name, "segment") : null);
    announce(`${regions.length} region`);
  }), { id: "segment", class: "primary" });
  const saveMark = () => {
    if (needsRegion()) return;
    const pixels = marks.mask ?? boxPixels(marks.box, stage);
    const { area, box } = measure(pixels, stage.width);
    const regions = [{ area, box, segmentation: encodeMask(pixels, stage.height, stage.width) }];
    fill(result, el("h3", {}, "The mark"), regionTable(regions), downloadButtons(regions, image.blob.name, "mark"));
  };

  place.append(
    el("p", {}, "Draw with the pointer, or move the cursor in the image with the arrow keys and press Enter. All numbers are pixels of the image."),
    el("div", {}, field("Tool", tool), field("Brush size", brush), field("Opacity", opacity)),
    el("fieldset", {}, el("legend", {}, "Box"), el("div", { class: "row" }, ...numbers.map((input, i) => field(["x", "y", "width", "height"][i], input)))),
    summary,
    el("div", { class: "row" }, segment, el("button", { type: "button", id: "save-mark", onclick: saveMark }, "Save the mark"), el("button", { type: "button", id: "clear-marks", onclick: clear }, "Clear")),
    size.element,
  );
  changed();
  const note = el("p", { class: "quiet" });
  const byRegion = actionButton("Search by this region", signal, (own) => busy(result, async () => {
    if (needsRegion()) return;
    const { name } = collection.current();
    const answer = await searchRegion(name, image.blob, region(), 12, own);
    fill(result, el("h3", {}, "Images with a similar region"), resultCards(name, answer.data));
  }), { id: "mark-search" });
  const collection = await collectionField("mark-collection", signal, (current) => {
    byRegion.disabled = Boolean(regionSearchProblem(current));
    note.textContent = regionSearchProblem(current);
  });
  place.append(el("h3", {}, "In a collection"), collection.element);
  if (collection.current()) {
    const find = findEverywhere({ image, signal, result, collection, region: () => (needsRegion() ? null : region()) });
    place.append(find, el("div", { class: "row" }, byRegion), note);
  }
  place.append(result);
}

/** A mask at the size of the canvas, which is all that can be seen: [pixels, height, width]. */
function reduced(mask, { canvas, width, height }) {
  if (canvas.width === width) return [mask, height, width];
  const pixels = new Uint8Array(canvas.width * canvas.height);
  for (let y = 0; y < canvas.height; y++) {
    const row = Math.floor(((y + 0.5) * height) / canvas.height) * width;
    for (let x = 0; x < canvas.width; x++) pixels[y * canvas.width + x] = mask[row + Math.floor(((x + 0.5) * width) / canvas.width)];
  }
  return [pixels, canvas.height, canvas.width];
}

function boxPixels([x, y, width, height], stage) {
  const pixels = new Uint8Array(stage.width * stage.height);
  for (let row = y; row < y + height; row++) pixels.fill(1, row * stage.width + x, row * stage.width + x + width);
  return pixels;
}

/** A point: a plus inside, a minus outside. */
function cross(canvas, x, y, isPositive) {
  canvas.beginPath();
  canvas.arc(x, y, 9, 0, 2 * Math.PI);
  canvas.fillStyle = isPositive ? "#0b6b2e" : "#a3192a";
  canvas.fill();
  canvas.strokeStyle = "#ffffff";
  canvas.lineWidth = 2;
  canvas.stroke();
  canvas.beginPath();
  canvas.moveTo(x - 5, y);
  canvas.lineTo(x + 5, y);
  if (isPositive) {
    canvas.moveTo(x, y - 5);
    canvas.lineTo(x, y + 5);
  }
  canvas.stroke();
}

/** The cursor of the keyboard. */
function ring(canvas, x, y) {
  for (const [colour, width] of [["#000000", 4], ["#ffffff", 2]]) {
    canvas.strokeStyle = colour;
    canvas.lineWidth = width;
    canvas.beginPath();
    canvas.arc(x, y, 6, 0, 2 * Math.PI);
    canvas.stroke();
  }
}
