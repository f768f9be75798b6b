"""Words that no training caption holds, and the emoji that each means: from the English keywords of Unicode CLDR, as the npm package `emojibase-data`
has them.

    npm pack emojibase-data@17.0.0 && tar xzf emojibase-data-17.0.0.tgz
    python data/keywords/make.py package/en/data.json

A keyword is kept if it belongs to one base alone, among all emoji of Unicode; if that base has a training image; and if none of its words, in
singular or plural, occurs in any training caption. Every second base is `dev`, to choose settings on; the others are `test`, to be run once."""
import argparse, json, random, re
from collections import defaultdict
from pathlib import Path
from v2flow_nbdev.base.files import write_json
from v2flow_nbdev.data.sources import emoji

def singular(word):
    "Plural → singular, roughly: it has to hide too many words rather than too few"
    for ending, instead in (('ies', 'y'), ('ves', 'f'), ('ches', 'ch'), ('shes', 'sh'), ('sses', 'ss'), ('xes', 'x'), ('oes', 'o'), ('s', '')):
        if word.endswith(ending) and len(word) > len(ending) + 1: return word[:-len(ending)] + instead
    return word

def words(text): return {f for w in re.findall(r"[^\W_]+", text.lower()) for f in (w, singular(w))}

def plain(mark): return mark.replace('\ufe0f', '')  # with or without the sign for "in colour"

def keywords(entries):
    "[{keyword, base}] of `entries`, as emojibase has them"
    train, base_of = emoji('train'), {plain(e['emoji']): e['base'] for e in emoji('all')}
    trained = {e['base'] for e in train}
    known = {w for e in train for c in e['captions'] for w in words(c)}
    owners = defaultdict(set)
    for e in entries:
        base = base_of.get(plain(e['emoji']), e['label'])
        for tag in {*e.get('tags', ()), e['label']}: owners[tag.lower()].add(base)
    found = [dict(keyword=k, base=b) for k, (b, *more) in sorted((k, [*v]) for k,v in owners.items())
             if not more and b in trained and re.search(r'[a-z]', k) and not words(k) & known]
    return found

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path, help='package/en/data.json')
    args = parser.parse_args()
    found = keywords(json.loads(args.data.read_text(encoding='utf-8')))
    bases = sorted({f['base'] for f in found})
    random.Random(0).shuffle(bases)
    half = {b: ('dev', 'test')[i % 2] for i,b in enumerate(bases)}
    splits = {s: [f for f in found if half[f['base']] == s] for s in ('dev', 'test')}
    write_json(Path(__file__).with_name('keywords.json'), splits)
    for s, part in splits.items(): print(f"{s}: {len(part)} keywords of {len({f['base'] for f in part})} bases")

if __name__ == '__main__': main()
