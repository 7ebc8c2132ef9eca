// Attention of the class token: one block and head, the mean of the heads, or the rollout, and all blocks as a grid.

import { json } from "../api.js";
import { announce, busy, el, field, fill, select } from "../dom.js";
import { latest, sizeField } from "./image-common.js";
import { drawHeat, heatLegend, heatMap, opacitySlider, rangeOf } from "./image-heat.js";
import { arrow } from "./image-stage.js";

const MODES = [["head", "One head"], ["mean", "Mean of the heads"], ["rollout", "Rollout through all blocks"]];
const percent = (value) => `${(100 * value).toPrecision(3)} %`;

export async function mount(place, { image, stage, signal }) {
  const shown = { answer: null, rollouts: new Map(), at: null, values: null, heat: el("canvas"), range: [0, 1] };
  const readout = el("output", { id: "attention-readout", class: "readout" });
  const legend = heatLegend();
  const opacity = opacitySlider(() => stage.drawSoon());
  const mode = select(MODES, { id: "attention-mode", onchange: () => show() });
  const [block, head] = ["block", "head"].map((name) =>
    el("input", { type: "range", id: `attention-${name}`, min: 1, max: 1, step: 1, ".value": "1", oninput: () => show() }),
  );
  const [blockNumber, headNumber] = [el("output", { for: block.id }), el("output", { for: head.id })];
  const grid = el("div", { class: "multiples", id: "attention-grid", role: "group", "aria-label": "All blocks and heads" });
  const size = sizeField(() => load());
  const next = latest(signal);
  let own = signal;

  stage.paint = (canvas) => {
    if (shown.values) drawHeat(canvas, shown.heat, Number(opacity.value));
  };

  const fetchMaps = (more) => {
    const form = [["file", image.blob], ["blocks", "all"], ["size", size.control.value], ...more];
    return json({ method: "POST", path: "/v1/attention", form, signal: own });
  };

  async function load() {
    const mine = (own = next());
    delete readout.dataset.block;
    fill(readout, "Computing the attention...");
    await busy(readout, async () => {
      const answer = await fetchMaps([]);
      if (mine.aborted) return;
      shown.answer = answer;
      shown.at = null;
      const [blocks, heads] = [answer.maps.length, answer.maps[0].length];
      const isFirst = Number(block.max) !== blocks;
      block.max = blocks;
      head.max = heads;
      if (isFirst) block.value = blocks;
      fillGrid();
      await show();
    });
  }

  /** The map [h][w] that is chosen, and its name. */
  async function chosen() {
    const [b, h] = [Number(block.value) - 1, Number(head.value) - 1];
    const { maps } = shown.answer;
    if (mode.value === "head") return [maps[b][h], `block ${b + 1}, head ${h + 1}`];
    if (mode.value === "mean") return [meanOf(maps[b]), `block ${b + 1}, mean of the heads`];
    const key = size.control.value;
    if (!shown.rollouts.has(key)) shown.rollouts.set(key, (await fetchMaps([["fuse_blocks", "rollout"]])).maps);
    return [shown.rollouts.get(key).flat().at(-1), "rollout through all blocks"];
  }

  const show = () => busy(readout, showChosen);

  async function showChosen() {
    if (!shown.answer) return;
    blockNumber.textContent = block.value;
    headNumber.textContent = head.value;
    block.disabled = mode.value === "rollout";
    head.disabled = mode.value !== "head";
    const mine = own;
    const asked = mode.value;
    const [map, name] = await chosen();
    if (mine.aborted || asked !== mode.value) return;
    const [height, width] = [map.length, map[0].length];
    shown.values = Float32Array.from(map.flat());
    shown.width = width;
    shown.name = name;
    shown.range = rangeOf(shown.values);
    heatMap(shown.values, height, width, shown.range, shown.heat);
    legend.show(shown.range, percent);
    mark();
    describe();
    stage.drawSoon();
  }

  function describe() {
    const { values, width, range, name, answer } = shown;
    const top = values.indexOf(range[1]);
    const where = (index) => `row ${Math.floor(index / width) + 1}, column ${(index % width) + 1}`;
    const parts = [`Attention of ${name}: ${percent(range[0])} to ${percent(range[1])}, highest at ${where(top)}.`];
    const [b, h] = [Number(block.value) - 1, Number(head.value) - 1];
    if (mode.value === "head") {
      parts.push(`Entropy ${answer.entropy[b][h].toFixed(2)} nats. The class token gives itself ${percent(answer.class_share[b][h])}.`);
    }
    if (shown.at !== null) parts.push(`At ${where(shown.at)}: ${percent(values[shown.at])}.`);
    Object.assign(readout.dataset, { mode: mode.value, block: block.value, head: head.value, low: range[0], high: range[1], top });
    Object.assign(readout.dataset, { at: shown.at ?? top, weight: values[shown.at ?? top] });
    fill(readout, parts.join(" "));
    stage.label(`The image with attention. ${parts.join(" ")} Arrow keys read the weight of a patch.`);
  }

  function fillGrid() {
    const { maps } = shown.answer;
    grid.style.gridTemplateColumns = `repeat(${maps[0].length}, minmax(1.75rem, 1fr))`;
    const cell = (map, b, h) => {
      const values = map.flat();
      const canvas = heatMap(values, map.length, map[0].length, rangeOf(values));
      const choose = () => {
        mode.value = "head";
        block.value = b + 1;
        head.value = h + 1;
        show();
      };
      return el("button", { type: "button", "aria-label": `Block ${b + 1}, head ${h + 1}`, onclick: choose }, canvas);
    };
    fill(grid, ...maps.flatMap((heads, b) => heads.map((map, h) => cell(map, b, h))));
  }

  /** Show in the grid which map is chosen. Only this one is in the order of the Tab key; the arrow keys reach the others. */
  function mark() {
    const at = (Number(block.value) - 1) * Number(head.max) + Number(head.value) - 1;
    [...grid.children].forEach((button, i) => {
      button.setAttribute("aria-pressed", String(i === at && mode.value === "head"));
      button.tabIndex = i === at ? 0 : -1;
    });
  }
  grid.addEventListener("keydown", (event) => {
    const step = arrow(event);
    if (!step) return;
    event.preventDefault();
    const heads = Number(head.max);
    const at = [...grid.children].indexOf(document.activeElement);
    const [row, column] = [Math.floor(at / heads) + step[1], (at % heads) + step[0]];
    if (row < 0 || column < 0 || column >= heads || row >= Number(block.max)) return;
    const next = grid.children[row * heads + column];
    next.focus();
    next.click();
  });

  stage.point = (kind, x, y) => {
    if (!shown.values) return;
    const [height, width] = [shown.values.length / shown.width, shown.width];
    shown.at = kind === "out" ? null : Math.floor((y / stage.height) * height) * width + Math.floor((x / stage.width) * width);
    describe();
  };
  stage.key = (event) => {
    const step = arrow(event);
    if (!step || !shown.values) return false;
    const [height, width] = [shown.values.length / shown.width, shown.width];
    const at = shown.at ?? shown.values.indexOf(shown.range[1]);
    const row = Math.min(Math.max(Math.floor(at / width) + step[1], 0), height - 1);
    shown.at = row * width + Math.min(Math.max((at % width) + step[0], 0), width - 1);
    describe();
    announce(readout.textContent);
    return true;
  };

  place.append(
    el("p", {}, "The share of its attention that the class token gives to each patch."),
    el("div", {}, field("Map", mode), size.element, field("Opacity", opacity)),
    el("div", { class: "row" }, withNumber("Block", block, blockNumber), withNumber("Head", head, headNumber)),
    legend,
    readout,
    el("h3", {}, "All blocks and heads"),
    el("p", { class: "quiet" }, "One row per block, one column per head. Each small map has its own range of colours."),
    grid,
  );
  await load();
}

function withNumber(text, slider, number) {
  const element = field(text, slider);
  element.querySelector("label").append(" ", number);
  return element;
}

/** The mean of maps [heads][h][w]. */
function meanOf(heads) {
  return heads[0].map((row, y) => row.map((_, x) => heads.reduce((sum, map) => sum + map[y][x], 0) / heads.length));
}
