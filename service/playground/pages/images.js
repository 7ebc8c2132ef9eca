// Lets the user choose an image: drop, paste, choose a file, use the camera, or take an item of a collection.

import { collectionPath, json, request } from "./api.js";
import { acceptDrops, el, errorBox, fill } from "./dom.js";

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
  const choose = (blob) => {
    if (!blob) return;
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
    if (item) onimage(await itemImage(...JSON.parse(item)));
    else choose(dropped.files[0]);
  });
  const paste = (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (file && takesPaste()) choose(file);
  };
  document.addEventListener("paste", paste);
  zone.stop = () => {
    document.removeEventListener("paste", paste);
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
  new IntersectionObserver(async (entries, observer) => {
    if (!entries.some((entry) => entry.isIntersecting)) return;
    observer.disconnect();
    try {
      const { blob } = await itemImage(collection, id);
      picture.src = URL.createObjectURL(blob);
      picture.addEventListener("load", () => URL.revokeObjectURL(picture.src), { once: true });
    } catch {
      picture.replaceWith(el("span", { class: "no-image" }, "no stored image"));
    }
  }, { rootMargin: "300px" }).observe(picture);
  return picture;
}

/** The names of all collections. */
export async function collectionNames() {
  const { data } = await json({ path: "/v1/collections", shown: false });
  return data.map((one) => one.name);
}

/** Decode an image upright. Return an ImageBitmap, whose width and height are those of the API's coordinates. */
export function decoded(blob) {
  return createImageBitmap(blob, { imageOrientation: "from-image" });
}

function named(blob, name) {
  if (blob.name) return blob;
  const suffix = { "image/png": ".png", "image/webp": ".webp" }[blob.type] ?? ".jpg";
  return new File([blob], name || `image${suffix}`, { type: blob.type || "image/jpeg" });
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
