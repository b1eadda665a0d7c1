// An evidence map as a picture: smooth over the film, coloured, transparent where it is dark.
// The same sampling as the server's own overlays (ssacl/inference/maps.py), so that both show the same thing.

const COLOURS = [
  [87, 16, 110], [127, 30, 108], [168, 46, 95], [204, 66, 72], [234, 99, 42], [249, 142, 9], [251, 190, 35], [241, 239, 117],
];
const LONGEST_SIDE = 320;

// For each of `count` samples along `length` original pixels: four cells and their weights (Catmull-Rom; border cells held constant).
function taps(cells, start, end, length, count) {
  return Array.from({ length: count }, (_, index) => {
    const at = (index + 0.5) * (length / count);
    const position = Math.min(Math.max(((at - start) / (end - start)) * cells - 0.5, 0), cells - 1);
    const low = Math.floor(position);
    const t = position - low;
    const weights = [
      -0.5 * t + t ** 2 - 0.5 * t ** 3,
      1 - 2.5 * t ** 2 + 1.5 * t ** 3,
      0.5 * t + 2 * t ** 2 - 1.5 * t ** 3,
      -0.5 * t ** 2 + 0.5 * t ** 3,
    ];
    return weights.map((weight, tap) => [Math.min(Math.max(low + tap - 1, 0), cells - 1), weight]);
  });
}

/**
 * A grid map resampled onto the picture, its maximum 1 (0 everywhere for a map without mass).
 * `frame` is the rectangle of original pixels that the grid covers; `width` and `height` are the picture's, in original pixels.
 */
export function heatOf(grid, frame, width, height, outWidth, outHeight) {
  const down = taps(grid.length, frame.y0, frame.y1, height, outHeight);
  const across = taps(grid[0].length, frame.x0, frame.x1, width, outWidth);
  const rows = down.map((cells) => grid[0].map((_, column) => cells.reduce((sum, [row, weight]) => sum + weight * grid[row][column], 0)));
  const heat = new Float32Array(outWidth * outHeight);
  let peak = 0;
  rows.forEach((row, y) => {
    across.forEach((cells, x) => {
      const value = cells.reduce((sum, [column, weight]) => sum + weight * row[column], 0);
      heat[y * outWidth + x] = Math.max(value, 0);
      peak = Math.max(peak, value);
    });
  });
  return peak > 0 ? heat.map((value) => value / peak) : heat.fill(0);
}

/** The map of a sentence as a canvas to lay over the whole picture. */
export function heatPicture(grid, frame, width, height) {
  const scale = LONGEST_SIDE / Math.max(width, height);
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const heat = heatOf(grid, frame, width, height, canvas.width, canvas.height);
  const image = new ImageData(canvas.width, canvas.height);
  heat.forEach((value, index) => {
    image.data.set([...colourOf(value), Math.round(255 * value ** 0.8)], 4 * index);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function colourOf(value) {
  const place = value * (COLOURS.length - 1);
  const low = Math.min(Math.floor(place), COLOURS.length - 2);
  return COLOURS[low].map((from, channel) => Math.round(from + (place - low) * (COLOURS[low + 1][channel] - from)));
}
