"""Two departures from the paper, with and without each, on digits, three seeds:

- *code at its mask token*: a hidden position's own code is added to its mask token. Without: codes are seen in the encoder's slots alone;
- *regression first*: an auxiliary decoder teaches the codes by regression, then they are frozen and the flow decoder alone is trained.
  Without: the flow loss alone trains the codes, and they are never frozen. Gumbel noise and k-means come at the same steps in both.

Model and data are those of configs/digits-tokenizer.yaml with the vocabulary that is shipped, the training is shorter: `changes` below.
Scores are those of the last step's parameters (no EMA, which does not fit a codebook that still moves). A run takes about a minute of
one core; a run that is in the file is not repeated. `18_tokenizer` shows the results.

    python -m benchmarks.departures [--config configs/digits-tokenizer.yaml]        benchmarks/departures.json and departures.png"""
import argparse, json
from dataclasses import replace
from pathlib import Path
from time import process_time
import torch
from torch import nn
from v2flow_nbdev.apps.cli import read_recipe
from v2flow_nbdev.base.files import write_json
from v2flow_nbdev.base.images import to_tensor
from v2flow_nbdev.data.batches import ImageBatches
from v2flow_nbdev.evaluation.metrics import tokenizer_scores
from v2flow_nbdev.models.tokenizer import V2Flow
from v2flow_nbdev.models.tokenizer_training import TokenizerTraining
from v2flow_nbdev.models.vocabulary import Vocabulary
from v2flow_nbdev.training.loop import train
from v2flow_nbdev.training.recipes import load_data
from v2flow_nbdev.training.tokenizer_recipes import TokenizerRecipe, open_latents

root = Path(__file__).resolve().parent.parent
results, figure = root/'benchmarks/departures.json', root/'benchmarks/departures.png'
changes = dict(steps=300, batch_size=32, ema_decay=0., evaluate_every=50, checkpoint_every=0., log_every=50,
               trackers=(), mixed_precision='no')
seeds = 0, 1, 2
measures = dict(codebook_usage='codebook usage', codebook_perplexity='codebook perplexity', psnr_db='PSNR of held-out digits, dB')

class Nothing(nn.Module):
    "What a code says to its mask token, left out: it is still seen in the encoder's slots"
    def forward(self, code): return torch.zeros_like(code)

class FlowLossAlone(TokenizerTraining):
    "The flow loss trains the codes, from the first step to the last"
    def before_step(self, progress):
        super().before_step(progress)
        self.frozen = False
        self.tok.resampler.requires_grad_(True)

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return replace(out, loss=out.flow_loss + out.commitment_loss)

def run(recipe, examples, held_out, code_at_mask, regression, seed):
    "Train once: the curve of scores, and the seconds of one core that it took"
    images, held_out_images = (to_tensor([r['image'] for r in some], channels=1) for some in (examples[:600], held_out[:150]))
    latents, shape = open_latents(recipe.tokenizer, images)
    torch.manual_seed(seed)
    tok = V2Flow(shape, Vocabulary.load(root/'data/checkpoints/digits/image_tokenizer'))
    if not code_at_mask: tok.masked.split = Nothing()
    model = (TokenizerTraining if regression else FlowLossAlone)(tok, recipe.tokenizer_training)
    data, curve, began = ImageBatches(examples, 1, [shape.image_size]), [], process_time()
    def scores(m):
        found = tokenizer_scores(m.tok, held_out_images, images)
        curve.append({name: round(found[name], 4) if found else None for name in measures})
        return found
    train(model, data, replace(recipe.training, **changes, seed=seed), data.collate, scores, progress=False)
    every = changes['evaluate_every']
    return dict(code_at_mask=code_at_mask, regression=regression, seed=seed, seconds=round(process_time() - began),
                curve=[dict(step=(i + 1)*every, **point) for i, point in enumerate(curve)])

def mean_and_error(runs, name, at=-1):
    "Over the seeds: mean, and its standard error; None where a run had no codebook yet"
    values = [r['curve'][at][name] for r in runs]
    if None in values: return None
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item()/len(values)**0.5 if len(values) > 1 else 0.

def arms(runs):
    "{(code_at_mask, regression): its runs}"
    return {arm: [r for r in runs if (r['code_at_mask'], r['regression']) == arm]
            for arm in ((True, True), (False, True), (True, False), (False, False))}

def name_of(code_at_mask, regression):
    return f"{'code' if code_at_mask else 'no code'} at its mask token, {'regression first' if regression else 'flow loss alone'}"

def draw(runs, config):
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(9, 2.9), dpi=80)
    for (code_at_mask, regression), some in arms(runs).items():
        style = dict(c='C0' if code_at_mask else 'C1', ls='-' if regression else '--')
        for ax, name in zip(axes, measures):
            points = [(p['step'], mean_and_error(some, name, i)) for i, p in enumerate(some[0]['curve'])] if some else []
            points = [(step, *m) for step, m in points if m]
            if not points: continue
            steps, means, errors = map(torch.tensor, zip(*points))
            ax.plot(steps, means, **style, lw=1.3, label=name_of(code_at_mask, regression) if ax is axes[0] else None)
            ax.fill_between(steps, means - errors, means + errors, color=style['c'], alpha=0.2, lw=0)
    for ax, title in zip(axes, measures.values()):
        ax.set_title(title, fontsize=9); ax.set_xlabel('step', fontsize=8); ax.tick_params(labelsize=7)
        for moment in (config.quantize_from, config.freeze_codes_at): ax.axvline(changes['steps']*moment, c='lightgray', lw=1, zorder=0)
    axes[0].set_ylim(0, 1.05)
    fig.legend(loc='lower center', ncols=2, fontsize=8, frameon=False)
    plt.tight_layout(rect=(0, 0.14, 1, 1)); fig.savefig(figure); plt.close(fig)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', type=Path, default=root/'configs/digits-tokenizer.yaml')
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = read_recipe(args.config, [], TokenizerRecipe)
    settings = dict(config=args.config.name, changes={k: list(v) if isinstance(v, tuple) else v for k,v in changes.items()})
    kept = json.loads(results.read_text()) if results.exists() else {}
    if kept and kept['settings'] != settings: raise SystemExit(f'{results}: of other settings; move it away')
    runs, (examples, held_out) = kept.get('runs', []), load_data(recipe.data)
    for seed in seeds:
        for arm in arms(runs):
            if any(r['seed'] == seed for r in arms(runs)[arm]): continue
            runs.append(run(recipe, examples, held_out, *arm, seed))
            print(name_of(*arm), f'seed {seed}:', runs[-1]['curve'][-1], runs[-1]['seconds'], 's', flush=True)
            write_json(results, dict(settings=settings, runs=runs))
            draw(runs, recipe.tokenizer_training)
    for arm, some in arms(runs).items():
        print(name_of(*arm), {n: '%.3f ± %.3f' % mean_and_error(some, n) for n in measures})

if __name__ == '__main__': main()
