// A film as grey values, and as a canvas seen through a window.

/** The film of an answer, decoded: `grey` holds a byte for each pixel. */
export async function decodeFilm({ png_base64: text }) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const bitmap = await createImageBitmap(new Blob([bytes], { type: "image/png" }), { colorSpaceConversion: "none" });
  const canvas = document.createElement("canvas");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  const grey = new Uint8Array(data.length / 4);
  // Millions of pixels: plain loops, here and below, are ten times as fast as callbacks.
  for (let index = 0; index < grey.length; index += 1) grey[index] = data[4 * index];
  return { width: canvas.width, height: canvas.height, grey };
}

/** Grey value -> shown value: `level` is the middle of a window `width` wide; below it black, above it white. */
export function shades(width, level, inverted) {
  return Uint8ClampedArray.from({ length: 256 }, (_, value) => {
    const shown = ((value - level) / width + 0.5) * 256;
    return inverted ? 255 - Math.min(shown, 255) : shown;
  });
}

/** Draws the film through the window onto `canvas`, which takes the film's size. */
export function drawThrough(film, table, canvas) {
  if (canvas.width !== film.width || canvas.height !== film.height) {
    canvas.width = film.width;
    canvas.height = film.height;
  }
  const image = new ImageData(film.width, film.height);
  const pixels = new Uint32Array(image.data.buffer);
  const packed = Uint32Array.from(table, (value) => 0xff000000 | (value << 16) | (value << 8) | value);
  for (let index = 0; index < pixels.length; index += 1) pixels[index] = packed[film.grey[index]];
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** A small picture of a film, for the list of drafts. */
export function thumbnail(film, side) {
  const whole = document.createElement("canvas");
  drawThrough(film, shades(256, 128, false), whole);
  const scale = side / Math.max(film.width, film.height);
  const small = document.createElement("canvas");
  small.width = Math.max(1, Math.round(film.width * scale));
  small.height = Math.max(1, Math.round(film.height * scale));
  const context = small.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(whole, 0, 0, small.width, small.height);
  return small;
}
