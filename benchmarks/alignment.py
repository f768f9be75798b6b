"""Does it help a language model that the codes lie among its token embeddings? The same training from four starts of the new embeddings, three
seeds each.

`codebook`: the codes themselves. `rotated`: the codes under one random rotation, the same geometry without the alignment. `mean`: all at
the text tokens' mean, near what transformers does for new tokens. `random`: random directions at the text tokens' norm. Everything else is equal: the
parameters, the data, the order of batches, the captions drawn.

    python -m benchmarks.alignment digits --llm runs/digits-text/model --tokenizer data/checkpoints/digits/image_tokenizer
    python -m benchmarks.alignment shapes --llm runs/shapes64-text/model --tokenizer runs/shapes64-tokenizer/model --steps 200 --points 4
    python -m benchmarks.alignment plot

For digits: the shipped tokenizer. For shapes: one of 64 tokens, which costs a language model a quarter of the shipped one's 256:

    v2flow pretrain-llm --config configs/shapes-text.yaml --out runs/shapes64-text llm.hidden_size=160 llm.num_attention_heads=5 llm.intermediate_size=448 llm.max_length=192 training.steps=600 training.lr=1.5e-3
    v2flow train-tokenizer --config configs/shapes-tokenizer.yaml --out runs/shapes64-tokenizer vocabulary=runs/shapes64-text/model tokenizer.patch_size=4 tokenizer.codebook_size=512 training.steps=2000 training.batch_size=64

Each run adds its curve to benchmarks/alignment.json; those already there are not run again."""
import argparse, json, time
from pathlib import Path
import numpy as np, torch
from v2flow_nbdev.data.sources import augment, digit_captions, digits
from v2flow_nbdev.base.files import write_atomically
from v2flow_nbdev.language.sequences import ImageTextSequences, image_to_text, text_to_image
from v2flow_nbdev.language.visual_tokens import add_visual_tokens, starts
from v2flow_nbdev.language.text_models import collate, first_id
from v2flow_nbdev.data.cache import encode_dataset
from v2flow_nbdev.language.generation import generate_image_ids
from v2flow_nbdev.evaluation.judges import accuracy, digit_classifier
from v2flow_nbdev.language.pipeline import load_llm
from v2flow_nbdev.data.shapes import facts, shapes
from v2flow_nbdev.data.judge import judge
from v2flow_nbdev.models.tokenizer import V2Flow
from v2flow_nbdev.base.images import to_pil
from v2flow_nbdev.training.config import TrainConfig
from v2flow_nbdev.training.loop import train

here = Path(__file__).parent

def examples_of(name):
    "(training examples, held-out examples)"
    if name == 'digits': return augment(digits('train'), 8, seed=1), digits('test')
    return shapes('train', 12_000, 32), shapes('test', 256, 32)

def pairs(examples, ids, tokenizer, visual):
    "One fixed sequence per held-out image and direction"
    tokens = [tokenizer(r['captions'][i % len(r['captions'])], add_special_tokens=False).input_ids for i,
              r in enumerate(examples)]
    bos, eos = first_id(tokenizer), tokenizer.eos_token_id
    return [text_to_image(visual, bos, c, x) for c,x in zip(tokens, ids)], [image_to_text(visual, bos, x, c + [eos])
        for c,x in zip(tokens, ids)]

@torch.no_grad()
def mean_loss(model, sequences):
    "Nats for each token of the target"
    total = count = 0
    for i in range(0, len(sequences), 64):
        batch = collate(sequences[i:i + 64]); n = (batch['labels'] != -100).sum().item()
        total, count = total + n*model(**batch).loss.item(), count + n
    return total/count

def generated_accuracy(name, model, tokenizer, tok, examples, seed=0):
    """Fraction of images from held-out captions that show what was asked: the digit; the mean over the judge's five
    answers"""
    g = torch.Generator().manual_seed(seed)
    if name == 'digits':
        labels = [d for d in range(10) for _ in range(20)]
        captions = [digit_captions(d)[i % len(digit_captions(d))] for i,d in enumerate(labels)]
    else: captions = [r['captions'][i % len(r['captions'])] for i,r in enumerate(examples[:100])]
    images = tok.decode(generate_image_ids(model, tokenizer, captions, generator=g), generator=g)
    if name == 'digits': return accuracy(digit_classifier(), images, labels)
    answers = [judge(im, facts(r['scene'])) for im,r in zip(to_pil(images), examples)]
    return float(np.mean([[a[k] for k in ('number', 'colour', 'shape', 'size', 'relation')] for a in answers]))

def one_run(name, start, seed, args, tok, train_ids, held_out, held_ids):
    "Train once; scores before the first step and at each of `--points` parts of the run"
    llm, tokenizer = load_llm(Path(args.llm))
    visual = add_visual_tokens(llm, tokenizer, tok, start, seed=seed)
    writes, reads = pairs(held_out, held_ids, tokenizer, visual)
    curve, began = [], time.time()
    def scores(model):
        model.eval()
        curve.append(dict(write_loss=mean_loss(model, writes), read_loss=mean_loss(model, reads),
                          accuracy=generated_accuracy(name, model, tokenizer, tok, held_out)))
        return curve[-1]
    scores(llm)
    train(llm, ImageTextSequences(train_ids, tokenizer, visual),
          TrainConfig(steps=args.steps, batch_size=args.batch_size, lr=args.lr, ema_decay=0.98, seed=seed, trackers=(),
                      evaluate_every=1/args.points),
          collate, scores, progress=False)
    steps = [0] + [s for s in range(1, args.steps + 1) if s % max(1, round(args.steps/args.points)) == 0
                   or s == args.steps]
    return dict(data=name, start=start, seed=seed, steps=steps, seconds=round(time.time() - began), curve=curve)

def plot(found, out):
    "Mean and range over seeds, for each data set and score"
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    names = [n for n in ('digits', 'shapes') if any(r['data'] == n for r in found)]
    fig, axes = plt.subplots(len(names), 3, figsize=(10, 2.7*len(names)), dpi=80, squeeze=False)
    for line, name in zip(axes, names):
        for ax, key, title in zip(line, ('write_loss', 'read_loss', 'accuracy'),
                                  ('loss, caption → image', 'loss, image → caption', 'accuracy of generated images')):
            for start, colour in zip(starts, ('tab:red', 'tab:blue', 'tab:green', 'tab:gray')):
                runs = [r for r in found if (r['data'], r['start']) == (name, start)]
                if not runs: continue
                y = np.array([[c[key] for c in r['curve']] for r in runs])
                ax.plot(runs[0]['steps'][1:], y.mean(0)[1:], color=colour, label=start, lw=1.2)
                ax.fill_between(runs[0]['steps'][1:], y.min(0)[1:], y.max(0)[1:], color=colour, alpha=.15, lw=0)
            ax.set_title(f'{name}: {title}', fontsize=9); ax.tick_params(labelsize=7)
        line[0].legend(fontsize=7)
    for ax in axes[-1]: ax.set_xlabel('steps', fontsize=8)
    plt.tight_layout(); plt.savefig(out)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['digits', 'shapes', 'plot']); p.add_argument('--llm'); p.add_argument('--tokenizer')
    p.add_argument('--steps', type=int, default=480)
    p.add_argument('--batch-size', type=int, default=64); p.add_argument('--lr', type=float, default=1e-3)
    p.add_argument('--points', type=int, default=8)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--cache', default='runs/alignment'); p.add_argument('--results', default=str(here/'alignment.json'))
    args = p.parse_args()
    results = Path(args.results)
    found = json.loads(results.read_text()) if results.exists() else []
    if args.what == 'plot': return plot(found, results.with_suffix('.png'))
    tok = V2Flow.from_pretrained(args.tokenizer)
    examples, held_out = examples_of(args.what)
    held_out = held_out[:256] if args.what == 'shapes' else [held_out[i] for i in range(len(held_out))]
    train_ids = encode_dataset(examples, tok, Path(args.cache)/f'{args.what}-train')
    held_ids = [r['ids'] for r in encode_dataset(held_out, tok, Path(args.cache)/f'{args.what}-test')]
    for seed in range(args.seeds):
        for start in starts:
            if any((r['data'], r['start'], r['seed']) == (args.what, start, seed) for r in found): continue
            run = one_run(args.what, start, seed, args, tok, train_ids, held_out, held_ids)
            found.append(run)
            with write_atomically(results) as tmp: tmp.write_text(json.dumps(found) + '\n')
            print(f"{args.what} {start:>8} seed {seed}: loss {run['curve'][-1]['write_loss']:.3f} / "
                  f"{run['curve'][-1]['read_loss']:.3f}, accuracy {run['curve'][-1]['accuracy']:.3f} ({run['seconds']} s)",
                  flush=True)

if __name__ == '__main__': main()
