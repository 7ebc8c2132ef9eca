// The results of a search as cards, with what can be done with each of them.

import { el, errorBox, fill } from "../dom.js";
import { itemImage, itemPicture } from "../images.js";
import { currentImage, setImage } from "../state.js";

/** Return a function that makes the elements for an answer of the search, whose first result has the rank `offset`. */
export function results({ panel, collection }) {
  const cards = (rows, start) => el("ol", { class: "results", start: start + 1 }, rows.map((row) => card(row, collection(), panel)));
  return (answer, offset) =>
    answer.groups
      ? answer.groups.map((group) => el("section", { class: "group" }, el("h3", {}, String(group.value)), cards(group.data, 0)))
      : cards(answer.data, offset);
}

function card(result, collection, panel) {
  const note = el("div");
  const action = (text, work) =>
    el("button", { type: "button", onclick: async () => {
      try {
        fill(note);
        await work();
      } catch (error) {
        fill(note, errorBox(error));
      }
    } }, text, el("span", { class: "hidden-text" }, `: ${result.id}`));
  return el("li", { class: "card", "data-id": result.id },
    itemPicture(collection, result.id),
    el("strong", { class: "id" }, result.id),
    el("span", { class: "score" }, scoreText(result)),
    metadataList(result.metadata, result.source),
    el("div", { class: "actions" },
      action("search by this", () => panel.useItem(result.id, collection)),
      action("more like this", () => panel.addExample(result.id, 1)),
      action("less like this", () => panel.addExample(result.id, -0.5)),
      action("look at it", async () => {
        setImage(await itemImage(collection, result.id));
        location.hash = `image?${new URLSearchParams({ collection, item: result.id })}`;
      }),
      action("compare with query", () => {
        if (!currentImage()) throw new Error("the query has no image that could be compared");
        const { item } = panel.query();
        const first = item?.collection === collection ? { a: item.id } : {}; // otherwise the current image
        location.hash = `match?${new URLSearchParams({ collection, ...first, b: result.id })}`;
      })),
    note);
}

function scoreText(result) {
  const text = `score ${result.score.toFixed(3)}`;
  return result.rerank_score === undefined ? text : `${text}, by patches ${result.rerank_score.toFixed(3)}`;
}

/** Metadata as a list of keys and values. A source that only names the stored image is left out. */
export function metadataList(metadata, source) {
  const rows = Object.entries(metadata ?? {});
  if (source && !source.startsWith("original:")) rows.push(["source", source]);
  if (!rows.length) return null;
  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  return el("dl", { class: "metadata" }, rows.map(([key, value]) => [el("dt", {}, key), el("dd", {}, text(value))]));
}
