// Results of a search as cards, with masks over the images where the answer has them.

import { el } from "../dom.js";
import { decoded, itemImage, itemPicture } from "../images.js";
import { itemLink } from "./image-common.js";
import { drawMask } from "./image-regions.js";

/** A list of results with their pictures. */
export function resultCards(collection, hits) {
  return el(
    "ul",
    { class: "results" },
    ...hits.map((hit) => card(collection, hit, itemPicture(collection, hit.id))),
  );
}

function card(collection, hit, picture, ...more) {
  const link = el("a", { href: itemLink(collection, hit.id) }, hit.id);
  return el("li", { class: "card", "data-id": hit.id }, picture, link, el("small", {}, `score ${hit.score.toFixed(3)}`), ...more);
}

/** A card of a result with a mask. The image is loaded when it comes into view. */
export function maskCard(collection, hit, signal, ...more) {
  const canvas = el("canvas", { role: "img", "aria-label": `${hit.id} with the mask of the region` });
  const result = card(collection, hit, canvas, el("small", {}, `box ${hit.box.join(", ")}; ${hit.area} pixels`), ...more);
  const observer = new IntersectionObserver(async (entries) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    try {
      const { blob } = await itemImage(collection, hit.id);
      const bitmap = await decoded(blob);
      if (signal.aborted) return;
      const scale = Math.min(1, 400 / Math.max(bitmap.width, bitmap.height));
      canvas.width = Math.round(bitmap.width * scale);
      canvas.height = Math.round(bitmap.height * scale);
      const context = canvas.getContext("2d");
      context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      drawMask(context, hit.segmentation, 0, 0.6);
      bitmap.close();
      result.dataset.drawn = "true";
    } catch (error) {
      canvas.replaceWith(el("span", { class: "no-image" }, error.message));
    }
  }, { rootMargin: "200px" });
  observer.observe(result);
  signal.addEventListener("abort", () => observer.disconnect());
  return result;
}
