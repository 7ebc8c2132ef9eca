// Reads the items of a collection with their vectors, and computes their positions in a worker.

import { collectionPath, json } from "../api.js";

export const MOST_ITEMS = 10_000;
const PAGE = 1000;

// The policy for trusted types allows only this one script.
const policy = window.trustedTypes?.createPolicy("worker", { createScriptURL: () => scriptUrl() });
const scriptUrl = () => new URL("../worker-map.js", import.meta.url).href;

/** Read up to MOST_ITEMS items: { items: [{ id, metadata }], vectors: Float32Array, dimension, total }. */
export async function loadItems(collection, { signal, filter, onprogress }) {
  const { count: total } = await json({ method: "POST", path: collectionPath(collection, "items", "count"), json: filter ? { filter } : {}, signal, shown: false });
  const items = [];
  let [vectors, dimension, cursor] = [new Float32Array(0), 0, undefined];
  do {
    const limit = Math.min(PAGE, MOST_ITEMS - items.length);
    const page = await json({
      method: "POST",
      path: collectionPath(collection, "items", "scroll"),
      json: { ...(filter ? { filter } : {}), include: ["vector"], encoding_format: "base64", limit, ...(cursor ? { cursor } : {}) },
      shown: !cursor,
      signal,
    });
    for (const item of page.data) {
      const vector = floats(item.vector);
      if (!dimension) {
        dimension = vector.length;
        vectors = new Float32Array(Math.min(total + PAGE, MOST_ITEMS) * dimension);
      }
      vectors.set(vector, items.length * dimension);
      items.push({ id: item.id, metadata: item.metadata ?? {} });
    }
    cursor = page.cursor;
    onprogress(items.length, Math.min(total, MOST_ITEMS));
  } while (cursor && items.length < Math.min(total + PAGE, MOST_ITEMS));
  return { items, vectors: vectors.slice(0, items.length * dimension), dimension, total };
}

/** Compute the positions of vectors. `onmessage` gets the messages of the worker. Return a function that stops it. */
export function layOut({ vectors, dimension, layout, onmessage, onerror }) {
  const worker = new Worker(policy ? policy.createScriptURL("") : scriptUrl(), { type: "module" });
  worker.addEventListener("message", ({ data }) => {
    onmessage(data);
    if (data.isFinal) worker.terminate();
  });
  worker.addEventListener("error", (event) => onerror(new Error(event.message || "the layout failed")));
  worker.postMessage({ vectors, dimension, layout });
  return () => worker.terminate();
}

/** The little-endian float32 numbers of a base64 text. */
function floats(base64) {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Float32Array(bytes.buffer);
}
