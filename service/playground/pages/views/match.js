// TODO

import { el } from "../dom.js";

export function mount(place) {
  place.append(el("h2", {}, "Match"));
}
