// Find a marked region in all images of a collection, page by page.

import { base64, collectionPath, json } from "../api.js";
import { announce, busy, el, field, fill } from "../dom.js";
import { actionButton } from "./image-common.js";
import { maskCard } from "./image-results.js";

const LIMIT = 12;

/** The controls of find-everywhere. The results are shown in `result`. `region()` returns { box } or { mask }, or null. */
export function findEverywhere({ image, signal, result, collection, region }) {
  const least = el("input", { type: "number", id: "find-score", min: 0, max: 1, step: 0.05, ".value": "0.5" });
  const limit = el("input", { type: "number", id: "find-limit", min: 1, max: 100, ".value": String(LIMIT) });
  const button = actionButton("Find everywhere", signal, (own) => busy(result, async () => {
    const marked = region();
    if (!marked) return;
    const current = collection.current();
    if (!current.originals) {
      throw new Error(`the collection ${current.name} stores no images; find everywhere needs a collection with "originals": true`);
    }
    const reference = { image: await base64(image.blob), ...marked };
    const body = { references: [reference], min_score: Number(least.value), limit: Number(limit.value) };
    await showPages(result, current.name, body, own);
  }), { id: "find-everywhere" });
  return el("div", {}, field("Lowest score", least), field("Results on a page", limit), el("div", { class: "row" }, button));
}

/** Ask until no image is pending, and show the first page. */
async function showPages(result, name, body, signal) {
  const path = collectionPath(name, "find-region");
  const list = el("ul", { class: "results" });
  const state = el("div", { id: "find-status", role: "status" }, "Comparing images...");
  const bar = el("progress", { "aria-label": "Images compared" });
  const more = el("button", { type: "button", id: "find-more", hidden: true }, "More results");
  fill(result, el("h3", {}, "Found"), state, bar, list, more);
  let answer;
  do {
    answer = await json({ method: "POST", path, json: body, signal });
    bar.max = Math.max(1, answer.examined + answer.pending);
    bar.value = answer.examined;
    fill(list, ...answer.data.map((hit) => maskCard(name, hit, signal)));
    state.textContent = describe(answer, list);
  } while (answer.pending > 0);
  bar.hidden = true;
  announce(state.textContent);
  const turn = () => {
    more.hidden = !answer.cursor;
  };
  more.addEventListener("click", () => busy(state, async () => {
    more.disabled = true;
    try {
      answer = await json({ method: "POST", path, json: { ...body, cursor: answer.cursor }, signal });
      list.append(...answer.data.map((hit) => maskCard(name, hit, signal)));
      state.textContent = describe(answer, list);
      announce(state.textContent);
    } finally {
      more.disabled = false;
    }
    turn();
  }));
  turn();
}

function describe({ total, examined, pending, unreadable }, list) {
  const parts = [`${total} images contain the region, ${list.childElementCount} are shown. ${examined} images were examined`];
  if (pending) parts.push(`${pending} are pending`);
  if (unreadable) parts.push(`${unreadable} cannot be read`);
  return `${parts.join(", ")}.`;
}
