"""What the three shipped models give, held to what they gave when this was written: files may be rewritten, outputs may not change.

    python tests/golden.py           every score of `v2flow evaluate` against data/checkpoints/*/scores.json: `make golden`
    python tests/golden.py --write   write tests/golden/ anew, for a model that was trained anew (name it: --write digits)

`tests/test_golden.py` holds the rest of it in `make test`: ids of 16 held-out images, pixels from committed ids, greedy and sampled visual
tokens of 8 captions, captions of 8 images. `tests/golden/names.json` maps a score's committed name to today's, once names change; null is a
score that is no longer measured: a removal is printed and not compared."""
import json, subprocess, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from v2flow_nbdev.data.sources import digits, emoji
from v2flow_nbdev.base.images import to_tensor
from v2flow_nbdev.language.generation import generate_captions, generate_image_ids
from v2flow_nbdev.language.pipeline import V2FlowPipeline
from v2flow_nbdev.data.shapes import shapes
from v2flow_nbdev.base.files import write_tensors

root = Path(__file__).parent.parent
place = Path(__file__).parent/'golden'
decoded = dict(digits=16, shapes=8, emoji=4)         # images whose pixels are kept
seeds = dict(digits=0, shapes=0, emoji=0)            # of the sampled tokens

def held_out(name):
    "16 images that the model was never trained on, (16, C, H, W)"
    examples = dict(digits=lambda: digits('test')[:16], shapes=lambda: list(shapes('test', 16, 32, 0)),
                emoji=lambda: emoji('held_out_bases')[:16])[name]()
    return to_tensor([r['image'] for r in examples], 1 if name == 'digits' else 3)

def prompts(name):
    "8 captions; those of the shapes and the emoji name compositions that were held out"
    if name == 'digits':
        return ['a handwritten seven', 'the digit 3', 'a bright 6 on black', 'an eight', 'number 0',
                'a scan of the digit two', 'this is the number 9', 'the figure four']
    examples = shapes('compositions', 8, 32,
        0) if name == 'shapes' else emoji('held_out_compositions')[::len(emoji('held_out_compositions'))//8][:8]
    return [examples[i]['captions'][0] for i in range(8)]

def ids_of(pipe, name): return pipe.image_tokenizer.encode(held_out(name))

def pixels_of(pipe, name, ids):
    return pipe.image_tokenizer.decode(ids[:decoded[name]], generator=torch.Generator().manual_seed(0))

def tokens_of(pipe, name, sampled):
    d = {k: v for k, v in pipe.defaults.items() if k != 'temperature'}
    how = dict(temperature=pipe.defaults['temperature'], generator=[torch.Generator().manual_seed(seeds[name] + i)
        for i in range(8)]) if sampled else dict(temperature=0.)
    return generate_image_ids(pipe.llm, pipe.tokenizer, prompts(name), **{**d, **how})

def captions_of(pipe, ids): return generate_captions(pipe.llm, pipe.tokenizer, ids[:8])

def load(name): return V2FlowPipeline.from_pretrained(root/'data/checkpoints'/name)

def write(name):
    pipe = load(name)
    ids = ids_of(pipe, name)
    write_tensors(place/f'{name}.safetensors', dict(ids=ids.short(), pixels=pixels_of(pipe, name, ids),
                                                    greedy=tokens_of(pipe, name, False).short(),
                                                    sampled=tokens_of(pipe, name, True).short()))
    (place/f'{name}.json').write_text(json.dumps(dict(prompts=prompts(name), captions=captions_of(pipe, ids)), indent=1,
                                                 ensure_ascii=False) + '\n', encoding='utf-8')

def read(name):
    "(tensors, {prompts, captions})"
    tensors = load_file(place/f'{name}.safetensors')
    return {n: t.long() if t.dtype == torch.int16 else t for n,
            t in tensors.items()}, json.loads((place/f'{name}.json').read_text(encoding='utf-8'))

def measured_anew(score): return not score.startswith(('seconds', 'memory'))

def check_scores(name):
    """Every score but seconds and memory; 1e-3 is the noise of another CPU's rounding, by which a few of some
    thousand images come out otherwise"""
    committed = json.loads((root/'data/checkpoints'/name/'scores.json').read_text())
    names = json.loads((place/'names.json').read_text())
    now = json.loads(subprocess.run([Path(sys.executable).with_name('v2flow'), 'evaluate', '--data', name, '--model',
                                     root/'data/checkpoints'/name, '--json'], check=True, capture_output=True,
                                     text=True, cwd=root).stdout)
    removed = {n for n in committed if n in names and names[n] is None}
    if removed: print(f"{name}: no longer measured, so not compared: {', '.join(sorted(removed))}")
    different = {n: (v, now.get(names.get(n, n))) for n, v in committed.items() if measured_anew(n) and n not in removed
                 and not abs(now.get(names.get(n, n), float('nan')) - v) <= 1e-3*max(1, abs(v))}
    for n, (before, after) in different.items(): print(f'{name}: {n} was {before}, is {after}')
    return not different

if __name__ == '__main__':
    if sys.argv[1:2] == ['--write']: place.mkdir(exist_ok=True); [write(n) for n in sys.argv[2:] or decoded]
    else:
        fine = [check_scores(n) for n in sys.argv[1:] or decoded]
        print(f'{sum(fine)} of {len(fine)} models give the scores that are committed')
        sys.exit(not all(fine))
