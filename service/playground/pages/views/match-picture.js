// Two images side by side, or one above the other, with a line for each match.

import { css, rampColour } from "../colours.js";
import { el, fill, svg } from "../dom.js";

const GAP = 16;
const NARROW = 560;
const MOST_HEIGHT = 560;
const NEAR = 9; // how far from a line the pointer chooses it, in CSS pixels

export const placeText = ([x, y, width, height]) =>
  `x ${Math.round(x)}, y ${Math.round(y)}, ${Math.round(width)} × ${Math.round(height)}`;

/** Make the picture. `onchange` gets the index of the chosen match, or -1. */
export function matchPicture({ onchange }) {
  const canvas = el("canvas", { "aria-hidden": "true" });
  const lines = svg("svg", { id: "match-lines", class: "match-lines", role: "listbox", tabindex: "0", "aria-label": "Matches. The arrow keys go from one match to the next" });
  const stage = el("div", { class: "match-stage" }, canvas, lines);
  const status = el("p", { id: "match-status", role: "status" });
  const legend = el("p", { class: "quiet" });
  const element = el("div", { hidden: true }, stage, legend, status,
    el("p", { class: "quiet" }, "Point to a line, or press the arrow keys, Home and End when the picture is focused. Dashed: the part that the network sees."));
  let bitmaps = [];
  let crops = [];
  let matches = [];
  let layout = null;
  let chosen = -1;

  const draw = () => {
    if (!bitmaps.length || !element.clientWidth) return;
    layout = layoutOf(bitmaps, element.clientWidth);
    drawImages(canvas, layout, bitmaps);
    lines.setAttribute("viewBox", `0 0 ${layout.width} ${layout.height}`);
    drawLines(lines, layout, matches, crops);
    choose(chosen < matches.length ? chosen : -1);
  };
  const choose = (index) => {
    chosen = index;
    lines.querySelector("[aria-selected=true]")?.setAttribute("aria-selected", "false");
    lines.querySelectorAll(".match-patch").forEach((one) => one.remove());
    const match = matches[index];
    if (match) {
      const line = lines.querySelector(`#match-${index}`);
      line.setAttribute("aria-selected", "true");
      lines.setAttribute("aria-activedescendant", line.id);
      lines.append(svg("line", { ...ends(layout, match), class: "match-patch" }));
      match.boxes.forEach((box, i) => lines.append(patchMark(layout, i, box, "match-patch")));
    } else {
      lines.removeAttribute("aria-activedescendant");
    }
    status.textContent = match ? describe(match, index, matches.length) : "";
    onchange(match ? index : -1);
  };
  lines.addEventListener("pointermove", (event) => {
    const box = lines.getBoundingClientRect();
    const scale = layout.width / box.width;
    const near = nearest(layout, matches, (event.clientX - box.left) * scale, (event.clientY - box.top) * scale, NEAR * scale);
    if (near >= 0 && near !== chosen) choose(near);
  });
  lines.addEventListener("focus", () => chosen < 0 && matches.length && choose(0));
  lines.addEventListener("keydown", (event) => {
    const next = nextIndex(event.key, chosen, matches.length);
    if (next === null) return;
    event.preventDefault();
    choose(next);
  });
  const observer = new ResizeObserver(() => element.clientWidth !== layout?.width && draw());
  observer.observe(element);
  return {
    element,
    choose,
    open(images, cropBoxes) {
      [bitmaps, crops, layout] = [images, cropBoxes, null];
      element.hidden = false;
      draw();
    },
    show(shown) {
      const kept = matches[chosen];
      matches = shown;
      chosen = shown.indexOf(kept);
      fill(legend, ...legendOf(matches));
      draw();
    },
    clear() {
      [bitmaps, matches, chosen] = [[], [], -1];
      status.textContent = "";
      element.hidden = true;
    },
    stop: () => observer.disconnect(),
  };
}

/** The places of both images in the picture: { width, height, parts: [{ x, y, width, height, scale }] }. */
function layoutOf(bitmaps, width) {
  if (width < NARROW) {
    let y = 0;
    const parts = bitmaps.map((bitmap) => {
      const scale = Math.min(width / bitmap.width, MOST_HEIGHT / bitmap.height);
      const part = { x: (width - bitmap.width * scale) / 2, y, scale, width: bitmap.width * scale, height: bitmap.height * scale };
      y += part.height + GAP;
      return part;
    });
    return { width, height: y - GAP, parts };
  }
  const ratios = bitmaps.map((bitmap) => bitmap.width / bitmap.height);
  const height = Math.min((width - GAP) / (ratios[0] + ratios[1]), MOST_HEIGHT);
  let x = (width - GAP - height * (ratios[0] + ratios[1])) / 2;
  const parts = bitmaps.map((bitmap, i) => {
    const part = { x, y: 0, scale: height / bitmap.height, width: height * ratios[i], height };
    x += part.width + GAP;
    return part;
  });
  return { width, height, parts };
}

function drawImages(canvas, layout, bitmaps) {
  const density = window.devicePixelRatio;
  canvas.width = Math.round(layout.width * density);
  canvas.height = Math.round(layout.height * density);
  const context = canvas.getContext("2d");
  context.scale(density, density);
  layout.parts.forEach((part, i) => context.drawImage(bitmaps[i], part.x, part.y, part.width, part.height));
}

function drawLines(place, layout, matches, crops) {
  const all = matches.map((match) => ends(layout, match));
  const shadow = all.map(({ x1, y1, x2, y2 }) => `M${x1} ${y1}L${x2} ${y2}`).join("");
  const colour = colourOf(matches);
  fill(
    place,
    ...crops.map((box, i) => patchMark(layout, i, box, "match-crop")),
    svg("path", { d: shadow, class: "match-shadow", "aria-hidden": "true" }),
    // The best matches are drawn last, above the others.
    ...matches.map((match, i) => svg("line", {
      ...all[i], id: `match-${i}`, role: "option", "aria-selected": "false", stroke: css(colour(match)),
      "aria-label": describe(match, i, matches.length),
    })).reverse(),
  );
}

function ends(layout, match) {
  const [[x1, y1], [x2, y2]] = match.points.map(([x, y], i) => {
    const part = layout.parts[i];
    return [part.x + x * part.scale, part.y + y * part.scale];
  });
  return { x1, y1, x2, y2 };
}

function patchMark(layout, i, [x, y, width, height], name) {
  const part = layout.parts[i];
  const [w, h] = [width * part.scale, height * part.scale];
  return svg("rect", { x: part.x + x * part.scale, y: part.y + y * part.scale, width: w, height: h, class: name, "aria-hidden": "true" });
}

function colourOf(matches) {
  const scores = matches.map((match) => match.score);
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  return (match) => rampColour(high > low ? (match.score - low) / (high - low) : 1);
}

function legendOf(matches) {
  if (!matches.length) return ["No match reaches this score."];
  const [high, low] = [matches[0].score, matches[matches.length - 1].score];
  const swatches = [0, 0.25, 0.5, 0.75, 1].map((value) => {
    const swatch = el("span", { class: "swatch", "aria-hidden": "true" });
    swatch.style.background = css(rampColour(value));
    return swatch;
  });
  return [`Scores: ${low.toFixed(3)} `, swatches, ` ${high.toFixed(3)}`];
}

const describe = (match, i, count) =>
  `Match ${i + 1} of ${count}: score ${match.score.toFixed(3)}. First image: ${placeText(match.boxes[0])}. Second image: ${placeText(match.boxes[1])}.`;

function nearest(layout, matches, x, y, most) {
  let [best, bestDistance] = [-1, most];
  matches.forEach((match, i) => {
    const { x1, y1, x2, y2 } = ends(layout, match);
    const [dx, dy] = [x2 - x1, y2 - y1];
    const t = Math.min(Math.max(((x - x1) * dx + (y - y1) * dy) / (dx * dx + dy * dy || 1), 0), 1);
    const distance = Math.hypot(x - x1 - t * dx, y - y1 - t * dy);
    if (distance < bestDistance) [best, bestDistance] = [i, distance];
  });
  return best;
}

function nextIndex(key, index, count) {
  if (!count) return null;
  switch (key) {
    case "ArrowRight": case "ArrowDown": return (index + 1) % count;
    case "ArrowLeft": case "ArrowUp": return (Math.max(index, 0) + count - 1) % count;
    case "Home": return 0;
    case "End": return count - 1;
    case "Escape": return -1;
    default: return null;
  }
}
