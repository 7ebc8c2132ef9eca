// What the model sees in one image: patch similarity, marks, attention, colours, masks, boxes, depth and class.

import { announce, el, errorBox, fill } from "../dom.js";
import { decoded, imagePicker, itemImage } from "../images.js";
import { currentImage, setCollection, setImage } from "../state.js";
import { patchFeatures } from "./image-features.js";
import { createStage } from "./image-stage.js";

// Each tab is a module with `mount(panel, context)`. The context has the image ({ blob, item }), the stage, a signal that
// is aborted when the tab is left, and `features(size)`. Tabs keep nothing after they are left.
const TABS = [
  ["patches", "Patches", () => import("./image-patches.js")],
  ["mark", "Mark", () => import("./image-mark.js")],
  ["attention", "Attention", () => import("./image-attention.js")],
  ["colours", "Colours", () => import("./image-colours.js")],
  ["masks", "Masks", () => import("./image-masks.js")],
  ["boxes", "Boxes", () => import("./image-boxes.js")],
  ["depth", "Depth", () => import("./image-depth.js")],
  ["class", "Class", () => import("./image-class.js")],
];

export function mount(place, parameters) {
  const view = { tab: TABS.some(([key]) => key === parameters.get("tab")) ? parameters.get("tab") : "patches", work: null, turn: 0 };
  const body = el("div", { id: "image-body" }, el("p", { class: "quiet" }, "Choose an image to see what the model sees in it. An item of a collection is opened by “look at it” in ",
    el("a", { href: "#search" }, "Search"), " and ", el("a", { href: "#collections" }, "Collections"), "."));
  const picker = imagePicker({ onimage: (image) => show(image) });
  place.append(el("h2", {}, "Image"), picker, body);
  const close = () => {
    view.work?.abort();
    view.fetching?.abort();
    view.bitmap?.close();
    view.bitmap = null;
  };

  async function show(image) {
    const turn = ++view.turn;
    close();
    setImage(image);
    try {
      const bitmap = await decoded(image.blob);
      if (turn !== view.turn) return bitmap.close();
      view.bitmap = bitmap;
    } catch (error) {
      if (turn === view.turn) fill(body, errorBox(error));
      return;
    }
    announce(`${nameOf(image)}, ${view.bitmap.width} by ${view.bitmap.height} pixels`);
    fillBody(body, view, image);
  }

  /** Fetch the image of an item. Another image that is chosen meanwhile takes its place. */
  async function open(collection, item) {
    const turn = ++view.turn;
    const { signal } = (view.fetching = new AbortController());
    try {
      const image = await itemImage(collection, item, signal);
      if (turn === view.turn) show(image);
    } catch (error) {
      if (turn === view.turn) fill(body, errorBox(error));
    }
  }

  const [collection, item] = [parameters.get("collection"), parameters.get("item")];
  if (collection) setCollection(collection);
  if (collection && item) open(collection, item);
  else if (currentImage()) show(currentImage());
  return () => {
    view.turn++;
    picker.stop();
    close();
  };
}

function nameOf({ blob, item }) {
  return item ? `${item.id} of ${item.collection}` : blob.name;
}

/** Show an image with its tabs. */
function fillBody(body, view, image) {
  const stage = createStage(view.bitmap);
  const panel = el("div", { id: "image-panel", role: "tabpanel", tabindex: "-1" });
  const cache = new Map();
  const { signal } = (view.fetching = new AbortController());
  const features = (size) => {
    const key = String(size);
    if (!cache.has(key)) {
      const promise = patchFeatures(image.blob, size, { signal });
      cache.set(key, promise);
      promise.catch(() => cache.delete(key));
    }
    return cache.get(key);
  };
  const buttons = TABS.map(([key, title]) =>
    el("button", { type: "button", role: "tab", id: `tab-${key}`, "aria-controls": panel.id, onclick: () => open(key) }, title),
  );
  const tabs = el("div", { class: "row", role: "tablist", "aria-label": "What to show", onkeydown: (event) => move(event) }, ...buttons);

  async function open(key) {
    view.work?.abort();
    const work = (view.work = new AbortController());
    view.tab = key;
    for (const button of buttons) {
      const isOpen = button.id === `tab-${key}`;
      button.setAttribute("aria-selected", String(isOpen));
      button.tabIndex = isOpen ? 0 : -1;
    }
    panel.setAttribute("aria-labelledby", `tab-${key}`);
    stage.release();
    const content = el("div", { id: `image-${key}` });
    fill(panel, content);
    try {
      const module = await TABS.find(([one]) => one === key)[2]();
      if (!work.signal.aborted) await module.mount(content, { image, stage, features, signal: work.signal });
    } catch (error) {
      if (error.name !== "AbortError" && !work.signal.aborted) fill(content, errorBox(error));
    }
  }

  function move(event) {
    const at = TABS.findIndex(([key]) => key === view.tab);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? TABS.length - 1 : step ? (at + step + TABS.length) % TABS.length : null;
    if (to === null) return;
    event.preventDefault();
    buttons[to].focus();
    open(TABS[to][0]);
  }

  const caption = el("p", { class: "quiet" }, `${nameOf(image)}, ${stage.width} × ${stage.height} pixels`);
  fill(body, tabs, el("div", { class: "columns" }, el("div", { class: "stage-column" }, stage.canvas, caption), panel));
  open(view.tab);
}
