// What the views share: the image that the user works with, the collection, and the filter of its items.

const state = { image: null, collection: "", filter: null };

/** The image: { blob (with a name), item ({collection, id} if it is from a collection) }, or null. */
export const currentImage = () => state.image;
export function setImage(image) {
  state.image = image;
}

/** The name of the collection that was chosen last. */
export const currentCollection = () => state.collection;
export function setCollection(name) {
  state.collection = name;
}

/** The filter (docs/search.md) that the map or the user has set, or null. */
export const currentFilter = () => state.filter;
export function setFilter(filter) {
  state.filter = filter;
}
