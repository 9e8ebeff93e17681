"use strict";

const $ = id => document.getElementById(id);
const facts = JSON.parse($("facts").textContent);

let format = null;  // the chosen tab: chat, a translation, or text
let messages = [];  // of the conversation
let exchanges = [];  // what Save writes for the other tabs
let running = null;  // stops the answer that is being made

// Model output is shown only through textContent, never as markup.
function add(parent, tag, className, text) {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  parent.append(element);
  return element;
}

function choose(next) {
  if (running) return;
  if (format && (format.kind === "chat" || next.kind === "chat")) clear();
  format = next;
  for (const tab of $("formats").children) {
    tab.setAttribute("aria-selected", tab.dataset.name === format.name);
  }
  $("empty").textContent = format.about;
  $("text").placeholder = format.hint;
  for (const element of document.querySelectorAll(".sampling")) {
    element.hidden = format.kind === "translate";
  }
  $("text").focus();
}

function clear() {
  messages = [];
  exchanges = [];
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  updateControls();
}

function updateControls() {
  const busy = Boolean(running);
  $("empty").hidden = Boolean(document.querySelector(".turn"));
  if (busy) $("go").textContent = "Stop";
  else $("go").textContent = format && format.kind === "translate" ? "Translate" : "Send";
  for (const tab of $("formats").children) tab.disabled = busy;
  $("clear").disabled = busy;
  $("save").disabled = busy || !exchanges.length;
}

function fitHeight() {
  $("text").style.height = "auto";
  $("text").style.height = $("text").scrollHeight + "px";
}

function makeQuestion(text, seed) {
  const question = {format: format.name, seed, new: Number($("new").value)};
  if (format.kind !== "translate") {
    question.temperature = Number($("temperature").value);
    question.top_p = Number($("top_p").value);
  }
  if (format.kind !== "chat") {
    question.text = text;
    return question;
  }
  question.messages = [...messages, {role: "user", content: text}];
  const size = () => new Blob([JSON.stringify(question)]).size;
  while (question.messages.length > 2 && size() > facts.max_bytes) question.messages.splice(0, 2);
  return question;
}

// Reads the lines of an answer, a JSON object each, as they arrive.
async function readAnswer(question, takePart) {
  const answer = await fetch("answer", {
    method: "POST", signal: running.signal, body: JSON.stringify(question),
    headers: {"Content-Type": "application/json", "X-Token": facts.token}});
  if (!answer.ok) throw new Error(await answer.text());
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) takePart(JSON.parse(line));
  }
}

async function ask(text) {
  const chosen = $("seed").value;
  const seed = chosen === "" ? Math.floor(Math.random() * 2 ** 31) : Number(chosen);
  const question = makeQuestion(text, seed);
  const turn = add($("log"), "section", "turn " + format.kind, "");
  const box = format.kind === "text" ? add(turn, "div", "box-text", "") : turn;
  add(box, "p", "message prompt", text);
  const shown = add(box, "p", "message answer busy", "");
  const foot = add(turn, "p", "foot", "");
  const main = document.querySelector("main");
  turn.scrollIntoView({block: "nearest"});
  const notes = [];
  if (format.kind === "chat" && question.messages.length <= messages.length) {
    notes.push(facts.truncated);
  }
  let end = null;
  const takePart = part => {
    const atBottom = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
    if (part.text) shown.append(part.text);  // a text node
    if (part.note) notes.push(part.note);
    if (part.error) throw new Error(part.error);
    if (part.end) end = part;
    if (atBottom) main.scrollTop = main.scrollHeight;
  };
  running = new AbortController();
  updateControls();
  try {
    await readAnswer(question, takePart);
    if (!end) throw new Error("the answer is incomplete; is sample.py still running?");
    notes.push(`${end.tokens} tokens in ${end.seconds} s`);
    if (format.kind !== "translate") notes.push(`seed ${seed}`);
    if (end.end === "length") notes.push("the maximum number of tokens");
  } catch (error) {
    const stopped = error.name === "AbortError";
    foot.classList.toggle("bad", !stopped);
    if (stopped) notes.push("stopped");
    else if (error instanceof TypeError) notes.push("no answer; is sample.py still running?");
    else notes.push(error.message);
  }
  running = null;
  shown.classList.remove("busy");
  foot.textContent = notes.join(" · ");
  const answer = shown.textContent;
  if (answer || end) {
    messages.push({role: "user", content: text}, {role: "assistant", content: answer.trim()});
    exchanges.push({way: format.name, prompt: text, text: answer});
  } else if (!$("text").value) {  // after a fault, the text can be sent again
    $("text").value = text;
    fitHeight();
  }
  turn.scrollIntoView({block: "end"});
  updateControls();
}

$("form").addEventListener("submit", event => {
  event.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const text = $("text").value;
  if (!text.trim() && format.kind !== "text") return;
  $("text").value = "";
  fitHeight();
  ask(text);
});

$("text").addEventListener("input", fitHeight);

$("text").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  if (matchMedia("(pointer: coarse)").matches) return;  // on a phone, Enter is a new line
  event.preventDefault();
  if (!running) $("form").requestSubmit();
});

$("settings").addEventListener("click", () => {
  $("more").hidden = !$("more").hidden;
  $("settings").setAttribute("aria-expanded", !$("more").hidden);
});

$("clear").addEventListener("click", clear);

$("save").addEventListener("click", () => {  // a conversation as `prepare.py chat` reads it
  const chat = format.kind === "chat";
  const rows = chat ? [{messages}] : exchanges;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob(rows.map(row => JSON.stringify(row) + "\n")));
  link.download = chat ? "talk.jsonl" : "answers.jsonl";
  link.click();
});

document.title = facts.title;
$("title").textContent = facts.title;
for (const each of facts.formats) {
  const tab = add($("formats"), "button", "", each.label);
  tab.type = "button";
  tab.dataset.name = each.name;
  tab.setAttribute("role", "tab");
  tab.addEventListener("click", () => {
    choose(each);
    updateControls();
  });
}
$("formats").hidden = facts.formats.length < 2;
for (const name of ["new", "temperature", "top_p"]) $(name).value = facts[name];
$("new").max = facts.new;
choose(facts.formats[0]);
updateControls();
