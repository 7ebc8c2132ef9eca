// Similar images: the query, the filter, and the results page by page.

import { el } from "../dom.js";

export function mount(place) {
  place.append(el("h2", {}, "Search"));
}
