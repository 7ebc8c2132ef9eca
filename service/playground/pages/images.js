// Lets the user choose an image: drop, paste, choose a file, use the camera, or take an item of a collection.

import { collectionPath, json, request } from "./api.js";
import { acceptDrops, el, errorBox, fill } from "./dom.js";

export const IMAGE_NAME = /\.(jpe?g|png|webp|gif|bmp|tiff?|avif|heic)$/i;
const SUFFIXES = {
  "image/png": ".png", "image/webp": ".webp", "image/gif": ".gif", "image/bmp": ".bmp", "image/tiff": ".tiff", "image/avif": ".avif", "image/heic": ".heic",
};

/** Make an element with which the user chooses one image. `onimage` gets { blob, item }. Call `.stop()` when it is not
 * needed any more. If a page has several pickers, `takesPaste` says which of them gets a pasted image. */
export function imagePicker({ label = "Drop an image, paste it, or", onimage, takesPaste = () => true }) {
  const input = el("input", { type: "file", accept: "image/*", class: "hidden-text", "aria-label": "Image file" });
  const note = el("div", { class: "note" });
  const camera = cameraPanel((blob) => choose(blob));
  const zone = el(
    "div",
    { class: "drop", role: "group", "aria-label": "Choose an image" },
    el("span", {}, label, " "),
    el("button", { type: "button", onclick: () => input.click() }, "choose a file"),
    el("button", { type: "button", onclick: () => camera.start() }, "use the camera"),
    input,
    camera.element,
    note,
  );
  let turn = 0; // an item whose image is still on the way must not take the place of a newer image
  const choose = (blob) => {
    if (!blob) return;
    turn++;
    fill(note);
    camera.stop();
    onimage({ blob: named(blob), item: null });
  };
  input.addEventListener("change", () => {
    choose(input.files[0]);
    input.value = "";
  });
  acceptDrops(zone, note, async (dropped) => {
    const item = dropped.getData("application/x-dinov2-item");
    if (!item) return choose(dropped.files[0]);
    const mine = ++turn;
    const image = await itemImage(...JSON.parse(item));
    if (mine === turn) onimage(image);
  });
  const paste = (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (file && takesPaste()) choose(file);
  };
  document.addEventListener("paste", paste);
  zone.stop = () => {
    document.removeEventListener("paste", paste);
    turn++;
    camera.stop();
  };
  return zone;
}

/** Fetch the stored image of an item. Raise ApiError if the collection stores no images. */
export async function itemImage(collection, id, signal) {
  const path = collectionPath(collection, "items", id, "image");
  const response = await request({ path, accept: "image/*", shown: false, signal });
  const blob = await response.blob();
  return { blob: named(blob, id.split("/").pop()), item: { collection, id } };
}

/** An <img> of an item, which is loaded when it comes into view. Shows the id if there is no stored image. */
export function itemPicture(collection, id, attributes = {}) {
  const picture = el("img", { alt: id, draggable: "true", ...attributes });
  picture.addEventListener("dragstart", (event) => {
    event.dataTransfer.setData("application/x-dinov2-item", JSON.stringify([collection, id]));
  });
  const replace = (text) => picture.replaceWith(el("span", { class: "no-image" }, text));
  let loading = null;
  new IntersectionObserver(async (entries, observer) => {
    loading?.abort(); // it was scrolled away, or removed, while its image was on the way
    if (!entries.at(-1).isIntersecting) return;
    const { signal } = (loading = new AbortController());
    try {
      const { blob } = await itemImage(collection, id, signal);
      observer.disconnect();
      const url = URL.createObjectURL(blob);
      picture.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
      picture.addEventListener("error", () => {
        URL.revokeObjectURL(url);
        replace("this browser cannot show it");
      }, { once: true });
      picture.src = url;
    } catch (error) {
      if (error.name === "AbortError") return;
      observer.disconnect();
      replace(error.status === 404 ? "no stored image" : `no image: ${error.message}`);
    }
  }, { rootMargin: "300px" }).observe(picture);
  return picture;
}

/** The names of all collections. */
export async function collectionNames() {
  const { data } = await json({ path: "/v1/collections", shown: false });
  return data.map((one) => one.name);
}

/** Decode an image upright. Return an ImageBitmap, whose width and height are those of the API's coordinates. Raise Error
 * if the browser cannot read the format, which the service may be able to read. */
export async function decoded(blob) {
  try {
    return await createImageBitmap(blob, { imageOrientation: "from-image" });
  } catch {
    throw new Error(`${blob.name ?? "the image"} cannot be read as an image by this browser`);
  }
}

/** The blob as a file. A name without the suffix of an image gets one, because the file may be downloaded under this name. */
function named(blob, name = "image") {
  if (blob.name) return blob;
  const suffix = IMAGE_NAME.test(name) ? "" : SUFFIXES[blob.type] ?? ".jpg";
  return new File([blob], name + suffix, { type: blob.type || "image/jpeg" });
}

function cameraPanel(onphoto) {
  const video = el("video", { autoplay: true, muted: true, playsinline: true, "aria-label": "Camera" });
  const panel = el("div", { class: "camera", hidden: true }, video);
  let stream = null;
  const stop = () => {
    stream?.getTracks().forEach((track) => track.stop());
    stream = null;
    video.srcObject = null;
    panel.hidden = true;
  };
  const take = () => {
    const canvas = el("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => {
      stop();
      onphoto(new File([blob], "camera.jpg", { type: "image/jpeg" }));
    }, "image/jpeg", 0.92);
  };
  panel.append(
    el("button", { type: "button", onclick: take }, "Take the picture"),
    el("button", { type: "button", onclick: stop }, "Cancel"),
  );
  const start = async () => {
    panel.hidden = false;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
      if (panel.hidden || !panel.isConnected) return stop(); // cancelled, or left, while the browser was asking
      video.srcObject = stream;
      await video.play();
    } catch (error) {
      panel.append(errorBox(new Error(`the camera cannot be used: ${error.message}`)));
    }
  };
  return { element: panel, start, stop };
}
