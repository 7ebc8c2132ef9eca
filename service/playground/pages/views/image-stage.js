// The picture of the view "Image": a canvas with the image, over which the tabs draw, and which passes on the pointer and
// the keys in pixels of the upright image.

import { el } from "../dom.js";

const LONGEST = 1024; // pixels of the canvas; larger images are shown smaller

/** Make the stage of an ImageBitmap. The tabs set:
 *   paint(context, scale): draws over the image, where scale converts pixels of the image into pixels of the canvas
 *   point(kind, x, y, event): kind is "down", "move", "up" (the pointer is pressed), "over" or "out"
 *   key(event): returns true if the key was used */
export function createStage(bitmap) {
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const canvas = el("canvas", {
    id: "stage",
    class: "stage",
    tabindex: "0",
    role: "application",
    width: Math.max(1, Math.round(bitmap.width * scale)),
    height: Math.max(1, Math.round(bitmap.height * scale)),
  });
  canvas.style.maxWidth = `min(48rem, ${((80 * canvas.width) / canvas.height).toFixed(2)}vh)`; // the whole image is in view
  const context = canvas.getContext("2d");
  const stage = { canvas, bitmap, width: bitmap.width, height: bitmap.height, paint: null, point: null, key: null };

  stage.draw = () => {
    context.globalAlpha = 1;
    context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    if (stage.paint) stage.paint(context, scale);
    context.globalAlpha = 1;
  };
  let isPending = false;
  stage.drawSoon = () => {
    if (isPending) return;
    isPending = true;
    requestAnimationFrame(() => {
      isPending = false;
      stage.draw();
    });
  };
  stage.label = (text) => canvas.setAttribute("aria-label", text);
  stage.release = () => {
    stage.paint = stage.point = stage.key = null;
    stage.label("The image");
    stage.draw();
  };

  let isDown = false;
  const pass = (kind, event) => {
    const box = canvas.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * bitmap.width;
    const y = ((event.clientY - box.top) / box.height) * bitmap.height;
    stage.point?.(kind, limited(x, bitmap.width), limited(y, bitmap.height), event);
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !stage.point) return;
    isDown = true;
    canvas.setPointerCapture(event.pointerId);
    pass("down", event);
  });
  canvas.addEventListener("pointermove", (event) => pass(isDown ? "move" : "over", event));
  for (const name of ["pointerup", "pointercancel"]) {
    canvas.addEventListener(name, (event) => {
      if (isDown) pass("up", event);
      isDown = false;
    });
  }
  canvas.addEventListener("pointerleave", (event) => {
    if (!isDown) pass("out", event);
  });
  canvas.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey && !event.altKey && stage.key?.(event)) event.preventDefault();
  });
  stage.release();
  return stage;
}

/** The step [dx, dy] of an arrow key, or null. */
export function arrow(event) {
  return { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? null;
}

const limited = (value, size) => Math.min(Math.max(value, 0), size - 1e-6);
