// Uploads many files into a collection, a few with each request, so that progress is real and can be cancelled.

import { collectionPath, upload } from "./api.js";
import { IMAGE_NAME } from "./images.js";

const MAX_FILES = 16; // with each request
const MAX_BYTES = 16 * 2 ** 20;
const TRIES = 4;

/** The files of a drop, with those in its folders, as [{ file, path }]. The path begins with the folder's name. */
export async function droppedFiles(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return chosenFiles(transfer.files);
  return (await Promise.all(entries.map(filesOf))).flat();
}

/** The files of an <input type="file">, with or without `webkitdirectory`, as [{ file, path }]. */
export function chosenFiles(files) {
  return [...files].map((file) => ({ file, path: file.webkitRelativePath || file.name }));
}

/** Whether a file seems to be an image. The service decides by the content; this leaves out the other files of a folder. */
export function isImage({ file }) {
  return !file.name.startsWith(".") && (file.type.startsWith("image/") || IMAGE_NAME.test(file.name));
}

/** Upload `files`, as [{ file, path, id, metadata }], where an empty id means the sha256 of the file. `onprogress` is
 * called with { sent, bytes, done, stored, failed: [{ file, reason }] }. Return the last progress. Raise AbortError. */
export async function uploadFiles({ collection, files, signal, onprogress }) {
  const progress = { sent: 0, bytes: files.reduce((sum, { file }) => sum + file.size, 0), done: 0, stored: 0, failed: [] };
  let before = 0;
  for (const [number, batch] of batches(files).entries()) {
    const size = batch.reduce((sum, { file }) => sum + file.size, 0);
    const sending = (loaded, total) => {
      progress.sent = before + size * Math.min(1, loaded / (total || 1));
      onprogress(progress);
    };
    const failed = await send({ collection, batch, signal, shown: number === 0, sending });
    progress.failed.push(...failed);
    progress.done += batch.length;
    progress.stored += batch.length - failed.length;
    progress.sent = before += size;
    onprogress(progress);
  }
  return progress;
}

/** Upload the files of one request. Return those that failed. */
async function send({ collection, batch, signal, shown, sending }) {
  const form = batch.flatMap(({ file, id, metadata }) => [["file", file], ["id", id], ["metadata", JSON.stringify(metadata)]]);
  const call = { method: "POST", path: collectionPath(collection, "items"), form: [...form, ["on_error", "partial"]], signal, shown };
  const all = (reason) => batch.map((one) => ({ file: one, reason }));
  for (let attempt = 1; ; attempt += 1) {
    try {
      return failures((await upload(call, sending)).errors, batch);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      if ([429, 503].includes(error.status) && attempt < TRIES) await pause(error.retryAfter || 1, signal);
      else if (error.problem?.errors?.length) return failures(error.problem.errors, batch, error.message);
      else return all(error.message);
    }
  }
}

/** The files that failed. With `other`, no file of the request was stored, and this is the reason of the others. */
function failures(errors, batch, other) {
  const reasons = new Map((errors ?? []).map((one) => [one.index, one.detail]));
  const failed = batch.map((file, index) => ({ file, reason: reasons.get(index) ?? other }));
  return failed.filter(({ reason }) => reason !== undefined);
}

function batches(files) {
  const found = [];
  let size = 0;
  for (const one of files) {
    const last = found.at(-1);
    if (!last || last.length >= MAX_FILES || size + one.file.size > MAX_BYTES) {
      found.push([one]);
      size = 0;
    } else last.push(one);
    size += one.file.size;
  }
  return found;
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, Math.min(seconds, 30) * 1000);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("aborted", "AbortError"));
    }, { once: true });
  });
}

async function filesOf(entry) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    return [{ file, path: entry.fullPath.replace(/^\//, "") }];
  }
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject)); // at most 100 at a time
    if (!some.length) return found;
    for (const inner of some) found.push(...(await filesOf(inner)));
  }
}
