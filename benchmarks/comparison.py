"""Which half of V²Flow does what? {codes of its own, codes among a vocabulary} × {regression, masked flow decoder}, everything else equal,
at 256, 64 and 16 tokens of 2,048 codes (2,816, 704 and 176 bits), with three seeds; between k-means codes and the autoencoder alone.

    python -m benchmarks.comparison                        # every row that is missing; stop it at any time
    python -m benchmarks.comparison plan                   # steps, FLOPs and parameters of each cell; nothing is trained
    python -m benchmarks.comparison run --data emoji --tokens 16 --systems kmeans plain_vq v2flow --seeds 0
    python -m benchmarks.comparison table                  # scores, and paired differences with their intervals
    python -m benchmarks.comparison plot                   # comparison.png: rate–distortion, rate–perception
    python -m benchmarks.comparison sheet --data emoji --tokens 64    # comparison-emoji-64.png: the same 12 images through all
    python -m benchmarks.comparison run --steps 8 --lrs 1e-3 --seeds 0 --results /tmp/short.json --out /tmp/short      # how long a step takes

*Systems* (chapter 71_plainvq). `plain_vq`: codes of their own, regression. `own_flow`: codes of their own, flow. `vocabulary_regression`.
`v2flow`. `kmeans`: as many k-means codes of latents, decoded by the nearest code. `autoencoder`: no codes at all.
Only where `--systems` names them: `projected`, `simvq` (72_projected: a frozen table, of tokens or random, times a trained map; regression);
`titok`, `titok_flow` (73_titok: as many latent tokens without a grid, in two stages); `flextok` (74_flextok: a sequence of which every prefix
decodes; its first 64 and 16 ids of 256 are lines of their own); `dito` (75_dito: a flow of the whole image alone).

*Budget.* `--steps` are those of `v2flow`; every other cell gets as many as make its training FLOPs equal. Two stages share this budget: the
first has the steps until codes are frozen, 40 %, the second the rest; `plan` says what that is in FLOPs. *Tuning*: seed 0 at each of `--lrs`; the
other seeds at the one whose restored dev images are nearest in the judge's features. Test images are scored, never chosen by. *Scores* of a test
image: PSNR, SSIM, mean squared error of latents, perceptual distance in the teacher's tower, its part of the unbiased kernel distance in the tower's
features (`kernel`), and whether the judge is right. The flow is scored at noise 0.25 and 1.

A run's model is kept in runs/comparison, its row is added to benchmarks/comparison.json; those already there are not run again. Commands for different data
or systems may run side by side, each with OMP_NUM_THREADS=1."""
import argparse, base64, hashlib, json, re, shutil, subprocess, time
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
import numpy as np, torch, torch.nn.functional as F
from v2flow_nbdev.base.files import find_data, write_atomically
from v2flow_nbdev.base.locks import only_writer
from v2flow_nbdev.base.images import image_grid, to_pil, to_tensor
from v2flow_nbdev.base.random import ShardedGenerator
from v2flow_nbdev.data.cache import cache_latents
from v2flow_nbdev.data.judge import judge as judge_scene
from v2flow_nbdev.data.shapes import shapes
from v2flow_nbdev.data.sources import emoji
from v2flow_nbdev.evaluation.emoji import emoji_judge
from v2flow_nbdev.evaluation.metrics import fidelity, nearest_codes, plain_codes
from v2flow_nbdev.evaluation.pairs import kernel_distances, paired_interval
from v2flow_nbdev.models.latents import AutoencoderLatents, PixelLatents
from v2flow_nbdev.models.masked import sample_mask_ratio
from v2flow_nbdev.models.quantizer import codebook_perplexity, codebook_usage
from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
from v2flow_nbdev.models.tokenizer_training import TokenizerTrainingConfig
from v2flow_nbdev.models.vocabulary import Vocabulary
from v2flow_nbdev.systems.dito import DiTo, DiToTraining
from v2flow_nbdev.systems.flextok import FlexTok, FlexTokTraining
from v2flow_nbdev.systems.plainvq import ComparedTraining, PlainVQ, RegressionTraining, regression_decoding
from v2flow_nbdev.systems.projected import Projected, SimVQ
from v2flow_nbdev.systems.teacher import Teacher
from v2flow_nbdev.systems.titok import TiTok, TiTokFlowTraining, TiTokTraining
from v2flow_nbdev.training.loop import train
from v2flow_nbdev.training.config import TrainConfig
from v2flow_nbdev.training.tokenizer_recipes import Numbered, stack_latents

here = Path(__file__).parent
cells = dict(plain_vq=(PlainVQ, RegressionTraining), own_flow=(PlainVQ, ComparedTraining),
             vocabulary_regression=(V2Flow, RegressionTraining), v2flow=(V2Flow, ComparedTraining))
systems = ('kmeans', *cells, 'autoencoder')               # which are run where none are named
cells |= dict(projected=(Projected, RegressionTraining), simvq=(SimVQ, RegressionTraining), titok=(TiTok, TiTokTraining),
              titok_flow=(TiTok, TiTokFlowTraining), flextok=(FlexTok, FlexTokTraining),
              dito=(DiTo, DiToTraining))
rates = {256: 1, 64: 2, 16: 4}   # tokens → `pool`, on 16×16 latents
names = {'kmeans': 'k-means codes', 'plain_vq': 'own codes, regression (plain VQ)', 'own_flow': 'own codes, flow',
         'vocabulary_regression': 'vocabulary, regression', 'v2flow': 'vocabulary, flow (V²Flow)',
         'projected': 'projected tokens, regression (TA-Tok)', 'simvq': 'projected random vectors, regression (SimVQ)',
         'titok': 'sequence, regression (TiTok)', 'titok_flow': 'sequence, flow', 'flextok': 'sequence of prefixes, flow (FlexTok)',
         'dito': 'own codes, flow of the image (DiTo)',
         'autoencoder': 'autoencoder alone'}             # in the order of a table
temperatures = (0.25, 1.)        # noise at which the flow is scored; the first is compared, and tuned on
measures = dict(psnr_db='PSNR, dB', ssim='SSIM', latent_mse='latents, MSE', perceptual='perceptual', kernel='kernel · 10³',
                accuracy='judge, %')
scales = dict(kernel=1e3, accuracy=100)

@dataclass
class Settings:
    "What all runs share, and results depend on"
    steps:int=450            # of `v2flow`; the others get as many FLOPs
    batch_size:int=32
    lrs:tuple=(1e-3, 2e-3)   # tried with seed 0
    codebook_size:int=2048
    resampler_width:int=96
    resampler_depth:int=2
    dim:int=96               # of the decoder
    depth:int=3
    heads:int=2
    velocity_width:int=128
    velocity_depth:int=3
    n_draws:int=2
    n_iter:int=8             # rounds of the flow's decoding
    n_steps:int=10
    n_train:int=6000         # images at most
    n_test:int=300           # of test, and of dev, at most

# ---- data

@dataclass(repr=False)
class Task:
    "A data set on its latents, and what its restored images are measured with"
    name:str
    latents:torch.nn.Module   # the autoencoder
    vocabulary:Vocabulary
    train:torch.utils.data.Dataset  # {'latents', 'number'}
    test:list                 # examples
    dev:list
    judge:torch.nn.Module     # chooses
    teacher:torch.nn.Module   # reports
    flops:dict=field(default_factory=dict)  # of a step, see `step_flops`

    def images(self, examples): return to_tensor([r['image'] for r in examples], 3)

    @cached_property
    def real(self):
        "(images, latents, the teacher's features) of test and dev, by name"
        def of(examples):
            x = self.images(examples)
            return SimpleNamespace(images=x, latents=torch.cat([self.latents.encode(p) for p in x.split(64)]),
                                   features=self.features(x))
        return dict(test=of(self.test), dev=of(self.dev))

    @cached_property
    def train_latents(self):
        "Of all training images: k-means is fitted to them, and codes are counted on them"
        return torch.stack([r['latents'] for r in map(self.train.__getitem__, range(len(self.train)))])

    def features(self, images):
        "The teacher's, of norm √D"
        found = self.teacher.embed_images(images)
        return found*found.shape[1]**0.5

    def right(self, images):
        "Is each test image recognised? (n,) bool"
        if self.name == 'shapes':
            return [judge_scene(im, r['scene'])['all'] for im,r in zip(to_pil(images), self.test)]
        return [said == r['base'] for said,r in zip(self.judge.predict(images)['base'], self.test)]

def make_task(data, settings, cache):
    "Load a data set; its latents are computed once and kept"
    n, m = settings.n_train, settings.n_test
    folder = find_data(f'checkpoints/{data}')/'image_tokenizer'
    if data == 'emoji':
        train, test, dev = (emoji(s) for s in ('train', 'held_out_bases', 'held_out_compositions'))
        latents = AutoencoderLatents.from_pretrained(folder/'autoencoder')
        train, test, dev = train[:n], test[:m], dev[:m]
    else:
        train, test, dev = shapes('train', n, 32), shapes('test', m, 32)[:], shapes('test', m, 32, 1)[:]
        latents = PixelLatents.fit(to_tensor([train[i]['image'] for i in range(min(n, 500))], 3), 2)
    cached = cache_latents(train, latents, Path(cache)/f'latents-{data}-{len(train)}', progress=False)
    return Task(data, latents, Vocabulary.load(folder), Numbered(cached), test, dev, emoji_judge(),
                Teacher.from_pretrained(find_data('checkpoints/teacher')))

# ---- a cell: its shape, cost and training

def has_flow(system):
    "Does it decode by a flow, whose noise is a choice?"
    return system in cells and not issubclass(cells[system][1], RegressionTraining)

def shape_of(task, s, tokens, system):
    "The image tokenizer's config"
    a, pixels = task.latents, isinstance(task.latents, PixelLatents)
    decoding = dict(n_iter=s.n_iter, n_steps=s.n_steps, temperature=temperatures[0]) if has_flow(system) else regression_decoding
    return V2FlowConfig(image_size=(16*a.patch_size,)*2, image_channels=3, patch_size=a.patch_size,
                        latent_channels=0 if pixels else a.channels, latent_scale=a.scale, latent_shift=a.shift, pool=rates[tokens],
                        vocab_size=len(task.vocabulary), vocab_dim=task.vocabulary.embeddings.shape[1],
                        resampler_width=s.resampler_width, resampler_depth=s.resampler_depth, codebook_size=s.codebook_size,
                        codebook_decay=0.8**(tokens/256),    # the EMA is over as many vectors, whatever a batch has
                        dim=s.dim, depth=s.depth, heads=s.heads, velocity_width=s.velocity_width, velocity_depth=s.velocity_depth, **decoding)

def lesson_of(task, s, tokens, system, seed):
    "An untrained cell. All of one seed begin with the same parameters where they have the same: in the 2×2 all but the readout"
    kind, lesson = cells[system]
    def new(kind):
        torch.manual_seed(seed)
        return kind(shape_of(task, s, tokens, system), task.vocabulary if kind is V2Flow or issubclass(kind, Projected) else None,
                    task.latents if isinstance(task.latents, AutoencoderLatents) else None)
    tok, first = new(kind), dict(new(V2Flow).named_parameters())
    with torch.no_grad():
        for name, p in tok.named_parameters():
            if name in first and p.shape == first[name].shape: p.copy_(first[name])
    torch.manual_seed(seed)
    lesson = lesson(tok, TokenizerTrainingConfig(noise=0., code_dropout=0., n_draws=s.n_draws))
    lesson.examples = task.train
    return lesson

def step_flops(task, s, tokens, system):
    "FLOPs of a step in each phase of a run (before codes, codes learn, codes frozen), and the fraction of the run that each takes"
    from torch.utils.flop_counter import FlopCounterMode
    if (key := (tokens, system, json.dumps(asdict(s)))) in task.flops: return task.flops[key]
    (kind, lesson), c = cells[system], shape_of(task, s, tokens, system)
    with torch.device('meta'):                               # counted, not computed
        lesson = lesson(kind(c), TokenizerTrainingConfig(noise=0., code_dropout=0., n_draws=s.n_draws)).train()
        if kind is V2Flow: lesson.tok.vocab = torch.empty(c.vocab_size, c.vocab_dim)
        z, ids = torch.empty(s.batch_size, c.channels, *c.latent_grid), torch.zeros(s.batch_size, tokens, dtype=torch.long)
    t, n = lesson.config, z.shape[2:].numel()
    hidden = round(n*np.mean([sample_mask_ratio(t.mask_ratio_min, generator=torch.Generator().manual_seed(i)) for i in range(500)]))
    found = []
    for ready, progress in ((False, 0.), (True, t.quantize_from), (True, t.freeze_codes_at)):
        lesson.tok.quantizer.initialised = torch.tensor(ready)
        lesson.before_step(progress)
        with FlopCounterMode(display=False) as counter:
            lesson.losses(z, c.tau, 0., 0, hidden, ShardedGenerator(), ids if lesson.frozen else None)[0].backward()
        found.append(counter.get_total_flops())
    task.flops[key] = found, (t.quantize_from, t.freeze_codes_at - t.quantize_from, 1 - t.freeze_codes_at)
    return task.flops[key]

def flops_a_step(task, s, tokens, system):
    "Training FLOPs of a step, the mean over a run"
    return float(np.dot(*step_flops(task, s, tokens, system)))

def steps_of(task, s, tokens, system):
    "As many as make the FLOPs those of `v2flow` in `s.steps`"
    return max(1, round(s.steps*flops_a_step(task, s, tokens, 'v2flow')/flops_a_step(task, s, tokens, system)))

def parameters_of(tok, regression):
    "Of encoder and decoder, as far as they are trained; codes, and the map that makes them, are not counted"
    def count(*parts, but=()): return sum(p.numel() for part in parts for n,p in part.named_parameters() if not n.startswith(but))
    idle = ('null_code', 'latent_in', 'is_latent', 'input.weight') if regression else ('null_code',)
    return dict(encoder=count(tok.resampler), decoder=count(tok.masked, tok.velocity, but=idle))

def train_cell(task, s, tokens, system, seed, lr, folder):
    "Train a cell, or go on where it was stopped; its folder is `folder/model`"
    kind, steps = cells[system][0], steps_of(task, s, tokens, system)
    if not (folder/'model'/'config.json').exists():
        config = TrainConfig(steps=steps, batch_size=s.batch_size, lr=lr, seed=seed, evaluate_every=0, checkpoint_every=0.2,
                             save_total_limit=1, trackers=())
        lesson = lesson_of(task, s, tokens, system, seed)
        tok = train(lesson, task.train, config, stack_latents, out=folder, resume=True, progress=False).tok
        tok.save_pretrained(folder/'model', torch.float16)
        shutil.rmtree(folder/'checkpoints', ignore_errors=True)
    return kind.from_pretrained(folder/'model')

# ---- scores

class KMeans:
    "As many codes, found by k-means on latents, called as the others are"
    def __init__(self, task, s, tokens, seed):
        self.pool, self.side = rates[tokens], 16
        self.codes = plain_codes(F.pixel_unshuffle(task.train_latents, self.pool), s.codebook_size, seed)

    def encode(self, latents):
        flat = F.pixel_unshuffle(latents, self.pool).flatten(2).mT.contiguous()
        return torch.cdist(flat, self.codes.expand(len(flat), -1, -1)).argmin(-1)

    def decode_latents(self, ids):
        side = self.side//self.pool
        return F.pixel_shuffle(self.codes[ids].mT.unflatten(2, (side, side)), self.pool)

@torch.no_grad()
def restored(system, tok, task, latents, temperature=None, kept=None):
    "Latents → latents through a system, or through its first ids"
    if system == 'autoencoder': return latents
    out, generator = [], torch.Generator().manual_seed(0)
    for z in latents.split(64):
        if system == 'kmeans': out.append(tok.decode_latents(tok.encode(z)))
        else: out.append(tok.decode_latents(tok.encode(latents=z)[:, :kept], temperature=temperature, generator=generator))
    return torch.cat(out)

def to_images(task, z): return torch.cat([task.latents.decode(part) for part in z.split(64)])

@torch.no_grad()
def image_scores(task, z):
    "Scores of each restored test image, by name, (n,)"
    real, back = task.real['test'], to_images(task, z)
    return dict(fidelity(back, real.images), latent_mse=(z - real.latents).square().flatten(1).mean(1),
                perceptual=torch.cat([task.teacher.perceptual_distance(a, b)
                                      for a,b in zip(back.split(64), real.images.split(64))]),
                kernel=kernel_distances(real.features, task.features(back)),
                accuracy=torch.tensor(task.right(back)).float())

@torch.no_grad()
def dev_distance(task, z):
    "How far restored dev images are in the judge's features, a mean of squared distances of unit vectors"
    a, b = (F.normalize(task.judge.features(x), dim=-1) for x in (task.real['dev'].images, to_images(task, z)))
    return (a - b).square().sum(1).mean().item()

def milliseconds(work, images):
    "An image, the median of three"
    def once():
        began = time.time(); work(); return time.time() - began
    return round(1e3*float(np.median([once() for _ in range(3)]))/images, 3)

def variants(system, tokens):
    "How it restores images, name → (noise, how many of the ids); the first is what is chosen and compared"
    prefixes = [n for n in rates if n < tokens] if system == 'flextok' and tokens == max(rates) else []
    return {system + f'[:{k}]'*(k < tokens) + '@1'*(t == 1): (t, k)
            for k in (tokens, *prefixes) for t in (temperatures if has_flow(system) else (None,))}

def scores_of(task, system, tok, tokens, codebook_size):
    "What a row says of a trained system"
    row, z16 = dict(scores={}, images={}), task.real['test'].latents[:16]
    for name, how in variants(system, tokens).items():
        each = image_scores(task, restored(system, tok, task, task.real['test'].latents, *how))
        row['scores'][name] = {k: round(v.double().mean().item(), 6) for k,v in each.items()}
        row['images'][name] = {k: pack(v) for k,v in each.items()}
    row['dev'] = round(dev_distance(task, restored(system, tok, task, task.real['dev'].latents, *variants(system, tokens)[system])), 6)
    if system == 'autoencoder': return row
    encode = tok.encode if system == 'kmeans' else lambda z: tok.encode(latents=z)
    ids, some = torch.cat([encode(z) for z in task.train_latents.split(64)]), encode(z16)
    for name, (_, kept) in variants(system, tokens).items(): row['scores'][name] |= spent(ids[:, :kept], codebook_size)
    return row | dict(encode_ms=milliseconds(lambda: encode(z16), len(z16)),
                      decode_ms=milliseconds(lambda: tok.decode_latents(some), len(z16)))

def spent(ids, codebook_size):
    "What ids of training images use of a codebook; bits by the entropy over all places"
    perplexity = codebook_perplexity(ids, codebook_size)
    return dict(usage=round(codebook_usage(ids, codebook_size), 4), perplexity=round(perplexity, 2),
                bits_spent=round(ids.shape[1]*float(np.log2(perplexity)), 1))

def pack(x): return base64.b64encode(np.asarray(x, np.float16).tobytes()).decode()

def unpack(text): return np.frombuffer(base64.b64decode(text), np.float16).astype(float)

# ---- a run, and many

def machine():
    "What this is measured on"
    from benchmarks import bench
    return bench.machine()

def commit():
    "Of the code; `+` where this file or the library was changed"
    def git(*args): return subprocess.run(['git', *args], cwd=here, capture_output=True, text=True).stdout.strip()
    return git('rev-parse', '--short=8', 'HEAD') + '+'*bool(git('status', '--porcelain', '-uno', 'comparison.py', '../v2flow_nbdev'))

def read_results(path): return json.loads(Path(path).read_text()) if Path(path).exists() else []

def same(run, **wanted): return all(run.get(k) == v for k,v in wanted.items())

def key_of(task, s, tokens, system, seed, lr):
    "What a row is known by"
    about = {k: v for k,v in asdict(s).items() if k not in ('lrs', 'n_train', 'n_test')}
    return dict(data=task.name, tokens=tokens if system != 'autoencoder' else 0, system=system, seed=seed, lr=lr,
                n_train=len(task.train), n_test=len(task.test), settings=about)

def folder_of(out, key):
    "Where a run's model is kept: other settings, another folder"
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:6]
    return Path(out)/f"{key['data']}-{key['tokens']}-{key['system']}-seed{key['seed']}-lr{key['lr']:g}-{digest}"

def open_system(task, s, tokens, system, seed, lr, out):
    "The trained system of a run; it is trained if it is not there"
    if system == 'autoencoder': return None
    if system == 'kmeans': return KMeans(task, s, tokens, seed)
    return train_cell(task, s, tokens, system, seed, lr, folder_of(out, key_of(task, s, tokens, system, seed, lr)))

def run_once(task, s, tokens, system, seed, lr, results, out):
    "The row of a run, from the file if it is there"
    key = key_of(task, s, tokens, system, seed, lr)
    if known := [r for r in read_results(results) if same(r, **key)]: return known[0]
    began, row = (time.time(), time.process_time()), dict(key)
    tok = open_system(task, s, tokens, system, seed, lr, out)
    row |= dict(seconds=round(time.time() - began[0], 1), cpu_seconds=round(time.process_time() - began[1], 1))   # of training
    if system in cells:
        steps = steps_of(task, s, tokens, system)
        row |= dict(steps=steps, train_flops=steps*flops_a_step(task, s, tokens, system),
                    parameters=parameters_of(tok, not has_flow(system)))
    row |= dict(scores_of(task, system, tok, tokens, s.codebook_size), commit=commit(), machine=machine())
    with only_writer(out, progress=False), write_atomically(Path(results)) as tmp:       # several commands may run side by side
        tmp.write_text(json.dumps(read_results(results) + [row], ensure_ascii=False).replace('}, {"data"', '},\n{"data"') + '\n',
                       encoding='utf-8')
    found = row['scores'][system]
    print(f"{task.name} {tokens:>3} {system:>21} seed {seed} lr {lr:g}: {found['psnr_db']:.2f} dB, SSIM {found['ssim']:.3f}, perceptual "
          f"{found['perceptual']:.4f}, usage {found.get('usage', 0):.0%}, {row['seconds']:.0f} s, {row['cpu_seconds']:.0f} s of CPU", flush=True)
    return row

def chosen_lr(found, system, **key):
    "The learning rate with the nearest dev images at seed 0; `ValueError` where there is no run"
    tried = {r['lr']: r['dev'] for r in found if same(r, system=system, seed=0, **key)}
    if not tried: raise ValueError(f"{key.get('data')}, {key.get('tokens')} tokens, {system}: no run with seed 0 yet")
    return min(tried, key=tried.get)

def run_all(task, s, tokens, of, seeds, results, out):
    "Seed by seed; within a seed rate by rate. Seed 0 at all learning rates, the others at the chosen one"
    for seed in sorted(seeds):
        for n in tokens:
            for system in of:
                if system == 'autoencoder' and (seed or n != tokens[0]): continue    # nothing in it is random
                about = key_of(task, s, n, system, seed, 0.)
                about = {k: about[k] for k in ('data', 'tokens', 'n_train', 'n_test', 'settings')}
                lrs = (0.,) if system not in cells else s.lrs if seed == 0 else (
                    chosen_lr(read_results(results), system, **about),)
                for lr in lrs: run_once(task, s, n, system, seed, lr, results, out)

# ---- what was found

def groups(found):
    "(data, settings as text) → {(tokens, system) → rows at the chosen learning rate, by seed}"
    out = {}
    for r in found: out.setdefault((r['data'], r['n_test'], json.dumps(r['settings'])), []).append(r)
    for group, rows in out.items():
        chosen = {}
        for tokens, system in dict.fromkeys((r['tokens'], r['system']) for r in rows):
            try: lr = chosen_lr(rows, system, tokens=tokens)
            except ValueError: continue
            chosen[tokens, system] = {r['seed']: r for r in rows if same(r, tokens=tokens, system=system, lr=lr)}
        yield group[0], chosen

def lines_of(chosen, tokens):
    "(system, variant name, rows by seed) for each line of a table; the first ids of more come after as many of their own"
    for system in names:
        for n in (0,) if system == 'autoencoder' else sorted(r for r in rates if r >= tokens):
            for variant, (_, kept) in variants(system, n).items():
                if kept in (tokens, 0) and (rows := chosen.get((n, system))): yield system, variant, rows

def parts(variant):
    "flextok[:64]@1 → system, how many of the ids, noise; None for what is not said"
    return re.fullmatch(r'(\w+)(?:\[:(\w*)\])?(?:@(\w+))?', variant).groups()

def label(variant):
    "What a table calls it"
    system, kept, noise = parts(variant)
    return names[system] + (f', the first {kept} of {max(rates)}' if kept else '') + (f', noise {noise}' if noise else '')

def shown(k, v, sign=''): return f"{v*scales.get(k, 1):{sign}.{dict(psnr_db=2, ssim=3, accuracy=1, kernel=2).get(k, 4)}f}"

def table(found):
    "Markdown: means over images and seeds"
    out = []
    for data, chosen in groups(found):
        out += [f"**{data}**", '', '| tokens | system | seeds | ' + ' | '.join(measures.values())
                + ' | usage | perplexity | bits spent | parameters | PFLOP | steps | ms to encode, decode |',
                '|--:|---|--:|' + '--:|'*(len(measures) + 7)]
        for tokens in rates:
            for system, variant, rows in lines_of(chosen, tokens):
                def mean(get): return np.mean([get(r) for r in rows.values()])
                line = [f'{tokens}', label(variant), f'{len(rows)}',
                        *(shown(k, mean(lambda r: r['scores'][variant][k])) for k in measures)]
                if system == 'autoencoder': line += ['']*7
                else:
                    p = next(iter(rows.values())).get('parameters')
                    of = {k: mean(lambda r: r['scores'][variant][k]) for k in ('usage', 'perplexity', 'bits_spent')}
                    line += [f"{of['usage']:.0%}", f"{of['perplexity']:.0f}",
                             f"{of['bits_spent']:.0f} of {tokens*np.log2(next(iter(rows.values()))['settings']['codebook_size']):.0f}",
                             f"{sum(p.values())/1e6:.2f} M" if p else '',
                             f"{mean(lambda r: r['train_flops'])/1e15:.2f}" if p else '',
                             f"{mean(lambda r: r['steps']):.0f}" if p else '',
                             f"{mean(lambda r: r['encode_ms']):.1f}, {mean(lambda r: r['decode_ms']):.1f}"]
                out.append('| ' + ' | '.join(line) + ' |')
        out.append('')
    return '\n'.join(out)

compared = [('V²Flow − plain VQ', 'v2flow', 'plain_vq'), ('V²Flow − k-means', 'v2flow', 'kmeans'),
            ('codes: vocabulary − own, with the flow', 'v2flow', 'own_flow'),
            ('codes: vocabulary − own, with the regression', 'vocabulary_regression', 'plain_vq'),
            ('decoder: flow − regression, own codes', 'own_flow', 'plain_vq'),
            ('decoder: flow − regression, vocabulary', 'v2flow', 'vocabulary_regression'),
            ('the same at noise 1', 'v2flow@1', 'vocabulary_regression'),
            ('codes: projected tokens − own', 'projected', 'plain_vq'), ('codes: projected random vectors − own', 'simvq', 'plain_vq'),
            ('V²Flow − projected tokens', 'v2flow', 'projected'), ('sequence − grid, regression', 'titok', 'plain_vq'),
            ('sequence − grid, flow', 'titok_flow', 'own_flow'), ('V²Flow − sequence, flow', 'v2flow', 'titok_flow'),
            ('flow of the image − masked flow', 'dito', 'own_flow'), ('the same at noise 1', 'dito@1', 'own_flow@1'),
            ('V²Flow − DiTo', 'v2flow', 'dito'), ('an order: FlexTok − sequence, flow', 'flextok', 'titok_flow'),
            ('FlexTok, the first of 256 − as many of their own', 'flextok[:]', 'flextok'), ('the same at noise 1', 'flextok[:]@1', 'flextok@1')]

def difference(chosen, tokens, a, b, measure):
    "(mean, half its 95 % interval, seeds) of paired differences over images and the seeds that both have; None: no such pair"
    of = [(system, tokens if kept is None else max(rates)) for system, kept, _ in map(parts, (a, b))]
    sides = [chosen.get((n, system), {}) for system, n in of]
    a, b = (v.replace('[:]', f'[:{tokens}]') for v in (a, b))
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds or any(v not in sides[i][seeds[0]]['images'] for i,v in enumerate((a, b))): return None
    x, y = (np.stack([unpack(rows[s]['images'][v][measure]) for s in seeds]) for v,rows in zip((a, b), sides))
    return *paired_interval(x - y), len(seeds)

def difference_table(found):
    "Markdown: paired differences; ~ where the interval holds 0"
    out = []
    for data, chosen in groups(found):
        out += [f"**{data}**: differences, ± half the 95 % interval over images and seeds; ~ where it holds 0", '',
                '| tokens | difference | seeds | ' + ' | '.join(measures.values()) + ' |', '|--:|---|--:|' + '--:|'*len(measures)]
        for tokens in rates:
            for name, a, b in compared:
                by = {k: difference(chosen, tokens, a, b, k) for k in measures}
                if None in by.values(): continue
                said = [f"{'~ '*(not abs(mean) > half)}{shown(k, mean, '+')} ± {shown(k, half)}" for k,(mean, half, _) in by.items()]
                out.append(f"| {tokens} | {name} | {by['psnr_db'][2]} | " + ' | '.join(said) + ' |')
        out.append('')
    return '\n'.join(out)

def plot(found, out):
    "Rate–distortion and rate–perception: a line for each system, a row for each data set"
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    sets, panels = list(groups(found)), ('psnr_db', 'latent_mse', 'perceptual', 'kernel')
    if not sets: raise SystemExit('no runs to plot yet')
    fig, axes = plt.subplots(len(sets), len(panels), figsize=(3.1*len(panels), 2.5*len(sets)), dpi=80, squeeze=False,
                             layout='constrained')
    lines = [v for s in sorted(names, key=lambda s: s not in systems) if s != 'autoencoder' for v in ([s, f'{s}@1'] if has_flow(s) else [s])]
    for row, (data, chosen) in zip(axes, sets):
        for ax, k in zip(row, panels):
            for i, line in enumerate([*lines, 'flextok[:]']):
                points = [(r['scores'][v]['bits_spent'], np.mean([r['scores'][v][k] for r in rows.values()])*scales.get(k, 1))
                          for n in rates for system,v,rows in lines_of(chosen, n) if re.sub(r':\d+', ':', v) == line for r in [rows[min(rows)]]]
                if points: ax.plot(*zip(*points), 'o--' if 'own' in line or line == 'plain_vq' else 'o-', ms=3, lw=1,
                                   color=plt.cm.tab20(i % 10*2 + i//10), label=label(line.replace('[:]', '[:k]')))
            if (0, 'autoencoder') in chosen and k != 'latent_mse':
                top = chosen[0, 'autoencoder'][0]['scores']['autoencoder'][k]*scales.get(k, 1)
                if top < 60: ax.axhline(top, color='gray', lw=.7, ls=':')            # pixels have no ceiling
            ax.set_xscale('log'); ax.set_title(f'{data}: {measures[k]}', fontsize=8); ax.tick_params(labelsize=7)
            ax.set_xlabel('bits spent on an image', fontsize=7)
    axes[0][0].legend(fontsize=5)
    plt.savefig(out); plt.close(fig)

def sheet(task, s, tokens, found, out, path, n=12, side=64):
    "The same images through all systems, with seed 0; line by line"
    real, chosen = task.real['test'], next((c for d,c in groups(found) if d == task.name), {})
    pick = [i*len(task.test)//n for i in range(min(n, len(task.test)))]
    images, captions = to_pil(real.images[pick]), ['the image'] + ['']*(len(pick) - 1)
    for system, variant, rows in lines_of(chosen, tokens):
        row = rows[min(rows)]
        tok, how = open_system(task, s, row['tokens'], system, row['seed'], row['lr'], out), variants(system, row['tokens'])[variant]
        images += to_pil(to_images(task, restored(system, tok, task, real.latents[pick], *how)))
        captions += [label(variant).replace('²', '2')] + ['']*(len(pick) - 1)
    image_grid(images, captions, len(pick), side).save(path)

def plan(task, s, tokens):
    "Markdown: what each cell takes"
    out = ['| data | tokens | system | GFLOP a step | steps | PFLOP | until codes are frozen | encoder, decoder, M parameters |',
           '|---|--:|---|--:|--:|--:|--:|--:|']
    for n in tokens:
        for system in cells:
            flops, steps = flops_a_step(task, s, n, system), steps_of(task, s, n, system)
            *first, _ = np.multiply(*step_flops(task, s, n, system))                  # stages 1 and 2, where there are two
            p = parameters_of(lesson_of(task, s, n, system, 0).tok, not has_flow(system))
            out.append(f"| {task.name} | {n} | {names[system]} | {flops/1e9:.1f} | {steps} | {steps*flops/1e15:.3f} | "
                       f"{sum(first)/flops:.0%} | {p['encoder']/1e6:.2f}, {p['decoder']/1e6:.2f} |")
    return '\n'.join(out)

def arguments(argv):
    "What a user types"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', nargs='?', default='run', choices=['run', 'plan', 'table', 'plot', 'sheet'])
    p.add_argument('--data', nargs='+', default=['emoji', 'shapes'], choices=['emoji', 'shapes'])
    p.add_argument('--tokens', nargs='+', type=int, default=list(rates), choices=list(rates))
    p.add_argument('--systems', nargs='+', default=list(systems), choices=list(names))
    p.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    p.add_argument('--steps', type=int, default=Settings.steps, help='of v2flow; the others get as many FLOPs')
    p.add_argument('--lrs', nargs='+', type=float, default=list(Settings.lrs), help='learning rates tried with seed 0')
    p.add_argument('--out', default='runs/comparison', help='where models and latents are kept')
    p.add_argument('--results', default=str(here/'comparison.json'))
    return p.parse_args(argv)

def main(argv=None):
    args = arguments(argv)
    found, results = read_results(args.results), Path(args.results)
    if args.what in ('table', 'plot') and not found: raise SystemExit(f'{results}: no runs yet; `python -m benchmarks.comparison` makes them')
    if args.what == 'table':
        text = table(found) + '\n' + difference_table(found)
        with write_atomically(results.with_suffix('.md')) as new: new.write_text(text + '\n', encoding='utf-8')
        return print(text)
    if args.what == 'plot': return plot(found, results.with_suffix('.png'))
    s = Settings(steps=args.steps, lrs=tuple(args.lrs))
    for data in args.data:
        task = make_task(data, s, args.out)
        if args.what == 'plan': print(plan(task, s, args.tokens))
        elif args.what == 'sheet':
            for n in args.tokens: sheet(task, s, n, found, args.out, results.with_name(f'{results.stem}-{data}-{n}.png'))
        else: run_all(task, s, args.tokens, args.systems, args.seeds, results, args.out)

if __name__ == '__main__': main()
