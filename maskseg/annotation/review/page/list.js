// The list of annotations. Only visible rows are in the DOM, so that tens of thousands scroll smoothly.

const HEIGHT = 28; // px of a row, as in style.css
const MARKS = { unreviewed: "", accepted: "✓", edited: "✎", added: "+", rejected: "✗" };

const passes = (filter, review) =>
  filter === "all" || filter === review || (filter === "accepted" && ["edited", "added"].includes(review));

export class List {
  // items: [{ id, image, category, review }]; pick: called with the id of the selected row.
  constructor(element, items, pick) {
    Object.assign(this, { element, items, filter: "all", current: null });
    this.index();
    this.spacer = element.querySelector("#spacer");
    element.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(element);
    element.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) pick(Number(row.dataset.id));
    });
    this.show("all");
  }

  // Filters the list. A row that no longer matches after a decision stays visible until the next call.
  show(filter) {
    this.filter = filter;
    this.shown = this.items.filter((item) => passes(filter, item.review));
    this.row = new Map(this.shown.map((item, i) => [item.id, i]));
    this.spacer.style.height = `${this.shown.length * HEIGHT}px`;
    this.draw();
  }

  index() {
    this.place = new Map(this.items.map((item, i) => [item.id, i]));
  }

  // Adds an item after the others of its image.
  insert(item) {
    const last = this.items.findLastIndex((other) => other.imageId === item.imageId);
    this.items.splice(last < 0 ? this.items.length : last + 1, 0, item);
    this.index();
    this.show(this.filter);
  }

  remove(id) {
    this.items.splice(this.place.get(id), 1);
    this.index();
    this.show(this.filter);
  }

  item(id) {
    return this.items[this.place.get(id)];
  }

  select(id) {
    this.current = id;
    const top = (this.row.get(id) ?? 0) * HEIGHT;
    const { scrollTop, clientHeight } = this.element;
    if (top < scrollTop || top + HEIGHT > scrollTop + clientHeight) this.element.scrollTop = top - clientHeight / 2;
    this.draw();
  }

  // Id of the row `step` rows further, or null. wanted: id of the next row with that review, wrapping around at the end.
  beside(step, wanted = null) {
    const count = this.shown.length;
    const here = this.row.get(this.current) ?? -1;
    if (wanted === null) return this.shown[here + step]?.id ?? null;
    for (let far = 1; far <= count; far++) {
      const item = this.shown[(here + far) % count];
      if (item.review === wanted && item.id !== this.current) return item.id;
    }
    return null;
  }

  draw() {
    const first = Math.max(0, Math.floor(this.element.scrollTop / HEIGHT) - 2);
    const rows = Math.ceil(this.element.clientHeight / HEIGHT) + 4;
    this.spacer.replaceChildren(...this.shown.slice(first, first + rows).map((item, i) => this.line(item, first + i)));
    this.element.setAttribute("aria-activedescendant", this.current === null ? "" : `row-${this.current}`);
  }

  line(item, index) {
    const row = document.createElement("div");
    row.className = `row ${item.review}`;
    row.id = `row-${item.id}`;
    row.dataset.id = item.id;
    row.style.top = `${index * HEIGHT}px`;
    row.setAttribute("role", "option");
    row.setAttribute("aria-selected", String(item.id === this.current));
    row.setAttribute("aria-setsize", this.shown.length);
    row.setAttribute("aria-posinset", index + 1);
    for (const [name, text] of [["review", MARKS[item.review]], ["category", item.category], ["name", item.image]]) {
      const part = document.createElement("span");
      part.className = name;
      part.textContent = text;
      row.append(part);
    }
    row.querySelector(".review").setAttribute("aria-label", item.review);
    return row;
  }
}
