// Why two images match: lines between the patches that are each other's nearest neighbour.

import { json } from "../api.js";
import { announce, busy, el, field, fill, slider } from "../dom.js";
import { itemImage } from "../images.js";
import { currentCollection, currentImage, setCollection } from "../state.js";
import { matchPicture, placeText } from "./match-picture.js";
import { imageSlot } from "./match-slot.js";

export async function mount(place, parameters) {
  const note = el("p", { id: "match-total", role: "status" }, "Choose two images.");
  const faults = el("div");
  const rows = el("tbody");
  const picture = matchPicture({ onchange: (chosen) => markRow(rows, chosen) });
  const limit = el("input", { id: "match-limit", type: "number", min: 1, max: 1000, ".value": "100" });
  const threshold = slider("Lowest score that is shown", { id: "match-threshold", min: 0, max: 1, step: 0.01, value: 0 });
  const debias = el("input", { id: "match-debias", type: "checkbox" });
  let slots = [];
  let answer = null;
  let running = null;

  const show = () => {
    if (!answer) return;
    const matches = answer.matches.filter((match) => match.score >= Number(threshold.input.value));
    picture.show(matches);
    fill(rows, ...matches.map((match, i) => tableRow(match, i, picture.choose)));
    note.textContent = `${matches.length} of ${answer.total} matches are shown. Score of the images: ${answer.score.toFixed(3)}.`;
  };
  const clear = () => {
    answer = null;
    picture.clear();
    fill(rows);
  };
  const run = async () => {
    running?.abort();
    clear();
    const [a, b] = slots.map((slot) => slot.image);
    if (!a || !b) {
      note.textContent = a || b ? "Choose the other image." : "Choose two images.";
      return; // the other image may be on the way: the address stays
    }
    rememberItems(a, b);
    const { signal } = (running = new AbortController());
    fill(faults);
    note.textContent = "Matching...";
    const form = [["file", a.blob], ["file", b.blob], ["limit", limit.value || "100"]];
    if (debias.checked) form.push(["debias", "true"]);
    const found = await busy(faults, () => json({ method: "POST", path: "/v1/match", form, signal }));
    if (signal.aborted) return;
    if (!found) {
      note.textContent = "";
      return;
    }
    answer = found;
    picture.open([a.bitmap, b.bitmap], found.crop_boxes);
    show();
    announce(note.textContent);
  };

  const slot = (name, number) => imageSlot({ name, onchange: run, takesPaste: () => slots[0].image ? number === 1 : number === 0 });
  slots = [slot("First image", 0), slot("Second image", 1)];
  threshold.input.addEventListener("input", show);
  limit.addEventListener("change", run);
  debias.addEventListener("change", run);
  fill(
    place,
    el("h2", {}, "Match: why are two images similar?"),
    el("p", { class: "quiet" }, "A line connects two patches if each is the other's nearest neighbour in the other image."),
    el("div", { class: "columns" }, ...slots.map((one) => one.element)),
    el("div", { class: "row" },
      threshold,
      field("Number of matches", limit),
      field("Without the effect of positions", debias),
    ),
    note,
    faults,
    picture.element,
    el("details", { id: "match-table" },
      el("summary", {}, "The matches as a table"),
      el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Matches" },
        el("table", {},
          el("thead", {}, el("tr", {}, ...["Match", "Score", "Patch in the first image", "Patch in the second image"]
            .map((title) => el("th", { scope: "col" }, title)))),
          rows,
        ),
      ),
    ),
  );
  openFirst(slots, parameters);
  return () => {
    running?.abort();
    picture.stop();
    for (const one of slots) one.stop();
  };
}

/** Fill the slots from the address, or the first one with the image of the other views. */
function openFirst(slots, parameters) {
  const collection = parameters.get("collection") ?? currentCollection();
  setCollection(collection);
  ["a", "b"].forEach((name, i) => {
    const id = parameters.get(name);
    if (id && collection) slots[i].load((signal) => itemImage(collection, id, signal));
    else if (i === 0 && currentImage()) slots[i].load(() => currentImage());
  });
}

/** Write two items of one collection into the address, so that it can be shared. */
function rememberItems(a, b) {
  let hash = "#match";
  if (a.item && b.item && a.item.collection === b.item.collection) {
    hash += `?${new URLSearchParams({ collection: a.item.collection, a: a.item.id, b: b.item.id })}`;
  }
  if (location.hash.startsWith("#match")) history.replaceState(null, "", hash);
}

function tableRow(match, i, choose) {
  const button = el("button", { type: "button", onfocus: () => choose(i), onclick: () => choose(i) }, String(i + 1));
  const cells = [button, match.score.toFixed(3), ...match.boxes.map(placeText)];
  return el("tr", { "data-match": i }, ...cells.map((cell) => el("td", {}, cell)));
}

function markRow(rows, chosen) {
  rows.querySelector("[aria-current]")?.removeAttribute("aria-current");
  rows.children[chosen]?.setAttribute("aria-current", "true");
}
