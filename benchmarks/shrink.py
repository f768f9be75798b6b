"""Makes a pipeline that `train-llm` wrote as an adapter (`llm.store_base: false`) small enough to be shipped.

    python -m benchmarks.shrink runs/smollm2-llm-64/model data/checkpoints/smollm2 --rank 8
    python -m benchmarks.shrink runs/smollm2-llm-64/model data/checkpoints/smollm2 --rank 16 --float8

LoRA's updates are cut to a lower rank by a singular value decomposition, which loses as little of their squared norm as any matrix of
that rank can. With `--float8` their matrices, the new embeddings and the resampler's readout are stored in a byte a number (`float8_e4m3fn`, four
significant bits): half the size of LoRA for a fortieth of what half the rank would lose. The rest of the resampler is stored as float16; its readout is
centred first, which changes no mixture (a softmax does not know what all its scores have in common) and makes the numbers that are rounded smaller. The
codebook stays float32: its codes lie so near to each other that rounding them changes every tenth id. What changed is printed."""
import argparse, shutil, sys
from pathlib import Path
import torch
from v2flow_nbdev.base.files import read_json, read_tensors, write_json, write_tensors
from v2flow_nbdev.base.images import to_tensor
from v2flow_nbdev.data.sources import emoji
from v2flow_nbdev.models.tokenizer import V2Flow

def lower_rank(weights, config, rank, dtype=None):
    "LoRA's matrices under names of `peft`, cut to a rank, stored as `dtype` or as they were; the mean fraction of their squared norm that is lost"
    before, after, lost, found = config['lora_alpha']/config['r'], config['lora_alpha']/rank, [], dict(weights)
    for name in [n for n in weights if '.lora_A.' in n]:
        other = name.replace('.lora_A.', '.lora_B.')
        update = weights[other].float() @ weights[name].float()*before
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        root = (s[:rank]/after).sqrt()
        b, a = found[other], found[name] = [m.to(dtype or weights[name].dtype).contiguous() for m in (u[:, :rank]*root, root[:, None]*v[:rank])]
        lost.append(((b.float() @ a.float()*after - update).square().sum()/update.square().sum()).item())
    return found, sum(lost)/len(lost)

def in_a_byte(weights, names):
    "Some of the tensors in a byte a number"
    return {n: w.to(torch.float8_e4m3fn) if any(part in n for part in names) else w for n,w in weights.items()}

@torch.no_grad()
def round_resampler(tok, images, readout):
    "The resampler as it will be stored, the readout as its dtype; the fraction of ids that stay"
    before, weight = tok.encode(images), tok.resampler.readout.weight
    weight.sub_(weight.mean(0))
    for p in tok.resampler.parameters(): p.copy_(p.to(readout if p is weight else torch.float16).float())
    return (tok.encode(images) == before).float().mean().item()

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('model', type=Path); p.add_argument('out', type=Path); p.add_argument('--rank', type=int, default=8)
    p.add_argument('--float8', action='store_true', help='store LoRA, the new embeddings and the readout in a byte a number')
    args = p.parse_args()
    try:
        config = read_json(args.model/'llm/adapter_config.json', ['r', 'lora_alpha'])
        if not 1 <= args.rank <= config['r']: raise ValueError(f"--rank {args.rank}: the adapter has rank {config['r']}")
        weights, lost = lower_rank(read_tensors(args.model/'llm/adapter_model.safetensors'), config, args.rank,
                                   torch.float8_e4m3fn if args.float8 else None)
        if args.float8: weights = in_a_byte(weights, ['embed_tokens', 'lm_head'])
        tok = V2Flow.from_pretrained(args.model/'image_tokenizer')
        size = tok.config.image_size
        stay = round_resampler(tok, to_tensor([r['image'].resize(size[::-1]) for r in emoji('held_out_bases')[:48]], tok.config.image_channels),
                               torch.float8_e4m3fn if args.float8 else torch.float16)
        for part in ('llm', 'image_tokenizer'): shutil.rmtree(args.out/part, ignore_errors=True)
        shutil.copytree(args.model/'llm', args.out/'llm'); shutil.copy(args.model/'model_index.json', args.out)
        write_json(args.out/'llm/adapter_config.json', config | dict(r=args.rank))
        write_tensors(args.out/'llm/adapter_model.safetensors', weights)
        tok.save_pretrained(args.out/'image_tokenizer', torch.float16)
        if args.float8:
            file = args.out/'image_tokenizer/model.safetensors'
            write_tensors(file, in_a_byte(read_tensors(file), ['resampler.readout.weight']))
    except (OSError, ValueError) as e: sys.exit(f'benchmarks.shrink: {e}')
    bytes_ = sum(f.stat().st_size for part in ('llm', 'image_tokenizer') for f in (args.out/part).rglob('*') if f.is_file())
    print(f"rank {config['r']} → {args.rank}: {100*lost:.2g} % of the updates' squared norm are lost; {100*stay:.2f} % of the ids stay; "
          f"{bytes_/2**20:.1f} MiB")

if __name__ == '__main__': main()
