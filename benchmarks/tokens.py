"""How many tokens does an emoji need? Autoencoders of other grids, their latents replaced by the nearest of K k-means codes, and decoded: what
a plain vector quantizer keeps of images that no autoencoder was trained on. Prints the table of `54_emoji`.

    v2flow train-autoencoder --config configs/emoji-autoencoder.yaml --out runs/f8 autoencoder.local=false training.steps=3000 autoencoder.channels=16 autoencoder.width=32 autoencoder.halvings=3 autoencoder.noise=0
    v2flow train-autoencoder --config configs/emoji-autoencoder.yaml --out runs/f4 autoencoder.local=false training.steps=3000 autoencoder.channels=4 autoencoder.noise=0.15
    python -m benchmarks.tokens runs/f8/model runs/f4/model runs/emoji-autoencoder/model"""
import argparse
import torch
from v2flow_nbdev.data.sources import emoji
from v2flow_nbdev.base.images import to_tensor
from v2flow_nbdev.models.latents import AutoencoderLatents
from v2flow_nbdev.evaluation.metrics import nearest_codes, plain_codes, psnr, ssim

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('autoencoders', nargs='+', help='folders of autoencoders')
    parser.add_argument('--codes', type=int, nargs='+', default=[256, 512, 1024, 2048])
    args = parser.parse_args()
    train, held_out = (to_tensor([r['image'] for r in emoji(split)], 3) for split in ('train', 'held_out_bases'))
    print('| tokens, numbers in each | codes | bits an image | variance lost | PSNR | SSIM '
          '|\n|---|--:|--:|--:|--:|--:|')
    for folder in args.autoencoders:
        latents = AutoencoderLatents.from_pretrained(folder)
        z_train, z = (torch.cat([latents.encode(part) for part in x.split(64)]) for x in (train[::2], held_out))
        for k in args.codes:
            kept = nearest_codes(z, plain_codes(z_train, k))
            back = torch.cat([latents.decode(part) for part in kept.split(64)])
            lost, n = ((kept - z).square().mean()/z.var()).item(), z.shape[2]*z.shape[3]
            print(f'| {n}, {z.shape[1]} | {k:,} | {n*(k - 1).bit_length():,} | {lost:.2f} | '
                  f'{psnr(back, held_out).mean():.1f} dB | {ssim(back, held_out).mean():.3f} |', flush=True)

if __name__ == '__main__': main()
