// Patch features of images: fetched once, scaled to length 1, and compared by their cosine similarity.

import { request } from "../api.js";
import { parseNpy } from "../npy.js";

/** Fetch the patch features of an image. Return { height, width, depth, units }, where `units` are the vectors of all
 * patches in row order, scaled to length 1. */
export async function patchFeatures(blob, size, { signal, shown = true } = {}) {
  const form = [["file", blob], ["format", "npy"], ["size", String(size)]];
  const response = await request({ method: "POST", path: "/v1/features", form, accept: "application/x-npy, */*", signal, shown });
  const { shape, data } = parseNpy(await response.arrayBuffer());
  const [height, width, depth] = shape;
  for (let begin = 0; begin < data.length; begin += depth) {
    let sum = 0;
    for (let i = begin; i < begin + depth; i++) sum += data[i] * data[i];
    const factor = sum > 0 ? 1 / Math.sqrt(sum) : 0;
    for (let i = begin; i < begin + depth; i++) data[i] *= factor;
  }
  return { height, width, depth, units: data };
}

/** The unit vector of a patch. */
export function patchVector({ width, depth, units }, row, column) {
  const begin = (row * width + column) * depth;
  return units.subarray(begin, begin + depth);
}

/** The cosine similarity of a unit vector to all patches, in row order. */
export function similarities({ depth, units }, vector) {
  const result = new Float32Array(units.length / depth);
  for (let patch = 0, at = 0; patch < result.length; patch++) {
    let sum = 0;
    for (let i = 0; i < depth; i++, at++) sum += units[at] * vector[i];
    result[patch] = sum;
  }
  return result;
}
