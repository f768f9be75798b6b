"""English for a small language model, collected from what is installed: no text lies in the repository.

    python data/emoji/corpus.py [--out runs/emoji-corpus.txt] [--prose 60000]

writes one text a line: captions of the digits and of 4,000 drawings of shapes in many wordings, and prose from docstrings of the installed
packages and the standard library, and from Python's own manual (`pydoc_data.topics`). The captions of the emoji are not in it:
`v2flow pretrain-llm` takes them from the data set, the training split alone. Other packages give another corpus of the same kind."""
import argparse, ast, hashlib, re, sys, sysconfig
from pathlib import Path

def sentences(text):
    "Paragraphs of plain English: no code, no lists of arguments, 8 to 90 words"
    for paragraph in re.split(r'\n\s*\n', text):
        line = ' '.join(paragraph.split())
        words = re.findall(r"[A-Za-z][A-Za-z'’-]*", line)
        plain = sum(len(w) for w in words) + line.count(' ') + line.count(',') + line.count('.')
        if 8 <= len(line.split()) <= 90 and line[0].isupper() and line[-1] in '.!?' and plain > 0.93*len(line) and '`' not in line: yield line

def docstrings(folder):
    "Every docstring below a folder; nothing is imported"
    for path in sorted(folder.rglob('*.py')):
        if {'tests', 'test', 'testing', 'idlelib', 'lib2to3'} & set(path.parts): continue
        try: tree = ast.parse(path.read_text(encoding='utf-8'))
        except (SyntaxError, ValueError, OSError, RecursionError): continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)): yield ast.get_docstring(node) or ''

def prose(n):
    "n paragraphs, drawn by the hash of their text, so that the same installation gives the same corpus"
    from pydoc_data.topics import topics
    folders = {Path(sysconfig.get_paths()[k]) for k in ('stdlib', 'purelib', 'platlib')}
    found = {line for text in topics.values() for line in sentences(text)}
    for folder in sorted(folders): found.update(line for text in docstrings(folder) for line in sentences(text))
    return sorted(found, key=lambda line: hashlib.sha256(line.encode()).digest())[:n]

def captions():
    "What the other data sets say of their pictures"
    from v2flow_nbdev.data.sources import digit_captions
    from v2flow_nbdev.data.shapes import shapes
    drawn = shapes('train', 4000, 32)
    return sorted({c for d in range(10) for c in digit_captions(d)} | {c for i in range(len(drawn)) for c in drawn[i]['captions'][:3]})

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('runs/emoji-corpus.txt'))
    parser.add_argument('--prose', type=int, default=60_000, help='paragraphs of prose at most')
    args = parser.parse_args()
    texts = captions() + prose(args.prose)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text('\n'.join(texts) + '\n', encoding='utf-8')
    print(f'{args.out}: {len(texts):,} texts, {sum(len(t.split()) for t in texts):,} words', file=sys.stderr)

if __name__ == '__main__': main()
