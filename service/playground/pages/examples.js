// Examples of requests that run as they are: a drawn image, and bodies that follow the schemas.

import { base64 } from "./api.js";

/** A text in a body that stands for the drawn image in base64. */
export const EXAMPLE_IMAGE = "EXAMPLE_IMAGE";

const PATHS = { name: "demo", alias: "demo-alias", item_id: "example", schedule: "nightly" };
const BODIES = {
  create_embeddings: { input: [EXAMPLE_IMAGE] },
  put_collection: { originals: true },
  add_items: { items: [{ id: "example", image: EXAMPLE_IMAGE, metadata: { brand: "Arla" } }] },
  put_item: { image: EXAMPLE_IMAGE, metadata: { brand: "Arla" } },
  search: { image: EXAMPLE_IMAGE, k: 3 },
  create_job: { kind: "export", source: "dinov2_vits14" },
  match: { images: [EXAMPLE_IMAGE, EXAMPLE_IMAGE] },
  find_region: { references: [{ image: EXAMPLE_IMAGE, box: [60, 40, 80, 80] }] },
};

export const examplePath = (name) => PATHS[name] ?? "";

/** The body of an operation: an example of this file, or the required fields of its schema. */
export function exampleBody(operationId, schema, api) {
  return BODIES[operationId] ?? valueOf(schema, api, 0);
}

function valueOf(given, api, depth) {
  const schema = given.$ref ? api.components.schemas[given.$ref.split("/").pop()] : given;
  if (schema.examples?.length) return schema.examples[0];
  if (schema.const !== undefined) return schema.const;
  if (schema.enum) return schema.enum[0];
  const variant = (schema.anyOf ?? schema.oneOf)?.find((one) => one.type !== "null");
  if (variant) return valueOf(variant, api, depth);
  if (schema.type === "array") return depth < 4 && schema.minItems ? [valueOf(schema.items, api, depth + 1)] : [];
  if (schema.type === "number" || schema.type === "integer") return schema.minimum ?? 1;
  if (schema.type === "boolean") return true;
  if (schema.type === "string") return "example";
  const names = Object.keys(schema.properties ?? {});
  const required = new Set(schema.required ?? []);
  const image = names.find((name) => name === "image" || name === "images");
  const body = {};
  for (const name of names) {
    if (name === image) body[name] = name === "images" ? [EXAMPLE_IMAGE, EXAMPLE_IMAGE] : EXAMPLE_IMAGE;
    else if (required.has(name)) body[name] = depth < 4 ? valueOf(schema.properties[name], api, depth + 1) : null;
  }
  return body;
}

let drawn = null;

/** A drawn image, 320 x 240 pixels. Return a promise of a PNG file. */
export function exampleImage() {
  drawn ??= new Promise((resolve) => {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [320, 240];
    const context = canvas.getContext("2d");
    context.fillStyle = "#b9c7a6";
    context.fillRect(0, 0, 320, 240);
    context.strokeStyle = "#7d8a70";
    for (let x = -200; x < 320; x += 24) context.strokeRect(x, -2, 12, 260);
    context.fillStyle = "#c23b3b";
    context.beginPath();
    context.ellipse(130, 110, 70, 50, 0.3, 0, 2 * Math.PI);
    context.fill();
    canvas.toBlob((blob) => resolve(new File([blob], "example.png", { type: "image/png" })), "image/png");
  });
  return drawn;
}

/** A copy of a body with the drawn image in the place of `EXAMPLE_IMAGE`. */
export async function withImage(value) {
  if (value === EXAMPLE_IMAGE) return base64(await exampleImage());
  if (Array.isArray(value)) return Promise.all(value.map(withImage));
  if (value && typeof value === "object") {
    return Object.fromEntries(await Promise.all(Object.entries(value).map(async ([name, inner]) => [name, await withImage(inner)])));
  }
  return value;
}
