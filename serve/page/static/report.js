// A draft as text: sentences that show their evidence, findings with their probabilities, and where it all comes from.

// The same colours as in the server's overlays (ssacl/inference/film.py).
const COLOURS = ["#ff9f1c", "#2ec4b6", "#ff5c93", "#8ac926", "#4cc9f0", "#c77dff", "#ffd166", "#f4845f", "#90be6d", "#b8c0ff"];
const STATUS = { present: "present", absent: "absent", uncertain: "uncertain", unmentioned: "no finding named" };

export const colourOf = (index) => COLOURS[index % COLOURS.length];
const percent = (value) => `${Math.round(100 * value)} %`;
const length = (value) => `${100 * value}%`;

/** An element with properties and children; text never becomes markup. */
export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

/** Where a sentence's box lies, in words, for those who do not see the film. */
export function placeInWords(sentence, draft) {
  const { box } = sentence;
  if (!box) return "evidence all over the film";
  const x = (box.x0 + box.x1) / 2 / draft.image_width_px;
  const y = (box.y0 + box.y1) / 2 / draft.image_height_px;
  const row = y < 1 / 3 ? "top" : y > 2 / 3 ? "bottom" : "middle";
  const column = x < 0.4 ? "left" : x > 0.6 ? "right" : "centre";
  return `evidence at the ${row} ${column} of the picture`;
}

/** Fill the list of sentences. `onLook(index | null)`: the sentence whose evidence is asked for, by mouse, touch or keys. */
export function showSentences(list, draft, onLook) {
  let kept = null;
  let isOver = null;
  let hasFocus = null;
  const buttons = [];
  const tell = () => {
    const shown = isOver ?? hasFocus ?? kept;
    buttons.forEach((button, index) => {
      button.classList.toggle("shown", index === shown);
      button.setAttribute("aria-pressed", String(index === kept));
    });
    onLook(shown);
  };
  draft.sentences.forEach((sentence, index) => {
    const button = sentenceButton(sentence, index, draft);
    button.addEventListener("pointerenter", (event) => {
      if (event.pointerType !== "touch") isOver = index;
      tell();
    });
    button.addEventListener("pointerleave", () => {
      isOver = null;
      tell();
    });
    // Only focus by keys: a tap that keeps a sentence, and another that lets it go, must not leave its evidence behind.
    button.addEventListener("focus", () => {
      if (button.matches(":focus-visible")) hasFocus = index;
      tell();
    });
    button.addEventListener("blur", () => {
      hasFocus = null;
      tell();
    });
    button.addEventListener("click", () => {
      kept = kept === index ? null : index;
      tell();
    });
    button.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
      if (step) {
        event.preventDefault();
        buttons[Math.min(Math.max(index + step, 0), buttons.length - 1)].focus();
      }
      if (event.key === "Escape") {
        kept = isOver = hasFocus = null;
        tell();
      }
    });
    buttons.push(button);
  });
  list.replaceChildren(...buttons.map((button) => element("li", {}, button)));
  if (!buttons.length) list.replaceChildren(element("li", { className: "note", textContent: "The model wrote no sentence." }));
}

function sentenceButton(sentence, index, draft) {
  const said = sentence.finding ? `${sentence.finding}: ${STATUS[sentence.status] ?? sentence.status}` : STATUS.unmentioned;
  const meter = element("span", { className: "meter", ariaHidden: "true" }, element("span"));
  meter.firstChild.style.width = length(sentence.confidence);
  const button = element(
    "button",
    { type: "button", className: `sentence ${sentence.status}` },
    element("span", { className: "number", textContent: String(index + 1), ariaHidden: "true" }),
    element("span", { className: "text", textContent: sentence.text }),
    element(
      "span",
      { className: "facts" },
      element("span", { className: "said", textContent: said }),
      element("span", { className: "sure" }, meter, `confidence ${percent(sentence.confidence)}`),
      element("span", { className: "unseen", textContent: `; ${placeInWords(sentence, draft)}` }),
    ),
  );
  button.style.setProperty("--own", colourOf(index));
  return button;
}

/** Fill the table of findings, the likeliest first. */
export function showFindings(body, findings) {
  const rows = [...findings].sort((a, b) => b.probability - a.probability).map((finding) => {
    const bar = element("span", { className: "bar", ariaHidden: "true" }, element("span", { className: "fill" }), element("span", { className: "tick" }));
    bar.children[0].style.width = length(finding.probability);
    bar.children[1].style.left = length(finding.threshold);
    const word = finding.present ? "above" : "below";
    return element(
      "tr",
      { className: finding.present ? "present" : "" },
      element("th", { scope: "row", textContent: finding.name }),
      element("td", {}, bar, element("span", { className: "unseen", textContent: `${word} its threshold of ${percent(finding.threshold)}` })),
      element("td", { className: "figure", textContent: percent(finding.probability) }),
    );
  });
  body.replaceChildren(...rows);
}

/** Fill the facts about a draft. */
export function showAbout(list, draft, at) {
  const facts = [
    ["Status", `${draft.status}, unverified`],
    ["Model", draft.model_version],
    ["Made", at.toLocaleTimeString()],
    ["Film", `${draft.image_width_px} × ${draft.image_height_px} px, content ${draft.image_ref.slice(0, 12)}`],
    ["Request", draft.request_id],
    ...draft.unused.map((item) => [`Image ${item.index + 1}`, `not read: ${item.detail}`]),
    ["Note", draft.disclaimer],
  ];
  list.replaceChildren(...facts.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]));
}
