// The review page: handles keys and buttons in sequence, and shows the state from the server.

import { Contour } from "./contour.js";
import { List } from "./list.js";
import { View } from "./view.js";

const find = (id) => document.getElementById(id);
const images = new Map(); // the most recent images, by image id; the next one is prefetched
const KEPT = 6;

// The token is in a cookie now; it should not stay in the address, the history or a bookmark.
if (location.search) history.replaceState(null, "", location.pathname);

let list = null;
let names = null; // of images and categories, by id
let adding = false; // whether a new object is being drawn
let shown = null; // state of the current annotation, from the server
let undoable = 0;
const view = new View(find("view"), () => buttons());

async function ask(path, options = {}) {
  const answer = await fetch(`/api/${path}`, options);
  if (!answer.ok) {
    const reply = await answer.json().catch(() => ({ error: `the server responded with status ${answer.status}` }));
    throw new Error(reply.error);
  }
  return answer;
}

const askJson = async (path, options) => (await ask(path, options)).json();

function picture(id) {
  const found = images.get(id) ?? ask(`images/${id}`).then(async (answer) => createImageBitmap(await answer.blob()));
  images.delete(id); // reinsert at the end: the oldest entry is evicted first
  images.set(id, found);
  found.catch(() => images.delete(id));
  if (images.size > KEPT) images.delete(images.keys().next().value);
  return found;
}

const mask = async (id) => createImageBitmap(await (await ask(`annotations/${id}/mask`)).blob());

async function open(id) {
  if (id === null) return;
  list.select(id);
  const { imageId } = list.item(id);
  shown = null; // no decision is possible until the annotation is visible
  adding = false;
  say("");
  const [state, image, cover] = await Promise.allSettled([askJson(`annotations/${id}`), picture(imageId), mask(id)]);
  const failed = [state, image, cover].find((part) => part.status === "rejected");
  if (state.status === "fulfilled") {
    shown = state.value;
    view.surround([]);
    view.show({ ...shown, image: image.value ?? null, mask: cover.value ?? null });
    surround(shown);
    note(shown);
  }
  if (failed) say(failed.reason.message);
  if (!shown) return;
  const ahead = list.beside(1);
  if (ahead !== null) picture(list.item(ahead).imageId).catch(() => {});
}

// Shows the neighbors when they arrive, unless another annotation is shown by then.
async function surround({ id, image_id: imageId }) {
  const around = await askJson(`images/${imageId}/neighbors?without=${id}`).catch(() => null);
  if (shown?.id === id && !adding && around) view.surround(around.masks);
}

// Updates the list, the counts and the line about the annotation after a decision.
function note(state) {
  const item = list.item(state.id);
  item.review = state.review;
  item.category = names.categories[state.category_id] ?? "";
  undoable = state.undoable;
  const score = state.score === null ? "" : `, score ${state.score.toFixed(2)}`;
  find("about").textContent = `${item.category} in ${item.image}, annotation ${item.id}${score}: ${item.review}`;
  find("category").value = state.category_id;
  if (state.fallback) {
    const substitute = "the mask is the ellipse in the box, or the thresholded map; painted strokes are kept";
    say(`No object was found here (${state.fallback}): ${substitute}`);
  }
  if (state.trouble) say(`Saved in the journal, but not in the file: ${state.trouble}`);
  count();
  buttons();
}

function count() {
  const done = list.items.filter((each) => each.review !== "unreviewed").length;
  find("count").textContent = `${done} of ${list.items.length} reviewed, ${list.shown.length} shown`;
  Object.assign(find("progress"), { value: done, max: Math.max(1, list.items.length) });
  list.draw();
}

async function decide(decision) {
  if (!shown || busy()) return;
  const state = await askJson(`annotations/${shown.id}/decision?decision=${decision}`, { method: "POST" });
  if (state.removed) return discard(state);
  note(state);
  await open(list.beside(1, "unreviewed") ?? list.beside(1));
}

// Takes an annotation that is no longer there from the list, and opens the one after it.
async function discard({ id, undoable: left }) {
  const after = list.current === id ? (list.beside(1) ?? list.beside(-1)) : list.current;
  list.remove(id);
  undoable = left;
  count();
  if (after !== null) return open(after);
  shown = null;
  find("about").textContent = "";
}

// Runs what the tools have prepared: a new object, an edited contour, or else GrabCut.
async function run() {
  if (!shown) return;
  if (view.contour) return saveContour();
  const box = adding ? view.drawnBox() : view.chosenBox();
  if (adding && !box && !view.layer) return say("Draw a box around the object, or paint it");
  const query = new URLSearchParams(box ? { box: box.map((v) => v.toFixed(2)).join(",") } : {});
  if (adding) query.set("category_id", find("category").value);
  say("Running GrabCut ...");
  const options = { method: "POST", headers: { "Content-Type": "image/png" }, body: await view.strokes() };
  const path = adding ? `images/${shown.image_id}/annotations` : `annotations/${shown.id}/cut`;
  const state = await askJson(`${path}?${query}`, options);
  say("");
  if (adding) return admit(state);
  shown = state;
  view.settle();
  view.show({ ...shown, box, image: view.image, mask: await mask(shown.id) }, true);
  note(shown);
}

// Puts an annotation that was added, or is there again, into the list and opens it.
async function admit(state) {
  list.insert({
    id: state.id,
    imageId: state.image_id,
    image: names.images[state.image_id],
    category: names.categories[state.category_id] ?? "",
    review: state.review,
  });
  await open(state.id);
}

async function saveContour() {
  if (!view.pending()) return leave();
  const options = { method: "POST", headers: { "Content-Type": "application/json" } };
  options.body = JSON.stringify({ rings: view.contour.flat() });
  shown = await askJson(`annotations/${shown.id}/contour`, options);
  view.show({ ...shown, image: view.image, mask: await mask(shown.id) });
  note(shown);
}

async function editContour() {
  if (!shown || adding) return;
  if (view.contour) return leave();
  choose(null);
  const { rings } = await askJson(`annotations/${shown.id}/contour`);
  if (!rings.length) return say("There is no mask here: draw a box or paint, and run GrabCut");
  view.reset();
  view.edit(new Contour(rings));
}

// Starts a new object in the image that is shown.
async function create() {
  if (!shown) return;
  if (adding) return leave();
  adding = true;
  view.tool = null;
  view.show({ ...shown, box: null, mask: null, image: view.image });
  view.surround((await askJson(`images/${shown.image_id}/neighbors`)).masks);
  choose("box");
}

async function setCategory() {
  if (!shown || adding) return;
  shown = await askJson(`annotations/${shown.id}/category?category_id=${find("category").value}`, { method: "POST" });
  note(shown);
}

// Discards strokes, an edited contour, or a new object that was not run yet.
async function leave() {
  const again = adding || view.contour;
  choose(null);
  view.reset();
  view.draw();
  if (again && shown) await open(shown.id);
}

async function undo() {
  if (view.takeBack() || busy() || !undoable) return buttons();
  const state = await askJson("undo", { method: "POST" });
  if (state.removed) return discard(state);
  if (!list.place.has(state.id)) return admit(state);
  list.item(state.id).review = state.review;
  if (!list.row.has(state.id)) list.show(find("filter").value);
  await open(state.id);
}

// Opens another annotation, unless that would lose a contour or a new object.
function go(id) {
  if (busy() && view.pending()) return say("Press Enter to save what was drawn, or Esc to discard it");
  return open(id);
}

// Whether a contour or a new object is being drawn, and no decision can be made.
const busy = () => adding || view.contour !== null;

function choose(tool) {
  view.tool = view.tool === tool ? null : tool;
  view.canvas.classList.toggle("paint", view.tool !== null);
  view.draw();
}

function resize(size) {
  view.brush = Math.min(80, Math.max(1, size));
  find("size").value = view.brush;
  find("pixels").textContent = `${view.brush} px`;
}

function fade(percent) {
  view.opacity = percent / 100;
  find("opacity").value = percent;
  find("percent").textContent = `${percent} %`;
  view.draw();
}

function flip(name) {
  view[name] = !view[name];
  view.draw();
}

const unlessContour = (action) => () => view.contour || action();

const actions = {
  accept: () => decide("accepted"),
  reject: () => decide("rejected"),
  undo,
  box: unlessContour(() => choose("box")),
  foreground: unlessContour(() => choose("foreground")),
  background: unlessContour(() => choose("background")),
  run,
  contour: editContour,
  create,
  zoomed: () => flip("zoomed"),
  overlay: () => flip("overlay"),
  outline: () => flip("outline"),
  neighbors: () => flip("neighbors"),
  previous: () => go(list.beside(-1)),
  next: () => go(list.beside(1)),
  smaller: () => resize(view.brush - Math.max(1, Math.round(view.brush / 5))),
  larger: () => resize(view.brush + Math.max(1, Math.round(view.brush / 5))),
  leave,
  classes: () => find("category").focus(),
};
const KEYS = {
  a: "accept", r: "reject", delete: "reject", z: "undo", b: "box", f: "foreground", g: "background", enter: "run", c: "contour", n: "create",
  v: "zoomed", m: "overlay", o: "outline", s: "neighbors", l: "classes", escape: "leave",
  arrowleft: "previous", arrowup: "previous", arrowright: "next", arrowdown: "next", "[": "smaller", "]": "larger",
};

const ONCE = new Set(["accept", "reject", "run", "undo", "create", "contour"]); // not repeated while the key is held down
const HELP = {
  review: "[ and ] change the brush, Z undoes, Esc discards what was drawn. Painted pixels stay as they were painted.",
  create: "Draw a box around the object or paint it, choose its class, and press Enter. Esc cancels.",
  contour: "Drag points. Click an edge to add a point, right-click or Alt-click a point to remove it. Enter saves, Esc cancels.",
};

function buttons() {
  for (const tool of ["box", "foreground", "background"]) find(tool).setAttribute("aria-pressed", String(view.tool === tool));
  for (const name of ["zoomed", "overlay", "outline", "neighbors"]) find(name).setAttribute("aria-pressed", String(view[name]));
  find("contour").setAttribute("aria-pressed", String(view.contour !== null));
  find("create").setAttribute("aria-pressed", String(adding));
  for (const name of ["accept", "reject"]) find(name).disabled = !shown || busy();
  for (const name of ["run", "create", "category"]) find(name).disabled = !shown;
  for (const name of ["box", "foreground", "background"]) find(name).disabled = !shown || view.contour !== null;
  find("contour").disabled = !shown || adding;
  find("undo").disabled = busy() ? !view.pending() : !undoable && !view.pending();
  find("reject-word").textContent = shown?.removable ? "Delete" : "Reject";
  find("run-word").textContent = adding ? "Add object" : view.contour ? "Save contour" : "Re-run GrabCut";
  find("help").textContent = adding ? HELP.create : view.contour ? HELP.contour : HELP.review;
}

function say(text) {
  find("message").textContent = text;
}

let last = Promise.resolve();

// Runs one action at a time: keys pressed while a request is pending are queued.
function act(action) {
  last = last.then(action).catch((error) => say(error.message)).then(buttons);
}

function listen() {
  for (const name of Object.keys(actions)) {
    find(name)?.addEventListener("click", (event) => {
      event.currentTarget.blur(); // otherwise the space bar would press it again
      act(actions[name]);
    });
  }
  find("size").addEventListener("input", (event) => resize(Number(event.target.value)));
  find("opacity").addEventListener("input", (event) => fade(Number(event.target.value)));
  find("category").addEventListener("change", (event) => {
    event.target.blur(); // otherwise letters would go to the select element
    act(setCategory);
  });
  find("filter").addEventListener("change", (event) => {
    event.target.blur(); // otherwise letters would go to the select element
    act(async () => {
      list.show(event.target.value);
      if (shown) note(shown);
      if (!list.row.has(list.current) && list.shown.length) await open(list.shown[0].id);
    });
  });
  document.addEventListener("keydown", (event) => {
    const name = KEYS[event.key.toLowerCase()];
    const field = event.target.matches("select") || (event.target.matches("input") && event.key.startsWith("Arrow"));
    const press = event.key === "Enter" && event.target.matches("button");
    if (!name || field || press || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (!(event.repeat && ONCE.has(name))) act(actions[name]);
  });
}

async function start() {
  const found = await askJson("items");
  const items = found.ids.map((id, i) => ({
    id,
    imageId: found.image_ids[i],
    image: found.images[found.image_ids[i]],
    category: found.categories[found.category_ids[i]],
    review: found.reviews[i],
  }));
  undoable = found.undoable;
  names = { images: found.images, categories: found.categories };
  const classes = Object.entries(found.categories);
  find("category").replaceChildren(...classes.map(([id, name]) => new Option(name, id)));
  find("file").textContent = document.title = found.file;
  list = new List(find("list"), items, (id) => act(() => go(id)));
  listen();
  resize(view.brush);
  fade(40);
  const first = items.find((item) => item.review === "unreviewed") ?? items[0];
  if (first) await open(first.id);
  else find("count").textContent = "no annotations";
  buttons();
}

act(start);
