// What scrolls sideways can be reached by the keyboard: code, tables and formulas that are wider than their place.
const WIDE = "pre, .table-wrapper, .formula, .cell_output";

function markScrolling() {
  document.querySelectorAll(WIDE).forEach((part) => {
    if (part.scrollWidth > part.clientWidth) part.tabIndex = 0;
    else part.removeAttribute("tabindex");
  });
}

addEventListener("load", markScrolling);
addEventListener("resize", markScrolling);
