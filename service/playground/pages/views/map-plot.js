// The drawing of the map: points on a canvas, moved and zoomed, and the outline with which points are selected.

import { el, svg } from "../dom.js";

const NEAR = 10; // how far from a point the pointer finds it, in CSS pixels
const DIMMED = 0x48;

/** Make the plot. `onfocus` gets the index of a point or -1, `onselect` an array of indexes and whether they are added. */
export function mapPlot({ onfocus, onselect }) {
  const canvas = el("canvas", {
    id: "map-canvas", class: "stage map-canvas", tabindex: "0", role: "application", "aria-label": "Map of the items", "aria-describedby": "map-keys",
  });
  const outline = svg("polygon", { class: "map-lasso" });
  const ring = svg("circle", { r: 9, class: "map-ring", visibility: "hidden" });
  const element = el("div", { class: "map-plot" }, canvas, svg("svg", { class: "map-over", "aria-hidden": "true" }, outline, ring));
  const context = canvas.getContext("2d");
  const view = { x: 0, y: 0, scale: 20, isFitted: true };
  let size = { width: 0, height: 0, density: 1 };
  let [image, pixels] = [null, null];
  let positions = new Float32Array(0);
  let colours = new Uint32Array(0); // as the pixels of the image: alpha, blue, green, red from the highest byte
  let selected = null; // Uint8Array, or null if nothing is selected
  let [focused, frame] = [-1, 0];
  const times = [];

  const toScreen = (i) => [(positions[2 * i] - view.x) * view.scale + size.width / 2, (positions[2 * i + 1] - view.y) * view.scale + size.height / 2];
  const toMap = (x, y) => [(x - size.width / 2) / view.scale + view.x, (y - size.height / 2) / view.scale + view.y];

  const draw = () => {
    frame = 0;
    if (!pixels) return;
    const begin = performance.now();
    pixels.fill(0);
    const radius = Math.round(radiusOf(positions.length / 2, size.width) * size.density);
    const place = { pixels, width: canvas.width, height: canvas.height, halves: halvesOf(radius), radius };
    const [scale, dx, dy] = [view.scale * size.density, canvas.width / 2 - view.x * view.scale * size.density, canvas.height / 2 - view.y * view.scale * size.density];
    for (const pass of selected ? [0, 1] : [0]) {
      for (let i = 0; i < colours.length; i++) {
        if (selected && selected[i] !== pass) continue;
        const colour = selected && !pass ? (colours[i] & 0xffffff) | (DIMMED << 24) : colours[i];
        disc(place, Math.round(positions[2 * i] * scale + dx), Math.round(positions[2 * i + 1] * scale + dy), colour);
      }
    }
    context.putImageData(image, 0, 0);
    times.push(performance.now() - begin);
    if (times.length > 60) times.shift();
    canvas.dataset.frameMs = (times.reduce((sum, time) => sum + time, 0) / times.length).toFixed(2);
    canvas.dataset.view = [view.scale, view.x, view.y].join(" ");
    placeRing();
  };
  const redraw = () => (frame ||= requestAnimationFrame(draw));

  const placeRing = () => {
    ring.setAttribute("visibility", focused < 0 ? "hidden" : "visible");
    if (focused < 0) return;
    const [x, y] = toScreen(focused);
    ring.setAttribute("cx", x);
    ring.setAttribute("cy", y);
  };
  const focus = (index) => {
    if (index === focused) return;
    focused = index;
    placeRing();
    onfocus(index);
  };
  const fit = () => {
    let [left, right, top, bottom] = [Infinity, -Infinity, Infinity, -Infinity];
    for (let i = 0; i < positions.length; i += 2) {
      [left, right] = [Math.min(left, positions[i]), Math.max(right, positions[i])];
      [top, bottom] = [Math.min(top, positions[i + 1]), Math.max(bottom, positions[i + 1])];
    }
    if (left > right) return;
    [view.x, view.y] = [(left + right) / 2, (top + bottom) / 2];
    view.scale = Math.min((size.width - 40) / (right - left || 1), (size.height - 40) / (bottom - top || 1));
    view.isFitted = true;
    redraw();
  };
  const zoom = (factor, x = size.width / 2, y = size.height / 2) => {
    const [mapX, mapY] = toMap(x, y);
    view.scale = Math.min(Math.max(view.scale * factor, 0.5), 1e5);
    view.x = mapX - (x - size.width / 2) / view.scale;
    view.y = mapY - (y - size.height / 2) / view.scale;
    view.isFitted = false;
    redraw();
  };
  const pan = (dx, dy) => {
    view.x -= dx / view.scale;
    view.y -= dy / view.scale;
    view.isFitted = false;
    redraw();
  };
  const resize = () => {
    const width = element.clientWidth;
    if (!width) return;
    const height = Math.round(Math.min(Math.max(width * 0.66, 260), window.innerHeight * 0.75));
    size = { width, height, density: window.devicePixelRatio };
    canvas.width = Math.round(width * size.density);
    canvas.height = Math.round(height * size.density);
    element.style.height = `${height}px`;
    image = context.createImageData(canvas.width, canvas.height);
    pixels = new Uint32Array(image.data.buffer);
    if (view.isFitted) fit();
    else redraw();
  };
  const observer = new ResizeObserver(() => (element.clientWidth !== size.width || window.devicePixelRatio !== size.density) && resize());
  observer.observe(element);

  const plot = {
    element, fit, zoom, focus,
    lasso: false,
    /** Show points. `newColours` are [red, green, blue] of each point. */
    show(newPositions, newColours) {
      if (newPositions.length !== positions.length) focus(-1);
      positions = newPositions;
      if (newColours) colours = Uint32Array.from(newColours, ([red, green, blue]) => ((255 << 24) | (blue << 16) | (green << 8) | red) >>> 0);
      if (view.isFitted) fit();
      else redraw();
    },
    /** Mark points as selected: an array of indexes. */
    select(indexes) {
      selected = indexes.length ? new Uint8Array(positions.length / 2) : null;
      for (const i of indexes) selected[i] = 1;
      redraw();
    },
    /** The indexes of the points inside a polygon of [x, y] in the coordinates of the map. */
    inside: (polygon) => indexesWhere(positions, (x, y) => isInside(polygon, x, y)),
    stop() {
      observer.disconnect();
      cancelAnimationFrame(frame);
    },
  };
  const near = (x, y) => nearest(positions, ...toMap(x, y), NEAR / view.scale);
  listenToPointer(canvas, { plot, outline, pan, toMap, near, focus, onselect });
  listenToKeys(canvas, { plot, pan, onselect, move: (dx, dy) => focus(neighbourOf(positions, focused, dx, dy, view)), focused: () => focused });
  return plot;
}

function listenToPointer(canvas, { plot, outline, pan, toMap, near, focus, onselect }) {
  const pressed = new Map(); // where each pressed pointer is: one moves the map, and two also zoom it
  let path = null; // the outline that is being drawn, in CSS pixels of the canvas
  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  const centreAndWidth = () => {
    const [a, b = a] = pressed.values();
    return [[(a[0] + b[0]) / 2, (a[1] + b[1]) / 2], Math.hypot(a[0] - b[0], a[1] - b[1])];
  };
  const moved = (event) => {
    const [before, widthBefore] = centreAndWidth();
    pressed.set(event.pointerId, at(event));
    const [centre, width] = centreAndWidth();
    pan(centre[0] - before[0], centre[1] - before[1]);
    if (width && widthBefore) plot.zoom(width / widthBefore, ...centre);
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    pressed.set(event.pointerId, at(event));
    setPath(plot.lasso && pressed.size === 1 ? [at(event)] : null);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (path) setPath([...path, at(event)]);
    else if (pressed.has(event.pointerId)) moved(event);
    else focus(near(...at(event)));
  });
  canvas.addEventListener("pointerup", (event) => {
    if (path?.length > 2) onselect(plot.inside(path.map((point) => toMap(...point))), event.shiftKey);
    end(event);
  });
  const setPath = (newPath) => {
    path = newPath;
    outline.setAttribute("points", (path ?? []).map((point) => point.join(",")).join(" "));
  };
  const end = (event) => {
    pressed.delete(event.pointerId);
    setPath(null);
  };
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    plot.zoom(Math.exp(-event.deltaY / (event.deltaMode ? 20 : 500)), ...at(event));
  }, { passive: false });
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function listenToKeys(canvas, { plot, pan, onselect, move, focused }) {
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const arrow = ARROWS[event.key];
    if (arrow && event.shiftKey) pan(-60 * arrow[0], -60 * arrow[1]);
    else if (arrow) move(...arrow);
    else if (event.key === "+" || event.key === "=") plot.zoom(1.25);
    else if (event.key === "-") plot.zoom(0.8);
    else if (event.key === "0") plot.fit();
    else if (event.key === "Enter" && focused() >= 0) onselect([focused()], true);
    else if (event.key === "Escape") onselect([], false);
    else return;
    event.preventDefault();
  });
}

const radiusOf = (count, width) => (width < 500 ? 0.75 : 1) * (count < 300 ? 6 : count < 3000 ? 4 : 3);

/** Half the width of each row of a disc. */
const halvesOf = (radius) => Array.from({ length: 2 * radius + 1 }, (_, row) => Math.floor(Math.sqrt((radius + 0.5) ** 2 - (row - radius) ** 2)));

function disc({ pixels, width, height, halves, radius }, x, y, colour) {
  if (x < -radius || y < -radius || x >= width + radius || y >= height + radius) return;
  for (let row = 0; row < halves.length; row++) {
    const line = y - radius + row;
    if (line < 0 || line >= height) continue;
    const half = halves[row];
    const end = line * width + Math.min(x + half, width - 1);
    for (let at = line * width + Math.max(x - half, 0); at <= end; at++) pixels[at] = colour;
  }
}

function indexesWhere(positions, test) {
  const found = [];
  for (let i = 0; i < positions.length / 2; i++) if (test(positions[2 * i], positions[2 * i + 1])) found.push(i);
  return found;
}

/** Whether a point is inside a polygon: a ray to the right crosses its sides an odd number of times. */
function isInside(polygon, x, y) {
  let inside = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [[x1, y1], [x2, y2]] = [polygon[i], polygon[j]];
    if (y1 > y !== y2 > y && x < x1 + ((y - y1) / (y2 - y1)) * (x2 - x1)) inside = !inside;
  }
  return inside;
}

function nearest(positions, x, y, most) {
  let [best, bestSquare] = [-1, most * most];
  for (let i = 0; i < positions.length / 2; i++) {
    const square = (positions[2 * i] - x) ** 2 + (positions[2 * i + 1] - y) ** 2;
    if (square <= bestSquare) [best, bestSquare] = [i, square];
  }
  return best;
}

/** The nearest point in a direction, within 45 degrees of it. Without a point to start from: the nearest to the centre. */
function neighbourOf(positions, from, dx, dy, view) {
  if (from < 0) return nearest(positions, view.x, view.y, Infinity);
  let [best, bestSquare] = [from, Infinity];
  for (let i = 0; i < positions.length / 2; i++) {
    const [x, y] = [positions[2 * i] - positions[2 * from], positions[2 * i + 1] - positions[2 * from + 1]];
    const along = x * dx + y * dy;
    const square = x * x + y * y;
    if (along > 0 && along * along * 2 >= square && square < bestSquare) [best, bestSquare] = [i, square];
  }
  return best;
}
