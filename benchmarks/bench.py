"""Ratios against the plain form, both sides in one run on the same machine: `results.json`, the table in `README.md`, `growth.png`.

    python -m benchmarks.bench            every group
    python -m benchmarks.bench resampler  one of them

On the CPU, each side of a case runs in a process of its own, both on one core, and they take turns. With a CUDA device the same goes
there, and to `results-cuda.json`; CUDA_VISIBLE_DEVICES= takes the CPU all the same"""
import ctypes, gc, json, os, platform, re, statistics, subprocess, sys, time
from dataclasses import dataclass, field
from pathlib import Path
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from benchmarks.plain import OneHotQuantizer, PlainTraining, PlainV2Flow, resample_plain
from v2flow_nbdev.models.quantizer import VectorQuantizer
from v2flow_nbdev.models.resampler import resample
from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
from v2flow_nbdev.models.tokenizer_training import TokenizerTraining, TokenizerTrainingConfig
from v2flow_nbdev.models.vocabulary import Vocabulary

here = Path(__file__).resolve().parent
cuda = torch.cuda.is_available()
device, suffix = ('cuda', '-cuda') if cuda else ('cpu', '')
sides = 'plain', 'ours'
features, width, codes = 512, 1024, 16_384    # of the resampler; of words and codes; in the codebook
mask_seed = 9                                 # its first draw hides 222 of 256 positions, the mean of the law

# What is measured: `case(side, …)` builds one side of it

@dataclass
class Case:
    "One side of a comparison, ready to run"
    run:object                                # callable (**what), the measured stretch
    warm:object                               # callable, the same on a sliver: loads what torch loads when first used
    less:int = 0                              # bytes of results that are not counted as transient
    more:dict = field(default_factory=dict)   # name → callable: other things to ask

def resampler_case(side, dtype='float32', words=32_000, tokens=1024, train=True, width=width):
    "Features (tokens, 512) → mixtures of `words` rows (tokens, width); in training with Gumbel noise, and backward"
    torch.manual_seed(0)
    def new(*shape): return torch.randn(shape, device=device).to(getattr(torch, dtype))
    x, weight, bias, vocab, grad = new(tokens, features), new(words, features)*3/features**0.5, new(words)*0, new(words,
        width), new(tokens, width)
    for t in (x, weight, bias): t.requires_grad_(train)
    f = resample_plain if side == 'plain' else resample
    def run(n=tokens):
        with torch.set_grad_enabled(train): out = f(x[:n], weight, bias, vocab, noise=float(train))
        if train: out.backward(grad[:n])
        x.grad = weight.grad = bias.grad = None
    def kept():
        "Bytes that the forward keeps for backward, beyond weights and table"
        seen = {}
        def pack(t): seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = f(x, weight, bias, vocab, noise=float(train))
        for t in (weight, bias, vocab): seen.pop(t.untyped_storage().data_ptr(), None)
        return sum(seen.values())
    return Case(run, lambda: run(16), weight.nbytes + bias.nbytes if train else 0, dict(kept=kept))

def quantizer_case(side, tokens=1024):
    "Vectors (1, tokens, 1024) → codes, and the codebook's update"
    torch.manual_seed(0)
    quantizer = (OneHotQuantizer if side == 'plain' else VectorQuantizer)(codes, width, initialised=True).to(device)
    x = torch.randn(1, tokens, width, device=device)
    def run(n=tokens):
        quantizer(x[:, :n])
        quantizer.update()
    return Case(run, lambda: run(16))

def model(side, words=32_000, compiled=False, **changes):
    "`base` over a vocabulary of `words` random rows of 1,024 numbers; 0 words: it can only decode"
    torch.manual_seed(0)
    config = V2FlowConfig.base(vocab_size=8, vocab_dim=width, codebook_size=codes, **changes)
    tok = (PlainV2Flow if side == 'plain' else V2Flow)(config, Vocabulary(['']*words, torch.randn(words, width))
                                                       if words else None).to(device)
    tok.quantizer.initialised.fill_(True)
    if compiled: tok.masked.compile(); tok.velocity.compile()
    return tok

def step_case(side, batch=4, words=32_000, compiled=False, **changes):
    """Forward, backward and the codebook's update at progress 0, in bf16 autocast; every gradient is dropped as soon
    as it is there, and there is no optimizer"""
    lesson = (PlainTraining if side == 'plain' else TokenizerTraining)(model(side, words, compiled, **changes),
        TokenizerTrainingConfig(aux_decoder_width=512)).to(device).train()
    z = torch.randn(batch, 32, 16, 16, device=device)
    for p in lesson.parameters(): p.register_post_accumulate_grad_hook(lambda p: setattr(p, 'grad', None))
    def run(n=batch):
        with torch.autocast(device, torch.bfloat16):
            loss = lesson(latents=z[:n], generator=torch.Generator().manual_seed(mask_seed)).loss
        loss.backward()
        lesson.after_step()
    def flops():
        """Of the whole batch, all of whose parts grow with it; the resampler's second look at its logits is no work
        of the model's"""
        with FlopCounterMode(display=False) as counter: run(1)
        counted = {str(op): n for op, n in counter.get_flop_counts()['Global'].items() if 'backward' not in str(op)}
        # for these two backward is twice the forward; the counter adds attention's recomputation, and overlooks a
        # convolution's groups
        total = sum(n*(3 if 'attention' in op or 'convolution' in op else 1) for op, n in counted.items())
        return batch*(total - 2*z[0, 0].numel()*words*features)
    return Case(run, lambda: run(1), more=dict(flops=flops, rate=matmul_rate))

def decode_case(side, compiled=False, **changes):
    """The ids of one image → its latents, 4 rounds of 20 steps, guidance 3, weights in bf16; any square number of
    tokens"""
    tok = model(side, 0, compiled, **changes).bfloat16().eval()
    def run(tokens=256, **how):
        n, g = int(tokens**0.5), torch.Generator().manual_seed(0)
        tok.decode_latents(torch.randint(codes, (1, tokens), device=device), (n, n),
                           **dict(n_iter=4, n_steps=20, guidance_scale=3., generator=g) | how)
    return Case(run, lambda: run(16, n_steps=2))

def encode_case(side, words=32_000):
    "The latents of one image → its ids, weights in bf16"
    # the decoder takes no part
    tok = model(side, words, dim=64, depth=1, heads=1, velocity_width=64, velocity_depth=1).bfloat16().eval()
    def run(tokens=256): tok.encode(latents=torch.randn(1, 32, int(tokens**0.5), int(tokens**0.5), device=device))
    return Case(run, lambda: run(16))

def matmul_rate(dtype=torch.bfloat16):
    "Products of square matrices, FLOP/s: what this device reaches at best"
    n = 8192 if cuda else 1024
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return 2*n**3/statistics.median(measure(Case(lambda: torch.mm(a, b, out=out), None))[0] for _ in range(20))

# How it is measured

def status(key):
    "A memory figure of this process in bytes; None where the system does not say"
    try: return 1024*int(re.search(rf'^{key}:\s+(\d+)', Path('/proc/self/status').read_text(), re.M)[1])
    except (OSError, TypeError): return None

def measure(case, **what):
    "(seconds, bytes of transient memory at its peak, or None) of one run"
    gc.collect()
    if cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        start.record(); case.run(**what); end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)/1000, torch.cuda.max_memory_allocated() - before - case.less
    try:
        ctypes.CDLL(None).malloc_trim(0)                               # what earlier runs left is not to be used again
        Path('/proc/self/clear_refs').write_text('5')                  # the peak starts anew
        before = status('VmRSS')
    except (OSError, AttributeError): before = None
    start = time.perf_counter()
    case.run(**what)
    seconds = time.perf_counter() - start
    return seconds, None if before is None else status('VmHWM') - before - case.less

def worker(name, side, options):
    "One side in a process of its own: builds the case, warms up, then answers each line of stdin with a line of JSON"
    if not cuda:
        torch.set_num_threads(1)
        if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    import benchmarks.training as more
    case = (globals().get(name) or getattr(more, name))(side, **json.loads(options))
    for _ in range(3 if cuda else 1): case.run() if cuda else case.warm()
    print('"ready"', flush=True)
    for line in sys.stdin:
        wanted, what = json.loads(line)
        print(json.dumps(measure(case, **what) if wanted == 'run' else case.more[wanted]()), flush=True)

class Pair:
    "Plain and ours, each in its process, taking turns: whatever else the machine does meets both alike"
    def __init__(self, case, **options): self.case, self.options = case.__name__, options

    def __enter__(self):
        env = os.environ | ({} if cuda else dict(OMP_NUM_THREADS='1'))
        self.workers = {side: subprocess.Popen([sys.executable, '-m', 'benchmarks.bench', 'worker', self.case, side,
                                                json.dumps(self.options)],
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=here.parent, env=env)
                        for side in sides}
        for side in sides: self.answer(side)
        return self

    def __exit__(self, *error):
        for process in self.workers.values(): process.stdin.close(); process.kill() if error[0] else process.wait()

    def answer(self, side):
        "The worker's next line"
        line = self.workers[side].stdout.readline()
        if not line: raise RuntimeError(f"{self.case}: the process of {side} ended, see its message above")
        return json.loads(line)

    def ask(self, side, wanted='run', **what):
        "One question to one side"
        print(json.dumps([wanted, what]), file=self.workers[side].stdin, flush=True)
        return self.answer(side)

    def turns(self, runs=5, seconds=40, **what):
        "Medians of some turns each: ({side: seconds}, {side: bytes}); not another turn when `seconds` are over"
        start, got = time.perf_counter(), {side: [] for side in sides}
        for _ in range(runs):
            for side in sides: got[side].append(self.ask(side, **what))
            if time.perf_counter() - start > seconds: break
        return tuple({side: statistics.median(one[i] for one in got[side]) if got[side][0][i] is not None else None
                      for side in sides} for i in range(2))

def row(name, metric, plain, ours):
    "One row of the results, to four digits"
    plain, ours, ratio = (float(f'{x:.4g}') for x in (plain, ours, ours/plain))
    print(f'{name}, {metric}: {plain:g} → {ours:g}, × {ratio:.3f}', flush=True)
    return dict(name=name, metric=metric, plain=plain, ours=ours, ratio=ratio)

def rows(name, times, memory=None):
    "The rows of time and, where it could be measured, memory"
    yield row(name, 'time, ms', *(1e3*times[side] for side in sides))
    if memory and None not in memory.values(): yield row(name, 'memory, MB', *(memory[side]/1e6 for side in sides))

# The groups: generators of rows

def resampler():
    for kind, dtype in (('fp32', 'float32'), ('bf16', 'bfloat16')):
        with Pair(resampler_case, dtype=dtype) as pair:
            yield from rows(f'resampler, forward and backward, {kind}', *pair.turns(7))
    with Pair(resampler_case, train=False) as pair: yield from rows('resampler, inference, fp32', *pair.turns(7))
    for words in (32_000, 128_256)*cuda:
        with Pair(resampler_case, dtype='bfloat16', words=words, width=4096) as pair:
            yield from rows(f'resampler, {words:,} text tokens of width 4,096, bf16', *pair.turns(7))
    kept = {}
    for words in (32_000, 128_256):
        with Pair(resampler_case, words=words) as pair: kept[words] = {side: pair.ask(side, 'kept') for side in sides}
        yield row(f'resampler, saved activations, {words:,} text tokens', 'memory, MB',
                  *(kept[words][side]/1e6 for side in sides))
    yield row('resampler, saved activations at 128,256 over 32,000 text tokens', 'quotient',
              *(kept[128_256][side]/kept[32_000][side] for side in sides))

def quantizer():
    with Pair(quantizer_case) as pair: yield from rows('quantizer, forward and update, fp32', *pair.turns(11))

def step(compiled=False):
    name = 'training step, bf16' + ', compiled'*compiled
    with Pair(step_case, compiled=compiled) as pair:
        times, memory = pair.turns(3, 75)
        yield from rows(name, times, memory)
        if compiled: return
        flops, rates = pair.ask('ours', 'flops'), {side: pair.ask(side, 'rate') for side in sides}
        print(f'{flops/1e12:.2f} TFLOP of the model')
        yield row('product of two matrices, bf16', 'TFLOP/s', *(rates[side]/1e12 for side in sides))
        yield row(name, 'arithmetic reached', *(flops/times[side]/rates[side] for side in sides))

def decode(compiled=False):
    with Pair(decode_case, compiled=compiled) as pair:
        yield from rows('decode, bf16' + ', compiled'*compiled, pair.turns(5, 50)[0])

sizes, tables = (64, 256, 1024), (8_000, 32_000, 128_256)

def slope(name, against, all_times, at):
    "The steepest piece of a curve in log–log"
    def steepest(side):
        log = [torch.tensor(v).log().item()
               for v in [t[side] for t in all_times]], [torch.tensor(float(v)).log().item() for v in at]
        return max((log[0][i+1] - log[0][i])/(log[1][i+1] - log[1][i]) for i in range(len(at) - 1))
    return row(f'growth of {name} with {against}', 'largest slope', *map(steepest, sides))

def growth():
    tokens, words = [], []
    for v in tables:
        with Pair(encode_case, words=v) as pair:
            if v == 32_000: tokens = [pair.turns(5, 15, tokens=n)[0] for n in sizes]
            words.append(tokens[sizes.index(256)] if tokens and v == 32_000 else pair.turns(5, 15, tokens=256)[0])
    with Pair(decode_case) as pair: decoding = [pair.turns(3, 10, tokens=n, n_steps=10)[0] for n in sizes]
    for n, t in zip(sizes, tokens): yield from rows(f'encode, {n:,} visual tokens, 32,000 text tokens', t)
    for v, t in zip(tables, words):
        if v != 32_000: yield from rows(f'encode, 256 visual tokens, {v:,} text tokens', t)
    for n, t in zip(sizes, decoding): yield from rows(f'decode, {n:,} visual tokens, 10 steps', t)
    yield slope('encode', 'visual tokens', tokens, sizes)
    yield slope('encode', 'text tokens', words, tables)
    yield slope('decode', 'visual tokens', decoding, sizes)

def compiled():
    "`torch.compile` of the masked transformer and the velocity network, on CUDA"
    yield from step(True)
    yield from decode(True)

def generation():
    "The decoding loop beside `generate` of `transformers`: see `generation.py`"
    from benchmarks.generation import generation
    yield from generation(row, device)

def training():
    "A step of the library's loop beside a plain one: see `training.py`"
    import benchmarks.training
    yield from benchmarks.training.training()

groups = {f.__name__: f for f in (resampler, quantizer, step, decode, growth, generation, training, *[compiled]*cuda)}

# What is written

def at_most(limit, of='ratio'): return lambda r: r[of] <= limit

targets = {  # (name, metric): what the project aims at, and whether a row reaches it
    ('resampler, forward and backward, fp32', 'time, ms'): ('≤ 0.8 ×', at_most(0.8)),
    ('resampler, forward and backward, fp32', 'memory, MB'): ('≥ 5 × less', at_most(1/5)),
    ('resampler, forward and backward, bf16', 'time, ms'): ('≤ 0.55 ×', at_most(0.55)),
    ('resampler, forward and backward, bf16', 'memory, MB'): ('≥ 4 × less', at_most(1/4)),
    ('resampler, inference, fp32', 'time, ms'): ('≤ 0.7 ×', at_most(0.7)),
    ('resampler, inference, fp32', 'memory, MB'): ('≥ 10 × less', at_most(1/10)),
    ('resampler, saved activations at 128,256 over 32,000 text tokens', 'quotient'): ('ours ≤ 1.1', at_most(1.1, 'ours')),
    ('quantizer, forward and update, fp32', 'time, ms'): ('≥ 2.5 × faster', at_most(1/2.5)),
    ('quantizer, forward and update, fp32', 'memory, MB'): ('≥ 5 × less', at_most(1/5)),
    ('training step, bf16', 'time, ms'): ('≥ 2.2 × faster', at_most(1/2.2)),
    ('training step, bf16', 'memory, MB'): ('≥ 2 × less', at_most(1/2)),
    ('training step, bf16', 'arithmetic reached'): ('ours ≥ 0.4', lambda r: r['ours'] >= 0.4),
    ('decode, bf16', 'time, ms'): ('≥ 2 × faster', at_most(1/2)),
    ('ids of one, fp32', 'time, ms'): ('≥ 1.7 × faster', at_most(1/1.7)),
    ('ids of one, bf16', 'time, ms'): ('≥ 2.5 × faster', at_most(1/2.5)),
    ('ids of sixteen, fp32', 'time, ms'): ('≥ 1.4 × faster', at_most(1/1.4)),
    ('caption → one, fp32', 'time, ms'): ('ours ≤ 600', at_most(600, 'ours')),
    ('caption → sixteen, fp32', 'time, ms'): ('ours ≤ 2,300', at_most(2300, 'ours')),
    **{(f'growth of {what}', 'largest slope'): ('ours ≤ 2', at_most(2, 'ours')) for what in ('encode with visual tokens',
        'encode with text tokens', 'decode with visual tokens')}}

if cuda: targets |= {(f'resampler, {words} text tokens of width 4,096, bf16', metric): aim for words in ('32,000', '128,256')
                     for metric, aim in (('time, ms', ('≤ 0.8 ×', at_most(0.8))),
                                         ('memory, MB', ('≥ 8 × less', at_most(1/8))))} | {
    ('training, ten steps of a 6.8M LLaMA, bf16, compiled', 'time, ms'): ('≥ 4 × faster', at_most(1/4)),
    ('training, ten steps of a 135M LLaMA, bf16, compiled', 'arithmetic reached'): ('ours ≥ 0.35', lambda r: r['ours'] >= 0.35)}

def table(results):
    "The results as a table in Markdown"
    def number(x): return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'
    lines = ['| what | metric | plain | ours | ours/plain | target | reached? |', '|---|---|--:|--:|--:|---|---|']
    for r in results:
        aim, reached = targets.get((r['name'], r['metric']), ('', None))
        times = next((f" ({1/r['ratio']:.1f} × {word})" for start, word in (('time', 'faster'), ('memory', 'less'))
                      if r['metric'].startswith(start) and r['ratio'] < 1), '')
        said = '' if reached is None else 'yes' if reached(r) else '**no**'
        lines.append(f"| {r['name']} | {r['metric']} | {number(r['plain'])} | {number(r['ours'])} | "
                     f"{number(r['ratio'])}{times} | {aim} | {said} |")
    return '\n'.join(lines)

def measured_tables(results):
    "A table for each machine that something was measured on"
    machines = list(dict.fromkeys(r['machine'] for r in results))
    return '\n'.join(f'Measured on: {m}.\n\n{table([r for r in results if r["machine"] == m])}\n' for m in machines)

def machine():
    "What this machine is"
    if cuda: return f'{torch.cuda.get_device_name()}, torch {torch.__version__}'
    try: info = Path('/proc/cpuinfo').read_text()
    except OSError: info = ''
    name, flags = (re.search(rf'^{key}\s*:\s*(.+)', info, re.M) for key in ('model name', 'flags'))
    known = [f for f in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if flags and f in flags[1].split()]
    return (f"{name[1] if name else platform.machine()} ({', '.join(known) or 'no flags known'}), one of "
            f"{os.cpu_count()} cores, torch {torch.__version__}")

def write(results):
    "`results.json`, its table between the marks in `README.md`, and the plot of growth"
    (here/f'results{suffix}.json').write_text(json.dumps(results, indent=1, ensure_ascii=False) + '\n',
                                              encoding='utf-8')
    readme = (here/'README.md').read_text(encoding='utf-8')
    before, rest = readme.split(f'<!-- table{suffix} -->\n')
    after = rest.split(f'<!-- end of table{suffix} -->')[1]
    new = measured_tables(results)
    (here/'README.md').write_text(f'{before}<!-- table{suffix} -->\n{new}<!-- end of table{suffix} -->{after}',
                                  encoding='utf-8')
    if all(f'decode, {n:,} visual tokens, 10 steps' in {r['name'] for r in results} for n in sizes):
        draw_growth({r['name']: r for r in results})

def draw_growth(named):
    "Time against visual tokens and against text tokens, both axes logarithmic"
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), dpi=80, sharey=True)
    def curve(axes, at, names, label, colour):
        for side, style in (('ours', 'o-'), ('plain', 'o:')):
            axes.plot(at, [named[n][side] for n in names], style, color=colour, ms=4, label=f'{label}, {side}')
        axes.plot(at, [named[names[0]]['ours']*(n/at[0])**2 for n in at], '--', color='grey', lw=1, label='slope 2'
                  if colour == 'C1' else None)
    curve(left, sizes, [f'decode, {n:,} visual tokens, 10 steps' for n in sizes], 'decode', 'C0')
    curve(left, sizes, [f'encode, {n:,} visual tokens, 32,000 text tokens' for n in sizes], 'encode', 'C1')
    curve(right, tables, [f'encode, 256 visual tokens, {v:,} text tokens' for v in tables], 'encode', 'C1')
    for axes, at, label in ((left, sizes, 'visual tokens'), (right, tables, 'text tokens in the vocabulary (256 visual tokens)')):
        axes.set(xscale='log', yscale='log', xlabel=label)
        axes.set_xticks(at, [f'{n:,}' for n in at]); axes.minorticks_off(); axes.legend(fontsize=7)
    left.set_ylabel('time, ms')
    figure.tight_layout()
    figure.savefig(here/f'growth{suffix}.png')

def main(wanted):
    "Run the groups named, or all; rows of the others stay"
    if unknown := set(wanted) - set(groups):
        raise SystemExit(f"bench: no group {', '.join(sorted(unknown))}; there are {', '.join(groups)}")
    path, new = here/f'results{suffix}.json', {}
    old = {(r['name'], r['metric']): r for r in json.loads(path.read_text(encoding='utf-8'))} if path.exists() else {}
    for name in wanted or groups:
        start = time.perf_counter()
        new |= {(r['name'], r['metric']): r | dict(machine=machine()) for r in groups[name]()}
        print(f'{name}: {time.perf_counter() - start:.0f} s\n', flush=True)
        write(list((old | new).values()))
    if not wanted: write(list(new.values()))

if __name__ == '__main__': worker(*sys.argv[2:]) if sys.argv[1:2] == ['worker'] else main(sys.argv[1:])
