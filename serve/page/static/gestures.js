// Mouse, touch, pen and keys on the film.

const ARROWS = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };

/** `dragMode()` is "window" or "move". */
export function listenTo(stage, viewer, dragMode) {
  const pointers = new Map();
  let isMoving = false;

  stage.addEventListener("pointerdown", (event) => {
    if (!viewer.film) return;
    stage.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    isMoving = dragMode() === "move" || event.shiftKey || event.button !== 0;
  });

  stage.addEventListener("pointermove", (event) => {
    const last = pointers.get(event.pointerId);
    if (!last) return;
    const now = { x: event.clientX, y: event.clientY };
    const [dx, dy] = [now.x - last.x, now.y - last.y];
    const other = [...pointers].find(([id]) => id !== event.pointerId)?.[1];
    pointers.set(event.pointerId, now);
    if (other) {
      const { left, top } = stage.getBoundingClientRect();
      const ratio = Math.hypot(now.x - other.x, now.y - other.y) / Math.max(Math.hypot(last.x - other.x, last.y - other.y), 1);
      viewer.zoomBy(ratio, (now.x + other.x) / 2 - left, (now.y + other.y) / 2 - top);
      viewer.moveBy(dx / 2, dy / 2);
    } else if (isMoving) {
      viewer.moveBy(dx, dy);
    } else {
      // As on reading stations: to the right the window widens, down the film darkens; once across the stage is the whole range.
      viewer.setWindow(viewer.width + (dx * 256) / stage.clientWidth, viewer.level + (dy * 256) / stage.clientHeight);
    }
  });

  for (const end of ["pointerup", "pointercancel", "lostpointercapture"]) {
    stage.addEventListener(end, (event) => pointers.delete(event.pointerId));
  }
  stage.addEventListener("contextmenu", (event) => event.preventDefault());

  stage.addEventListener("wheel", (event) => {
    if (!viewer.film) return;
    event.preventDefault();
    const { left, top } = stage.getBoundingClientRect();
    viewer.zoomBy(1.0015 ** -event.deltaY, event.clientX - left, event.clientY - top);
  }, { passive: false });

  const keys = {
    "+": () => viewer.zoomStep(1),
    "=": () => viewer.zoomStep(1),
    "-": () => viewer.zoomStep(-1),
    "[": () => viewer.setWindow(viewer.width - 16, viewer.level),
    "]": () => viewer.setWindow(viewer.width + 16, viewer.level),
    ",": () => viewer.setWindow(viewer.width, viewer.level - 8),
    ".": () => viewer.setWindow(viewer.width, viewer.level + 8),
    i: () => viewer.invert(),
    0: () => viewer.reset(),
  };
  stage.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !viewer.film) return;
    const act = ARROWS[event.key] ? () => viewer.moveBy(...ARROWS[event.key]) : keys[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
}
