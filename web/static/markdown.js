"use strict";
// Draws what a model writes: marked reads the Markdown, DOMPurify lets only harmless elements pass.
// What is HTML in an answer stays text, and nothing is loaded from anywhere.

const HARMLESS = {
  ALLOWED_TAGS: ("p br hr h1 h2 h3 h4 h5 h6 strong em del ul ol li blockquote pre code a span "
    + "table thead tbody tr th td").split(" "),
  ALLOWED_ATTR: ["href", "start", "align", "class"],
  ALLOWED_URI_REGEXP: /^(https?:|mailto:)/i,
  ADD_URI_SAFE_ATTR: ["start", "align"],  // they hold no address
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escaped = text => text.replace(/[&<>"']/g, one => `&#${one.charCodeAt(0)};`);

// TeX would lose its backslashes and underscores as Markdown, so it is kept as it is written:
// $$ and \[ on lines of their own, \( and $ within a line (but "$5 and $6" is no formula).
const DISPLAYED_TEX = String.raw`\$\$[^]{1,4000}?\$\$|\\\[[^]{1,4000}?\\\]`;
const INLINE_TEX = String.raw`\\\([^]{1,1000}?\\\)|\$(?!\s)[^$\n]{0,500}?[^$\s]\$(?!\d)`;

function tex(level, pattern, start, tag) {
  const type = level + "Tex";
  return {
    name: type,
    level,
    start,
    tokenizer(text) {
      const found = pattern.exec(text);
      if (found) return { type, raw: found[0] };
    },
    renderer: token => `<${tag} class="verbatim">${escaped(token.raw.trim())}</${tag}>`,
  };
}

function nextDisplayedTex(text) {
  const found = /\n(?=\$\$|\\\[)/.exec(text);
  if (found) return found.index + 1;
}

const blockTex = tex(
  "block", new RegExp(`^(?:${DISPLAYED_TEX})[ \\t]*(?:\\n|$)`), nextDisplayedTex, "p");
const inlineTex = tex(
  "inline", new RegExp(`^(?:${DISPLAYED_TEX}|${INLINE_TEX})`),
  text => /\$|\\[([]/.exec(text)?.index, "span");

const reader = new marked.Marked({
  breaks: true,  // a line end of the model's stays one
  extensions: [blockTex, inlineTex],
  tokenizer: { html() {}, tag() {} },  // HTML is text like any other
  renderer: {
    checkbox: ({ checked }) => checked ? "☑ " : "☐ ",
    image: ({ href, text }) => escaped(`${text} (${href})`),
    // Where a link leads is shown: its text may say something else.
    link({ href, text, tokens }) {
      const shown = text === href ? "" : ` (${escaped(href)})`;
      return `<a href="${escaped(href)}">${this.parser.parseInline(tokens)}</a>${shown}`;
    },
  },
});

// Draws `text` in `element`, which belongs to it alone. A text that takes long to draw is drawn less
// often, until it is finished: some texts take marked a second.
function drawMarkdown(element, text, label, finished) {
  const begun = performance.now();
  if (!finished && begun < element.nextDrawing) return;
  try {
    drawBlocks(element, text, label);
  } catch {  // too deeply nested, say
    element.textContent = text;
  }
  const ended = performance.now();
  element.nextDrawing = ended + 4 * (ended - begun);
}

// Only the blocks that have changed are new, so that what one selects in the others stays selected.
function drawBlocks(element, text, label) {
  const blocks = reader.lexer(text).filter(token => token.type !== "space" && token.type !== "def");
  if (!element.children.length) element.textContent = "";
  blocks.forEach((token, number) => {
    const old = element.children[number];
    const html = reader.parser([token]).trim();
    if (old?.html === html) return;
    const block = document.createElement("div");
    block.html = html;
    block.append(DOMPurify.sanitize(html, HARMLESS));
    for (const link of block.querySelectorAll("a")) {
      link.target = "_blank";
      link.rel = "noopener noreferrer";
    }
    for (const code of block.querySelectorAll("pre")) {
      const box = document.createElement("div");
      box.className = "code";
      code.replaceWith(box);
      box.append(copyButton(code, label), code);
    }
    if (old) old.replaceWith(block); else element.append(block);
  });
  while (element.children.length > blocks.length) element.lastChild.remove();
}

function copyButton(code, label) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy";
  button.title = label;
  button.setAttribute("aria-label", label);
  button.addEventListener("click", async () => {
    await copy(code);
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), 1500);
  });
  return button;
}

// Over plain HTTP from another machine, browsers have no navigator.clipboard.
async function copy(element) {
  if (navigator.clipboard) return navigator.clipboard.writeText(element.textContent);
  getSelection().selectAllChildren(element);
  document.execCommand("copy");
}
