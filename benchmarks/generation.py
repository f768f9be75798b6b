"""Generation with the shipped model of emoji: the library's decoding loop beside `model.generate` of `transformers`, in the same dtype,
on the same model, in the same run. A group of `bench`:

    python -m benchmarks.bench generation      rows of results.json and of the table in README.md

Both forms (`plain_generation.py` holds the other) use as many threads as there are cores, and take turns after a warm-up"""
import functools, hashlib, os, statistics, time
from importlib.metadata import version
from pathlib import Path
import torch, transformers
from benchmarks import plain_generation
from v2flow_nbdev.base.files import find_data
from v2flow_nbdev.language.generation import generate_captions, generate_image_ids
from v2flow_nbdev.language.pipeline import V2FlowPipeline

caption = 'a woman astronaut with medium-dark skin tone'   # a composition that was held out
turns = 5

def baseline():
    "What the plain form is made of: the hashes of its files, so that nobody slows it down"
    def of(path): return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return {'plain_generation.py': of(plain_generation.__file__), 'transformers': version('transformers'),
            'transformers/generation/utils.py': of(Path(transformers.__file__).parent/'generation/utils.py')}

def medians(plain, ours, device):
    "(seconds of the one, of the other), medians of some turns each"
    forms, took = (plain, ours), ([], [])
    for turn in range(turns + 1):
        for form, times in zip(forms, took):
            if device == 'cuda': torch.cuda.synchronize()
            start = time.perf_counter(); form()
            if device == 'cuda': torch.cuda.synchronize()
            if turn: times.append(time.perf_counter() - start)  # the first warms up
    return [statistics.median(times) for times in took]

def cases(pipe):
    """Names and pairs of callables: ids and captions in one dtype, that of the pipeline, and whole calls from a caption
    to images"""
    tok, grid = pipe.image_tokenizer, tuple(pipe.image_tokenizer.config.grid)
    sampling = {k: v for k, v in pipe.defaults.items() if v is not None}
    def seed(): return torch.Generator().manual_seed(0)
    def plain(n): return plain_generation.image_ids(pipe.llm, pipe.tokenizer, [caption]*n, grid, generator=seed(), **sampling)
    def ours(n, **how):
        return generate_image_ids(pipe.llm, pipe.tokenizer, [caption]*n, grid=grid, generator=seed(), **sampling, **how)
    def plain_images(n): return tok.decode(plain(n), grid, generator=seed())
    def images(n): return pipe(caption, n, generator=seed())
    def plain_captions(ids): return pipe.tokenizer.batch_decode(plain_generation.captions(pipe.llm, pipe.tokenizer, ids, grid))
    def captions(ids): return generate_captions(pipe.llm, pipe.tokenizer, ids, grid)
    bind = functools.partial
    for n, name in ((1, 'one'), (16, 'sixteen')):
        yield f'ids of {name}', bind(plain, n), bind(ours, n)
        yield f'caption → {name}', bind(plain_images, n), bind(images, n)
        ids = ours(n)
        yield f'caption of {name}', bind(plain_captions, ids), bind(captions, ids)
    if pipe.llm.device.type == 'cpu': yield 'ids of one, layers in int8', bind(plain, 1), bind(ours, 1, int8=True)
    else: yield 'ids of one, a graph', bind(plain, 1), bind(ours, 1, compile=True)

def generation(row, device='cpu'):
    "The rows, made by `row(name, metric, plain, ours)`"
    threads = torch.get_num_threads()
    if device == 'cpu': torch.set_num_threads(os.cpu_count())
    try:
        pipe = V2FlowPipeline.from_pretrained(find_data('checkpoints/emoji'), device=device)
        for dtype, kind in ((torch.float32, 'fp32'), (torch.bfloat16, 'bf16')):
            pipe.to(dtype)
            for name, plain, ours in cases(pipe):
                if 'int8' in name and kind == 'fp32': continue  # the rest of it is in bfloat16
                yield row(f'{name}, {kind}', 'time, ms', *(1e3*t for t in medians(plain, ours, device))) | dict(
                    baseline=baseline())
    finally: torch.set_num_threads(threads)
