// The composer: settings of a run, and the stack of passes with their edits.
//
// The browser holds all of it. A change of structure draws the stack anew within the very event that
// made it, so that no click can fall on a form that is gone; typing draws nothing. The server sees
// the stack when something is run, and is the judge of it: what is checked here only helps.

/**
 * @typedef {{name: string, title: string, kind: string, default: any, help: string, required: boolean,
 *   nullable: boolean, advanced: boolean, whole: boolean, low: ?number, high: ?number, step: ?number,
 *   longest: ?number, choices: string[], free: boolean, registry: string}} Field see forms.py
 * @typedef {{uid: string, name: string, enabled: boolean, values: Record<string, any>}} Edit
 * @typedef {{uid: string, enabled: boolean, values: Record<string, any>, edits: Edit[]}} Pass
 * @typedef {{settings: Record<string, any>, passes: Pass[]}} Stack
 */

const { edits: EDITS, pass: PASS, settings: SETTINGS, presets: PRESETS, words: WORDS } = props.forms;
const say = speaker(props.texts);
const TONGUE = tongue(props.texts);
const LAYERS = ["A", "B", "C", "D"];
/** Changes of structure that can be taken back. */
const HISTORY = 50;
const OWN = "own:";
/** Where the stack with its files, and the name of the session, lie through a reload of the tab. */
const KEPT = "diffedit.stack";
const SESSION = "diffedit.session";
/** On a 24 × 24 grid. */
const ICONS = {
  up: "M12 19V5M6 11l6-6 6 6",
  down: "M12 5v14M6 13l6 6 6-6",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  remove: "M6 6l12 12M18 6L6 18",
  undo: "M9 5L4 10l5 5M4 10h10a6 6 0 0 1 0 12h-3",
  redo: "M15 5l5 5-5 5M20 10H10a6 6 0 0 0 0 12h3",
  reset: "M5 4v6h6M5.6 10a8 8 0 1 1-1.4 5",
  random: "M4 4h16v16H4zM8.5 8.5h.01M15.5 8.5h.01M12 12h.01M8.5 15.5h.01M15.5 15.5h.01",
};

const my = {
  /** @type {Stack} */
  stack: { settings: {}, passes: [] },
  /** @type {{stack: string, settings: boolean}[]} before each change: JSON; whether settings changed too */
  before: [],
  /** What was taken back, the last of it at the end. */
  after: [],
  /** @type {Record<string, object>} pictures of one's own, as Gradio's FileData */
  files: {},
  /** @type {{id: number, title: string, file: {url: string}}[]} of the history */
  pictures: [],
  /** @type {{uid: string, field: string, said: string}[]} */
  faults: [],
  /** @type {Record<string, {url?: string, said?: string}>} hints by uid, where they are shown */
  hints: {},
  /** Uids whose folded fields are open. */
  open: new Set(),
  sending: Promise.resolve(),
  /** Whether an input method is putting a text together, and whether to draw when it is done. */
  composing: false,
  stale: false,
};

const root = make("div", { class: "diffedit-composer" });
element.querySelector(".diffedit-composer").replaceWith(root);

/** A word of a form in the browser's language; plugins speak English. */
const word = (english) => WORDS[TONGUE]?.[english] ?? english;

// ---------------------------------------------------------------------------------------- the stack

/** A name that no other item has; not `randomUUID`, which pages without TLS lack. */
function newUid() {
  return [...crypto.getRandomValues(new Uint8Array(6))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** @param {Stack} stack */
const items = (stack) => stack.passes.flatMap((one) => [one, ...one.edits]);
const find = (uid) => items(my.stack).find((item) => item.uid === uid);

/** Where an item stands: its list and its place in it; for an edit also its pass's place. */
function placed(uid) {
  const { passes } = my.stack;
  const at = passes.findIndex((one) => one.uid === uid);
  if (at >= 0) return { list: passes, at };
  for (const [pass, one] of passes.entries()) {
    const found = one.edits.findIndex((edit) => edit.uid === uid);
    if (found >= 0) return { list: one.edits, at: found, pass };
  }
  return null;
}

/** An edit as it is at first: a mask is one that no other edit has yet. */
function newEdit(name) {
  const values = {};
  const taken = new Set(my.stack.passes.flatMap((one) => one.edits.map((edit) => edit.values.mask)));
  for (const field of EDITS[name].fields) {
    if (field.kind !== "mask" || !field.required) continue;
    values[field.name] = `layer:${LAYERS.find((layer) => !taken.has(`layer:${layer}`)) ?? LAYERS[0]}`;
  }
  return { uid: newUid(), name, enabled: true, values };
}

const actions = {
  addPass: () => my.stack.passes.push({ uid: newUid(), enabled: true, values: { prompt: "" }, edits: [] }),
  addEdit: (uid, name) => find(uid).edits.push(newEdit(name)),
  /** An edit that leaves its pass enters the next. */
  move(uid, by) {
    const { list, at, pass } = placed(uid);
    const to = at + by;
    if (to >= 0 && to < list.length) list.splice(to, 0, ...list.splice(at, 1));
    else if (pass !== undefined && my.stack.passes[pass + by]) {
      const [edit] = list.splice(at, 1);
      const other = my.stack.passes[pass + by].edits;
      other.splice(by > 0 ? 0 : other.length, 0, edit);
    }
  },
  copy(uid) {
    const { list, at } = placed(uid);
    const twin = copied(list[at]);
    for (const item of [twin, ...(twin.edits ?? [])]) item.uid = newUid();
    // An edit's id is its own within its pass.
    if (!twin.edits) delete twin.values.id;
    list.splice(at + 1, 0, twin);
  },
  remove(uid) {
    const { list, at } = placed(uid);
    list.splice(at, 1);
  },
  /** What is typed as a prompt stays, unless the preset says one. */
  preset(key) {
    const { passes } = copied(PRESETS.find((one) => one.key === key));
    const prompt = my.stack.passes[0]?.values.prompt;
    for (const item of items({ passes })) item.uid = newUid();
    if (passes[0]) passes[0].values.prompt ??= prompt ?? "";
    my.stack.passes = passes;
  },
};

/**
 * Change the structure: it can be taken back, is drawn, and is told.
 * @param {keyof typeof actions} name
 * @param {string} focus the id of the control that is to have the focus
 */
function change(name, values, focus) {
  const before = JSON.stringify(my.stack);
  actions[name](...values);
  if (JSON.stringify(my.stack) === before) return;
  remember(before);
  settle(focus);
}

function remember(stack, settings = false) {
  my.before = [...my.before.slice(1 - HISTORY), { stack, settings }];
  my.after = [];
}

/** Take the last change of structure back. */
const takeBack = () => travel(my.before, my.after, "composer-undo");
/** Make the change that was taken back last once more. */
const makeAgain = () => travel(my.after, my.before, "composer-redo");

/** To another state; what was typed meanwhile in what is there in both stays. */
function travel(from, to, focus) {
  const last = from.pop();
  if (!last) return;
  to.push({ stack: JSON.stringify(my.stack), settings: last.settings });
  const stack = JSON.parse(last.stack);
  for (const item of items(stack)) {
    const now = find(item.uid);
    if (now) Object.assign(item, { values: now.values, enabled: now.enabled });
  }
  if (!last.settings) stack.settings = my.stack.settings;
  my.stack = stack;
  settle(focus);
}

function settle(focus) {
  publish();
  draw();
  if (focus) document.getElementById(focus)?.focus();
}

// ------------------------------------------------------------------------------------------ fields

/** Where a field's value is kept. */
const valuesOf = (uid) => (uid === "run" ? my.stack.settings : find(uid).values);

/**
 * What was typed or chosen. Undefined, and what the default says anyway, leaves the field unset:
 * workflows say what people said.
 */
function put(uid, field, value) {
  const values = valuesOf(uid);
  if (value === undefined || value === field.default) delete values[field.name];
  else values[field.name] = value;
  publish();
  clear(uid, field.name);
  document.getElementById(`reset-${uid}.${field.name}`)?.toggleAttribute("hidden", !canReset(uid, field));
  asksAgain(uid);
}

const canReset = (uid, field) => !field.required && uid !== "run" && (valuesOf(uid)[field.name] ?? "") !== "";

/** A number as it was typed; what is none is sent as it is, and the server says so. */
function numberOf(control) {
  if (control.validity.badInput) return "?";
  return control.value === "" ? undefined : Number(control.value);
}

/** @param {Field} field */
function drawField(uid, field) {
  const id = `${uid}.${field.name}`;
  const values = valuesOf(uid);
  const value = values[field.name] ?? field.default;
  const control = CONTROLS[field.kind](uid, field, value);
  const main = control.matches("input, select, textarea") ? control : control.querySelector("input, select, textarea");
  main.id = `control-${id}`;
  main.setAttribute("aria-describedby", `help-${id} fault-${id}`);
  const reset = button("reset", say("reset", { name: word(field.title) }), () => {
    put(uid, field, undefined);
    const anew = drawField(uid, field);
    document.getElementById(`field-${id}`).replaceWith(anew);
    anew.querySelector("input, select, textarea").focus();
  });
  reset.id = `reset-${id}`;
  reset.hidden = !canReset(uid, field);
  const label = make("label", { for: `control-${id}` }, word(field.title));
  const head = make("div", { class: "label" }, label, reset);
  if (field.random) head.append(button("random", say("random", { name: word(field.title) }), () => drawn(main, field)));
  const help = make("small", { id: `help-${id}`, class: "help" }, word(field.help));
  const fault = make("p", { id: `fault-${id}`, class: "fault", role: "alert" });
  const body = field.kind === "switch" ? [make("div", { class: "switch" }, control, head)] : [head, control];
  const whole = make("div", { class: `field ${field.kind}`, id: `field-${id}` }, ...body, help, fault);
  showFault(whole, uid, field.name);
  return whole;
}

/** A number drawn at random, short enough to be told to somebody. */
function drawn(control, field) {
  const [number] = crypto.getRandomValues(new Uint32Array(1));
  control.value = String(number % Math.min(field.high ?? 1e6, 1e6));
  control.dispatchEvent(new Event("input"));
}

/** Each gives the element that holds the control which the label names. */
const CONTROLS = {
  text(uid, field, value) {
    const long = field.name === "prompt" || (field.longest ?? 0) > 4096;
    const control = make(long ? "textarea" : "input", long ? { rows: "2" } : { type: "text", autocomplete: "off" });
    if (field.longest) control.maxLength = field.longest;
    control.value = value ?? "";
    control.addEventListener("input", () => {
      put(uid, field, control.value === "" && field.nullable ? undefined : control.value);
    });
    return control;
  },
  number(uid, field, value) {
    const control = make("input", { type: "number", step: String(field.step ?? "any"), inputmode: field.whole ? "numeric" : "decimal" });
    if (field.low !== null) control.min = String(field.low);
    if (field.high !== null) control.max = String(field.high);
    // A step counts from `min`: 8 above 1 by 1, but 0.5 above 0.05 by 0.05 is not exact.
    if (!field.whole) control.step = "any";
    control.value = value ?? "";
    control.addEventListener("input", () => {
      put(uid, field, numberOf(control));
      checkRange(control, uid, field);
    });
    return control;
  },
  slider(uid, field, value) {
    const range = make("input", { type: "range", min: String(field.low), max: String(field.high), step: String(field.step), tabindex: "-1", "aria-hidden": "true" });
    const number = CONTROLS.number(uid, field, value);
    range.value = value ?? field.low;
    range.addEventListener("input", () => {
      number.value = range.value;
      number.dispatchEvent(new Event("input"));
    });
    number.addEventListener("input", () => (range.value = number.value));
    number.addEventListener("keydown", (event) => stepped(event, number, field));
    return make("div", { class: "both" }, number, range);
  },
  switch(uid, field, value) {
    const control = make("input", { type: "checkbox" });
    control.checked = Boolean(value);
    control.addEventListener("change", () => put(uid, field, control.checked));
    return control;
  },
  choice(uid, field, value) {
    if (field.free) return listed(uid, field, value);
    const control = make("select");
    if (field.nullable) control.append(make("option", { value: "" }, say("unset")));
    for (const one of field.choices) control.append(make("option", { value: one }, one));
    control.value = value ?? "";
    control.addEventListener("change", () => put(uid, field, control.value || undefined));
    return control;
  },
  image: (uid, field, value) => picked(uid, field, value),
  mask: (uid, field, value) => picked(uid, field, value),
};

/** Arrow keys move by the step that the edit's author meant. */
function stepped(event, number, field) {
  const by = { ArrowUp: 1, ArrowDown: -1 }[event.key];
  if (!by) return;
  event.preventDefault();
  const moved = Math.min(field.high, Math.max(field.low, Number(number.value) + by * field.step));
  number.value = String(Number(moved.toFixed(6)));
  number.dispatchEvent(new Event("input"));
}

/** A choice that others may be typed into. */
function listed(uid, field, value) {
  const list = make("datalist", { id: `list-${uid}.${field.name}` });
  for (const one of field.choices) list.append(make("option", { value: one }));
  const control = make("input", { type: "text", autocomplete: "off", list: list.id });
  control.value = value ?? "";
  if (field.nullable) control.placeholder = say("unset");
  control.addEventListener("input", () => put(uid, field, control.value.trim() || undefined));
  return make("div", { class: "listed" }, control, list);
}

function checkRange(control, uid, field) {
  const { rangeUnderflow, rangeOverflow } = control.validity;
  if (!rangeUnderflow && !rangeOverflow) return;
  const { low, high } = field;
  const key = low === null ? "atMost" : high === null ? "atLeast" : "between";
  fault(uid, field.name, say(key, { low, high }));
}

// ---------------------------------------------------------------------------------------- pictures

/** A picture or a mask: a layer of the canvas, the source, an earlier result, or a file. */
function picked(uid, field, value) {
  const control = make("select");
  const look = make("img", { class: "look", alt: "" });
  const chooser = make("input", { type: "file", accept: "image/*", hidden: "", tabindex: "-1" });
  const show = (pick) => {
    const url = urlOf(pick);
    look.hidden = !url;
    if (url) look.src = url;
  };
  const fill = (pick) => {
    control.replaceChildren(...picksFor(field, pick).map(([key, said]) => make("option", { value: key }, said)));
    control.value = pick ?? "";
    show(pick);
  };
  fill(value);
  const file = make("button", { type: "button" }, say("file"));
  file.setAttribute("aria-label", say("fileFor", { name: word(field.title) }));
  file.addEventListener("click", () => chooser.click());
  control.addEventListener("change", () => {
    put(uid, field, control.value || undefined);
    show(control.value);
  });
  chooser.addEventListener("change", () => {
    const [file] = chooser.files;
    chooser.value = "";
    if (file) my.sending = my.sending.then(() => takes(uid, field, file, fill));
  });
  return make("div", { class: "picked" }, control, look, file, chooser);
}

async function takes(uid, field, file, fill) {
  if (!find(uid)) return;
  clear(uid, field.name);
  try {
    const name = `${OWN}${newUid()}`;
    my.files[name] = await sent(file);
    if (!find(uid)) return;
    put(uid, field, name);
    fill(name);
  } catch (error) {
    fault(uid, field.name, say("uploadFailed", { name: file.name, reason: reasonOf(error) }));
  }
}

/** @param {Field} field */
function picksFor(field, pick) {
  const found = [];
  if (!field.required) found.push(["", say("unset")]);
  else if (!pick) found.push(["", say("choose")]);
  if (field.kind === "mask") for (const layer of LAYERS) found.push([`layer:${layer}`, say("layer", { name: layer })]);
  else {
    found.push(["source", say("source")]);
    for (const { id, title } of my.pictures) found.push([`result:${id}`, say("result", { number: id + 1, title })]);
  }
  for (const [name, file] of Object.entries(my.files)) found.push([name, file.orig_name || say("inline")]);
  if (pick && !found.some(([key]) => key === pick)) found.push([pick, pick]);
  return found;
}

function urlOf(pick) {
  if (!pick) return null;
  if (pick.startsWith(OWN)) return my.files[pick]?.url ?? null;
  const [kind, id] = pick.split(":");
  return kind === "result" ? (my.pictures.find((one) => String(one.id) === id)?.file.url ?? null) : null;
}

// ------------------------------------------------------------------------------------------- hints

/** An edit whose hint is made by a preprocessor can show it. */
const hasHint = (edit) => EDITS[edit.name]?.fields.some((field) => field.registry === "preprocessors");

function drawHint(edit) {
  const whole = make("details", { class: "hint", id: `hint-${edit.uid}` }, make("summary", {}, say("hint")), make("div", { class: "shown" }));
  whole.open = edit.uid in my.hints;
  whole.addEventListener("toggle", () => {
    if (whole.open === edit.uid in my.hints) return;
    if (whole.open) {
      my.hints[edit.uid] = {};
      ask(edit.uid);
    } else delete my.hints[edit.uid];
  });
  showHint(whole, my.hints[edit.uid]);
  return whole;
}

function showHint(whole, hint) {
  const shown = whole.querySelector(".shown");
  if (hint?.url) shown.replaceChildren(make("img", { src: hint.url, alt: say("hint") }));
  else shown.replaceChildren(make("p", { role: "status" }, hint?.said ?? (hint ? say("making") : "")));
}

/** Timers by uid, what is to be asked for, and since when the server is busy with one. */
const hints = { timers: {}, wanted: new Set(), since: 0 };
/** After so many milliseconds without an answer another hint is asked for all the same. */
const PATIENCE = 60_000;

/** Ask for a hint anew, once typing has paused. */
function asksAgain(uid) {
  if (!(uid in my.hints)) return;
  clearTimeout(hints.timers[uid]);
  hints.timers[uid] = setTimeout(() => ask(uid), 400);
}

/** One at a time: the server makes the last that was asked for, and the others wait here. */
function ask(uid) {
  hints.wanted.add(uid);
  if (performance.now() - hints.since > PATIENCE || !hints.since) askNext();
}

async function askNext() {
  const [uid] = hints.wanted;
  hints.wanted.delete(uid);
  hints.since = uid ? performance.now() : 0;
  if (!uid) return;
  await my.sending;
  if (!(uid in my.hints)) return askNext();
  publish({ asked: uid });
  trigger("hint", {});
}

// ------------------------------------------------------------------------------------------ faults

/** Say what is wrong with a field, beside it. */
function fault(uid, name, said) {
  my.faults = [...my.faults.filter((one) => one.uid !== uid || one.field !== name), { uid, field: name, said }];
  refault(uid, name);
}

function clear(uid, name) {
  if (!my.faults.some((one) => one.uid === uid && one.field === name)) return;
  my.faults = my.faults.filter((one) => one.uid !== uid || one.field !== name);
  refault(uid, name);
}

function refault(uid, name) {
  const whole = document.getElementById(`field-${uid}.${name}`);
  if (whole) showFault(whole, uid, name);
}

function showFault(whole, uid, name) {
  const said = my.faults.filter((one) => one.uid === uid && one.field === name).map((one) => one.said);
  whole.querySelector(".fault").textContent = said.join(" ");
  const control = whole.querySelector("[aria-describedby]");
  if (said.length) control.setAttribute("aria-invalid", "true");
  else control.removeAttribute("aria-invalid");
}

// ----------------------------------------------------------------------------------------- drawing

function button(kind, name, act, sign = drawing(ICONS[kind])) {
  const made = make("button", { type: "button", class: `act-${kind}`, "aria-label": name, title: name }, sign);
  made.addEventListener("click", act);
  return made;
}

/** Something that is folded away until it is asked for; it stays as it was left. */
function folded(id, title, inside, open = false) {
  const more = make("details", { class: "more", id }, make("summary", {}, title), inside);
  more.open = open || my.open.has(id);
  more.addEventListener("toggle", () => my.open[more.open ? "add" : "delete"](id));
  return more;
}

/** The plain fields, and the others folded. */
function drawFields(uid, fields) {
  const plain = fields.filter((field) => !field.advanced);
  const rest = fields.filter((field) => field.advanced);
  const drawn = plain.map((field) => drawField(uid, field));
  if (!rest.length) return drawn;
  const names = new Set(rest.map((field) => field.name));
  const wrong = my.faults.some((one) => one.uid === uid && names.has(one.field));
  const inside = make("div", { class: "fields" }, ...rest.map((field) => drawField(uid, field)));
  return [...drawn, folded(`more-${uid}`, say("more"), inside, wrong)];
}

/** The switch, the name and the buttons of a pass or edit. */
function drawHead(item, title, level) {
  const { uid } = item;
  const box = make("input", { type: "checkbox", id: `on-${uid}`, "aria-label": say("on", { name: title }) });
  box.checked = item.enabled;
  box.addEventListener("change", () => {
    item.enabled = box.checked;
    publish();
    document.getElementById(`item-${uid}`).classList.toggle("off", !item.enabled);
  });
  const head = make("div", { class: "head" }, box, make(level, { id: `title-${uid}` }, title));
  const acts = { up: ["move", [uid, -1]], down: ["move", [uid, 1]], copy: ["copy", [uid]], remove: ["remove", [uid]] };
  for (const [name, [act, values]] of Object.entries(acts)) {
    const id = `${name}-${uid}`;
    const one = button(name, say(name, { name: title }), () => change(act, values, name === "remove" ? "add-pass" : id));
    one.id = id;
    head.append(one);
  }
  head.addEventListener("keydown", (event) => {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!by || !event.altKey) return;
    event.preventDefault();
    change("move", [uid, by], document.activeElement.id);
  });
  return head;
}

/** @param {Pass} pass */
function drawPass(pass, number) {
  const title = say("pass", { number });
  const whole = make("section", { class: "pass", id: `item-${pass.uid}`, "aria-labelledby": `title-${pass.uid}` });
  whole.classList.toggle("off", !pass.enabled);
  whole.append(drawHead(pass, title, "h2"), ...drawFields(pass.uid, PASS), ...pass.edits.map(drawEdit));
  const adding = make("div", { class: "adding", role: "group", "aria-label": say("addEdit") });
  const rare = make("div", { class: "adding", role: "group", "aria-label": say("moreEdits") });
  for (const [name, { help, advanced }] of Object.entries(EDITS)) {
    const id = `add-${name}-${pass.uid}`;
    const one = button("add", `+ ${name}`, () => change("addEdit", [pass.uid, name], id), `+ ${name}`);
    Object.assign(one, { id, title: word(help) });
    one.classList.add(`add-${name}`);
    (advanced ? rare : adding).append(one);
  }
  whole.append(adding);
  if (rare.childElementCount) whole.append(folded(`rare-${pass.uid}`, say("moreEdits"), rare));
  return whole;
}

/** @param {Edit} edit */
function drawEdit(edit) {
  const whole = make("section", { class: "edit", id: `item-${edit.uid}`, "aria-labelledby": `title-${edit.uid}` });
  whole.classList.toggle("off", !edit.enabled);
  whole.append(drawHead(edit, edit.name, "h3"), ...drawFields(edit.uid, EDITS[edit.name]?.fields ?? []));
  if (!(edit.name in EDITS)) whole.append(make("p", { class: "fault" }, say("missing", { name: edit.name })));
  if (hasHint(edit)) whole.append(drawHint(edit));
  return whole;
}

function drawPresets() {
  // Buttons, not a list: the arrow keys would choose all that they pass by.
  const presets = make("div", { class: "presets", role: "group", "aria-label": say("preset") });
  for (const { key, title } of PRESETS) {
    const id = `preset-${key}`;
    const one = make("button", { type: "button", id }, say(title));
    one.addEventListener("click", () => change("preset", [key], id));
    presets.append(one);
  }
  const undo = button("undo", say("takeBack"), takeBack);
  Object.assign(undo, { id: "composer-undo", disabled: !my.before.length });
  const redo = button("redo", say("makeAgain"), makeAgain);
  Object.assign(redo, { id: "composer-redo", disabled: !my.after.length });
  return make("div", { class: "starting" }, presets, undo, redo);
}

function draw() {
  const passes = my.stack.passes.map((pass, at) => drawPass(pass, at + 1));
  const more = make("button", { type: "button", id: "add-pass" }, say("addPass"));
  more.addEventListener("click", () => change("addPass", [], "add-pass"));
  const general = my.faults.filter((one) => !one.uid).map((one) => make("p", { class: "fault", role: "alert" }, one.said));
  const settings = make("section", { class: "run-settings", "aria-label": say("settings") }, ...drawFields("run", SETTINGS));
  root.replaceChildren(drawPresets(), ...general, settings, ...passes, more);
}

// ------------------------------------------------------------------------------- browser and server

/** Put what the page shows into the component's value. */
function publish(more = {}) {
  const { settings, passes } = my.stack;
  const used = new Set(items(my.stack).flatMap((item) => Object.values(item.values)));
  const files = Object.fromEntries(Object.entries(my.files).filter(([name]) => used.has(name)));
  const stack = JSON.stringify({ settings, passes });
  keep(KEPT, JSON.stringify({ stack: { settings, passes }, files }));
  props.value = copied({ stack, files, asked: null, ...more });
}

/** Take what the server says: a stack to show, pictures to pick from, faults, a hint. */
function receive() {
  const value = copied(props.value ?? {});
  if (!value.told) return;
  if (value.session) keep(SESSION, value.session);
  const load = value.stack ? JSON.parse(value.stack) : null;
  if (load) {
    remember(JSON.stringify(my.stack), true);
    Object.assign(my.files, value.files);
    my.stack = { settings: { ...my.stack.settings, ...load.settings }, passes: load.passes };
  }
  const before = JSON.stringify([my.pictures, my.faults]);
  my.pictures = value.pictures ?? my.pictures;
  my.faults = value.faults ?? my.faults;
  if (value.hint && value.hint.uid in my.hints) {
    my.hints[value.hint.uid] = { url: value.hint.file?.url, said: value.hint.said };
    const whole = document.getElementById(`hint-${value.hint.uid}`);
    if (whole) showHint(whole, my.hints[value.hint.uid]);
  }
  publish();
  if (value.hint) askNext();
  // Another picture may be edited now: hints that follow it are made anew.
  else if (value.pictures) for (const uid of Object.keys(my.hints)) asksAgain(uid);
  if (load || JSON.stringify([my.pictures, my.faults]) !== before) redraw();
}

/** Draw anew what the server changed, wherever the user is meanwhile. */
function redraw() {
  if (my.composing) {
    my.stale = true; // drawing now would break off what an input method is putting together
    return;
  }
  my.stale = false;
  const { id, selectionStart, selectionEnd } = document.activeElement ?? {};
  const inside = root.contains(document.activeElement);
  draw();
  const again = inside && id ? document.getElementById(id) : null;
  again?.focus({ preventScroll: true });
  if (again?.setSelectionRange && selectionStart != null && again.type !== "number") {
    again.setSelectionRange(selectionStart, selectionEnd);
  }
}

/**
 * The component's value once all that is being sent has arrived; for a `js=` to put among the inputs.
 * @returns {Promise<object>}
 */
async function flush() {
  await my.sending;
  publish();
  return copied(props.value);
}

root.addEventListener("compositionstart", () => (my.composing = true));
root.addEventListener("compositionend", () => {
  my.composing = false;
  if (my.stale) redraw();
});

/** Run and Cancel are buttons of the page, and the keys for them work wherever one is typing. */
const life = new AbortController();
document.addEventListener(
  "keydown",
  (event) => {
    if (!element.isConnected) return life.abort();
    const id = { Enter: "run", ".": "cancel" }[event.key];
    if (!id || !(event.ctrlKey || event.metaKey) || event.repeat) return;
    event.preventDefault();
    document.getElementById(id)?.click();
  },
  { signal: life.signal },
);
// For what is said in the page's own language without a script.
document.documentElement.lang = TONGUE;

function keep(name, text) {
  try {
    sessionStorage.setItem(name, text);
  } catch {
    // Full, or forbidden: then a reload begins anew.
  }
}

function kept(name) {
  try {
    return sessionStorage.getItem(name);
  } catch {
    return null;
  }
}

/** What was on the page before it was loaded again, as after a broken connection. */
function restored() {
  try {
    const { stack, files } = JSON.parse(kept(KEPT));
    return stack.passes.length ? { stack, files } : null;
  } catch {
    return null;
  }
}

const before = restored();
if (before) Object.assign(my, before);
else actions.preset(PRESETS[0].key);
publish({ session: kept(SESSION) ?? "" });
draw();
watch("value", receive);
trigger("arrived", {});
window.diffedit = { ...window.diffedit, composer: { flush, stack: () => copied(my.stack), change, takeBack, makeAgain } };
