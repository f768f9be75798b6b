"""What draws out of a pretrained language model that a hippo is a hippopotamus? It is taught to *name* the base of an emoji by one new token,
from training captions alone, without an image; then it is asked words that no training caption holds. Short trainings of SmolLM2, each with
one thing changed, and all else equal: the same steps, captions and order.

    python -m benchmarks.naming run                              # all of them; four minutes of a core each
    python -m benchmarks.naming run --only base 'rows begin as their names' --seeds 0 1 2
    python -m benchmarks.naming table
    python -m benchmarks.naming plot
    python -m benchmarks.naming ask lemons cavalry              # the nearest names of words, as the model sees them, before any training

Measured after each quarter of the steps, on the average of parameters that would be shipped: *named*, how many of the 789 keywords of `dev`
get the right base among 51 ([56_pretrained]; chance 2 %; the hidden states alone, untrained: 39 %), with its standard error over bases; *loss* of
the last steps on training captions, in nats. What is good here is where a longer training should begin. Each run is added to
benchmarks/naming.json; those already there are not run again, so it can be stopped at any time."""
import argparse, json, tempfile, time
from functools import lru_cache
from pathlib import Path
import numpy as np, torch
from torch.utils.data import Dataset
from benchmarks.choices import by_choice, read_results, run_missing
from v2flow_nbdev.base.files import find_data
from v2flow_nbdev.base.gguf import llm_folder
from v2flow_nbdev.base.precision import multiplies_bf16
from v2flow_nbdev.base.text import text_ids
from v2flow_nbdev.data.sources import emoji
from v2flow_nbdev.evaluation.likelihood import naming_marks
from v2flow_nbdev.evaluation.pretrained import as_scores, bases_of, exam_marks, framed_captions, load_keywords
from v2flow_nbdev.language.adapters import choose_trained, name_by_knowledge, whole_words, word_examples, word_scores
from v2flow_nbdev.language.losses import TargetLoss
from v2flow_nbdev.language.pipeline import load_llm
from v2flow_nbdev.language.sequences import cumulative_weights, drawn_index, inverse_sqrt_frequency
from v2flow_nbdev.language.text_models import collate, first_id, own_texts, text_sequences
from v2flow_nbdev.language.visual_tokens import add_visual_tokens
from v2flow_nbdev.models.tokenizer import V2Flow
from v2flow_nbdev.training.config import TrainConfig
from v2flow_nbdev.training.loop import train

here, frame = Path(__file__).parent, 'an emoji of a {}'
base = dict(train='lora', rank=16, lr=5e-4, embedding_lr=4., rows='small', noise=0., frame=False, text_share=0., word_share=0.)
choices = {                                           # name → what of `base` is another
    'base': {},
    'rows begin as their names': dict(rows='names'),
    'rows begin as what it knows of words': dict(rows='known'),   # four times as sharply as a training's
    'and words stay in the mix': dict(rows='known', word_share=0.3),
    'new embeddings alone': dict(train='new', lr=2e-3, embedding_lr=1.),
    'all parameters': dict(train='all', lr=5e-5, embedding_lr=40.),
    'a fifth of the body’s rate': dict(lr=1e-4, embedding_lr=20.),
    'three times the body’s rate': dict(lr=1.5e-3, embedding_lr=4/3),
    'new embeddings at the body’s rate': dict(embedding_lr=1.),
    'LoRA of rank 4': dict(rank=4),
    'noise on token embeddings': dict(noise=5.),      # NEFTune, arXiv 2310.05914
    'one frame for all captions': dict(frame=True),
    'a quarter keeps the distribution before': dict(text_share=0.25),
}

class Names(Dataset):
    "<s> caption <|image|> → the token of its base; rare bases more often; or plain text of the model's own, or a word as it knew it"
    def __init__(self, examples, tokenizer, visual, numbers, frame=False, texts=(), text_share=0., words=(), word_share=0.):
        self.captions = [[c] for c in framed_captions(examples)] if frame else [r['captions'] for r in examples]
        self.tokenizer, self.numbers, self.begin, self.coarse = tokenizer, numbers, visual.begin(visual.grid), visual.coarse
        self.texts, self.text_share, self.bos = text_sequences(tokenizer, texts) if texts else [], text_share, first_id(tokenizer)
        self.sums, self.words, self.word_share = cumulative_weights(inverse_sqrt_frequency(numbers), len(numbers)), words, word_share

    def __len__(self): return len(self.captions)

    def __getitem__(self, i):
        text, which = torch.rand(2).tolist()
        if text < self.text_share: return self.texts[int(which*len(self.texts))]
        if text < self.text_share + self.word_share:
            caption, sums = self.words[int(which*len(self.words))]
            name = drawn_index(sums)
        else:
            i = drawn_index(self.sums)
            caption, name = self.captions[i][int(which*len(self.captions[i]))], self.numbers[i]
        return [self.bos, *text_ids(self.tokenizer, [caption])[0], self.begin], [self.coarse[name]]

@torch.no_grad()
def rows_as_names(llm, tokenizer, visual, names):
    "A base's token begins as the mean of the embeddings of its name, at the tokens' mean distance from their mean"
    table = llm.get_input_embeddings().weight
    text = table[:visual.first]
    mean = text.mean(0); norm = (text - mean).norm(dim=-1).mean()
    for i, ids in zip(visual.coarse, text_ids(tokenizer, [f' {n}' for n in names])):
        off = text[ids].mean(0) - mean
        table[i] = mean + off*norm/off.norm()

@lru_cache(maxsize=1)
def known_words(llm_name):
    "What a language model knows of the words of its vocabulary, the exam's left out"
    llm, tokenizer = load_llm(llm_folder(llm_name))
    words = whole_words(tokenizer, (find_data('keywords')/'keywords.json').read_text())
    with torch.autocast('cpu', torch.bfloat16, enabled=multiplies_bf16(torch.device('cpu'))):
        return words, word_scores(llm, tokenizer, words, bases_of(emoji('train'))[0], frame)

def noisy(llm, alpha):
    "Uniform noise on token embeddings in training, of α/√(L·E) at most"
    def add(module, args, out):
        if not module.training: return out
        return out + (2*torch.rand_like(out) - 1)*alpha/(out.shape[-2]*out.shape[-1])**0.5
    llm.get_input_embeddings().register_forward_hook(add)

def one_run(name, tokenizer_folder, llm_name, steps, seed, n=None, batch_size=32):
    "Train, and measure on the way"
    how, began = base | choices[name], time.process_time()
    llm, tokenizer = load_llm(llm_folder(llm_name))
    examples, keywords = emoji('train'), load_keywords('dev', n)
    bases, numbers = bases_of(examples)
    texts = own_texts(llm, tokenizer, 500) if how['text_share'] else ()
    torch.manual_seed(seed)
    visual = add_visual_tokens(llm, tokenizer, V2Flow.from_pretrained(tokenizer_folder), seed=seed, coarse=[len(bases)])
    if how['rows'] == 'names': rows_as_names(llm, tokenizer, visual, bases)
    if how['rows'] == 'known': name_by_knowledge(llm, tokenizer, *known_words(llm_name), frame, scale=16.)
    words = word_examples(*known_words(llm_name), frame, part=1., tau=0.0875) if how['word_share'] else ()
    if how['noise']: noisy(llm, how['noise'])
    llm.set_attn_implementation('eager')
    model = TargetLoss(choose_trained(llm, how['train'], how['rank']), distillation=bool(texts))
    def measure(model):
        found = as_scores(dict(named=naming_marks(model.llm, tokenizer, keywords, bases)))
        return dict(named=found['named_accuracy'], named_se=found['named_se'])
    data = Names(examples, tokenizer, visual, numbers.tolist(), how['frame'], texts, how['text_share'],
                 words, how['word_share'])
    config = TrainConfig(steps=steps, batch_size=batch_size, lr=how['lr'], embedding_lr=how['embedding_lr'], seed=seed, weight_decay=0.,
                         ema_decay=0.95, evaluate_every=0.25, log_every=0.05, checkpoint_every=0, trackers=())
    with tempfile.TemporaryDirectory() as out:
        train(model, data, config, collate, evaluate=measure, out=Path(out)/'run', progress=False)
        lines = [json.loads(l) for l in (Path(out)/'run'/'log.jsonl').read_text().splitlines()]
    points = [{k: round(l[k], 4) for k in ('step', 'loss', 'named', 'named_se')} for l in lines if 'named' in l]
    return dict(choice=name, seed=seed, steps=steps, batch_size=batch_size, changes=choices[name], points=points,
                cpu_seconds=round(time.process_time() - began))

def table(found):
    "Markdown; ± is the standard error over bases, of one seed"
    lines = ['| one thing changed | seeds | sequences | named after a quarter | half | the end | loss at the end |', '|---|--:|--:|--:|--:|--:|--:|']
    for name, runs in by_choice(found, choices).items() if found else ():
        points = [[r['points'][i] for r in runs] for i in (0, 1, -1)]
        at = [f"{100*np.mean([p['named'] for p in some]):.1f} ± {100*np.mean([p['named_se'] for p in some]):.1f} %" for some in points]
        lines.append(f"| {name} | {len(runs)} | {runs[0]['steps']*runs[0]['batch_size']:,} | {' | '.join(at)} | "
                     f"{np.mean([p['loss'] for p in points[-1]]):.2f} |")
    return '\n'.join(lines)

def plot(found, out):
    "Named over the sequences seen, a line for each choice"
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    if not found: raise SystemExit('no runs to plot yet')
    fig, ax = plt.subplots(figsize=(7.2, 3.4), dpi=80, layout='constrained')
    for i, (name, runs) in enumerate(by_choice(found, choices).items()):
        at = [p['step']*runs[0]['batch_size'] for p in runs[0]['points']]
        y = np.mean([[100*p['named'] for p in r['points']] for r in runs], 0)
        ax.plot(at, y, marker='o', ms=3, lw=2.2 if name == 'base' else 1, color='k' if name == 'base' else f'C{i % 10}', label=name)
    ax.axhline(100/51, c='gray', lw=.8, ls=':'); ax.set_xlabel('captions seen'); ax.set_ylabel('keywords named, % of 51')
    fig.legend(*ax.get_legend_handles_labels(), loc='outside right', fontsize=7)
    plt.savefig(out); plt.close(fig)

def ask(words, llm_name, n=3):
    "The nearest names of words, and how many keywords of dev are nearest to their base among 51"
    (llm, tokenizer), names = load_llm(llm_folder(llm_name)), bases_of(emoji('train'))[0]
    keywords = load_keywords('dev')
    scores = word_scores(llm, tokenizer, [*words, *(r['keyword'] for r in keywords)], names, frame)
    for word, row in zip(words, scores): print(f"{word}: {', '.join(f'{names[i]} {row[i]:.1f}' for i in row.topk(n).indices)}")
    found = as_scores(dict(named=exam_marks(-scores[len(words):, None], keywords, names)))
    print(f"keywords nearest to their base, of 51: {100*found['named_accuracy']:.1f} ± {100*found['named_se']:.1f} %")

def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['run', 'table', 'plot', 'ask']); p.add_argument('words', nargs='*', help='to ask')
    p.add_argument('--only', nargs='+', default=list(choices), choices=choices, metavar='NAME', help='some of: ' + ', '.join(choices))
    p.add_argument('--seeds', nargs='+', type=int, default=[0]); p.add_argument('--steps', type=int, default=240)
    p.add_argument('--llm', default='smollm2', help='a folder, a Hub id or smollm2')
    p.add_argument('--tokenizer', default='data/checkpoints/smollm2/image_tokenizer', help='an image tokenizer over its vocabulary')
    p.add_argument('--results', default=str(here/'naming.json'))
    return p.parse_args(argv)

def main(argv=None):
    args = arguments(argv)
    if args.what == 'table': return print(table(read_results(args.results)))
    if args.what == 'ask': return ask(args.words, args.llm)
    if args.what == 'plot': return plot(read_results(args.results), Path(args.results).with_suffix('.png'))
    run_missing(args, lambda name, seed: one_run(name, args.tokenizer, args.llm, args.steps, seed))

if __name__ == '__main__': main()
