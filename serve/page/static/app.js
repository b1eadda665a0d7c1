// The reader page: a film goes in, its draft comes out. Drafts live in this page's memory and nowhere else.

import { modelVersion, Problem, readStudy } from "./endpoint.js";
import { decodeFilm, thumbnail } from "./film.js";
import { listenTo } from "./gestures.js";
import { heatPicture } from "./heat.js";
import { colourOf, element, showAbout, showFindings, showSentences } from "./report.js";
import { Viewer } from "./viewer.js";

const MOST_DRAFTS = 12;
const part = (id) => document.getElementById(id);
const stage = part("stage");
const viewer = new Viewer(stage, part("canvas"), showSettings);
let drafts = [];
let current = null;
let running = null;

// ---- a film is read

async function read(files) {
  if (!files.length) return;
  running?.abort();
  const mine = new AbortController();
  running = mine;
  showProblem(null);
  const stopClock = showWaiting();
  try {
    const draft = await readStudy(files, part("key").value.trim(), mine.signal);
    const film = await decodeFilm(draft.film);
    keep({ draft, film, at: new Date(), small: thumbnail(film, 72), heats: [] });
    say(summary(draft));
  } catch (error) {
    if (error.name === "AbortError") {
      if (running === mine) say("Cancelled.");
    } else {
      // Whatever else goes wrong in here is told too, and not left to a console that nobody reads.
      showProblem(error instanceof Problem ? error : new Problem("The draft cannot be shown", error.message), files);
    }
  } finally {
    stopClock();
    if (running === mine) {
      running = null;
      part("waiting").hidden = true;
    }
  }
}

function showWaiting() {
  const started = Date.now();
  part("waiting").hidden = false;
  say("Reading the film.");
  const tick = () => {
    part("waiting-text").textContent = `Reading the film, ${Math.round((Date.now() - started) / 1000)} s`;
  };
  tick();
  const clock = setInterval(tick, 1000);
  return () => clearInterval(clock);
}

function summary({ sentences, findings }) {
  const present = findings.filter((finding) => finding.present).map((finding) => finding.name);
  return `Draft ready: ${sentences.length} sentences. Findings above their threshold: ${present.join(", ") || "none"}.`;
}

function say(text) {
  part("status").textContent = text;
}

function showProblem(problem, files = []) {
  const box = part("problem");
  box.replaceChildren();
  if (!problem) return;
  say("");
  box.append(element("h2", { textContent: problem.title }), element("p", { textContent: problem.detail }));
  if (problem.status === 401 || problem.status === 403) {
    part("access").open = true;
    box.append(element("p", { textContent: "Enter a key above that may read films, then try again." }));
  }
  if (problem.requestId) box.append(element("p", { className: "note", textContent: `Request ${problem.requestId}` }));
  if (files.length && problem.status !== 415 && problem.status !== 422) {
    const again = element("button", { type: "button", textContent: "Try again" });
    again.addEventListener("click", () => read(files));
    box.append(again);
  }
}

// ---- drafts of this session

function keep(entry) {
  drafts = [entry, ...drafts].slice(0, MOST_DRAFTS);
  show(entry);
}

function show(entry) {
  current = entry;
  const { draft, film, at } = entry;
  showFilled(true);
  viewer.open(film, draft.image_width_px, draft.image_height_px);
  showSentences(part("sentences"), draft, look);
  showFindings(part("findings"), draft.findings);
  showAbout(part("about"), draft, at);
  part("model").textContent = draft.model_version;
  look(null);
  listDrafts();
}

function showFilled(isFilled) {
  for (const id of ["empty", "intro"]) part(id).hidden = isFilled;
  part("report").hidden = !isFilled;
  stage.classList.toggle("filled", isFilled);
}

function listDrafts() {
  part("recent").hidden = drafts.length === 0;
  const items = drafts.map((entry) => {
    const present = entry.draft.findings.filter((finding) => finding.present).length;
    const words = element(
      "span",
      {},
      element("strong", { textContent: entry.at.toLocaleTimeString() }),
      element("span", { className: "note", textContent: `${entry.draft.sentences.length} sentences, ${present} findings present` }),
    );
    entry.small.ariaHidden = "true";
    const button = element("button", { type: "button", className: "draft" }, entry.small, words);
    if (entry === current) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => {
      show(entry);
      say(`Opened the draft of ${entry.at.toLocaleTimeString()}.`);
      part("drafts").querySelector("[aria-current]").focus();
    });
    return element("li", {}, button);
  });
  part("drafts").replaceChildren(...items);
}

function forget() {
  running?.abort();
  drafts = [];
  current = null;
  viewer.close();
  look(null);
  for (const id of ["sentences", "findings", "about"]) part(id).replaceChildren();
  showFilled(false);
  listDrafts();
  say("All drafts of this session are forgotten.");
  part("files").focus();
}

// ---- evidence

function look(index) {
  const sentence = current?.draft.sentences[index];
  part("caption").textContent = sentence ? sentence.text : "";
  part("canvas").setAttribute("aria-label", described(sentence, index));
  if (!sentence) {
    viewer.look(null);
    return;
  }
  const { draft, heats } = current;
  heats[index] ??= heatPicture(sentence.evidence, draft.map_frame, draft.image_width_px, draft.image_height_px);
  viewer.look({ heat: heats[index], box: sentence.box, colour: colourOf(index), number: index + 1 });
}

function described(sentence, index) {
  if (!current) return "No film yet";
  return sentence ? `Film with the evidence of sentence ${index + 1}: ${sentence.text}` : "Film, the patient's right on the left side";
}

// ---- controls

function showSettings({ width, level, isInverted, zoom }) {
  part("width").value = width;
  part("level").value = level;
  part("invert").setAttribute("aria-pressed", String(isInverted));
  part("zoom").textContent = `${Math.round(zoom * 100)} %`;
}

listenTo(stage, viewer, () => document.querySelector("input[name=drag]:checked").value);
for (const id of ["width", "level"]) {
  part(id).addEventListener("input", () => viewer.setWindow(part("width").valueAsNumber, part("level").valueAsNumber));
}
part("strength").addEventListener("input", () => viewer.setStrength(part("strength").valueAsNumber / 100));
part("zoom-in").addEventListener("click", () => viewer.zoomStep(1));
part("zoom-out").addEventListener("click", () => viewer.zoomStep(-1));
part("invert").addEventListener("click", () => viewer.invert());
part("reset").addEventListener("click", () => viewer.reset());
part("cancel").addEventListener("click", () => running?.abort());
part("forget").addEventListener("click", forget);
part("files").addEventListener("change", (event) => {
  read([...event.target.files]);
  // The same file may be chosen again.
  event.target.value = "";
});

// Where a film could be dropped, a tap opens one: touch screens drop nothing.
stage.addEventListener("click", () => {
  if (!current) part("files").click();
});

// A film dropped beside the stage must not be opened by the browser in place of this page.
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  window.addEventListener(kind, (event) => {
    event.preventDefault();
    stage.classList.toggle("aimed", kind === "dragenter" || kind === "dragover");
    if (kind === "drop") read([...event.dataTransfer.files]);
  });
}

async function showModel() {
  const version = await modelVersion(part("key").value.trim());
  if (!current) part("model").textContent = version || "not known yet";
}
part("key").addEventListener("change", showModel);
showModel();
