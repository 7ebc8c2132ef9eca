// Edits the metadata and the source of an item.

import { collectionPath, json, parsed } from "../api.js";
import { announce, busy, dialog, el, field, fill } from "../dom.js";

/** Open a dialog with the metadata of an item as JSON. `onsaved` gets the item as it is stored then. */
export function itemEditor({ collection, item, onsaved }) {
  dialog(`Edit ${item.id}`, (close) => {
    const text = el("textarea", { id: "edit-metadata", class: "code", rows: 10, spellcheck: "false", ".value": JSON.stringify(item.metadata ?? {}, null, 2), oninput: () => check() });
    const source = el("input", { id: "edit-source", maxlength: 2048, spellcheck: "false", ".value": item.source ?? "" });
    const wrong = el("p", { class: "invalid", id: "edit-invalid", role: "status" });
    const save = el("button", { type: "submit", class: "primary" }, "Save");
    const note = el("div");

    function check() {
      try {
        const value = parsed(text.value);
        if (typeof value !== "object" || value === null || Array.isArray(value)) throw new Error("metadata is a JSON object");
        fill(wrong);
        save.disabled = false;
        text.removeAttribute("aria-invalid");
        return value;
      } catch (error) {
        fill(wrong, error.message);
        save.disabled = true;
        text.setAttribute("aria-invalid", "true");
        return null;
      }
    }

    async function submit(event) {
      event.preventDefault();
      const value = check();
      if (!value) return;
      const body = { metadata: mergePatch(item.metadata ?? {}, value) };
      if (source.value !== (item.source ?? "")) body.source = source.value;
      fill(note);
      const saved = await busy(note, () => json({ method: "PATCH", path: collectionPath(collection, "items", item.id), json: body }));
      if (!saved) return;
      close();
      announce(`${item.id} is saved`);
      onsaved({ ...item, metadata: saved.metadata, source: saved.source });
    }
    return el("form", { onsubmit: submit }, field("Metadata", text, "a JSON object"), wrong, field("Source", source, "where the image is from; original: and a digest names the stored image"), el("div", { class: "row" }, save), note);
  });
}

/** The JSON merge patch (RFC 7396) that changes one object into another. Unchanged values are not part of it. A value null cannot be set: it removes the key. */
export function mergePatch(before, after) {
  const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
  const patch = Object.create(null); // in which every name, also __proto__, is a name like any other
  for (const name of Object.keys(before)) if (!Object.hasOwn(after, name)) patch[name] = null;
  for (const [name, value] of Object.entries(after)) {
    const old = Object.hasOwn(before, name) ? before[name] : undefined;
    if (JSON.stringify(old) === JSON.stringify(value)) continue;
    patch[name] = isObject(old) && isObject(value) ? mergePatch(old, value) : value;
  }
  return patch;
}
