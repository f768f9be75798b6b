"""Images a second through a training run's loader, encoded anew in every epoch and from the cache of latents; one core, one thread.

    python -m benchmarks.loader            prints a table; about a minute

Weights are untrained: speed does not depend on them. Both ways take turns in one process, and times are medians over the turns"""
import os, statistics, tempfile, time
import torch
from v2flow_nbdev.data.sources import mosaics
from v2flow_nbdev.base.images import to_tensor
from v2flow_nbdev.models.latents import AutoencoderLatents, PixelLatents
from v2flow_nbdev.data.cache import cache_latents
from v2flow_nbdev.models.autoencoder import small_autoencoder

def bench_cache(
    examples,               # captioned images, of one size
    latents,            # `PixelLatents` or `AutoencoderLatents`
    batch_size:int=32,  # images per batch
    turns:int=5,        # epochs of each kind
    # images a second: from images, from the cache, and when the cache is made; with the largest difference of the
    # latents
)->dict:
    "One epoch of shuffled batches of latents, through `DataLoader`, from images and from the cache"
    def stack(batch): return torch.stack([r['latents'] for r in batch])
    def encode(batch): return latents.encode(to_tensor([r['image'] for r in batch], latents.image_channels))
    def epoch(data, collate):
        return list(torch.utils.data.DataLoader(data, batch_size, shuffle=True, collate_fn=collate,
                                                generator=torch.Generator().manual_seed(0)))
    def seconds(f):
        start = time.perf_counter()
        out = f()
        return time.perf_counter() - start, out
    with tempfile.TemporaryDirectory() as folder:
        making, cached = seconds(lambda: cache_latents(examples, latents, folder, progress=False))
        ways, times = dict(images=(examples, encode), cache=(cached, stack)), dict(images=[], cache=[])
        batches = {}
        for way in [*ways]*turns:
            took, batches[way] = seconds(lambda: epoch(*ways[way]))
            times[way].append(took)
    apart = max((a - b).abs().max().item() for a, b in zip(batches['images'], batches['cache']))
    return dict(**{way: len(examples)/statistics.median(times[way]) for way in ways}, making=len(examples)/making, apart=apart)

def main():
    torch.set_num_threads(1)
    if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    examples = mosaics('train', 256, (8, 8))                       # 64×64
    cases = {'`PixelLatents(3, 8)`': PixelLatents(3, 8),
             '`small_autoencoder()`': AutoencoderLatents(small_autoencoder())}
    print('| latents, of 64×64 pixels | from images, images/s | from the cache, images/s | times faster | making '
          'the cache, images/s | largest difference |\n|---|--:|--:|--:|--:|--:|')
    for name, latents in cases.items():
        r = bench_cache(examples, latents)
        print(f"| {name} | {r['images']:,.0f} | {r['cache']:,.0f} | {r['cache']/r['images']:.1f} | {r['making']:,.0f} "
              f"| {r['apart']:.0e} |", flush=True)

if __name__ == '__main__': main()
