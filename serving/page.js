"use strict";
const $ = id => document.getElementById(id), facts = JSON.parse($("facts").textContent);
let way = null, said = [], kept = [], running = null;  // messages, exchanges, what can stop the answer

function put(parent, tag, kind, text) {  // everything that is shown goes through textContent
  const x = document.createElement(tag);
  x.className = kind; x.textContent = text; parent.append(x);
  return x;
}
function choose(next) {
  if (running) return;
  if (way && (way.kind === "chat" || next.kind === "chat")) clear();
  way = next;
  for (const x of $("ways").children) x.setAttribute("aria-selected", x.dataset.name === way.name);
  $("empty").textContent = way.about;
  $("text").placeholder = way.hint;
  for (const x of document.querySelectorAll(".draws")) x.hidden = way.kind === "translate";
  $("text").focus();
}
function clear() {
  said = []; kept = [];
  for (const x of document.querySelectorAll(".turn")) x.remove();
  change();
}
function change() {  // what the controls look like now
  $("empty").hidden = Boolean(document.querySelector(".turn"));
  $("go").textContent = running ? "Stop" : way && way.kind === "translate" ? "Translate" : "Send";
  for (const x of $("ways").children) x.disabled = Boolean(running);
  $("clear").disabled = Boolean(running); $("save").disabled = Boolean(running) || !kept.length;
}
function grow() {
  $("text").style.height = "auto";
  $("text").style.height = $("text").scrollHeight + "px";
}
async function ask(text) {
  const seed = $("seed").value === "" ? Math.floor(Math.random() * 2 ** 31) : Number($("seed").value);
  const question = {way: way.name, seed, new: Number($("new").value)};
  if (way.kind !== "translate") Object.assign(question,
    {temperature: Number($("temperature").value), top_p: Number($("top_p").value)});
  if (way.kind === "chat") question.messages = [...said, {role: "user", content: text}];
  else question.text = text;
  while (way.kind === "chat" && question.messages.length > 2 &&
    new Blob([JSON.stringify(question)]).size > facts.most) question.messages.splice(0, 2);
  const turn = put($("log"), "section", "turn " + way.kind, "");
  const both = way.kind === "text" ? put(turn, "div", "both", "") : turn;
  put(both, "p", "said asked", text);
  const shown = put(both, "p", "said answer busy", ""), foot = put(turn, "p", "foot", "");
  const main = document.querySelector("main");
  turn.scrollIntoView({block: "nearest"});
  let end = null;
  const notes = way.kind === "chat" && question.messages.length <= said.length ? [facts.outgrown] : [];
  const take = part => {
    const near = main.scrollHeight - main.scrollTop - main.clientHeight < 80;
    if (part.text) shown.append(part.text);  // a text node
    if (part.note) notes.push(part.note);
    if (part.error) throw new Error(part.error);
    if (part.end) end = part;
    if (near) main.scrollTop = main.scrollHeight;
  };
  running = new AbortController(); change();
  try {
    const answer = await fetch("answer", {method: "POST", signal: running.signal, body: JSON.stringify(question),
      headers: {"Content-Type": "application/json", "X-Token": facts.token}});
    if (!answer.ok) throw new Error(await answer.text());
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let rest = "";;) {
      const {value, done} = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      lines.forEach(line => take(JSON.parse(line)));
    }
    if (!end) throw new Error("the answer broke off; is sample.py still running?");
    notes.push(`${end.tokens} tokens in ${end.seconds} s`);
    if (way.kind !== "translate") notes.push(`seed ${seed}`);
    if (end.end === "length") notes.push("as many tokens as were asked for");
  } catch (e) {
    const stopped = e.name === "AbortError";
    foot.classList.toggle("bad", !stopped);
    notes.push(stopped ? "stopped" : e instanceof TypeError ? "no answer; is sample.py still running?" : e.message);
  }
  running = null;
  shown.classList.remove("busy");
  foot.textContent = notes.join(" · ");
  const answer = shown.textContent;
  if (answer || end) {
    said.push({role: "user", content: text}, {role: "assistant", content: answer.trim()});
    kept.push({way: way.name, prompt: text, text: answer});
  } else if (!$("text").value) { $("text").value = text; grow(); }  // nothing is lost to a fault
  turn.scrollIntoView({block: "end"});
  change();
}
$("form").addEventListener("submit", e => {
  e.preventDefault();
  if (running) return running.abort();
  const text = $("text").value;
  if (!text.trim() && way.kind !== "text") return;
  $("text").value = ""; grow();
  ask(text);
});
$("text").addEventListener("input", grow);
$("text").addEventListener("keydown", e => {
  if (e.key !== "Enter" || e.shiftKey || e.isComposing || matchMedia("(pointer: coarse)").matches) return;
  e.preventDefault();
  if (!running) $("form").requestSubmit();
});
$("settings").addEventListener("click", () => {
  $("more").hidden = !$("more").hidden;
  $("settings").setAttribute("aria-expanded", !$("more").hidden);
});
$("clear").addEventListener("click", clear);
$("save").addEventListener("click", () => {  // a conversation as `prepare.py chat` reads it
  const rows = way.kind === "chat" ? [{messages: said}] : kept;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([rows.map(x => JSON.stringify(x) + "\n").join("")]));
  link.download = way.kind === "chat" ? "talk.jsonl" : "answers.jsonl";
  link.click();
});
document.title = facts.title; $("title").textContent = facts.title;
for (const x of facts.ways) {
  const button = put($("ways"), "button", "", x.label);
  button.type = "button"; button.dataset.name = x.name; button.setAttribute("role", "tab");
  button.addEventListener("click", () => { choose(x); change(); });
}
$("ways").hidden = facts.ways.length < 2;
for (const name of ["new", "temperature", "top_p"]) $(name).value = facts[name];
$("new").max = facts.new;
choose(facts.ways[0]); change();
