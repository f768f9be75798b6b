"""Does it help a *pretrained* language model that the codes lie among its token embeddings? SmolLM2 learns to write images
from ten starts of its new embeddings, everything else equal: parameters, order of batches, captions drawn, LoRA's start.

    python -m benchmarks.pretrained_alignment screen digits --tokenizer runs/smollm2-digits-tokenizer/model
    python -m benchmarks.pretrained_alignment screen emoji --tokenizer runs/smollm2-tokenizer-64/model --modes lora --seeds 1 --starts codebook rotated rotated_covariance semantic semantic_shuffled
    python -m benchmarks.pretrained_alignment test digits --tokenizer runs/smollm2-digits-tokenizer/model
    python -m benchmarks.pretrained_alignment test emoji --tokenizer runs/smollm2-tokenizer-64/model
    python -m benchmarks.pretrained_alignment table
    python -m benchmarks.pretrained_alignment plot
    python -m benchmarks.pretrained_alignment run digits --tokenizer … --modes lora --starts codebook random --results /tmp/found.json

*Starts* (see `starting_embeddings`). `codebook`: the codes. `rotated`: the codes under a rotation around the tokens' mean, a new one for
each seed: the same geometry without the alignment. `rotated_covariance`: the same in the space where the tokens' covariance is a ball, so that
what is rotated stays in the ellipsoid that the tokens fill. `shuffled`: the codes, each at another's index. `plain`: no vocabulary: the mean
of the latents that became a code, through a fixed random projection. `gaussian`: a normal distribution with the tokens' mean and covariance.
`random`: random directions. `mean`: all in the tokens' mean. `semantic`: a code is the mean of the embeddings of the caption's tokens with which it
occurs more often than by chance. `semantic_shuffled`. All but `gaussian` and `mean` are at the tokens' mean distance from their mean.

*A run*: 40 steps of 32 sequences, <bos> caption <image> → ids; constant learning rates after 5 steps of warm-up. The loss is over visual
tokens alone, each chosen among the new tokens (the paper: among all, which takes longer and adds to every start the same lesson, that an image is
no text). Input and output embeddings are one table, as in SmolLM2. Trained are the new embeddings and LoRA (`lora`), the new embeddings
(`rows`), or these and all of the body (`all`). *Measure*: nats for each visual token on held-out sequences, the mean of the losses after
steps 10, 20, 30, 40. *Rates* are chosen for each start with seed 0 on one half of the held-out sequences (dev); all that is reported is of the
other half. `test` has seeds of its own. Each run is added to benchmarks/pretrained_alignment.json; those already there are not run again, so
it can be stopped at any time."""
import argparse, json, time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from einops import rearrange
from v2flow_nbdev.base.files import read_tensors, write_atomically, write_tensors
from v2flow_nbdev.base.gguf import llm_folder
from v2flow_nbdev.base.images import to_tensor
from v2flow_nbdev.data.cache import encode_dataset
from v2flow_nbdev.data.sources import augment, digits, emoji
from v2flow_nbdev.language.pipeline import load_llm
from v2flow_nbdev.language.text_models import first_id
from v2flow_nbdev.language.visual_tokens import initial_embeddings
from v2flow_nbdev.models.tokenizer import V2Flow

here = Path(__file__).parent
starts = ('codebook', 'rotated', 'rotated_covariance', 'shuffled', 'plain', 'gaussian', 'random', 'mean', 'semantic',
          'semantic_shuffled')
# (of the body, of the new embeddings); 3e-4 and 1e-2 for the body, 1.6e-2 for the rows were worse in first runs of `codebook`
rates = dict(lora=[(1e-3, 4e-3), (3e-3, 1e-3), (3e-3, 4e-3)],
             rows=[(0., row) for row in (1e-3, 4e-3, 1.6e-2)],
             all=[(lr, row) for lr in (1e-4, 3e-4) for row in (1e-3, 4e-3)])
test_seeds = range(10, 18)  # none of screening's
warmup, rank, alpha = 5, 16, 32.

# ---- what the new embeddings start as

def covariance_roots(
    table,  # (V, E)
):          # mean (E,), square root of the covariance and its inverse (both (E, E)); float64
    "Directions without variance stay without"
    x = table.double()
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    root = values.clamp_min(0).sqrt()
    inverse = torch.where(root > 1e-4*root.max(), 1/root.clamp_min(1e-30), 0.)
    return x.mean(0), (vectors*root) @ vectors.T, (vectors*inverse) @ vectors.T

def pointwise_weights(
    ids,       # (n, N), of the images that the captions are of
    captions,  # for each image the token ids of its captions, lists of lists
    K,         # codes
    V,         # text tokens
):             # (tokens that occur (T,), weights (K, T)): p(token | code) · max(0, log p(token | code)/p(token))
    "A code's tokens, by positive pointwise mutual information; a token that all captions have gets 0"
    found = sorted({t for cs in captions for c in cs for t in c}); place = {t: i for i,t in enumerate(found)}
    said, drawn = torch.zeros(len(ids), len(found)), torch.zeros(len(ids), K)
    for row, cs in zip(said, captions):
        row += torch.tensor([place[t] for c in cs for t in c]).bincount(minlength=len(found))/len(cs)
    counts = (drawn.scatter_add_(1, ids, torch.ones_like(ids, dtype=torch.float32)).T @ said).double()
    given = counts/counts.sum(1, keepdim=True).clamp_min(1e-30)
    prior = counts.sum(0)/counts.sum()
    return torch.tensor(found), given*(given/prior).clamp_min(1e-30).log().clamp_min(0)

def code_latents(
    latents,  # (n, C, h, w)
    ids,      # (n, N)
    K,
):            # (K, C·p·p) for tokens of p×p latents; zeros for a code that never occurs; the mean over codes is 0
    "The mean of the latents that became each code: what plain k-means would have, with the same ids"
    p = int((latents.shape[2]*latents.shape[3]//ids.shape[1])**.5)
    x = rearrange(latents.double(), 'n c (h p) (w q) -> (n h w) (c p q)', p=p, q=p)
    sums = torch.zeros(K, x.shape[1], dtype=torch.float64).index_add_(0, ids.flatten(), x)
    counts = ids.flatten().bincount(minlength=K)[:, None]
    means = sums/counts.clamp_min(1)
    return (means - means[counts[:, 0] > 0].mean(0))*(counts > 0)

def starting_embeddings(
    start,         # one of `starts`
    codes,         # unit vectors, (K, E)
    table,         # embeddings of the text tokens, (V, E)
    seed,          # of what is random in it
    plain=None,    # of `code_latents`
    meaning=None,  # of `semantic`, (K, E): sums of centred embeddings with the weights of `pointwise_weights`
):                 # (K, E) float32
    "See above"
    centre, generator = table.mean(0), torch.Generator().manual_seed(seed)
    length = (table - centre).norm(dim=-1).mean()
    around = lambda directions: (centre + length*F.normalize(directions.float(), dim=-1)).float()
    if start in ('codebook', 'rotated', 'random', 'mean'): return initial_embeddings(codes, centre, length, start, seed)
    if start == 'rotated_covariance':
        _, root, inverse = covariance_roots(table)
        square = torch.randn(codes.shape[1], codes.shape[1], generator=generator, dtype=torch.float64)
        return around(codes.double() @ inverse @ torch.linalg.qr(square).Q @ root)
    if start == 'gaussian':
        mean, root, _ = covariance_roots(table)
        return (mean + torch.randn(codes.shape, generator=generator, dtype=torch.float64) @ root).float()
    if start == 'plain':
        fixed = torch.randn(plain.shape[1], codes.shape[1], generator=torch.Generator().manual_seed(0))
        return around(plain.float() @ fixed)
    if start == 'semantic': return around(meaning)
    other = dict(shuffled=codes, semantic_shuffled=meaning).get(start)
    if other is None: raise ValueError(f"start={start!r}: use one of {', '.join(starts)}")
    return around(other[torch.randperm(len(other), generator=generator)])

# ---- the language model's body

def linear(
    x,       # (B, L, I)
    w,       # one matrix or several, one under the other: (O, I)
    a=None,  # LoRA's first matrices, one for each, under each other: (n·rank, I)
    bs=(),   # its second matrices, (O_i, rank) each
):           # (B, L, O)
    "Several linear layers of one input as one product, with LoRA (`peft` computes the same)"
    y = F.linear(x, w.to(x.dtype))
    if a is None: return y
    parts = F.linear(x, a.to(x.dtype)).chunk(len(bs), -1)
    return y + torch.cat([F.linear(p, (alpha/rank*b).to(x.dtype)) for p,b in zip(parts, bs)], -1)

def norm(x, w, eps, dtype):
    return (x*torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)*w.float()).to(dtype)

def layer(
    x,         # (B, L, E) float32
    cos, sin,  # of rotary positions, (L, D)
    mask,      # (L, L), 0 or -inf
    w,         # norm 1, q k v, out, norm 2, gate up, down
    low,       # for each of the four products (a, bs) of `linear`
    heads,     # (of queries, of keys and values)
    eps, dtype,
):
    """A LLaMA layer. Queries that share a key stand in one matrix; scores by plain products, whose backward is faster
    on a CPU than SDPA's"""
    (B, L, _), D, (n, kv) = x.shape, cos.shape[-1], heads
    q, k, v = (rearrange(t, 'b l (h d) -> b h l d', d=D)
               for t in linear(norm(x, w[0], eps, dtype), w[1], *low[0]).split([n*D, kv*D, kv*D], -1))
    def turn(t): return (t*cos + torch.cat([-t[..., D//2:], t[..., :D//2]], -1)*sin).to(dtype)
    q, k = rearrange(turn(q)*D**-.5, 'b (k g) l d -> b k (g l) d', k=kv), turn(k)
    scores = (q @ k.transpose(-1, -2)).float().view(B, kv, n//kv, L, L) + mask
    mixed = scores.softmax(-1).to(dtype).view(B, kv, -1, L) @ v
    x = x + linear(rearrange(mixed, 'b k (g l) d -> b l (k g d)', l=L), w[2], *low[1])
    gate, up = linear(norm(x, w[3], eps, dtype), w[4], *low[2]).chunk(2, -1)
    return x + linear(F.silu(gate)*up, w[5], *low[3])

class Body:
    "The layers of a LLaMA of `transformers`, compiled once: all layers, runs and starts share one graph"
    def __init__(self, llm, dtype, compiled):
        c, model = llm.config, llm.model
        plain = c.tie_word_embeddings and not c.attention_bias and not c.mlp_bias and c.hidden_act == 'silu'
        if c.model_type != 'llama' or not plain:
            raise ValueError(f"{c.model_type}: needs a LLaMA with one table for input and output, and no biases")
        self.table, self.dtype, self.eps = model.embed_tokens.weight.detach().to(dtype), dtype, c.rms_norm_eps
        self.heads = c.num_attention_heads, c.num_key_value_heads
        self.norm, self.rotary = model.norm.weight.detach(), model.rotary_emb
        def of(l):
            a, m = l.self_attn, l.mlp
            return [l.input_layernorm.weight, (a.q_proj, a.k_proj, a.v_proj), (a.o_proj,),
                    l.post_attention_layernorm.weight, (m.gate_proj, m.up_proj), (m.down_proj,)]
        parts = [of(l) for l in model.layers]
        self.shapes = [[tuple(m.weight.shape) for m in p] for p in parts[0] if isinstance(p, tuple)]
        def joined(p): return torch.cat([m.weight for m in p]) if isinstance(p, tuple) else p
        self.layers = [tuple(joined(p).detach().to(dtype) for p in l) for l in parts]
        self.layer = torch.compile(layer, dynamic=False) if compiled else layer

    def adapters(self, seed):
        "LoRA for all linear layers as `peft` starts it: (a, bs) for each product of each layer; float32"
        generator = torch.Generator().manual_seed(seed)
        def one(shapes):
            I = shapes[0][1]
            a = (2*torch.rand(len(shapes)*rank, I, generator=generator) - 1)/I**.5
            return a.requires_grad_(), tuple(torch.zeros(o, rank, requires_grad=True) for o,_ in shapes)
        return [tuple(one(s) for s in self.shapes) for _ in self.layers]

    def states(self, x, layers=None, low=None, norm_weight=None):
        "Embeddings (B, L, E) float32 → last states, `dtype`"
        L = x.shape[1]
        cos, sin = (t[0] for t in self.rotary(x, torch.arange(L)[None]))
        mask = torch.full((L, L), -torch.inf).triu(1)
        for w, l in zip(layers or self.layers, low or [((),)*4]*len(self.layers)):
            x = self.layer(x, cos, sin, mask, w, l, self.heads, self.eps, self.dtype)
        return norm(x, self.norm if norm_weight is None else norm_weight, self.eps, self.dtype)

# ---- the task: sequences, and what starts need

@dataclass
class Task:
    "All that runs share"
    data:str
    key:dict              # what results depend on besides start, seed and rates
    body:Body
    codes:torch.Tensor    # unit vectors, (K, E)
    table:torch.Tensor    # embeddings of the text tokens, (V, E)
    train:tuple           # ids (n, N) and for each image the token ids of its captions
    held_out:tuple        # the same
    bos:int
    length:int            # of all sequences, that no graph is made twice
    plain:torch.Tensor    # of `code_latents`
    meaning:torch.Tensor  # directions of `semantic`

    def batch(self, ids, captions):
        """Inputs (B, L), codes to predict (B, N), and where the state before each is (B, N). Token V + i is new
        embedding i; V + K opens an image"""
        B, N, V = *ids.shape, len(self.body.table)
        inputs, at = torch.zeros(B, self.length, dtype=torch.long), torch.zeros(B, 1, dtype=torch.long)
        for i, (x, c) in enumerate(zip(ids, captions)):
            sequence = torch.tensor([self.bos, *c, V + len(self.codes)])
            at[i] = len(sequence) - 1
            inputs[i, :at[i] + N] = torch.cat([sequence, V + x[:-1]])
        return inputs, ids, at + torch.arange(N)

    def losses(self, rows, inputs, ids, at, **trained):
        "Nats of each visual token, (B, N). What is padded stands behind, where no token looks"
        V, body = len(self.body.table), self.body
        x = torch.where((inputs < V)[..., None], F.embedding(inputs.clamp(max=V - 1), body.table).float(),
                        F.embedding((inputs - V).clamp(min=0), rows))
        states = body.states(x, **trained)
        states = states.gather(1, at[..., None].expand(-1, -1, states.shape[-1]))
        return F.cross_entropy(F.linear(states, rows.to(body.dtype)).float().transpose(1, 2), ids, reduction='none')

def new_embeddings(task, start, seed):
    "(K + 2, E): the codes' start; the tokens that open and close an image start in the mean"
    rows = starting_embeddings(start, task.codes, task.table, seed, task.plain, task.meaning)
    return torch.cat([rows, task.table.mean(0).expand(2, -1)]).contiguous()

def examples_of(data, copies):
    "Training and held-out examples"
    if data == 'digits': return dict(train=augment(digits('train'), copies), test=digits('test'))
    return {split: emoji(split) for split in ('train', 'held_out_compositions')}

def make_task(data, tokenizer, llm='smollm2', cache='runs/pretrained_alignment', copies=8, compiled=True,
              dtype=torch.bfloat16, examples=None, steps=40, batch_size=32):
    "Load the model once; ids are computed once and kept"
    tok, cache = V2Flow.from_pretrained(tokenizer), Path(cache)
    sets = examples or examples_of(data, copies)
    found = {name: encode_dataset(s, tok, cache/f'ids-{name}', progress=False) for name,s in sets.items()}
    model, text = load_llm(llm_folder(llm), dtype, 'eager')
    body = Body(model, dtype, compiled)
    of = lru_cache(maxsize=None)(lambda caption: text(caption, add_special_tokens=False).input_ids)
    def tokens(encoded):
        rows = [encoded[i] for i in range(len(encoded))]
        return torch.stack([r['ids'].flatten() for r in rows]), [[of(c) for c in r['captions']] for r in rows]
    train, held_out = map(tokens, found.values())
    codes, table = tok.quantizer.codebook.detach().cpu().float(), tok.open_vocabulary().embeddings
    path = cache/f'latents-of-codes-{tok.codebook_checksum}-{len(train[0])}.safetensors'
    if not path.is_file():
        c, images = tok.config, [r['image'] for r in sets['train']]
        latents = torch.cat([tok.to_latents(to_tensor(images[i:i + 64], c.image_channels, c.image_size))
                             for i in range(0, len(images), 64)])
        write_tensors(path, dict(means=code_latents(latents, train[0], len(codes)).float()))
    at, weights = pointwise_weights(*train, len(codes), len(body.table))
    meaning = weights @ (body.table[at].double() - table.mean(0))
    longest = max(len(c) for _, captions in (train, held_out) for cs in captions for c in cs)
    key = dict(data=data, llm=str(llm), codebook=tok.codebook_checksum, examples=len(train[0]), steps=steps,
               batch_size=batch_size)
    return Task(data, key, body, codes, table, train, held_out, first_id(text), longest + 1 + train[0].shape[1],
                read_tensors(path)['means'], meaning)

# ---- a run, and many

def nats(task, rows, **trained):
    "Mean loss on each half of the held-out sequences (dev, report)"
    ids, captions = task.held_out
    each, size = [], task.key['batch_size']
    with torch.no_grad():
        for i in range(0, len(ids), size):
            some = [j % len(ids) for j in range(i, i + size)]        # batches of one size: one graph
            said = [captions[j][j % len(captions[j])] for j in some]
            each.append(task.losses(rows, *task.batch(ids[some], said), **trained).mean(1))
    each = torch.cat(each)[:len(ids)]
    return each[::2].mean().item(), each[1::2].mean().item()

def trained_parts(task, mode, seed):
    "(what `losses` takes besides the new embeddings, its parameters)"
    body = task.body
    if mode == 'rows': return {}, []
    if mode == 'lora':
        low = body.adapters(seed)
        return dict(low=low), [p for l in low for a,bs in l for p in (a, *bs)]
    layers = [tuple(w.float().clone().requires_grad_() for w in l) for l in body.layers]
    last = body.norm.float().clone().requires_grad_()
    return dict(layers=layers, norm_weight=last), [*(w for l in layers for w in l), last]

def one_run(task, start, mode, seed, lr, row_lr, points=4):
    "Train from one start; losses on held-out sequences at `points` parts of the run"
    (ids, captions), (trained, parameters) = task.train, trained_parts(task, mode, seed)
    rows = new_embeddings(task, start, seed).requires_grad_()
    groups = [dict(params=[rows], lr=row_lr)] + ([dict(params=parameters, lr=lr)] if parameters else [])
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0., fused=True)
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1., (s + 1)/warmup))
    generator, steps, curve = torch.Generator().manual_seed(seed), task.key['steps'], []
    began = time.time(), time.process_time()
    def one_of(n): return torch.randint(n, (1,), generator=generator).item()
    for step in range(1, steps + 1):
        some = torch.randint(len(ids), (task.key['batch_size'],), generator=generator)
        said = [captions[i][one_of(len(captions[i]))] for i in some.tolist()]
        task.losses(rows, *task.batch(ids[some], said), **trained).mean().backward()
        torch.nn.utils.clip_grad_norm_([rows, *parameters], 1.)
        optimizer.step(); optimizer.zero_grad(set_to_none=True); warm.step()
        if step % max(1, steps//points) == 0: curve.append(nats(task, rows, **trained))
    dev, report = ([round(x, 5) for x in half] for half in zip(*curve))
    return dict(task.key, mode=mode, start=start, seed=seed, lr=lr, row_lr=row_lr, dev=dev, report=report,
                seconds=round(time.time() - began[0], 1), cpu_seconds=round(time.process_time() - began[1], 1))

def same(run, **wanted): return all(run[k] == v for k,v in wanted.items())

def run_once(task, results, **how):
    "The run, from the file if it is there"
    found = read_results(results)
    known = [r for r in found if same(r, **task.key, **how)]
    if known: return known[0]
    run = one_run(task, **how)
    with write_atomically(Path(results)) as tmp:
        tmp.write_text(json.dumps(found + [run]).replace('}, {', '},\n{') + '\n')
    print(f"{run['data']} {run['mode']} {run['start']:>18} seed {run['seed']:>2} at {run['lr']:g}, {run['row_lr']:g}: "
          f"{np.mean(run['report']):.4f}, at the end {run['report'][-1]:.4f} ({run['seconds']:.0f} s, "
          f"{run['cpu_seconds']:.0f} s of CPU)", flush=True)
    return run

def read_results(path): return json.loads(Path(path).read_text()) if Path(path).exists() else []

def chosen_rates(found, mode, start, **key):
    "(lr, row_lr) with the lowest dev loss at seed 0; `ValueError` unless all were tried"
    tried = {(r['lr'], r['row_lr']): np.mean(r['dev']) for r in found if same(r, mode=mode, start=start, seed=0, **key)}
    if missing := set(rates[mode]) - set(tried):
        raise ValueError(f"{key.get('data')}, {mode}, {start}: {len(missing)} learning rates are not tried yet; "
                         f"`screen` first")
    return min(tried, key=tried.get)

def screen(task, results, modes, of, seeds):
    "Seed 0 at all rates; the other seeds at the best"
    for mode in modes:
        for start in of:
            for lr,row_lr in rates[mode]: run_once(task, results, start=start, mode=mode, seed=0, lr=lr, row_lr=row_lr)
        for seed in range(1, seeds):
            for start in of:
                lr, row_lr = chosen_rates(read_results(results), mode, start, **task.key)
                run_once(task, results, start=start, mode=mode, seed=seed, lr=lr, row_lr=row_lr)

def better_semantic(found, mode, **key):
    "`semantic` or its shuffle, by dev loss over the seeds of screening"
    def loss(start):
        lr, row_lr = chosen_rates(found, mode, start, **key)
        return np.mean([r['dev'] for r in found if same(r, mode=mode, start=start, lr=lr, row_lr=row_lr, **key)
                        and r['seed'] not in test_seeds])
    return min(('semantic', 'semantic_shuffled'), key=loss)

def test(task, results, mode, seeds=test_seeds):
    "The test that was registered: four starts, paired seeds"
    found = read_results(results)
    of = ['codebook', 'rotated', 'rotated_covariance', better_semantic(found, mode, **task.key)]
    at = {start: chosen_rates(found, mode, start, **task.key) for start in of}
    for seed in seeds:
        for start in of:
            run_once(task, results, start=start, mode=mode, seed=seed, lr=at[start][0], row_lr=at[start][1])

# ---- what was found

def interval(x):
    "Mean, and the half width of its 95 % t-interval"
    from scipy.stats import t
    x = np.asarray(x)
    return x.mean(), t.ppf(0.975, len(x) - 1)*x.std(ddof=1)/len(x)**.5 if len(x) > 1 else np.nan

def sequences_saved(codebook, other, steps, batch_size):
    """By how many sequences sooner `codebook` has the loss that the other start ends at (negative: later), between the
    points of the two mean curves; at most from the first point to the last"""
    if codebook[-1] > other[-1]: return -sequences_saved(other, codebook, steps, batch_size)
    at = np.linspace(steps/len(codebook), steps, len(codebook))
    return batch_size*(steps - np.interp(other[-1], np.minimum.accumulate(codebook)[::-1], at[::-1]))

def groups_of(found):
    "(what the runs share, mode, phase, its runs, all runs of that mode) for each group"
    names, groups = ('data', 'llm', 'codebook', 'examples', 'steps', 'batch_size'), {}
    for r in found: groups.setdefault((*(r[n] for n in names), r['mode']), []).append(r)
    for (*values, mode), runs in groups.items():
        for phase in ('screen', 'test'):
            some = [r for r in runs if (r['seed'] in test_seeds) == (phase == 'test')]
            yield dict(zip(names, values)), mode, phase, some, runs

def summary(found):
    "One row for each start and group, at the rates chosen. Differences are to `codebook`, seed by seed"
    out = []
    for key, mode, phase, some, runs in groups_of(found):
        curves, rates_of = {}, {}
        for start in starts:
            try: rates_of[start] = lr, row_lr = chosen_rates(runs, mode, start)
            except ValueError: continue
            curves[start] = {r['seed']: np.array(r['report']) for r in some
                             if same(r, start=start, lr=lr, row_lr=row_lr)}
        base = curves.get('codebook', {})
        for start, mine in ((s, c) for s,c in curves.items() if c):
            row = dict(key, mode=mode, phase=phase, start=start, rates=rates_of[start], differences=[], saved=0.,
                       loss=[c.mean() for c in mine.values()], end=np.mean([c[-1] for c in mine.values()]))
            if start != 'codebook' and (both := sorted(set(mine) & set(base))):
                row['differences'] = [mine[s].mean() - base[s].mean() for s in both]
                curve = lambda of: np.mean([of[s] for s in both], 0)
                row['saved'] = sequences_saved(curve(base), curve(mine), key['steps'], key['batch_size'])
            out.append(row)
    return out

def table(found):
    "Markdown"
    lines = ['| data | trained | | start | rates | loss | at the end | minus codebook, 95 % | sequences saved |',
             '|---|---|---|---|---|--:|--:|--:|--:|']
    for r in summary(found):
        n = len(r['loss'])
        error = f" ± {np.std(r['loss'], ddof=1)/n**.5:.3f}" if n > 1 else ''
        mean, half = interval(r['differences']) if r['differences'] else (np.nan, np.nan)
        lines.append(f"| {r['data']} ({r['codebook'][:6]}) | {r['mode']} | {r['phase']}, {n} seeds | {r['start']} | "
                     f"{r['rates'][0]:g}, {r['rates'][1]:g} | {np.mean(r['loss']):.3f}{error} | {r['end']:.3f} | "
                     + (f"{mean:+.3f} ± {half:.3f} | {r['saved']:+.0f} |" if r['differences'] else '| |'))
    return '\n'.join(lines)

def plot(found, out):
    "Loss minus that of `codebook`, seed by seed: points; the bar is the 95 % t-interval"
    import matplotlib; matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    groups = {}
    for r in summary(found):
        if r['differences']: groups.setdefault((r['data'], r['mode'], r['phase']), []).append(r)
    if not groups: raise SystemExit('no differences to plot yet')
    fig, axes = plt.subplots(1, len(groups), figsize=(3.6*len(groups), 2.6), dpi=80, squeeze=False,
                             layout='constrained')
    for ax, (group, rows) in zip(axes[0], groups.items()):
        for i, r in enumerate(rows):
            mean, half = interval(r['differences'])
            ax.plot(r['differences'], [i]*len(r['differences']), 'o', ms=3, alpha=.5, color='tab:blue')
            ax.errorbar(mean, i, xerr=None if np.isnan(half) else half, fmt='|', color='k', capsize=3)
        ax.axvline(0, color='gray', lw=.8); ax.tick_params(labelsize=7); ax.set_title(', '.join(group), fontsize=8)
        ax.set_yticks(range(len(rows)), [r['start'] for r in rows]); ax.margins(y=.2)
        ax.set_xlabel('loss minus codebook, nats a token', fontsize=7)
    plt.savefig(out); plt.close(fig)

def arguments(argv):
    "What a user types"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('what', choices=['screen', 'test', 'run', 'table', 'plot'], help='run: single runs at given rates')
    p.add_argument('data', nargs='?', choices=['digits', 'emoji'])
    p.add_argument('--tokenizer', help='an image tokenizer over the vocabulary of the language model')
    p.add_argument('--llm', default='smollm2')
    p.add_argument('--cache', help='of ids; default: runs/pretrained_alignment/DATA')
    p.add_argument('--copies', type=int, default=8, help='moved copies of each digit')
    p.add_argument('--modes', nargs='+', default=['lora', 'rows'], choices=list(rates))
    p.add_argument('--starts', nargs='+', default=list(starts), choices=starts)
    p.add_argument('--seeds', type=int, help='default: 3 to screen, 8 to test, 1 to run')
    p.add_argument('--steps', type=int, default=40)
    p.add_argument('--lr', type=float, default=1e-3, help='of a single run')
    p.add_argument('--row-lr', type=float, default=4e-3, help='of a single run')
    p.add_argument('--results', default=str(here/'pretrained_alignment.json'))
    p.add_argument('--no-compile', action='store_true', help='no graph is made: for a few runs')
    args = p.parse_args(argv)
    if args.what not in ('table', 'plot') and not (args.data and args.tokenizer):
        p.error(f'{args.what}: needs digits or emoji, and --tokenizer')
    return args

def main(argv=None):
    args = arguments(argv)
    if args.what == 'table': return print(table(read_results(args.results)))
    if args.what == 'plot': return plot(read_results(args.results), Path(args.results).with_suffix('.png'))
    task = make_task(args.data, args.tokenizer, args.llm, args.cache or f'runs/pretrained_alignment/{args.data}',
                     args.copies, not args.no_compile, steps=args.steps)
    if args.what == 'screen': return screen(task, args.results, args.modes, args.starts, args.seeds or 3)
    if args.what == 'test': return test(task, args.results, args.modes[0], test_seeds[:args.seeds or 8])
    for seed in range(args.seeds or 1):
        for mode in args.modes:
            for start in args.starts:
                run_once(task, args.results, start=start, mode=mode, seed=seed, lr=args.lr if mode != 'rows' else 0.,
                         row_lr=args.row_lr)

if __name__ == '__main__': main()
