// The token map: says how a token's score came about when it is pointed at, tapped, or reached by the arrow keys.
"use strict";
for (const map of document.querySelectorAll(".tokens")) {
  const details = JSON.parse(map.dataset.details);
  const readout = map.nextElementSibling;
  const tokens = [...map.querySelectorAll("[role=option]")];
  let active = -1;

  const describe = (token) => {
    const place = Number(token.dataset.place);
    const parts = [`“${token.textContent}”`, `position ${place} (of ${details.kinds.length} tokens)`, details.kinds[place]];
    details.names.forEach((name, column) => {
      const value = details.columns[column][place];
      const rank = column === 0 ? ` (rank ${details.ranks[place]})` : "";
      parts.push(`${name} ${value === null ? "none" : Number(value.toPrecision(4))}${rank}`);
    });
    parts.push(`selected in ${details.selected[place]} of ${details.visits} visit(s)`);
    return parts.join(" · ");
  };
  const activate = (index, scroll) => {
    if (index < 0 || index >= tokens.length) return;
    if (active >= 0) {
      tokens[active].classList.remove("active");
      tokens[active].removeAttribute("id");
    }
    active = index;
    const token = tokens[active];
    token.classList.add("active");
    // the listbox keeps the focus and names the token that it is at
    token.id = "active-token";
    map.setAttribute("aria-activedescendant", token.id);
    readout.textContent = describe(token);
    if (scroll) token.scrollIntoView({ block: "nearest" });
  };
  const steps = { ArrowRight: 1, ArrowDown: 10, ArrowLeft: -1, ArrowUp: -10 };
  map.addEventListener("keydown", (event) => {
    let target;
    if (event.key in steps) target = Math.min(Math.max(active + steps[event.key], 0), tokens.length - 1);
    else if (event.key === "Home") target = 0;
    else if (event.key === "End") target = tokens.length - 1;
    else return;
    event.preventDefault();
    activate(target, true);
  });
  map.addEventListener("focus", () => activate(Math.max(active, 0), true));
  for (const kind of ["mouseover", "click"]) {
    map.addEventListener(kind, (event) => activate(tokens.indexOf(event.target), false));
  }
}
