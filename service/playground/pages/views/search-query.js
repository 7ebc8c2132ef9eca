// The query of a search: an image or an item, and further items that the results should be like or unlike.

import { base64, collectionPath } from "../api.js";
import { announce, el, fill } from "../dom.js";
import { imagePicker, itemImage } from "../images.js";
import { itemChooser } from "../item-chooser.js";
import { currentImage, setImage } from "../state.js";

const kept = { weight: 1, examples: [] }; // until the page is reloaded, and for one collection

/** The part of the page with which the user makes the query. `onchange` is called when the query is different.
 *   useItem(id, collection): search by this item        addExample(id, weight): add an item to the query
 *   query(): { image, item, weight, examples }          isEmpty(), reset() for another collection, stop()
 *   arrived(): a promise that resolves when the image of the item is loaded, or cannot be */
export function queryPanel({ collection, onchange, onitems }) {
  let image = currentImage(); // { blob, item }, where the blob is null as long as the item's image is not loaded
  let arriving = Promise.resolve(); // when the image of the item is there, or cannot be
  const leaving = new AbortController();
  const picker = imagePicker({ onimage: use });
  const chooser = itemChooser({ collection, onpick: ({ id }) => element.useItem(id, collection()), onpage: onitems });
  const shown = el("div", { class: "query", id: "search-query" });
  const examples = el("ul", { class: "examples", id: "search-examples", "aria-label": "Examples and counter-examples" });
  const element = el("div", {}, picker, chooser, shown, examples);

  function use(next) {
    image = next;
    if (next?.blob) setImage(next);
    show();
    onchange();
  }

  function weightInput(name, value, onweight) {
    const input = el("input", { type: "number", min: -1000, max: 1000, step: "any", required: true, "aria-label": `weight of ${name}`, ".value": value });
    input.addEventListener("change", () => input.reportValidity() && onweight(Number(input.value)));
    return input;
  }

  function show() {
    fill(shown, image && [
      image.blob && queryPicture(image.blob),
      el("p", {}, el("strong", {}, "Query: "), nameOf(image)),
      kept.examples.length > 0 && el("label", {}, "weight ", weightInput("the query", kept.weight, (weight) => { kept.weight = weight; onchange(); })),
      el("button", { type: "button", onclick: () => { setImage(null); use(null); } }, "remove the query"),
    ]);
    fill(examples, kept.examples.map((example) => el("li", { class: "chip" },
      el("span", {}, example.weight < 0 ? "less like " : "more like ", el("strong", {}, example.id), " "),
      weightInput(example.id, example.weight, (weight) => { example.weight = weight; show(); onchange(); }),
      el("button", { type: "button", "aria-label": `remove ${example.id}`, onclick: () => remove(example) }, "remove"))));
  }

  function remove(example) {
    kept.examples = kept.examples.filter((one) => one !== example);
    announce(`${example.id} is removed from the query`);
    show();
    onchange();
    (examples.querySelector("button") ?? shown.querySelector("button"))?.focus();
  }

  element.useItem = (id, name) => {
    arriving = fetchItem(id, name); // `image` is set, and its blob follows
    return arriving;
  };
  async function fetchItem(id, name) {
    use({ blob: null, item: { collection: name, id } });
    const wanted = image;
    try {
      const loaded = await itemImage(name, id, leaving.signal);
      if (image !== wanted) return;
      image = loaded;
      setImage(loaded);
    } catch (error) {
      if (image !== wanted) return;
      console.debug(error); // the item has no stored image: a search by its vector works all the same
      setImage(null);
    }
    show();
  }
  element.arrived = () => arriving;
  element.addExample = (id, weight) => {
    kept.examples = [...kept.examples.filter((one) => one.id !== id), { id, weight, collection: collection() }];
    announce(`${id} is ${weight < 0 ? "a counter-example" : "a further example"}`);
    show();
    onchange();
  };
  element.query = () => ({ image, item: image?.item ?? null, weight: kept.weight, examples: kept.examples });
  element.isEmpty = () => !image && !kept.examples.length;
  element.reset = () => {
    chooser.reset();
    kept.examples = kept.examples.filter((example) => example.collection === collection());
    show();
  };
  element.stop = () => {
    image = null; // an image that is still on the way must not become that of another view
    leaving.abort();
    picker.stop();
    chooser.stop();
  };
  show();
  return element;
}

/** The call of a search. Raise Error if the query cannot be expressed. */
export async function searchCall(collection, { image, item, weight, examples }, options) {
  const call = { method: "POST", path: collectionPath(collection, "search") };
  const isMember = item?.collection === collection;
  if (image && !isMember && !image.blob) {
    throw new Error(`the item ${item.id} is in the collection ${item.collection}, which stores no image of it: only a query with an image can be used in another collection`);
  }
  if (examples.length) {
    const parts = examples.map((example) => ({ id: example.id, weight: example.weight }));
    if (isMember) parts.unshift({ id: item.id, weight });
    else if (image) parts.unshift({ image: await base64(image.blob), weight });
    return { ...call, json: { combine: parts, ...options } };
  }
  if (isMember) return { ...call, json: { id: item.id, ...options } };
  const fields = Object.entries(options).filter(([, value]) => value !== undefined);
  const text = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));
  return { ...call, form: [["file", image.blob], ...fields.map(([name, value]) => [name, text(value)])] };
}

function queryPicture(blob) {
  const url = URL.createObjectURL(blob);
  const done = () => URL.revokeObjectURL(url);
  return el("img", { class: "query-picture", alt: "the query", src: url, onload: done, onerror: done });
}

function nameOf({ blob, item }) {
  return item ? `item ${item.id} of ${item.collection}` : blob.name;
}
