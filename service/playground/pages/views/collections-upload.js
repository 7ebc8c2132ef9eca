// Uploads images into a collection: files and folders, with metadata, progress, cancel and the files that failed.

import { parsed } from "../api.js";
import { acceptDrops, announce, el, errorBox, field, fill, select } from "../dom.js";
import { chosenFiles, droppedFiles, isImage, uploadFiles } from "../uploads.js";

const MANY = 100; // failed files that are listed

/** The part of the page that uploads. `ondone` is called after each upload. `.start(files)` uploads files that were chosen
 * elsewhere. Call `.stop()` when the part is left: this cancels the upload. */
export function uploadPanel({ collection, ondone }) {
  let running = null;
  const files = fileInput("upload-files", "Image files", (chosen) => element.start(chosen));
  const folder = fileInput("upload-folder", "Folder of images", (chosen) => element.start(chosen), { webkitdirectory: true });
  const zone = el("div", { class: "drop", role: "group", "aria-label": "Upload images" },
    el("span", {}, "To start the upload, drop images or folders, or "),
    el("button", { type: "button", onclick: () => files.click() }, "choose files"),
    el("button", { type: "button", onclick: () => folder.click() }, "choose a folder"), files, folder);
  const ids = select([["path", "the path of the file"], ["content", "the sha256 of the file"]], { id: "upload-ids" });
  const metadata = el("textarea", { id: "upload-metadata", class: "code", rows: 2, spellcheck: "false", placeholder: '{"brand": "Arla"}' });
  const folderKey = el("input", { id: "upload-folder-key", spellcheck: "false", autocomplete: "off" });
  const bar = el("progress", { id: "upload-progress", "aria-label": "Upload", max: 1, value: 0 });
  const words = el("p", { id: "upload-words" });
  const cancel = el("button", { id: "upload-cancel", type: "button", onclick: () => running?.abort() }, "Cancel the upload");
  const progress = el("div", { hidden: true }, bar, words, cancel);
  const result = el("div", { id: "upload-result" });
  const element = el("div", { class: "upload" }, // the options come first, because a choice of files starts the upload
    el("div", {}, field("Metadata of every file", metadata, "a JSON object; the file's name is added as filename"),
      field("Id of each item", ids, "an item with the same id is replaced"),
      field("Store the name of the folder as", folderKey, "a metadata key, such as class; empty: do not store it")),
    zone, progress, result);

  acceptDrops(zone, result, async (dropped) => element.start(await droppedFiles(dropped)));

  function prepared(chosen) {
    const shared = metadata.value.trim() ? parsed(metadata.value) : {};
    if (typeof shared !== "object" || shared === null || Array.isArray(shared)) throw new Error("it must be a JSON object");
    const key = folderKey.value.trim();
    return chosen.map(({ file, path }) => {
      const inside = path.includes("/") ? { [key]: path.split("/").at(-2) } : {};
      return { file, path, id: ids.value === "path" ? path : "", metadata: key ? { ...shared, ...inside } : shared };
    });
  }

  function show({ sent, bytes, done, stored, failed }, total) {
    bar.value = bytes ? sent / bytes : 1;
    const percent = Math.floor(bar.value * 100);
    fill(words, `${percent} % sent (${megabytes(sent)} of ${megabytes(bytes)} MB); ${done} of ${total} files processed: ${stored} stored, ${failed.length} failed`);
  }

  element.start = async (chosen) => {
    if (running) return announce("An upload is already running.");
    const images = chosen.filter(isImage);
    const others = chosen.filter((one) => !isImage(one));
    let wanted;
    try {
      wanted = prepared(images);
    } catch (error) {
      metadata.setAttribute("aria-invalid", "true");
      metadata.focus();
      return fill(result, errorBox(new Error(`The metadata cannot be used: ${error.message}`)));
    }
    metadata.removeAttribute("aria-invalid");
    await run(wanted, others);
  };

  async function run(wanted, others) {
    running = new AbortController();
    const { signal } = running;
    let last = { sent: 0, bytes: 1, done: 0, stored: 0, failed: [] };
    fill(result);
    progress.hidden = false;
    cancel.hidden = false;
    show(last, wanted.length);
    announce(`Uploading ${wanted.length} files`);
    let cancelled = false;
    try {
      const onprogress = (state) => show((last = state), wanted.length);
      last = await uploadFiles({ collection, files: wanted, signal, onprogress });
    } catch (error) {
      if (error.name !== "AbortError") fill(result, errorBox(error));
      cancelled = true;
    }
    running = null;
    cancel.hidden = true;
    if (!element.isConnected) return;
    progress.hidden = true;
    const rest = wanted.slice(last.done);
    report({ ...last, others, rest: cancelled ? rest : [] });
    ondone();
  }

  function report({ stored, failed, others, rest }) {
    const sentence = [`${stored} ${stored === 1 ? "file is" : "files are"} stored.`, failed.length && `${failed.length} failed.`,
      rest.length && `Cancelled: ${rest.length} were not sent, or the answer did not arrive.`,
      others.length && `${others.length} left out, because ${others.length === 1 ? "it is not an image" : "they are not images"}.`].filter(Boolean).join(" ");
    const again = [...failed.map(({ file }) => file), ...rest];
    fill(result, el("p", {}, sentence),
      failed.length > 0 && el("ul", { class: "failed" }, failed.slice(0, MANY).map(({ file, reason }) => el("li", {}, el("strong", {}, file.path), `: ${reason}`)),
        failed.length > MANY && el("li", {}, `and ${failed.length - MANY} more`)),
      again.length > 0 && el("button", { type: "button", onclick: () => run(again, []) }, `Upload these ${again.length} again`));
    announce(sentence);
  }

  element.stop = () => running?.abort();
  return element;
}

/** A hidden <input type="file"> for several files. `onchosen` gets [{ file, path }]. */
export function fileInput(id, label, onchosen, attributes = {}) {
  const input = el("input", { id, type: "file", multiple: true, class: "hidden-text", tabindex: "-1", "aria-label": label, ...attributes });
  input.addEventListener("change", () => {
    const chosen = chosenFiles(input.files);
    input.value = "";
    if (chosen.length) onchosen(chosen);
  });
  return input;
}

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
