// How Sphinx orders the results of a search. Its own rules know nothing of kinds of pages:
// a reader who asks looks for a how-to first, and for how it is built last. A section is nearer than its page.
const kinds = [[/^(howto|tutorials|index)/, 3], [/^(explanations|results)/, 1], [/^(experiments|select|changelog)/, -3]];

var Scorer = {
  score: ([page, , anchor, , score]) =>
    score + (anchor ? 1 : 0) + kinds.reduce((sum, [kind, points]) => sum + (kind.test(page) ? points : 0), 0),
  // The rest are Sphinx's own values, which a scorer has to repeat.
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: {0: 15, 1: 5, 2: -5},
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
