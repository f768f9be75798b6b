"""What do the ids say of an emoji, before any language model reads them? Linear probes of base, skin tone and sex: trained on the training
images, asked about held-out compositions, whose bases were all seen, in other tones.

    python -m benchmarks.probes runs/tokenflow-emoji/model data/checkpoints/emoji data/checkpoints/smollm2
    python -m benchmarks.probes table

A MODEL is a folder of a `V2Flow`, of a `TokenFlow` or of a pipeline with one of them. Probed are the *map* of its codes, each in its place (of
a TokenFlow each half of it, too), and how often each code occurs, wherever it stands (*counts*). Beside them stand the pixels and the most
frequent answer. A probe is a ridge regression onto the classes; how strongly it is shrunk is chosen on a fifth of the training images. ± is the
standard error over images. Rows are added to benchmarks/probes.json."""
import argparse, json
from pathlib import Path
import torch, torch.nn.functional as F
from benchmarks.choices import read_results
from v2flow_nbdev.base.files import read_json, write_atomically
from v2flow_nbdev.base.images import to_tensor
from v2flow_nbdev.data.sources import emoji
from v2flow_nbdev.evaluation.pretrained import mean_and_error
from v2flow_nbdev.models.tokenizer import V2Flow
from v2flow_nbdev.systems.tokenflow import TokenFlow

here, asked = Path(__file__).parent, ('base', 'tone', 'sex')

def kernels(train, test):
    "Features (n, …) and (m, …), standardised by the first → their products (n, n) and (m, n), a mean of 1 on the diagonal"
    a, b = train.flatten(1).double(), test.flatten(1).double()
    mean, std = a.mean(0), a.std(0)
    a, b = ((x - mean)/std.clamp(min=1e-6) for x in (a, b))
    scale = a.square().sum(1).mean()
    return a @ a.T/scale, b @ a.T/scale

def ridge(products, asked_products, labels, classes, strength):
    "Answers of a ridge regression onto one-hot labels, with an intercept"
    wanted = F.one_hot(labels, classes).double()
    mean = wanted.mean(0)
    weights = torch.linalg.solve(products + strength*torch.eye(len(products), dtype=products.dtype), wanted - mean)
    return (asked_products @ weights + mean).argmax(1)

def probe(own, other, labels, test_labels, strengths=(1e-3, 1e-2, 1e-1, 1., 10.)):
    "From `kernels`, which of the test labels are right, (m,) bool; the strength is the best on a fifth of the training examples"
    classes, order = int(labels.max()) + 1, torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    fit, held = order[len(order)//5:], order[:len(order)//5]
    def right(strength): return (ridge(own[fit][:, fit], own[held][:, fit], labels[fit], classes, strength) == labels[held]).float().mean()
    return ridge(own, other, labels, classes, max(strengths, key=right)) == test_labels

def numbered(values, among):
    "Labels as numbers; -1 for one that training has not"
    number = {v: i for i,v in enumerate(sorted({*among}))}
    return torch.tensor([number.get(v, -1) for v in values])

def counts(ids, k): return torch.zeros(len(ids), k).scatter_add(1, ids, torch.ones_like(ids, dtype=torch.float))

def coarser(maps): return F.adaptive_avg_pool2d(maps, 8) if maps.shape[-1] > 8 else maps

@torch.no_grad()
def features_of(tok, images):
    "What of an image tokenizer's ids is probed: name → features (B, …)"
    ids = torch.cat([tok.encode(part).cpu() for part in images.split(64)])
    if isinstance(tok, TokenFlow):
        maps, semantic = torch.cat([tok.quantizer.codes_to_map(part) for part in ids.split(64)]), tok.quantizer.dims[0]
        found = dict(map=maps, semantic=maps[:, :semantic], pixel=maps[:, semantic:])
    else: found = dict(map=tok.quantizer.codebook[ids].mT.unflatten(2, tok.config.grid))
    return {k: coarser(v) for k,v in found.items()} | dict(counts=counts(ids, tok.config.codebook_size))

def image_tokenizer(folder):
    "Of a pipeline its tokenizer"
    folder = Path(folder)
    folder = folder/'image_tokenizer' if (folder/'image_tokenizer').is_dir() else folder
    return (TokenFlow if read_json(folder/'config.json').get('_class_name') == 'TokenFlow' else V2Flow).from_pretrained(folder)

def scores(train, test, examples, held_out):
    "Accuracy and standard error of each question"
    found, products = {}, kernels(train, test)
    for k in asked:
        known = [r[k] for r in examples]
        right = probe(*products, numbered(known, known), numbered([r[k] for r in held_out], known))
        found[k], found[f'{k}_se'] = mean_and_error(right.numpy(), range(len(right)))
    return found

def measure(models, results):
    "A row for each model and what is probed of it"
    examples, held_out = emoji('train'), emoji('held_out_compositions')
    x, y = (to_tensor([r['image'] for r in some], 3) for some in (examples, held_out))
    rows = read_results(results)
    def keep(name, what, train, test):
        rows[:] = [r for r in rows if (r['model'], r['probed']) != (name, what)]
        rows.append(dict(model=name, probed=what, numbers=train[0].numel(), n=len(held_out)) | scores(train, test, examples, held_out))
        with write_atomically(results) as new: new.write_text(json.dumps(rows, indent=1) + '\n', encoding='utf-8')
        print(rows[-1], flush=True)
    if not any(r['model'] == 'pixels' for r in rows): keep('pixels', '', x, y)
    for folder in models:
        tok = image_tokenizer(folder)
        train, test = (features_of(tok, images) for images in (x, y))
        name = Path(folder).parent.name if Path(folder).name == 'model' else Path(folder).name
        for what in train: keep(name, what, train[what], test[what])

def table(rows):
    "Markdown"
    held_out = emoji('held_out_compositions')
    def floor(k): values = [r[k] for r in held_out]; return max(values.count(v) for v in {*values})/len(values)
    lines = ['| probed | numbers | ' + ' | '.join(asked) + ' |', '|---|--:|' + '--:|'*len(asked),
             '| the most frequent answer | | ' + ' | '.join(f'{100*floor(k):.1f} %' for k in asked) + ' |']
    for r in rows:
        lines.append(f"| {r['model']}{', ' + r['probed'] if r['probed'] else ''} | {r['numbers']:,} | "
                     + ' | '.join(f"{100*r[k]:.1f} ± {100*r[f'{k}_se']:.1f} %" for k in asked) + ' |')
    return '\n'.join(lines)

def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('models', nargs='+', help='folders; or `table`'); p.add_argument('--results', type=Path, default=here/'probes.json')
    args = p.parse_args(argv)
    if args.models == ['table']: return print(table(read_results(args.results)))
    try: measure(args.models, args.results)
    except OSError as e: p.error(str(e))

if __name__ == '__main__': main()
