"""Flexible sequence lengths: one model trained on mixed grids against models trained on one grid alone, on pieces of digits and on mosaics.

    v2flow pretrain-llm --config configs/digits-text.yaml --out runs/digits-text
    python benchmarks/grids.py train       every model, about 40 min on 2 cores; goes on where it was stopped
    python benchmarks/grids.py measure     benchmarks/grids.json; 18_tokenizer draws it"""
import json, subprocess, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
families = dict(  # name: (sizes of models trained alone, sizes to measure; the last of these was in no training)
    digits=([(8, 4), (8, 8), (8, 12)], [(8, 4), (8, 6), (8, 8), (8, 10), (8, 12), (8, 14)]),
    mosaics=([(32, 16), (32, 32), (32, 48)], [(32, 16), (24, 32), (32, 32), (32, 48), (40, 32)]))
tiles = dict(digits=(1, 2), mosaics=(6, 6))      # as in the configs

def runs():
    "(folder, config, overrides) of every model"
    for name, (alone, _) in families.items():
        config = root/'configs'/('mosaics-tokenizer.yaml' if name == 'mosaics' else 'digits-sizes-tokenizer.yaml')
        yield f'{name}-mixed', config, []
        for size in alone:
            yield f'{name}-{size[0]}x{size[1]}', config, [f'data.sizes={[list(size)]}',
                                                          f'tokenizer.image_size={list(size)}']
        # two of its widths cannot be pooled
        pooled = [f'data.sizes={[list(s) for s in alone]}'] if name == 'digits' else []
        yield f'{name}-pooled', config, ['tokenizer.pool=2', *pooled]

def train():
    for folder, config, overrides in runs():
        out = root/'runs'/folder
        if (out/'model').exists(): continue
        print(folder, flush=True)
        subprocess.run([Path(sys.executable).with_name('v2flow'), 'train-tokenizer', '--config', config, '--out', out,
                        '--resume', *overrides], check=True, cwd=root)

def measure():
    import torch
    from v2flow_nbdev.data.batches import ImageBatches
    from v2flow_nbdev.data.sources import mosaics
    from v2flow_nbdev.evaluation.metrics import psnr
    from v2flow_nbdev.models.tokenizer import V2Flow
    examples = []
    for name, (_, sizes) in families.items():
        images = [r['image'] for r in mosaics('test', 300 if name == 'digits' else 100, tiles[name])]
        batches = ImageBatches(images, 1, sizes, corner=True)
        for folder, _, _ in runs():
            if not folder.startswith(name): continue
            tok, kind = V2Flow.from_pretrained(root/'runs'/folder/'model'), folder.removeprefix(name + '-')
            side = tok.config.patch_size*tok.config.pool
            here = [s for s in sizes if not (s[0] % side or s[1] % side)] if kind in ('mixed',
                'pooled') else [tuple(map(int, kind.split('x')))]
            for size in here:
                x = batches.at(images, size)
                grid = size[0]//side, size[1]//side
                back = tok.decode(tok.encode(x), grid, generator=torch.Generator().manual_seed(0))
                examples.append(dict(family=name, model=kind if kind in ('mixed', 'pooled') else 'alone', size=size,
                                 tokens=grid[0]*grid[1], psnr_db=round(psnr(back, x).mean().item(), 2)))
                print(examples[-1], flush=True)
    (root/'benchmarks/grids.json').write_text(json.dumps(examples, indent=1) + '\n')

if __name__ == '__main__': dict(train=train, measure=measure)[sys.argv[1]]()
