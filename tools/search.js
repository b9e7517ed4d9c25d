// The search of the website, in place of Fuse, whose fuzzy search finds little for several words: entries that hold
// every word of a query; names and headings count more than text, whole words more than parts.
window.Fuse = class {
  constructor(entries) {
    this.entries = entries;
  }

  search(query, { limit }) {
    const words = query.trim().split(/\s+/).map((word) => new Word(word));
    const scored = this.entries.map((item) => ({ item, scores: words.map((word) => word.score(item)) })).filter(({ scores }) => scores.every(Boolean));
    const sum = ({ scores }) => scores.reduce((total, score) => total + score, 0);
    return scored.sort((a, b) => sum(b) - sum(a)).slice(0, limit);
  }
};

class Word {
  constructor(word) {
    const pattern = word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");
    this.matches = [new RegExp(pattern, "i"), new RegExp(`(?<!\\w)${pattern}(?!\\w)`, "i"), new RegExp(`^${pattern}$`, "i"), new RegExp(`^${pattern}$`)];
  }

  rate(text) {
    return this.matches.filter((match) => match.test(text)).length;
  }

  score({ title, section, text }) {
    return 8 * this.rate(section) + 4 * this.rate(title) + this.rate(text);
  }
}
