"""What makes a pretrained language model learn to draw sooner? Short trainings of SmolLM2 on digits, each with one setting of
configs/smollm2-llm-64.yaml changed, and all else equal: the same steps, sequences and order.

    python -m benchmarks.choices run --tokenizer runs/smollm2-digits-tokenizer/model            # all of them, ten minutes of a core each
    python -m benchmarks.choices run --tokenizer … --only base 'no coarse token' --seeds 0 1 2
    python -m benchmarks.choices table
    python -m benchmarks.choices plot

Measured after each quarter of the steps, on the average of parameters that would be shipped: *drawn*, the fraction of 100 generated digits that a
classifier takes for the digit asked (chance 10 %); *heeding*, what its own caption saves on a held-out image beside the caption of another digit,
in nats, coarse token included ([57_likelihood]); *read*, the fraction of 100 held-out images whose caption names the right digit. Each run is
added to benchmarks/choices.json; those already there are not run again, so it can be stopped at any time."""
import argparse, json, shutil, tempfile, time
from pathlib import Path
import numpy as np, torch
from v2flow_nbdev.base.files import write_atomically
from v2flow_nbdev.base.images import to_tensor
from v2flow_nbdev.data.sources import digit_captions, digits, named_digit
from v2flow_nbdev.evaluation.judges import accuracy, digit_classifier
from v2flow_nbdev.evaluation.likelihood import heeding
from v2flow_nbdev.training.config import TrainConfig
from v2flow_nbdev.training.llm_data import LLMConfig, LLMRecipe
from v2flow_nbdev.training.llm_recipes import train_llm
from v2flow_nbdev.training.recipes import DataConfig

here = Path(__file__).parent
llm = dict(pretrained='smollm2', train='lora', rank=16, coarse='label', coarse_weight=8., write_share=0.8, caption_dropout=0.1, id_noise=0.1,
           write_noise=0.5, visual_softmax=True, attention='eager')
training = dict(batch_size=32, lr=1.5e-3, embedding_lr=2.5, weight_decay=0., ema_decay=0.99, evaluate_every=0.25, compile=True)
choices = {                                           # name → what of `llm` and `training` is another
    'base': {},
    'no coarse token': dict(coarse=''),
    'coarse token counts once': dict(coarse_weight=1.),
    'no write_noise': dict(write_noise=0.),
    'softmax over all tokens': dict(visual_softmax=False),
    'caption tokens count 6 times': dict(text_weight=6.),
    'a third of the learning rate': dict(lr=5e-4),
    'three times the learning rate': dict(lr=4.5e-3),
    'new embeddings at the body’s rate': dict(embedding_lr=1.),
    'new embeddings at ten times the rate': dict(embedding_lr=10.),
    'LoRA of rank 64': dict(rank=64),
    'Muon': dict(optimizer='muon'),
    'new embeddings alone': dict(train='new', lr=4e-3, embedding_lr=1.),
    'all parameters': dict(train='all', lr=3e-4, embedding_lr=10.),
}

def recipe_of(name, tokenizer, steps, seed, copies=8, **changes):
    "What `train_llm` needs for one of `choices`"
    changed = choices[name] | changes
    unknown = set(changed) - set(LLMConfig.__dataclass_fields__) - set(TrainConfig.__dataclass_fields__)
    assert not unknown, unknown
    own = lambda cls, given: given | {k: v for k,v in changed.items() if k in cls.__dataclass_fields__}
    return LLMRecipe(DataConfig(name='digits', copies=copies), str(tokenizer), LLMConfig(**own(LLMConfig, llm)),
                     TrainConfig(steps=steps, seed=seed, **own(TrainConfig, training)),
                     dict(guidance_scale=1., temperature=0.7, min_p=0.05))

def measure(pipe, n=100):
    "Of a pipeline for digits, see above"
    test, judge = digits('test'), digit_classifier()
    asked = [i % 10 for i in range(n)]
    made = pipe([digit_captions(d)[i//10 % len(digit_captions(d))] for i,d in enumerate(asked)], generator=torch.Generator().manual_seed(0))
    named = [named_digit(c) for c in pipe.caption([r['image'] for r in test[:n]])]
    told = heeding(pipe, [r | dict(base=str(r['label'])) for r in test], dict(base=[str(d) for d in range(10)]), batch_size=33)
    return dict(drawn=accuracy(judge, to_tensor(made.images, channels=1), asked), heeding=told['heeding'], heeding_se=told['se'],
                read=float(np.mean([a == r['label'] for a,r in zip(named, test)])))

def one_run(name, tokenizer, steps, seed, ids=None, **changes):
    "Train, and measure on the way"
    began = time.process_time()
    with tempfile.TemporaryDirectory() as out:
        out = Path(out)/'run'
        if ids and ids.is_dir(): shutil.copytree(ids, out/'ids')
        train_llm(recipe_of(name, tokenizer, steps, seed, **changes), out, evaluate=measure)
        if ids and not ids.is_dir(): shutil.copytree(out/'ids', ids)
        lines = [json.loads(l) for l in (out/'log.jsonl').read_text().splitlines()]
    points = [{k: round(l[k], 4) for k in ('step', 'loss', 'drawn', 'heeding', 'heeding_se', 'read')} for l in lines if 'drawn' in l]
    return dict(choice=name, seed=seed, steps=steps, changes=choices[name], points=points, cpu_seconds=round(time.process_time() - began))

def read_results(path): return json.loads(Path(path).read_text(encoding='utf-8')) if Path(path).exists() else []

def run_missing(args, one_run):
    "The choices that the file lacks, by `one_run(name, seed)`; also for `benchmarks.naming`"
    for seed in args.seeds:
        for name in args.only:
            found = read_results(args.results)
            if any((r['choice'], r['seed'], r['steps']) == (name, seed, args.steps) for r in found): continue
            found.append(one := one_run(name, seed))
            with write_atomically(Path(args.results)) as new:
                new.write_text(json.dumps(found, ensure_ascii=False).replace('}, {"choice"', '},\n{"choice"') + '\n', encoding='utf-8')
            print(f"{name}, seed {seed}: {one['points'][-1]} ({one['cpu_seconds']} s of CPU)", flush=True)

def by_choice(found, choices=choices):
    "name → its runs, in the order of `choices`; those with as many steps as most"
    steps = max({r['steps'] for r in found}, key=[r['steps'] for r in found].count)
    return {name: runs for name in choices if (runs := [r for r in found if (r['choice'], r['steps']) == (name, steps)])}

def table(found):
    "Markdown; ± is the standard deviation over seeds"
    def mean(runs, k):
        x = [r['points'][-1][k] for r in runs]
        return np.mean(x), np.std(x, ddof=1) if len(x) > 1 else None
    def percent(m, s): return f'{100*m:.0f}' + (f' ± {100*s:.0f}' if s is not None else '') + ' %'
    def nats(m, s): return f'{m:.1f}' + (f' ± {s:.1f}' if s is not None else '')
    lines = ['| one thing changed | seeds | sequences | drawn as asked | heeding, nats | read | seconds of CPU |', '|---|--:|--:|--:|--:|--:|--:|']
    for name, runs in by_choice(found).items() if found else ():
        lines.append(f"| {name} | {len(runs)} | {runs[0]['steps']*training['batch_size']:,} | {percent(*mean(runs, 'drawn'))} | "
                     f"{nats(*mean(runs, 'heeding'))} | {percent(*mean(runs, 'read'))} | {np.mean([r['cpu_seconds'] for r in runs]):.0f} |")
    return '\n'.join(lines)

def plot(found, out):
    "Drawn as asked and heeding over the sequences seen, a line for each choice"
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    if not found: raise SystemExit('no runs to plot yet')
    fig, axes = plt.subplots(1, 2, figsize=(9.6, 3.4), dpi=80, layout='constrained')
    for i, (name, runs) in enumerate(by_choice(found).items()):
        at = [0] + [p['step']*training['batch_size'] for p in runs[0]['points']]
        for ax, k, start in ((axes[0], 'drawn', 0.1), (axes[1], 'heeding', 0.)):
            y = [start] + np.mean([[p[k] for p in r['points']] for r in runs], 0).tolist()
            ax.plot(at, y, marker='o', ms=3, lw=2.2 if name == 'base' else 1, color='k' if name == 'base' else f'C{i % 10}', ls='-' if i < 10 else '--', label=name)
    axes[0].set_ylabel('drawn as asked'); axes[1].set_ylabel('heeding, nats an image')
    for ax in axes: ax.set_xlabel('sequences'); ax.tick_params(labelsize=8)
    fig.legend(*axes[0].get_legend_handles_labels(), loc='outside right', fontsize=7)
    plt.savefig(out); plt.close(fig)

def arguments(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['run', 'table', 'plot'])
    p.add_argument('--tokenizer', help='of `v2flow train-tokenizer --config configs/smollm2-digits-tokenizer.yaml`')
    p.add_argument('--only', nargs='+', default=list(choices), choices=choices, metavar='NAME', help='some of: ' + ', '.join(choices))
    p.add_argument('--seeds', nargs='+', type=int, default=[0]); p.add_argument('--steps', type=int, default=120)
    p.add_argument('--ids', type=Path, default=Path('runs/choices/ids'), help='where the ids are kept from run to run')
    p.add_argument('--results', default=str(here/'choices.json'))
    args = p.parse_args(argv)
    if args.what == 'run' and not args.tokenizer: p.error('run: needs --tokenizer')
    return args

def main(argv=None):
    args = arguments(argv)
    if args.what == 'table': return print(table(read_results(args.results)))
    if args.what == 'plot': return plot(read_results(args.results), Path(args.results).with_suffix('.png'))
    run_missing(args, lambda name, seed: one_run(name, args.tokenizer, args.steps, seed, args.ids))

if __name__ == '__main__': main()
