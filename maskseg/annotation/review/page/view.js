// The image with its mask, box, painted strokes and contour. Everything is in image pixels.

const REACH = 9; // px on the screen around a point of the contour

const FOREGROUND = "#00ff00"; // the colors that the server expects
const BACKGROUND = "#ff0000";
const MASK = "#19a7ff";
const LINE = "#8fd6ff"; // of the mask

export class View {
  constructor(canvas, changed) {
    Object.assign(this, { canvas, changed, tool: null, brush: 12, image: null, around: [] });
    Object.assign(this, { zoomed: false, overlay: true, outline: true, neighbors: true, opacity: 0.4 });
    this.reset();
    new ResizeObserver(() => this.draw()).observe(canvas);
    canvas.addEventListener("pointerdown", (event) => this.begin(event));
    canvas.addEventListener("pointermove", (event) => this.go(event));
    canvas.addEventListener("pointerup", () => this.end());
    canvas.addEventListener("pointercancel", () => this.end());
    canvas.addEventListener("pointerleave", () => this.draw());
    canvas.addEventListener("contextmenu", (event) => {
      if (!this.contour) return;
      event.preventDefault();
      this.remove(this.point(event));
    });
  }

  // Discards all strokes and boxes, and the contour.
  reset() {
    this.contour = null;
    this.drawn = []; // strokes and boxes in drawing order: { tool, size, points, box, cut }
    this.active = null;
    this.layer = null; // the strokes at the image's size; a single layer, so that crossing strokes do not add up
  }

  // image, mask: bitmaps of the image's size, or null; box: [x1, y1, x2, y2] or null.
  show({ image, mask, box, height, width }, keep = false) {
    if (!keep) this.reset();
    Object.assign(this, { image, box, height, width, mask: mask && tinted(mask, MASK), edge: null });
    this.draw();
  }

  // masks: for each neighbor its rings [x, y, x, y, ...]
  surround(masks) {
    this.around = masks.map((rings) => {
      const path = new Path2D();
      for (const ring of rings) {
        for (let i = 0; i < ring.length; i += 2) i ? path.lineTo(ring[i], ring[i + 1]) : path.moveTo(ring[0], ring[1]);
        path.closePath();
      }
      return path;
    });
    this.draw();
  }

  edit(contour) {
    this.contour = contour;
    this.draw();
  }

  remove(at) {
    if (this.contour.remove(at, this.reach())) this.changed();
    this.draw();
  }

  // The box to segment in: the last one drawn, or the annotation's own.
  chosenBox() {
    return this.drawnBox() ?? this.box;
  }

  // The last box that was drawn, or null.
  drawnBox() {
    return this.drawn.findLast((step) => step.tool === "box")?.box ?? null;
  }

  // Whether something was drawn since the last segmentation.
  pending() {
    if (this.contour) return this.contour.past.length > 0;
    return this.drawn.length > 0 && !this.drawn.at(-1).cut;
  }

  takeBack() {
    if (!this.pending()) return false;
    if (this.contour) {
      this.contour.undo();
      this.draw();
      return true;
    }
    this.drawn.pop();
    this.layer = null;
    for (const { tool, size, points } of this.drawn) if (tool !== "box") this.paint(tool, size, points);
    this.draw();
    return true;
  }

  // Marks strokes and boxes as used for a mask: they stay visible, but can no longer be undone one by one.
  settle() {
    for (const step of this.drawn) step.cut = true;
  }

  // The strokes as a PNG of the image's size on a black background.
  strokes() {
    const canvas = blank(this.width, this.height);
    const to = canvas.getContext("2d");
    to.fillRect(0, 0, this.width, this.height);
    if (this.layer) to.drawImage(this.layer, 0, 0);
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  }

  // Scale and offset from image to canvas, for the whole image or for the box with half its size as margin.
  fit() {
    const box = this.zoomed && this.box;
    const [x1, y1, x2, y2] = box ? grown(box, 0.5) : [0, 0, this.width, this.height];
    const scale = Math.min(this.canvas.width / (x2 - x1), this.canvas.height / (y2 - y1));
    return [scale, this.canvas.width / 2 - (scale * (x1 + x2)) / 2, this.canvas.height / 2 - (scale * (y1 + y2)) / 2];
  }

  point(event) {
    const ratio = this.canvas.width / this.canvas.clientWidth;
    const [scale, dx, dy] = this.fit();
    return [(event.offsetX * ratio - dx) / scale, (event.offsetY * ratio - dy) / scale];
  }

  // The distance in image pixels that counts as being at a point of the contour.
  reach() {
    return (REACH * window.devicePixelRatio) / this.fit()[0];
  }

  begin(event) {
    if (this.contour && event.button === 0) {
      const at = this.point(event);
      if (event.altKey) this.remove(at);
      else if (this.contour.grab(at, this.reach())) this.canvas.setPointerCapture(event.pointerId);
      return;
    }
    if (!this.tool || !this.width || event.button !== 0) return;
    this.canvas.setPointerCapture(event.pointerId);
    this.active = { tool: this.tool, size: this.brush, points: [this.point(event)], box: null, cut: false };
    this.drawn.push(this.active);
    this.go(event);
  }

  go(event) {
    if (this.contour) {
      if (this.contour.held) {
        this.contour.move(this.point(event));
        this.draw();
      }
      return;
    }
    if (!this.tool || !this.width) return;
    const at = this.point(event);
    if (this.active?.tool === "box") {
      const [[x, y]] = this.active.points;
      this.active.box = [Math.min(x, at[0]), Math.min(y, at[1]), Math.max(x, at[0]), Math.max(y, at[1])];
    } else if (this.active) {
      this.active.points.push(at);
      this.paint(this.active.tool, this.active.size, this.active.points.slice(-2));
    }
    this.draw(at);
  }

  end() {
    if (this.contour) {
      this.contour.release();
      this.draw();
      return this.changed();
    }
    const box = this.active?.box;
    if (this.active?.tool === "box" && !(box && box[2] - box[0] >= 1 && box[3] - box[1] >= 1)) this.drawn.pop(); // a click does not make a box
    this.active = null;
    this.draw();
    this.changed();
  }

  paint(tool, size, points) {
    this.layer ??= blank(this.width, this.height);
    const to = this.layer.getContext("2d");
    to.lineCap = to.lineJoin = "round";
    to.strokeStyle = tool === "foreground" ? FOREGROUND : BACKGROUND;
    to.lineWidth = size;
    to.beginPath();
    to.moveTo(...points[0]);
    for (const point of points) to.lineTo(...point);
    to.stroke();
  }

  draw(cursor = null) {
    const { canvas } = this;
    const ratio = window.devicePixelRatio;
    const to = canvas.getContext("2d");
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio)); // setting the width also clears the canvas
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    if (!this.width) return;
    const [scale, dx, dy] = this.fit();
    to.setTransform(scale, 0, 0, scale, dx, dy);
    to.imageSmoothingEnabled = scale < 2;
    const layers = [[this.image, 1], [this.overlay && !this.contour ? this.mask : null, this.opacity], [this.layer, 0.65]];
    for (const [layer, alpha] of layers) {
      to.globalAlpha = alpha;
      if (layer) to.drawImage(layer, 0, 0, this.width, this.height);
    }
    to.globalAlpha = 1;
    if (this.neighbors) this.drawNeighbors(to, scale / ratio);
    if (this.contour) return this.contour.draw(to, scale / ratio);
    if (this.outline && this.mask) this.drawOutline(to, scale, dx, dy, ratio);
    const box = this.chosenBox();
    if (box) this.frame(to, box, scale / ratio);
    if (cursor && this.tool !== "box") this.ring(to, cursor, scale / ratio);
  }

  drawNeighbors(to, scale) {
    to.fillStyle = "#fff2";
    for (const path of this.around) {
      to.fill(path, "evenodd");
      for (const [color, width] of [["#0009", 2.5], ["#fffb", 1]]) {
        to.strokeStyle = color;
        to.lineWidth = width / scale;
        to.stroke(path);
      }
    }
  }

  // A line of constant width on the screen around the mask. It is kept until the mask or its place changes.
  drawOutline(to, scale, dx, dy, ratio) {
    const place = [this.canvas.width, this.canvas.height, scale, dx, dy].join();
    if (this.edge?.place !== place) {
      const draw = (target, x, y) => {
        target.setTransform(scale, 0, 0, scale, dx + x, dy + y);
        target.drawImage(this.mask, 0, 0, this.width, this.height);
      };
      this.edge = { place, picture: edge(this.canvas, draw, ratio) };
    }
    to.save();
    to.resetTransform();
    to.drawImage(this.edge.picture, 0, 0);
    to.restore();
  }

  // Yellow dashes on black are visible on any image.
  frame(to, [x1, y1, x2, y2], scale) {
    for (const [color, dashes] of [["#000", []], ["#ffd60a", [6 / scale, 4 / scale]]]) {
      to.setLineDash(dashes);
      to.lineWidth = 2 / scale;
      to.strokeStyle = color;
      to.strokeRect(x1, y1, x2 - x1, y2 - y1);
    }
    to.setLineDash([]);
  }

  ring(to, [x, y], scale) {
    to.beginPath();
    to.arc(x, y, this.brush / 2, 0, 2 * Math.PI);
    to.lineWidth = 1.5 / scale;
    to.strokeStyle = this.tool === "foreground" ? FOREGROUND : BACKGROUND;
    to.stroke();
  }
}

function blank(width, height) {
  const canvas = document.createElement("canvas");
  Object.assign(canvas, { width, height });
  return canvas;
}

function grown([x1, y1, x2, y2], share) {
  const dx = (x2 - x1) * share;
  const dy = (y2 - y1) * share;
  return [x1 - dx, y1 - dy, x2 + dx, y2 + dy];
}

function tinted(mask, color) {
  const canvas = blank(mask.width, mask.height);
  const to = canvas.getContext("2d");
  to.drawImage(mask, 0, 0);
  to.globalCompositeOperation = "source-in";
  to.fillStyle = color;
  to.fillRect(0, 0, mask.width, mask.height);
  return canvas;
}

// The area within a few pixels of what `draw(context, x, y)` draws shifted by (x, y): a bright line on a dark one.
function edge({ width, height }, draw, ratio) {
  const picture = blank(width, height);
  for (const [color, distance] of [["#000", 3 * ratio], [LINE, 2 * ratio]]) {
    const ring = blank(width, height);
    const to = ring.getContext("2d");
    for (let i = 0; i < 16; i++) {
      const angle = (i * Math.PI) / 8;
      draw(to, distance * Math.cos(angle), distance * Math.sin(angle));
    }
    to.globalCompositeOperation = "destination-out";
    draw(to, 0, 0);
    picture.getContext("2d").drawImage(tinted(ring, color), 0, 0);
  }
  return picture;
}
