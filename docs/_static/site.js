// A bracket before a formula and punctuation after it stay on its line: a browser may break beside every formula.
document.addEventListener("DOMContentLoaded", () => {
  for (const math of document.querySelectorAll("article span.math")) {
    const before = math.previousSibling, after = math.nextSibling, whole = document.createElement("span");
    const open = before?.nodeType === Node.TEXT_NODE ? before.data.match(/[(["]+$/)?.[0] ?? "" : "";
    const close = after?.nodeType === Node.TEXT_NODE ? after.data.match(/^[.,:;!?)\]"'-]+/)?.[0] ?? "" : "";
    if (!open && !close) continue;
    whole.style.whiteSpace = "nowrap";
    math.replaceWith(whole);
    whole.append(open, math, close);
    if (open) before.data = before.data.slice(0, -open.length);
    if (close) after.data = after.data.slice(close.length);
  }
});
