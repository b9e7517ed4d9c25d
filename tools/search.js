// The search of the website, in place of Fuse, whose fuzzy search finds little for several words. A word stands for
// itself, for its synonyms, and for the words of the pages that are closest to it if hardly any page has it. Entries
// that hold most words of a query come first; names and headings count more than text, whole words more than parts.
const UNSPOKEN = new Set("a about an and are as at be by can cannot could do does for from get have how i in into is it make many me my of on or should the there this to use using want was what when where which who why will with without you your".split(" "));
const ENDINGS = /(?:isations?|izations?|ations?|ments?|ings?|ers?|ors?|ed|es|s|e)$/;
const RARE = 12;  // entries with a word: fewer, and it may be a slip of the finger
const WEIGHTS = { word: 1.1, spelling: 1, stem: 0.6, synonym: 0.6, part: 0.4, guess: 0.4, second_guess: 0.2 };

window.Fuse = class {
  constructor(entries) {
    this.entries = entries.map((item) => ({ item, fields: [item.section, item.title, item.text].map((text) => ({ text, low: text.toLowerCase() })), factor: importance(item.href) }));
  }

  search(query, { limit }) {
    const terms = split(query).map((word) => this.term(word));
    const scored = this.entries.map((entry) => {
      const scores = terms.map((term) => term.rarity * Math.sqrt(entry.factor * term.score(entry)));
      return { item: entry.item, found: scores.filter(Boolean).length, score: scores.reduce((sum, score) => sum + score, 0) };
    });
    const enough = Math.ceil(terms.length / 2);
    return scored.filter(({ found }) => found && found >= enough).sort((a, b) => b.found - a.found || b.score - a.score).slice(0, limit);
  }

  term(word) {
    const term = new Term(word);
    const count = () => this.entries.filter((entry) => term.begins(entry)).length;
    if (!count()) term.add(partsOf(word), WEIGHTS.part);
    const found = count();
    if (found < RARE) term.add(this.closest(word), found ? WEIGHTS.second_guess : WEIGHTS.guess);
    term.rarity = Math.log(2 + this.entries.length / (1 + count()));
    return term;
  }

  // The words of the pages, and in how many entries each is
  get vocabulary() {
    const counts = new Map();
    for (const { fields } of this.entries)
      for (const word of new Set(fields.flatMap(({ low }) => low.match(/[a-z][a-z0-9]{3,}/g) ?? []))) counts.set(word, (counts.get(word) ?? 0) + 1);
    Object.defineProperty(this, "vocabulary", { value: counts });
    return counts;
  }

  closest(word) {
    const allowed = word.length < 4 ? 0 : word.length < 7 ? 1 : 2;
    const alike = (other) => other[0] === word[0]?.toLowerCase() || other[0] === word[1]?.toLowerCase();  // few mistakes are in the first letter
    const near = [...this.vocabulary].filter(([other, count]) => count > 2 && alike(other)).map(([other, count]) => [distance(word.toLowerCase(), other, allowed), -count, other]);
    const best = near.filter(([edits]) => edits <= allowed).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    return best.slice(0, 2).map(([, , other]) => other);
  }
};

// Pages that explain come before pages that list, and those before what is only of interest inside.
function importance(href) {
  if (/^(index|gallery|tutorials|commands|explanations\/(?!architecture))/.test(href)) return 1.5;
  return /^(changelog|api\/kernels|explanations\/architecture)/.test(href) ? 0.5 : 1;
}

// The words of a query; words that belong together stay together, and those that say nothing are left out.
function split(query) {
  const said = query.trim().split(/\s+/).map((word) => word.replace(/[?!,;:]+$/, "")).filter(Boolean);
  const phrases = SYNONYMS.flat().filter((phrase) => /\s/.test(phrase)).sort((a, b) => b.length - a.length);
  const found = [];
  let rest = ` ${said.join(" ").toLowerCase()} `;
  for (const phrase of phrases)
    if (rest.includes(` ${phrase} `)) {
      found.push(phrase);
      rest = rest.replace(` ${phrase} `, "  ");
    }
  const telling = said.filter((word) => rest.includes(` ${word.toLowerCase()} `) && !UNSPOKEN.has(word.toLowerCase()));
  return found.length || telling.length ? [...found, ...telling] : said;
}

const british = (word) => word.replace(/iz(?=[aei])/, "is").replace(/olor/, "olour").replace(/enter$/, "entre").replace(/gray/, "grey");
const partsOf = (word) => word.toLowerCase().split(/[-_/\s]/).filter((part) => part.length > 2);

function stemOf(word) {
  const stem = word.replace(word.length > 4 ? ENDINGS : /s$/, "");
  return stem.length > 2 ? stem : word;
}

// A word of a query, and what else stands for it
class Term {
  constructor(word) {
    const low = word.toLowerCase(), others = SYNONYMS.filter((line) => line.includes(low)).flat();
    this.word = word;
    this.texts = [];
    this.add([low], WEIGHTS.word);
    this.add([british(low)], WEIGHTS.spelling);
    this.add([stemOf(low)], WEIGHTS.stem);
    this.add(others, WEIGHTS.synonym);
    this.add(others.map(stemOf), WEIGHTS.synonym * WEIGHTS.stem);
  }

  add(texts, weight) {
    for (const text of texts) {
      if (this.texts.some((known) => known.text === text)) continue;
      const pattern = text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
      this.texts.push({ text, weight, start: new RegExp(`(?<![a-z0-9])${pattern}`), whole: new RegExp(`(?<!\\w)${pattern}(?!\\w)`) });
    }
  }

  // Whether a word of an entry begins with the term
  begins({ fields }) {
    return fields.some(({ low }) => this.texts.some(({ text, start }) => low.includes(text) && start.test(low)));
  }

  // Short words stand at the beginning of a word; others may stand within one.
  rate({ text, low }) {
    let best = 0;
    for (const { text: known, weight, start, whole } of this.texts) {
      if (!low.includes(known)) continue;
      const begins = start.test(low);
      if (begins || known.length > 3) best = Math.max(best, weight * (0.5 + 0.5 * begins + whole.test(low) + (low === known) + (text === this.word)));
    }
    return best;
  }

  score({ fields: [section, title, text] }) {
    return 8 * this.rate(section) + 4 * this.rate(title) + this.rate(text);
  }
}

// How many letters to add, drop, change or swap with their neighbours, as far as it is allowed (Damerau 1964)
function distance(a, b, allowed) {
  if (Math.abs(a.length - b.length) > allowed) return Infinity;
  let before = [], row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] !== b[j - 1]));
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) next[j] = Math.min(next[j], before[j - 2] + 1);
    }
    [before, row] = [row, next];
  }
  return row[b.length];
}
