// The frame of the playground: chooses the view by the address, and holds the API key, the theme and the code panel.

import { apiKey, json, storage } from "./api.js";
import { curl, python } from "./code.js";
import { copyText, el, errorBox, fill } from "./dom.js";

// Each view is a module with `mount(place, parameters)`. It may return a function that is called when it is left.
const VIEWS = [
  ["search", "Search", () => import("./views/search.js")],
  ["image", "Image", () => import("./views/image.js")],
  ["match", "Match", () => import("./views/match.js")],
  ["map", "Map", () => import("./views/map.js")],
  ["collections", "Collections", () => import("./views/collections.js")],
  ["models", "Models", () => import("./views/models.js")],
  ["jobs", "Jobs", () => import("./views/jobs.js")],
];

const main = document.getElementById("main");
let leave = null;

/** Show the view that the address names: `#image`, `#map?collection=shop`. `event` is the change of the address, if any. */
async function show(event) {
  const [, name, query] = /^#?([^?]*)\??(.*)$/s.exec(location.hash);
  const [view, title, load] = VIEWS.find(([key]) => key === name) ?? VIEWS[0];
  leave?.();
  leave = null;
  document.title = `${title} - dinov2-service`;
  for (const link of document.querySelectorAll("#views a")) {
    if (link.hash === `#${view}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  const place = el("section", { id: `view-${view}`, "aria-label": title });
  fill(main, place);
  // A link in the view that was left had the focus: the next Tab goes on in the new view, not at the top of the page.
  if (event && document.activeElement === document.body) main.focus({ preventScroll: true });
  try {
    const module = await load();
    if (!place.isConnected) return; // another view was opened meanwhile
    const left = await module.mount(place, new URLSearchParams(query));
    if (place.isConnected) leave = left ?? null;
    else left?.();
  } catch (error) {
    fill(place, errorBox(error));
  }
  showModel();
}

function showCode({ detail: call }) {
  const pane = (title, text) =>
    el(
      "figure",
      {},
      el("figcaption", {}, title, " ", el("button", { type: "button", onclick: () => copyText(text) }, "Copy")),
      el("pre", { tabindex: "0", "aria-label": title }, text),
    );
  fill(document.getElementById("code-panes"), pane("curl", curl(call)), pane("Python", python(call)));
}

async function showModel() {
  const place = document.getElementById("model");
  try {
    const { data } = await json({ path: "/v1/models", shown: false });
    fill(place, data[0].id);
    place.title = `the live model, fingerprint ${data[0].fingerprint}`;
  } catch (error) {
    fill(place, error.status === 401 ? "needs an API key" : "not ready");
  }
}

function prepareKey() {
  const [button, form, input] = ["key", "key-form", "key-input"].map((id) => document.getElementById(id));
  const open = (isOpen) => {
    form.hidden = !isOpen;
    button.setAttribute("aria-expanded", String(isOpen));
    if (isOpen) input.focus();
  };
  button.addEventListener("click", () => open(form.hidden));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    apiKey.set(input.value.trim());
    input.value = "";
    open(false);
    button.focus();
    show();
  });
}

function prepareTheme() {
  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  const local = storage("localStorage");
  const use = (theme) => {
    document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    local.setItem("dinov2-theme", theme);
  };
  button.addEventListener("click", () => {
    use(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % themes.length]);
  });
  const kept = local.getItem("dinov2-theme");
  use(themes.includes(kept) ? kept : "auto");
}

fill(document.getElementById("views"), ...VIEWS.map(([name, title]) => el("a", { href: `#${name}` }, title)));
window.addEventListener("api-request", showCode);
window.addEventListener("hashchange", show);
document.querySelector("a.skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the view
  main.focus();
});
window.addEventListener("live-model", showModel);
prepareKey();
prepareTheme();
show();
