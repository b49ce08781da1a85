// Previews replace each other; pictures to compare stay in place, whatever the slider says.
const root = element.querySelector(".viewer");
const say = speaker(JSON.parse(root.dataset.texts));
const part = (name) => root.querySelector(`.${name}`);
const [before, after, preview, share, hold, difference] = [
  "before", "after", "preview", "share", "hold", "difference",
].map(part);

/** @param {string} name @param {boolean} on */
function set(name, on) {
  root.classList.toggle(name, on);
  (name === "holding" ? hold : difference).setAttribute("aria-pressed", String(on));
}

for (const one of root.querySelectorAll("[data-text]")) one.textContent = say(one.dataset.text);

function show() {
  const value = props.value ?? {};
  const mode = value.preview ? "preview" : value.after ? (value.before ? "compare" : "alone") : "empty";
  // On a phone Run is pressed far below: what forms is brought into view, once a run.
  if (mode === "preview" && root.dataset.mode !== "preview" && matchMedia("(max-width: 640px)").matches) {
    root.scrollIntoView({ block: "start" });
  }
  root.dataset.mode = mode;
  set("holding", false);
  set("differing", false);
  if (value.preview) preview.src = value.preview;
  else preview.removeAttribute("src");
  for (const [image, file] of [[before, value.before], [after, value.after]]) {
    if (file) image.src = file.url;
    else image.removeAttribute("src");
  }
  before.alt = say("before");
  after.alt = value.name || say("after");
  preview.alt = value.name || say("after");
}

share.addEventListener("input", () => root.style.setProperty("--share", `${share.value}%`));
for (const [start, end] of [["pointerdown", "pointerup"], ["keydown", "keyup"]]) {
  hold.addEventListener(start, (event) => {
    if (event.type === "pointerdown") hold.setPointerCapture(event.pointerId);
    else if (event.key !== " " && event.key !== "Enter") return;
    set("holding", true);
  });
  hold.addEventListener(end, () => set("holding", false));
}
hold.addEventListener("pointercancel", () => set("holding", false));
hold.addEventListener("blur", () => set("holding", false));
difference.addEventListener("click", () => set("differing", !root.classList.contains("differing")));

watch("value", show);
show();
