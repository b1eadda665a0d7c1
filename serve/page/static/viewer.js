// The film on the screen: window and level, zoom and place, evidence over it. Coordinates are original pixels of the film.

import { drawThrough, shades } from "./film.js";

const FULL = { width: 256, level: 128 };
const ZOOM = { least: 0.5, most: 24, step: 1.25 };

export class Viewer {
  /** `onChange` is called whenever the settings below have changed. */
  constructor(stage, canvas, onChange) {
    Object.assign(this, { stage, canvas, onChange });
    this.shown = document.createElement("canvas");
    this.film = null;
    this.evidence = null;
    this.strength = 0.6;
    this.isPlanned = false;
    this.setBack();
    new ResizeObserver(() => this.plan()).observe(stage);
  }

  /** Show a film of `width` x `height` original pixels. */
  open(film, width, height) {
    Object.assign(this, { film, imageWidth: width, imageHeight: height, evidence: null });
    this.reset();
  }

  close() {
    this.film = null;
    this.evidence = null;
    this.plan();
  }

  /** Lay `{heat, box, colour, number}` over the film; null takes it away. */
  look(evidence) {
    this.evidence = evidence;
    this.plan();
  }

  reset() {
    this.setBack();
    this.changed(true);
  }

  setBack() {
    Object.assign(this, { ...FULL, isInverted: false, zoom: 1, middleX: 0.5, middleY: 0.5 });
  }

  setWindow(width, level) {
    this.width = Math.min(Math.max(width, 8), 512);
    this.level = Math.min(Math.max(level, 0), 256);
    this.changed(true);
  }

  invert() {
    this.isInverted = !this.isInverted;
    this.changed(true);
  }

  setStrength(strength) {
    this.strength = strength;
    this.plan();
  }

  /** Zoom by a factor; what lies under (x, y) of the stage, in CSS pixels, stays there. Without them: the middle. */
  zoomBy(factor, x = this.stage.clientWidth / 2, y = this.stage.clientHeight / 2) {
    if (!this.film) return;
    const before = this.toFilm(x, y);
    this.zoom = Math.min(Math.max(this.zoom * factor, ZOOM.least), ZOOM.most);
    const after = this.toFilm(x, y);
    this.moveTo(this.middleX + (before.x - after.x) / this.imageWidth, this.middleY + (before.y - after.y) / this.imageHeight);
  }

  zoomStep(direction) {
    this.zoomBy(ZOOM.step ** direction);
  }

  /** Move the film by CSS pixels. */
  moveBy(dx, dy) {
    if (!this.film) return;
    const { scale } = this.layout();
    this.moveTo(this.middleX - dx / scale / this.imageWidth, this.middleY - dy / scale / this.imageHeight);
  }

  // Some of the film always stays on the stage.
  moveTo(x, y) {
    this.middleX = Math.min(Math.max(x, 0), 1);
    this.middleY = Math.min(Math.max(y, 0), 1);
    this.changed(false);
  }

  /** Stage position, CSS pixels, of a point of the film. */
  toStage(x, y) {
    const { scale, left, top } = this.layout();
    return { x: left + x * scale, y: top + y * scale };
  }

  toFilm(x, y) {
    const { scale, left, top } = this.layout();
    return { x: (x - left) / scale, y: (y - top) / scale };
  }

  layout() {
    const { clientWidth: width, clientHeight: height } = this.stage;
    const scale = Math.min(width / this.imageWidth, height / this.imageHeight) * this.zoom;
    return { scale, left: width / 2 - this.middleX * this.imageWidth * scale, top: height / 2 - this.middleY * this.imageHeight * scale };
  }

  changed(isWindow) {
    this.isWindowStale ||= isWindow;
    this.plan();
    this.onChange(this);
  }

  plan() {
    if (this.isPlanned) return;
    this.isPlanned = true;
    requestAnimationFrame(() => {
      this.isPlanned = false;
      this.draw();
    });
  }

  draw() {
    const ratio = window.devicePixelRatio || 1;
    const size = [Math.round(this.stage.clientWidth * ratio), Math.round(this.stage.clientHeight * ratio)];
    if (this.canvas.width !== size[0] || this.canvas.height !== size[1]) [this.canvas.width, this.canvas.height] = size;
    const context = this.canvas.getContext("2d");
    context.resetTransform();
    context.clearRect(0, 0, ...size);
    if (!this.film) return;
    if (this.isWindowStale) drawThrough(this.film, shades(this.width, this.level, this.isInverted), this.shown);
    this.isWindowStale = false;
    const { scale, left, top } = this.layout();
    context.setTransform(scale * ratio, 0, 0, scale * ratio, left * ratio, top * ratio);
    context.imageSmoothingQuality = "high";
    context.drawImage(this.shown, 0, 0, this.imageWidth, this.imageHeight);
    if (this.evidence) this.drawEvidence(context, scale);
  }

  drawEvidence(context, scale) {
    const { heat, box, colour, number } = this.evidence;
    context.globalAlpha = this.strength;
    context.drawImage(heat, 0, 0, this.imageWidth, this.imageHeight);
    context.globalAlpha = 1;
    if (!box) return;
    const line = 2 / scale;
    // A dark line below the coloured one keeps it visible on bright bone.
    for (const [style, width] of [["#000a", 2.2 * line], [colour, line]]) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.strokeRect(box.x0, box.y0, box.x1 - box.x0, box.y1 - box.y0);
    }
    const side = 20 / scale;
    context.fillStyle = colour;
    context.fillRect(box.x0, box.y0, side * (number > 9 ? 1.35 : 1), side);
    context.fillStyle = "#0a0c0f";
    context.font = `bold ${14 / scale}px system-ui, sans-serif`;
    context.textBaseline = "middle";
    context.fillText(String(number), box.x0 + side * 0.3, box.y0 + side * 0.54);
  }
}
