"""Does a model draw the right thing for words that no training caption holds? The exam of `nbs/evaluation/56_pretrained.ipynb`, a row for
each model.

    python -m benchmarks.words data/checkpoints/emoji --name llama-6.8M --images 1 --n 200     # 200 keywords of dev
    python -m benchmarks.words MODEL                           # 789 keywords of dev, three images each
    python -m benchmarks.words MODEL --naming --heeding        # no image: coarse tokens, and what a caption saves; a minute
    python -m benchmarks.words MODEL --prose                   # perplexity of held-out prose, and that of the base of its adapter
    python -m benchmarks.words smollm2 --retrieval             # the nearest training caption by hidden state, and its image
    python -m benchmarks.words MODEL --split test              # once for each name: the second time is refused

MODEL is a pipeline's folder or Hub id; with --retrieval a language model's, or `smollm2`. What is measured is written into words.json; on dev
a row is measured again, or added to. Beside it lies a sheet of ten right and ten wrong images, drawn at random: words-NAME-SPLIT.png. A test
row takes all figures that the model can have in one run; its retrieval uses the layer that dev chose. `_se` is the standard error over bases,
`_chance` the accuracy under permuted captions."""
import argparse, json, re, sys, time
from pathlib import Path
import torch, transformers
from v2flow_nbdev.base.files import check_writable, find_data, local_path, read_json, write_atomically
from v2flow_nbdev.base.gguf import llm_folder
from v2flow_nbdev.base.images import to_tensor
from v2flow_nbdev.base.precision import multiplies_bf16, resolve_device
from v2flow_nbdev.data.sources import emoji
from v2flow_nbdev.evaluation.emoji import emoji_judge
from v2flow_nbdev.evaluation.likelihood import heeding, naming_marks
from v2flow_nbdev.evaluation.pretrained import (
    KeywordExam, as_scores, bases_of, draw_keywords, keyword_sheet, load_keywords, retrieve_captions)
from v2flow_nbdev.language.pipeline import V2FlowPipeline, load_llm
from v2flow_nbdev.language.text_models import text_perplexity
from v2flow_nbdev.language.visual_tokens import VisualTokens
from v2flow_nbdev.training.recipes import text_lines

def rows_of(path):
    "The rows of a file that this command wrote; none where there is no file"
    if not path.exists(): return []
    try: rows = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as e: raise OSError(f"{path}: not JSON ({e}); name another file with --out") from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) and {'name', 'split'} <= r.keys() for r in rows):
        raise OSError(f"{path}: holds no rows of this command; name another file with --out")
    return rows

def row_of(rows, name, split): return next((r for r in rows if (r['name'], r['split']) == (name, split)), {})

def write_row(path, row):
    "On dev over what was there; a second test row of one name is an error"
    rows = rows_of(path)
    old = row_of(rows, row['name'], row['split'])
    if old and row['split'] == 'test': raise ValueError(f"{row['name']}: has a test row already; it is run once")
    if old: rows[rows.index(old)] = old | row
    else: rows.append(row)
    with write_atomically(path) as new: new.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')

def say(text): print(text, file=sys.stderr, flush=True)

def values_of(visual, examples):
    "What the coarse tokens of a model stand for: the fields of the emoji that have as many values, in the model's order"
    known = {f: sorted({r[f] for r in examples}) for f in ('base', 'tone', 'sex')}
    return {f: v for n in visual.coarse_sizes for f, v in known.items() if len(v) == n}

def prose_of(pipe, folder):
    "Perplexity of held-out prose, and what the language model had that its adapter was trained on"
    texts, some = text_lines(find_data('prose')/'persuasion.txt')
    base, tokenizer = load_llm(llm_folder(read_json(Path(folder)/'llm/base.json', ['base'])['base']))
    found = {}
    for name, llm, words in (('prose', pipe.llm, pipe.tokenizer), ('prose_before', base.to(pipe.device), tokenizer)):
        with torch.autocast(pipe.device.type, torch.bfloat16, enabled=multiplies_bf16(pipe.device)):
            found[name] = text_perplexity(llm.eval(), words, texts + some)
    return found

def drawn(args, keywords):
    "What a pipeline draws, names and heeds: figures, and what the sheet shows"
    pipe, found, shown = V2FlowPipeline.from_pretrained(args.model, dtype=None, device=resolve_device()), {}, None
    bases, _ = bases_of(examples := emoji('train'))
    visual = VisualTokens.of(pipe.llm)
    if tuple(size := pipe.image_tokenizer.config.image_size) != (64, 64):
        raise ValueError(f"{args.model}: images of {size[0]}×{size[1]} pixels; the emoji have 64×64")
    if args.naming or (args.split == 'test' and visual.coarse_sizes[:1] == (len(bases),)):
        marks = dict(naming=naming_marks(pipe.llm, pipe.tokenizer, keywords, bases))
        found |= as_scores(marks) | dict(naming_n=len(keywords))
    if args.heeding:
        told = heeding(pipe, emoji('held_out_compositions'), values_of(visual, examples))
        found |= {k if k == 'heeding' else f'heeding_{k}': v for k, v in told.items()}
    if args.prose: found |= prose_of(pipe, local_path(args.model))
    if not (args.naming or args.heeding or args.prose) or args.split == 'test':
        images = draw_keywords(pipe, keywords, args.images, args.seed, args.batch_size, say)
        exam = KeywordExam(emoji_judge(), examples)
        marks = exam.marks(images, keywords)
        found |= as_scores(marks) | dict(n=len(keywords), images=args.images, seed=args.seed)
        shown = images, marks, exam
    return found, shown

def retrieved(args, keywords, layer):
    "The image of the nearest training caption in place of a drawn one; `states` are judged without it, among the 51 alone"
    llm, tokenizer = load_llm(llm_folder(args.model), torch.bfloat16)
    exam = KeywordExam(emoji_judge())
    numbers, states, layer, by_layer = retrieve_captions(llm.to(resolve_device()).eval(), tokenizer, keywords, exam, layer)
    images = to_tensor([exam.examples[i]['image'] for i in numbers], 3)
    marks = exam.marks(images, keywords)
    found = as_scores(marks | dict(states=states)) | dict(n=len(keywords), images=1, layer=layer)
    return found | (dict(by_layer=[round(a, 4) for a in by_layer]) if len(by_layer) > 1 else {}), (images, marks, exam)

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model'); p.add_argument('--name', help="of the row; else the last part of MODEL")
    p.add_argument('--split', choices=['dev', 'test'], default='dev')
    p.add_argument('--images', type=int, default=3, help='for each keyword'); p.add_argument('--n', type=int, help='so many keywords; else all')
    p.add_argument('--seed', type=int, default=0); p.add_argument('--batch-size', type=int, default=64)
    p.add_argument('--retrieval', action='store_true'); p.add_argument('--naming', action='store_true')
    p.add_argument('--heeding', action='store_true'); p.add_argument('--prose', action='store_true')
    p.add_argument('--out', type=Path, default=Path(__file__).resolve().with_name('words.json'))
    args = p.parse_args()
    args.name = args.name or Path(args.model).resolve().name
    if not re.fullmatch(r'[\w.+-]+', args.name): p.error(f"--name {args.name}: letters, digits and . + - _ alone: a file is named by it")
    for k in ('images', 'n', 'batch_size'):
        if (v := getattr(args, k)) is not None and v < 1: p.error(f"--{k.replace('_', '-')} {v}: needs 1 or more")
    if args.retrieval and (args.naming or args.heeding or args.prose): p.error('--retrieval: a language model alone neither names nor heeds')
    rows = rows_of(args.out)
    if args.split == 'test' and row_of(rows, args.name, 'test'): p.error(f"{args.name}: has a test row already; it is run once")
    args.layer = row_of(rows, args.name, 'dev').get('layer') if args.split == 'test' else None
    if args.split == 'test' and args.retrieval and args.layer is None: p.error(f"{args.name}: dev has to choose the layer first")
    check_writable(args.out)
    return args

def main():
    transformers.utils.logging.disable_progress_bar()
    try:
        args = arguments()
        keywords, began = load_keywords(args.split, args.n), time.time()
        found, shown = retrieved(args, keywords, args.layer) if args.retrieval else drawn(args, keywords)
        write_row(args.out, row := dict(name=args.name, split=args.split) | found | dict(seconds=round(time.time() - began)))
        if shown:
            images, marks, exam = shown
            path = args.out.with_name(f'{args.out.stem}-{args.name}-{args.split}.png')
            with write_atomically(path) as new:
                keyword_sheet(images, keywords, marks['features'], exam).quantize(128, dither=0).save(new, 'PNG', optimize=True)
            say(f'{path}: a sheet of right and wrong ones')
    except (OSError, ValueError) as e: sys.exit(f'benchmarks.words: {e}')
    print(json.dumps(row, ensure_ascii=False))

if __name__ == '__main__': main()
