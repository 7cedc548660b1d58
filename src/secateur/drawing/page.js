// What a page says of a shape under the pointer, and which rows hang together with the one that is looked at.
(function () {
  "use strict";
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  tip.setAttribute("aria-hidden", "true"); // every word of it stands in a table or a row of the page
  document.body.appendChild(tip);

  function show(event) {
    const shape = event.target.closest("[data-tip]");
    tip.hidden = !shape;
    if (!shape) return;
    tip.textContent = shape.getAttribute("data-tip");
    const width = Math.min(tip.offsetWidth, window.innerWidth - 16);
    tip.style.left = Math.max(8, Math.min(event.clientX + 12, window.innerWidth - width - 8)) + "px";
    const above = event.clientY + 28 + tip.offsetHeight > window.innerHeight;
    tip.style.top = (above ? event.clientY - tip.offsetHeight - 10 : event.clientY + 18) + "px";
  }

  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("keydown", function () { tip.hidden = true; });
  document.addEventListener("scroll", function () { tip.hidden = true; }, true);

  const networks = document.querySelectorAll(".network");
  function light(row) {
    const wanted = row ? row.dataset.groups.split(" ") : [];
    networks.forEach(function (network) {
      network.classList.toggle("looked-at", wanted.length > 0);
      network.querySelectorAll(":scope > li").forEach(function (other) {
        const groups = (other.dataset.groups || "").split(" ");
        other.classList.toggle("lit", groups.some(function (one) { return wanted.includes(one); }));
      });
      network.querySelectorAll("[data-group]").forEach(function (line) {
        line.classList.toggle("lit", wanted.includes(line.dataset.group));
      });
    });
  }
  ["pointerover", "focusin"].forEach(function (kind) {
    document.addEventListener(kind, function (event) { light(event.target.closest(".network > li[data-groups]")); });
  });
})();
