// A click on a heading of a table of the class "sortable" sorts its rows, numbers as numbers; cells without a value
// stand last.
function cellValue(row, column) {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text.replace(/[\s,]/g, "").replace("−", "-"));
  return Number.isNaN(number) ? text.toLowerCase() : number;
}

function isMissing(value) {
  return ["", "-", "–", "—"].includes(value);
}

function compare(a, b) {
  if (typeof a === typeof b) return a < b ? -1 : a > b ? 1 : 0;
  return typeof a === "number" ? -1 : 1;
}

function sorted(rows, column, upwards) {
  const keyed = [...rows].map((row) => ({ row, value: cellValue(row, column) }));
  keyed.sort((a, b) => {
    const [noA, noB] = [isMissing(a.value), isMissing(b.value)];
    return noA || noB ? noA - noB : (upwards ? 1 : -1) * compare(a.value, b.value);
  });
  return keyed.map(({ row }) => row);
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
      body.append(...sorted(body.rows, column, upwards));
    });
  });
}

document.addEventListener("DOMContentLoaded", () => document.querySelectorAll("table.sortable").forEach(makeSortable));
