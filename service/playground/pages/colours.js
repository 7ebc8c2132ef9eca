// Colours of values and of categories. They have a contrast of at least 3 to a white and to a dark background.

/** Colours of categories, as [red, green, blue]. */
export const CATEGORIES = [
  [59, 125, 216], [210, 100, 20], [40, 150, 85], [214, 64, 80], [140, 100, 210],
  [150, 110, 60], [210, 80, 155], [20, 145, 160], [135, 135, 25], [95, 110, 235],
];
export const OTHER = [125, 136, 150];

const RAMP = [[58, 60, 160], [20, 120, 170], [30, 160, 120], [140, 185, 50], [250, 220, 40]];

/** The colour of a value from 0 (dark blue) to 1 (yellow), as [red, green, blue]. */
export function rampColour(value) {
  const at = Math.min(Math.max(value, 0), 1) * (RAMP.length - 1);
  const i = Math.min(Math.floor(at), RAMP.length - 2);
  return RAMP[i].map((low, channel) => Math.round(low + (RAMP[i + 1][channel] - low) * (at - i)));
}

export const css = (colour) => `rgb(${colour.join(" ")})`;
