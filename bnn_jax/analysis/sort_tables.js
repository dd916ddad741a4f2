// A click on a heading of a table of the class "sortable" sorts its rows, numbers as numbers.
function cellValue(row, column) {
  const text = row.cells[column].textContent.trim().replace(/[\s,]/g, "");
  const number = parseFloat(text.replace("−", "-"));
  return Number.isNaN(number) ? text.toLowerCase() : number;
}

function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1;
}

function makeSortable(table) {
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    const button = document.createElement("button");
    button.append(...heading.childNodes);
    heading.append(button);
    heading.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const upwards = heading.getAttribute("aria-sort") !== "ascending";
      headings.forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", upwards ? "ascending" : "descending");
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => compare(cellValue(a, column), cellValue(b, column)));
      body.append(...(upwards ? rows : rows.reverse()));
    });
  });
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("table.sortable").forEach(makeSortable));
