// The order of search results. Without it, pages that hold a word are listed by the alphabet.
// Pages that answer come first, tools of the repository last; explicit subjects of a page (chapters.SUBJECTS) stand above both.
var Scorer = {
  answers: { index: 8, how_it_works: 7, method: 6, run: 8, own_data: 8, runs: 8, glossary: 8, configuration: 6, paper: 6, commands: 4,
    "00_index": 4, "01a_annotated": 3, weights: 3, presets: 3 },
  score: ([page, , , , score, , kind]) => {
    const number = page.match(/^(\d\d)([a-z]?)_/);
    if (!number) return score + (kind === "object" ? 0 : Scorer.answers[page] || 0);
    const isTool = number[1][0] === "9" || page === "80a_scaling";
    return score - (isTool ? 6 : 0) - (number[2] && kind === "text" ? 1 : 0);
  },
  objNameMatch: 30,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
