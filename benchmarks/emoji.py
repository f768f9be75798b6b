"""The pages, curves and figures behind a README of emoji: everything that `v2flow evaluate --data emoji` does not print.

    python -m benchmarks.emoji pages                           # train.png, held_out.png, reconstructions.png, failures.png; 3 min
    python -m benchmarks.emoji curves                          # training.png, from the logs of six trainings
    python -m benchmarks.emoji ids                             # are ids easy to learn? 1 min
    python -m benchmarks.emoji families                        # accuracy by the number of same-base training images; 1 min
    python -m benchmarks.emoji nearest [--cache DIR]           # distances of generated images to the nearest training image
    python -m benchmarks.emoji settings guidance_scale=1.5,temperature=1,min_p=0.05 guidance_scale=1    # other ways to sample, 1 min each

All read a pipeline's folder (`--model`), and the first two write into it (`--out`)."""
import argparse, json, random
from collections import Counter
from pathlib import Path
import torch
from v2flow_nbdev.base.images import image_grid, to_pil, to_tensor
from v2flow_nbdev.base.files import read_tensors, write_atomically, write_tensors
from v2flow_nbdev.base.precision import resolve_device
from v2flow_nbdev.evaluation.emoji import emoji_examples, emoji_judge, emoji_sheet, generate_emoji, generate_split, retrieval_scores, some_captions
from v2flow_nbdev.evaluation.judges import blurred
from v2flow_nbdev.evaluation.metrics import frechet_of_splits
from v2flow_nbdev.language.pipeline import V2FlowPipeline

def open_all(folder):
    "Pipeline and judge, on the GPU where there is one, in float32; and all emoji"
    pipe = V2FlowPipeline.from_pretrained(folder, device=resolve_device())
    return pipe, emoji_judge(folder).to(pipe.device), emoji_examples()

def image_tensor(examples): return to_tensor([r['image'] for r in examples], 3)

def save(image, path):
    "A PNG of few colours, so that it is small"
    with write_atomically(path) as new: image.quantize(160, dither=0).save(new, 'PNG', optimize=True)
    print(f'{path}: {image.size[0]}×{image.size[1]}, {path.stat().st_size/1024:.0f} KiB')

def write_pages(folder, out, seed=0):
    "Samples, reconstructions and failures; what is shown is chosen at random and not by hand"
    pipe, judge, examples = open_all(folder)
    for split, name in (('train', 'train'), ('held_out_compositions', 'held_out')):
        save(emoji_sheet(pipe, judge, split, seed=seed), out/f'{name}.png')
    held_out = [r['image'] for r in examples if r['split'] == 'held_out_bases'][3::17]
    save(image_grid(held_out + pipe.reconstruct(held_out, generator=torch.Generator().manual_seed(seed)),
                    columns=len(held_out), side=64), out/'reconstructions.png')
    real, wrong = image_tensor(examples), []
    for split, n in (('train', 160), ('held_out_compositions', 96)):
        made, captions, numbers = generate_split(pipe, split, n, seed + 7)
        right = retrieval_scores(made, numbers, examples, real, judge)['features']
        wrong += [(image, caption, examples[i]['image']) for image, caption, i, ok in zip(to_pil(made), captions, numbers,
            right) if not ok]
    random.Random(seed).shuffle(wrong)
    made, captions, meant = zip(*wrong[:10])
    save(image_grid([*made, *meant], [*captions, *['']*len(meant)], columns=len(made), side=96), out/'failures.png')

def plot_curves(folder, out):
    "The trainings of a checkpoint, from its logs"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    def log(name): return [json.loads(line) for line in (folder/f'{name}-log.jsonl').read_text().splitlines()]
    def over_all():  # scores over all examples that the language model was trained on, in its three logs
        seen = 0
        for name, examples in (('llm', 16), ('llm-rare', 16), ('llm-long', 128)):
            lines = log(name)
            yield from ({**line, 'step': (seen + examples*line['step'])/1000} for line in lines)
            seen += examples*lines[-1]['step']
    generated = ['train_pixels_accuracy', 'held_out_pixels_accuracy']
    panels = [[('autoencoder: mean squared error', log('autoencoder'), ['loss']),
               ('held-out images, PSNR in dB', log('autoencoder'), ['psnr_db'])],
              [('text: loss', log('text'), ['loss']), ('perplexity of held-out text', log('text'),
                                                       ['text_perplexity_held_out'])],
              [('tokenizer: losses of flow and codes', log('tokenizer'), ['flow_loss', 'code_loss']),
               ('held-out images, PSNR in dB', log('tokenizer'), ['psnr_db'])],
              [('decoder-long: loss', log('decoder-long'), ['loss']), ('held-out images, SSIM', log('decoder-long'),
                  ['ssim'])],
              [('llm and llm-on: loss', log('llm'), ['loss']), ('top-1 retrieval, pixels', log('llm'), generated)],
              [('llm-long: loss, captions count more', log('llm-long'), ['loss']),
               ('the same over all thousands of examples', list(over_all()), generated)]]
    figure, axes = plt.subplots(2, 6, figsize=(17, 4.2), dpi=80, layout='constrained')
    for column, pair in zip(axes.T, panels):
        for axis, (title, lines, keys), style in zip(column, pair, ('-', 'o-')):
            for key in keys:
                axis.plot(*zip(*[(line['step'], line[key]) for line in lines if key in line]), style, ms=3, lw=1,
                          label=key)
            if len(keys) > 1: axis.legend(fontsize=6)
            axis.set_title(title, fontsize=8); axis.tick_params(labelsize=7)
            if title.startswith(('perplexity', 'autoencoder', 'tokenizer')): axis.set_yscale('log')
        column[1].set_xlabel('examples, thousands' if 'examples' in pair[1][0] else 'step', fontsize=7)
    figure.savefig(out/'training.png'); plt.close(figure)
    print(out/'training.png')

@torch.no_grad()
def id_figures(folder, same=0.02):
    "Where two images are equal, are their ids? And how many bits do the ids of squares of one colour take?"
    pipe, _, examples = open_all(folder)
    examples = [r for r in examples if r['split'] == 'train']
    x, tok = image_tensor(examples), pipe.image_tokenizer
    ids = torch.cat([tok.encode(part).cpu() for part in x.split(64)]).unflatten(1, tok.config.grid)     # (N, h, w)
    # (N, h, w, numbers of a square)
    squares = x.unflatten(2, (ids.shape[1], -1)).unflatten(4, (ids.shape[2], -1)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    same_base = {}
    for i,r in enumerate(examples): same_base.setdefault(r['base'], []).append(i)
    equal = []
    for first, *others in same_base.values():
        if len(others) < 4: continue
        for j in others:
            alike = (squares[first] - squares[j]).abs().amax(-1) < same
            equal.append((ids[first] == ids[j])[alike].float().mean())
    flat = squares.unflatten(3, (3, -1))
    flat = (flat.amax(-1) - flat.amin(-1)).amax(-1) < same
    p = torch.bincount(ids[flat], minlength=tok.config.codebook_size)/flat.sum()
    print(f'ids equal where same-base images are equal in pixels: {torch.stack(equal).nanmean():.1%}\nsquares of one colour: '
          f'{flat.float().mean():.1%}, bits in their ids: '
          f'{-torch.special.xlogy(p, p).sum()/torch.log(torch.tensor(2.)):.1f}')

def compare_settings(folder, settings, n=160):
    "Captions of the training split, sampled in several ways"
    pipe, judge, examples = open_all(folder)
    train, real = [i for i,r in enumerate(examples) if r['split'] == 'train'], image_tensor(examples)
    asked = some_captions([examples[i] for i in train], n, seed=3)
    print('| how | right in pixels | in features | empty | Fréchet ratio |\n|---|--:|--:|--:|--:|')
    for way in settings or [{}]:
        made = generate_emoji(lambda *args, **more: pipe(*args, **more, **way), [c for _,c in asked], seed=1)
        right = retrieval_scores(made, [train[i] for i,_ in asked], examples, real, judge)
        empty = ((made > 0.9).all(1).float().mean((1, 2)) > 0.97).float().mean()
        print(f"| {', '.join(f'{k}={v:g}' for k,v in way.items()) or 'as it is'} | "
              f"{right['pixels'].float().mean():.1%} | {right['features'].float().mean():.1%} | {empty:.1%} | "
              f"{frechet_of_splits(judge.features(made), judge.features(real))['frechet_ratio']:.1f} |", flush=True)

def family_figures(folder, n=384):
    "Is it those without same-base images that come out wrong?"
    pipe, judge, examples = open_all(folder)
    made, _, numbers = generate_split(pipe, 'train', n, seed=21)
    right, sizes = retrieval_scores(made, numbers, examples, image_tensor(examples), judge), Counter(r['base'] for r in examples
        if r['split'] == 'train')
    print('| images of the same base in training | generated | right in pixels | in features |\n|---|--:|--:|--:|')
    for low, high in ((1, 1), (2, 6), (7, 20), (21, 10**6)):
        mine = torch.tensor([low <= sizes[examples[i]['base']] <= high for i in numbers])
        name = low if low == high else f'{low} and more' if high == 10**6 else f'{low} to {high}'
        print(f"| {name} | {mine.sum()} | {right['pixels'][mine].float().mean():.0%} | "
              f"{right['features'][mine].float().mean():.0%} |")

def nearest_figures(folder, cache=None):
    """Root mean square differences of blurred pixels (range 2): are generated images nearer to a training image than
    real held-out ones are? `cache` keeps what was generated, `split.safetensors` with images and numbers"""
    pipe, _, examples = open_all(folder)
    real, train = image_tensor(examples), [i for i,r in enumerate(examples) if r['split'] == 'train']
    soft = blurred(real).flatten(1)
    def distance(a, b): return torch.cdist(blurred(a).flatten(1), b)/soft.shape[1]**.5
    print('| median distance | to the nearest training image | to the image of the caption | of all these the latter is nearest '
          '|\n|---|--:|--:|--:|')
    for split, n in (('train', 1792), ('held_out_compositions', 208)):  # those of `v2flow evaluate`
        kept = cache and cache/f'{split}.safetensors'
        if kept and kept.is_file(): found = read_tensors(kept)
        else:
            made, _, numbers = generate_split(pipe, split, n)
            found = dict(images=((made + 1)*127.5).round().to(torch.uint8), numbers=torch.tensor(numbers))
            if kept: write_tensors(kept, found)
        images, numbers = found['images'].float()/127.5 - 1, found['numbers'].long()
        for name, x in ((f'{len(images):,} generated, {split}', images), ('the real images of these captions', real[numbers])):
            near = distance(x, soft[train]).amin(1)
            own = (blurred(x).flatten(1) - soft[numbers]).square().mean(1).sqrt()
            print(f'| {name} | {near.median():.3f} | {own.median():.3f} | {(own <= near + 1e-3).float().mean():.0%} |', flush=True)

def setting(text):
    "guidance_scale=1.5,temperature=1 → numbers by name"
    found = {k: float(v) for k,v in (part.split('=') for part in text.split(','))}
    if not found.keys() <= {'guidance_scale', 'temperature', 'top_p', 'min_p'}: raise ValueError(text)
    return found

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=['pages', 'curves', 'ids', 'families', 'nearest', 'settings'])
    parser.add_argument('settings', nargs='*', type=setting,
                        help="of the pipeline's call, as in guidance_scale=1.5,temperature=1")
    parser.add_argument('--model', type=Path, default=Path('data/checkpoints/emoji'))
    parser.add_argument('--out', type=Path, help='where images go; the folder of the model')
    parser.add_argument('--cache', type=Path, help='nearest: where generated images are kept')
    args = parser.parse_args()
    if not args.model.is_dir(): parser.error(f'{args.model}: no such folder')
    if args.settings and args.what != 'settings': parser.error(f'{args.what} takes no settings')
    out = args.out or args.model
    out.mkdir(parents=True, exist_ok=True)
    if args.what == 'pages': write_pages(args.model, out)
    elif args.what == 'curves': plot_curves(args.model, out)
    elif args.what == 'ids': id_figures(args.model)
    elif args.what == 'families': family_figures(args.model)
    elif args.what == 'nearest': nearest_figures(args.model, args.cache)
    else: compare_settings(args.model, args.settings)

if __name__ == '__main__': main()
