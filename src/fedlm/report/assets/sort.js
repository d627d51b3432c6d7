// A click on a heading of a table.sortable sorts its rows by the cells' data-value; a second click turns the order round.
(() => {
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
    let last = -1, down = false;
    heads.forEach((head, column) => {
      head.tabIndex = 0;
      head.setAttribute("role", "button");
      const sort = () => {
        down = column === last && !down;
        last = column;
        const value = (row) => row.cells[column].dataset.value;
        const compare = (a, b) => {
          const x = value(a), y = value(b);
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);  // absent ones stay last
          const numbers = Number(x) - Number(y);
          const order = Number.isNaN(numbers) ? x.localeCompare(y) : numbers;
          return down ? -order : order;
        };
        body.append(...[...body.rows].sort(compare));
        heads.forEach((h, i) => h.setAttribute("aria-sort", i !== column ? "none" : down ? "descending" : "ascending"));
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
    });
  }
})();
