"""What guided writing of images costs a language model: `generate_image_ids` beside what one would do without it, in one run.

    python -m benchmarks.generation                      the table, and benchmarks/generation.json
    python -m benchmarks.generation --compile            one setting with a static cache and compiled, too
    python -m benchmarks.generation --device cuda

For B images, the forms below take turns after a warm-up, so that whatever else the machine does meets all alike:

    guided       `generate_image_ids` with guidance: both branches in one batch of 2·B rows
    plain 2·B    `model.generate`, greedy, of the same 2·B prompts and as many words, without our processor: the network and `generate` alone
    two passes   guidance as one would write it first: two calls of the model for each word, each with its own cache of keys and values
    unguided     `generate_image_ids` without guidance, B rows
    plain B      `model.generate` of the same B prompts

guided / plain 2·B is what our processor adds, and it is also timed alone, inside `generate`; two passes / guided is what the one batch
gains. The bound is the time to read the weights once per word at the bandwidth of summing 1 GB: less is only possible from the
processor's caches. The model is an untrained LLaMA of 6.9M weights with 1,024 visual tokens: speed does not depend on training"""
import argparse, json, math, os, statistics, time
from pathlib import Path
import torch
import torch.nn.functional as F
from benchmarks import bench
from v2flow_nbdev.base.files import write_atomically
from v2flow_nbdev.language.generation import VisualTokenProcessor, left_pad, generate_image_ids
from v2flow_nbdev.language.visual_tokens import VisualTokens, add_visual_tokens
from v2flow_nbdev.language.text_models import first_id, small_llama, train_text_tokenizer
from v2flow_nbdev.models.resampler import gumbel
from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
from v2flow_nbdev.models.vocabulary import Vocabulary

here = Path(__file__).resolve().parent

def captions_of(n, seed=0):
    "n captions of twelve invented words each"
    g = torch.Generator().manual_seed(seed)
    syllables = [c + v for c in 'bdfgklmnprstvz' for v in 'aeiou']
    return [' '.join(''.join(syllables[i] for i in word) for word in torch.randint(len(syllables), (12, 3),
        generator=g)) for _ in range(n)]

def small_model(words=4000, codes=1024, grids=((8, 8), (16, 16)), device='cpu', **shape):
    "(LLaMA, text tokenizer), untrained, with visual tokens; float32, one table for reading and writing"
    torch.manual_seed(0)
    tokenizer = train_text_tokenizer(captions_of(words//2), words)
    shape = dict(hidden_size=256, num_hidden_layers=7, num_attention_heads=4, intermediate_size=704) | shape
    llm = small_llama(tokenizer, max_length=max(map(math.prod, grids)) + 128, tie_word_embeddings=True, **shape)
    vocabulary = Vocabulary(tokenizer.convert_ids_to_tokens(range(len(tokenizer))),
                            llm.get_input_embeddings().weight.detach().clone())
    tok = V2Flow(V2FlowConfig(codebook_size=codes, image_size=tuple(2*n for n in grids[0])), vocabulary)
    tok.quantizer.initialised.fill_(True)
    add_visual_tokens(llm, tokenizer, tok, grids=grids)
    return llm.to(device).eval(), tokenizer

# The other forms

def prompts(model, tokenizer, captions, grid, guided=False):
    "The batch that `generate_image_ids` makes of captions: (B or 2·B, L)"
    begin, bos = VisualTokens.of(model).begin(grid), first_id(tokenizer)
    examples = [[bos, *c, begin] for c in tokenizer(captions, add_special_tokens=False).input_ids]
    return left_pad(examples + [[bos, begin]]*len(examples)*guided, model.device)

def plain(model, tokenizer, captions, grid, guided=False):
    "Greedy `model.generate` of as many words, of any kind, without any logits processor"
    settings = dict(do_sample=False, max_new_tokens=math.prod(grid), eos_token_id=None, suppress_tokens=None,
                    pad_token_id=tokenizer.pad_token_id, disable_compile=True)
    return model.generate(**prompts(model, tokenizer, captions, grid, guided), **settings)[:, -math.prod(grid):]

@torch.no_grad()
def two_passes(model, tokenizer, captions, grid, guidance_scale=2., generator=None):
    "Ids as `generate_image_ids` writes them, (B, N), by two calls of the model per word: with the caption, and without"
    words, ids = VisualTokens.of(model), []
    both = [dict(prompts(model, tokenizer, c, grid), use_cache=True, logits_to_keep=1)
            for c in (captions, ['']*len(captions))]
    for branch in both: branch['position_ids'] = (branch['attention_mask'].cumsum(1) - 1).clamp(min=0)
    for _ in range(math.prod(grid)):
        logits = []
        for branch in both:
            out = model(**branch)
            branch['past_key_values'] = out.past_key_values
            logits.append(out.logits[:, -1, words.first:words.first + words.codebook_size].log_softmax(-1))
        mixed = torch.lerp(logits[1], logits[0], guidance_scale)
        ids.append((mixed + gumbel(mixed.shape, generator, mixed.device)).argmax(-1, keepdim=True))
        for branch in both:
            branch.update(input_ids=words.first + ids[-1], attention_mask=F.pad(branch['attention_mask'], (0, 1),
                value=1), position_ids=branch['position_ids'][:, -1:] + 1)
    return torch.cat(ids, 1)

# How it is measured

def seconds(f, device):
    "(time of one call, what it returns)"
    if device == 'cuda': torch.cuda.synchronize()
    start, out = time.perf_counter(), f()
    if device == 'cuda': torch.cuda.synchronize()
    return time.perf_counter() - start, out

def processor_share(f, device):
    "Run f, a `generate_image_ids`: time in `VisualTokenProcessor.choose` over all other time"
    real, spent = VisualTokenProcessor.choose, []
    def call(*args):
        took, out = seconds(lambda: real(*args), device)
        spent.append(took)
        return out
    VisualTokenProcessor.choose = call
    try: whole = seconds(f, device)[0]
    finally: VisualTokenProcessor.choose = real
    return sum(spent)/(whole - sum(spent))

def bandwidth(device, size=2**28, runs=7):
    "Bytes a second that summing `size` float32 numbers reads, at best"
    x = torch.ones(size, device=device)
    return x.nbytes/min(seconds(x.sum, device)[0] for _ in range(runs))

def weights_read(model):
    "Bytes of weights that a step reads: every parameter once; of a table that only embeds, next to nothing"
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(p.nbytes for p in model.parameters()) - (0 if head is table else table.nbytes)

def measure(model, tokenizer, batch, grid, rounds, rate, **more):
    """One row of the table: each form's best time, the processor's share in the median round, the bound; `more`:
    name → settings of `generate_image_ids`"""
    device, captions, n = model.device.type, captions_of(batch, seed=1), math.prod(grid)
    def draws(): return torch.Generator(device).manual_seed(0)
    def ours(scale, **how):
        return generate_image_ids(model, tokenizer, captions, guidance_scale=scale, grid=grid, generator=draws(), **how)
    forms = {'guided': lambda: ours(2.), 'plain_2b': lambda: plain(model, tokenizer, captions, grid, True),
             'two_passes': lambda: two_passes(model, tokenizer, captions, grid, generator=draws()),
             'unguided': lambda: ours(1.), 'plain_b': lambda: plain(model, tokenizer, captions, grid),
             **{name: lambda how=how: ours(2., **how) for name, how in more.items()}}
    for form in forms.values(): form()                                              # the warm-up
    turns = [({name: seconds(form, device)[0] for name, form in forms.items()},
              processor_share(forms['guided'], device)) for _ in range(rounds)]
    def digits(x): return float(f'{x:.4g}')
    return dict(batch=batch, tokens=n, seconds={name: digits(min(t[name] for t,_ in turns)) for name in forms},
                share=digits(statistics.median(s for _,s in turns)),
                bound=digits(weights_read(model)/rate*n/batch))

def table(examples):
    "Rows of `measure` as a table in Markdown"
    lines = ['| images at once | visual tokens | images/s | s per image | at least, s | ms per token | guided / '
             'plain 2·B | processor | unguided / plain B | two passes / guided |', '|' + '--:|'*10]
    for r in examples:
        s, n = r['seconds'], r['batch']
        lines.append(f"| {n} | {r['tokens']} | {n/s['guided']:.3g} | {s['guided']/n:.3g} | {r['bound']:.2g} | "
                     f"{1e3*s['guided']/r['tokens']:.3g} "
                     f"| {s['guided']/s['plain_2b']:.3f} | {r['share']:.1%} | {s['unguided']/s['plain_b']:.3f} | "
                     f"{s['two_passes']/s['guided']:.2f} |")
    return '\n'.join(lines)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=here/'generation.json')
    p.add_argument('--device', default='cpu', choices=['cpu', 'cuda']); p.add_argument('--compile', action='store_true')
    p.add_argument('--rounds', type=int, default=5)
    p.add_argument('--batches', type=int, nargs='+', default=[1, 4, 16])
    p.add_argument('--sides', type=int, nargs='+', default=[8, 16], choices=[8, 16])
    args = p.parse_args()
    if 'OMP_NUM_THREADS' not in os.environ: torch.set_num_threads(2)
    bench.cuda = args.device == 'cuda'                                              # what `machine` describes
    model, tokenizer = small_model(device=args.device)
    rate, cached = bandwidth(args.device), bandwidth(args.device, weights_read(model)//4, 99)
    found = dict(machine=bench.machine().replace('one of', f'{torch.get_num_threads()} threads on'),
                 parameters=sum(q.numel() for q in model.parameters()), bytes=weights_read(model),
                 bandwidth=rate, cached=cached, rounds=args.rounds, examples=[])
    print(f"{found['machine']}; {found['parameters']/1e6:.2f}M parameters, {found['bytes']/1e6:.1f} MB a step; "
          f"{rate/1e9:.1f} GB/s over 1 GB, {cached/1e9:.1f} GB/s over as much as the weights", flush=True)
    for side in args.sides:
        for batch in args.batches:
            found['rows'].append(measure(model, tokenizer, batch, (side, side), args.rounds, rate))
            print(found['rows'][-1], flush=True)
    if args.compile:
        s = measure(model, tokenizer, 4, (8, 8), args.rounds, rate, static_cache=dict(static_cache=True),
                    compiled=dict(compile=True))['seconds']
        found['compiled'] = s
        print(f"4 images of 64 words: static cache {s['static_cache']/s['guided']:.3f}, compiled "
              f"{s['compiled']/s['guided']:.3f} × guided")
    with write_atomically(args.out) as tmp:
        tmp.write_text(json.dumps(found, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    print(f"\n{table(found['rows'])}")

if __name__ == '__main__': main()
