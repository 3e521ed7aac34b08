// The review page: handles keys and buttons in sequence, and shows the state from the server.

import { List } from "./list.js";
import { View } from "./view.js";

const find = (id) => document.getElementById(id);
const images = new Map(); // the most recent images, by image id; the next one is prefetched
const KEPT = 6;

// The token is in a cookie now; it should not stay in the address, the history or a bookmark.
if (location.search) history.replaceState(null, "", location.pathname);

let list = null;
let shown = null; // state of the current annotation, from the server
let undoable = 0;
const view = new View(find("view"), () => buttons());

async function ask(path, options = {}) {
  const answer = await fetch(`/api/${path}`, options);
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({ error: `the server responded with status ${answer.status}` }));
    throw new Error(told.error);
  }
  return answer;
}

const told = async (path, options) => (await ask(path, options)).json();

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
  say("");
  const [state, image, bitmap] = await Promise.allSettled([told(`annotations/${id}`), picture(imageId), mask(id)]);
  const failed = [state, image, bitmap].find((part) => part.status === "rejected");
  if (state.status === "fulfilled") {
    shown = state.value;
    view.show({ ...shown, image: image.value ?? null, mask: bitmap.value ?? null });
    note(shown);
  }
  if (failed) say(failed.reason.message);
  if (!shown) return;
  const ahead = list.beside(1);
  if (ahead !== null) picture(list.item(ahead).imageId).catch(() => {});
}

// Updates the list, the counts and the line about the annotation after a decision.
function note(state) {
  const item = list.item(state.id);
  item.review = state.review;
  undoable = state.undoable;
  const score = state.score === null ? "" : `, score ${state.score.toFixed(2)}`;
  find("about").textContent = `${item.category} in ${item.image}, annotation ${item.id}${score}: ${item.review}`;
  if (state.fallback) {
    const substitute = "the mask is the ellipse in the box, or the thresholded map; painted strokes are kept";
    say(`No object was found here (${state.fallback}): ${substitute}`);
  }
  if (state.trouble) say(`Saved in the journal, but not in the file: ${state.trouble}`);
  const done = list.items.filter((each) => each.review !== "open").length;
  find("count").textContent = `${done} of ${list.items.length} reviewed, ${list.shown.length} shown`;
  Object.assign(find("progress"), { value: done, max: Math.max(1, list.items.length) });
  list.draw();
  buttons();
}

async function decide(decision) {
  if (!shown) return;
  note(await told(`annotations/${shown.id}/decision?decision=${decision}`, { method: "POST" }));
  await open(list.beside(1, "open") ?? list.beside(1));
}

async function cut() {
  if (!shown) return;
  const box = view.chosenBox();
  const query = box ? `?box=${box.map((v) => v.toFixed(2)).join(",")}` : "";
  say("Segmenting ...");
  const options = { method: "POST", headers: { "Content-Type": "image/png" }, body: await view.strokes() };
  shown = await told(`annotations/${shown.id}/cut${query}`, options);
  say("");
  view.settle();
  view.show({ ...shown, box, image: view.image, mask: await mask(shown.id) }, true);
  note(shown);
}

async function undo() {
  if (view.takeBack() || !undoable) return buttons();
  const state = await told("undo", { method: "POST" });
  list.item(state.id).review = state.review;
  if (!list.row.has(state.id)) list.show(find("filter").value);
  await open(state.id);
}

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

function drop() {
  view.reset();
  view.draw();
}

function flip(name) {
  view[name] = !view[name];
  view.draw();
}

const actions = {
  accept: () => decide("accepted"),
  reject: () => decide("rejected"),
  undo,
  box: () => choose("box"),
  foreground: () => choose("foreground"),
  background: () => choose("background"),
  run: cut,
  zoom: () => flip("zoomed"),
  overlay: () => flip("overlay"),
  previous: () => open(list.beside(-1)),
  next: () => open(list.beside(1)),
  smaller: () => resize(view.brush - Math.max(1, Math.round(view.brush / 5))),
  larger: () => resize(view.brush + Math.max(1, Math.round(view.brush / 5))),
  drop,
};
const KEYS = {
  a: "accept", r: "reject", z: "undo", b: "box", f: "foreground", g: "background", enter: "run", v: "zoom", m: "overlay", escape: "drop",
  arrowleft: "previous", arrowup: "previous", arrowright: "next", arrowdown: "next", "[": "smaller", "]": "larger",
};

const ONCE = new Set(["accept", "reject", "run", "undo"]); // not repeated while the key is held down

function buttons() {
  for (const tool of ["box", "foreground", "background"]) find(tool).setAttribute("aria-pressed", String(view.tool === tool));
  find("zoom").setAttribute("aria-pressed", String(view.zoomed));
  find("overlay").setAttribute("aria-pressed", String(view.overlay));
  for (const name of ["accept", "reject", "run"]) find(name).disabled = !shown;
  find("undo").disabled = !undoable && !view.pending();
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
  const found = await told("items");
  const items = found.ids.map((id, i) => ({
    id,
    imageId: found.image_ids[i],
    image: found.images[found.image_ids[i]],
    category: found.categories[found.category_ids[i]],
    review: found.reviews[i],
  }));
  undoable = found.undoable;
  find("file").textContent = document.title = found.file;
  list = new List(find("list"), items, (id) => act(() => open(id)));
  listen();
  resize(view.brush);
  const first = items.find((item) => item.review === "open") ?? items[0];
  if (first) await open(first.id);
  else find("count").textContent = "no annotations";
  buttons();
}

act(start);
