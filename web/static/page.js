"use strict";
const chinese = navigator.language.startsWith("zh");
const words = chinese ? {
  clear: "清空", send: "发送", stop: "停止", prompt: "输入问题（Shift+Enter 换行）",
  stopped: "（已停止）", broken: "回答不完整，连接断了。", none: "连接不上服务器。",
  shortened: "（对话太长，忘记了最早的一轮）", key: "这台服务器需要密钥：", talk: "对话",
  cut: "（太长，截断了）", copy: "复制",
} : {
  clear: "Clear", send: "Send", stop: "Stop", prompt: "Your question (Shift+Enter: new line)",
  stopped: "(stopped)", broken: "The answer is incomplete: the connection broke off.",
  none: "The server cannot be reached.", shortened: "(too long: the oldest turn is forgotten)",
  key: "This server wants a key:", talk: "Conversation",
  cut: "(cut off: the answer is too long)", copy: "Copy",
};
document.documentElement.lang = chinese ? "zh" : "en";
const get = id => document.getElementById(id);
const [talk, form, prompt, send, stop, clear] =
  ["talk", "form", "prompt", "send", "stop", "clear"].map(get);
for (const button of [send, stop, clear]) button.textContent = words[button.id];
prompt.placeholder = words.prompt;
prompt.setAttribute("aria-label", words.prompt);
talk.setAttribute("aria-label", words.talk);

const session = String(Math.random());  // under Ray, all turns go to the replica that knows them
let history = [];       // [question, answer] pairs, as the server takes them
let reading = null;     // the AbortController of the answer under way

// Marks that write text backwards, so that it seems to say something else.
const clean = text => text.replace(/[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "");

function show(text, kind) {
  const part = document.createElement("div");
  part.className = kind;
  part.textContent = clean(text);
  talk.append(part);
  talk.scrollTop = talk.scrollHeight;
  return part;
}

// The events of a server-sent event stream, as they come.
async function* events(response) {
  let rest = "";
  for await (const text of pieces(response.body.pipeThrough(new TextDecoderStream()))) {
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { type: "message", data: "" };
      for (const line of block.split("\n")) {
        if (line.startsWith("event: ")) event.type = line.slice(7);
        if (line.startsWith("data: ")) event.data += line.slice(6);
      }
      if (event.data) yield event;      // a comment only keeps the connection alive
    }
  }
}

async function* pieces(stream) {        // Safari cannot iterate over a stream
  const reader = stream.getReader();
  for (let part; !(part = await reader.read()).done;) yield part.value;
}

async function ask(question, controller) {
  for (;;) {
    const key = sessionStorage.getItem("key");
    const response = await fetch("stream", {
      method: "POST", signal: controller.signal, body: JSON.stringify({ prompt: question, history }),
      headers: { "Content-Type": "application/json", "x-session-id": session,
                 ...(key && { Authorization: "Bearer " + key }) },
    });
    if (response.ok) return response;
    const refusal = await response.json().catch(() => ({}));
    const detail = String(refusal.detail ?? response.statusText);
    if (response.status === 401) {
      let typed = window.prompt(words.key);
      while (typed && !/^[!-~]+$/.test(typed.trim())) typed = window.prompt(words.key);
      if (!typed) throw new Error(detail);
      sessionStorage.setItem("key", typed.trim());
    } else if (history.length && refusal.code === "context_length_exceeded") {
      history.shift();
      show(words.shortened, "note");
    } else {
      throw new Error(detail);
    }
  }
}

async function turn(question) {
  const controller = reading = new AbortController();
  busy(true);
  show(question, "user");
  const answer = show("", "assistant");
  let text = "", whole = false, cut = false, note = words.broken;
  try {
    const response = await ask(question, controller);
    for await (const event of events(response)) {
      if (event.data === "[DONE]") { whole = true; break; }
      const data = JSON.parse(event.data);
      cut = data.finish_reason === "length";
      if (event.type === "error") { note = words.broken + " " + data.detail; break; }
      const below = talk.scrollHeight - talk.scrollTop - talk.clientHeight;
      text += clean(data.text);
      drawMarkdown(answer, text, words.copy, false);
      if (below < 40) talk.scrollTop = talk.scrollHeight;  // unless one scrolled up to read
    }
  } catch (error) {
    note = error.name === "AbortError" ? words.stopped
         : text ? words.broken
         : error instanceof TypeError ? words.none : error.message;
  }
  if (reading !== controller) return;   // cleared meanwhile
  if (text) drawMarkdown(answer, text, words.copy, true);
  if (text) history.push([question, text]);
  else answer.remove();
  if (!whole || cut) show(whole ? words.cut : note, "note");
  reading = null;
  busy(false);
}

function busy(now) {
  send.hidden = now;
  stop.hidden = !now;
  if (!now) prompt.focus();
}

form.addEventListener("submit", event => {
  event.preventDefault();
  const question = prompt.value.trim();
  if (!question || reading) return;
  prompt.value = "";
  turn(question);
});
prompt.addEventListener("keydown", event => {
  // Enter also ends the choice of a character in a Chinese input method: not that one (in Safari,
  // only the code 229 tells).
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    form.requestSubmit();
  }
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape" && !event.isComposing) reading?.abort();
});
stop.addEventListener("click", () => reading?.abort());
clear.addEventListener("click", () => {
  const controller = reading;
  reading = null;
  controller?.abort();
  history = [];
  talk.replaceChildren();
  busy(false);
});
