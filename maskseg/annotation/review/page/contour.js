// The contour of a mask as rings of points, which are moved, inserted and removed with the pointer.

export class Contour {
  // rings: [[x, y, x, y, ...], ...] in image pixels
  constructor(rings) {
    this.rings = rings.map((ring) => Array.from({ length: ring.length / 2 }, (_, i) => [ring[2 * i], ring[2 * i + 1]]));
    this.past = []; // earlier rings, the last one first to be restored
    this.held = null; // [ring, index] of the point that is being moved
  }

  flat() {
    return this.rings.map((ring) => ring.flat());
  }

  undo() {
    if (!this.past.length) return false;
    this.rings = this.past.pop();
    return true;
  }

  // Starts to move the point at a position, or a new one on the edge there. near: distance that counts as there.
  grab(at, near) {
    const point = this.point(at, near);
    const edge = point ? null : this.edge(at, near);
    if (!point && !edge) return false;
    this.remember();
    if (edge) this.rings[edge[0]].splice(edge[1], 0, at);
    this.held = point ?? edge;
    return true;
  }

  move(at) {
    if (this.held) this.rings[this.held[0]][this.held[1]] = at;
  }

  release() {
    this.held = null;
  }

  // Removes the point at a position; a ring of fewer than three points disappears, unless it is the only one.
  remove(at, near) {
    const point = this.point(at, near);
    if (!point) return false;
    const ring = this.rings[point[0]];
    if (ring.length <= 3 && this.rings.length === 1) return false;
    this.remember();
    if (ring.length > 3) this.rings[point[0]].splice(point[1], 1);
    else this.rings.splice(point[0], 1);
    return true;
  }

  remember() {
    this.past.push(this.rings.map((ring) => ring.map((point) => [...point])));
  }

  // [ring, index] of the nearest point within a distance, or null.
  point(at, near) {
    return this.nearest(near, (ring, i) => Math.hypot(ring[i][0] - at[0], ring[i][1] - at[1]));
  }

  // [ring, index before which a point on the nearest edge belongs], or null.
  edge(at, near) {
    const found = this.nearest(near, (ring, i) => distance(at, ring[i], ring[(i + 1) % ring.length]));
    return found && [found[0], found[1] + 1];
  }

  nearest(near, measure) {
    let best = null;
    let least = near;
    this.rings.forEach((ring, r) => {
      for (let i = 0; i < ring.length; i++) {
        const far = measure(ring, i);
        if (far <= least) [best, least] = [[r, i], far];
      }
    });
    return best;
  }

  // Draws lines and points. scale: canvas pixels per image pixel, over the pixel ratio.
  draw(to, scale) {
    to.beginPath();
    for (const ring of this.rings) {
      ring.forEach(([x, y], i) => (i ? to.lineTo(x, y) : to.moveTo(x, y)));
      to.closePath();
    }
    for (const [color, width] of [["#000", 3.5], ["#fff", 1.5]]) {
      to.strokeStyle = color;
      to.lineWidth = width / scale;
      to.stroke();
    }
    const half = 3.5 / scale;
    to.lineWidth = 1 / scale;
    to.strokeStyle = "#000";
    for (const [x, y] of this.rings.flat()) {
      to.fillStyle = "#fff";
      to.fillRect(x - half, y - half, 2 * half, 2 * half);
      to.strokeRect(x - half, y - half, 2 * half, 2 * half);
    }
  }
}

// Distance of a point from a line segment.
function distance([x, y], [x1, y1], [x2, y2]) {
  const [dx, dy] = [x2 - x1, y2 - y1];
  const share = Math.min(1, Math.max(0, ((x - x1) * dx + (y - y1) * dy) / (dx * dx + dy * dy || 1)));
  return Math.hypot(x - x1 - share * dx, y - y1 - share * dy);
}
