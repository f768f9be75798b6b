"""The method in one drawing: docs/method.svg

    python docs/method.py        # needs matplotlib

Numbers are those of the shipped emoji model (data/checkpoints/emoji)."""
from pathlib import Path
import matplotlib
matplotlib.use('svg')
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

plt.rcParams.update({'font.family': 'DejaVu Sans', 'svg.fonttype': 'path', 'svg.hashsalt': 'v2flow'})
ink, grey = '#1f2430', '#5b6270'
trained, frozen, llm = '#d8e8fb', '#ececef', '#fde6c8'

def box(ax, x, y, w, h, text, colour, small=''):
    ax.add_patch(FancyBboxPatch((x, y), w, h, 'round,pad=0,rounding_size=.12', fc=colour, ec=ink, lw=1))
    ax.text(x + w/2, y + h/2 + (.14 if small else 0), text, ha='center', va='center', fontsize=9, color=ink, weight='bold')
    if small: ax.text(x + w/2, y + h/2 - .24, small, ha='center', va='center', fontsize=7, color=grey)

def arrow(ax, a, b, text='', dx=0, dy=.13, ha='center', style='-|>', curve=0, dashed=False):
    ax.annotate('', b, a, arrowprops=dict(arrowstyle=style, color=ink, lw=1.1, shrinkA=1, shrinkB=1,
                                          ls='--' if dashed else '-', connectionstyle=f'arc3,rad={curve}'))
    if text: ax.text((a[0] + b[0])/2 + dx, (a[1] + b[1])/2 + dy, text, ha=ha, va='bottom', fontsize=7, color=grey, linespacing=1.15)

def thing(ax, x, y, text, small=''):
    ax.text(x, y + (.1 if small else 0), text, ha='center', va='center', fontsize=9, color=ink)
    if small: ax.text(x, y - .17, small, ha='center', va='center', fontsize=7, color=grey)

def draw():
    figure, ax = plt.subplots(figsize=(10.4, 4.7))
    ax.set_xlim(0, 15.6); ax.set_ylim(-.3, 6.85); ax.axis('off')
    top, mid, low, h = 5.15, 2.75, .45, 1.0
    # image → ids
    ax.text(.05, 6.6, 'image tokenizer: encode', fontsize=8, color=grey, style='italic')
    thing(ax, .55, top + .5, 'image', '64×64×3')
    box(ax, 1.75, top, 1.75, h, 'autoencoder', frozen, 'encoder, frozen')
    box(ax, 4.85, top, 2.15, h, 'resampler', trained, 'softmax over V tokens')
    box(ax, 8.5, top, 2.0, h, 'quantizer', trained, 'nearest of K codes')
    thing(ax, 12.85, top + .5, 'visual token ids', '256 of K = 2,048')
    arrow(ax, (1.1, top + .5), (1.75, top + .5))
    arrow(ax, (3.5, top + .5), (4.85, top + .5), 'latents\n16×16×6')
    arrow(ax, (7.0, top + .5), (8.5, top + .5), 'mixtures of\nembeddings\n256×256')
    arrow(ax, (10.5, top + .5), (11.65, top + .5))
    # the language model
    box(ax, 4.4, mid, 3.05, h, 'token embeddings', frozen, 'of the LLaMA: V = 1,871 × E = 256')
    box(ax, 8.5, mid, 2.0, h, 'codebook', trained, 'K = 2,048 codes × E')
    box(ax, 12.05, mid, 1.85, h, 'LLaMA', llm, 'text + K new tokens')
    thing(ax, 15.0, mid + .5, 'caption', 'text token ids')
    arrow(ax, (5.92, mid + h), (5.92, top), 'frozen V×E', dx=.1, dy=-.1, ha='left')
    arrow(ax, (9.5, mid + h), (9.5, top), 'K×E', dx=.1, dy=-.1, ha='left', style='<|-|>')
    arrow(ax, (10.5, mid + .5), (12.05, mid + .5), 'start of K\nnew embeddings', dashed=True)
    arrow(ax, (12.97, mid + h), (12.97, top + .12), 'writes\nand reads', dx=.12, dy=-.22, ha='left', style='<|-|>')
    arrow(ax, (13.9, mid + .5), (14.5, mid + .5), style='<|-|>')
    # ids → image
    ax.text(.05, low + h + .28, 'image tokenizer: decode', fontsize=8, color=grey, style='italic')
    thing(ax, .55, low + .5, 'image', '64×64×3')
    box(ax, 1.75, low, 1.75, h, 'autoencoder', frozen, 'decoder')
    box(ax, 4.85, low, 2.15, h, 'rectified flow', trained, 'noise → latent, 5 steps')
    box(ax, 8.5, low, 2.0, h, 'masked decoder', trained, '2 rounds of reveal')
    arrow(ax, (1.75, low + .5), (1.1, low + .5))
    arrow(ax, (4.85, low + .5), (3.5, low + .5), 'latents\n16×16×6')
    arrow(ax, (8.5, low + .5), (7.0, low + .5), 'condition z\n256×144')
    arrow(ax, (9.5, mid), (9.5, low + h), 'codes of the ids, 256×E', dx=.1, dy=-.12, ha='left')
    arrow(ax, (5.9, low), (9.5, low), '', curve=.13)
    ax.text(7.7, low - .52, 'latents revealed so far', ha='center', va='bottom', fontsize=7, color=grey)
    for x, colour, text in ((10.95, trained, 'trained'), (12.3, frozen, 'frozen'), (13.6, llm, 'fine-tuned')):
        ax.add_patch(FancyBboxPatch((x, .55), .26, .26, 'round,pad=0,rounding_size=.05', fc=colour, ec=ink, lw=.7))
        ax.text(x + .36, .68, text, va='center', fontsize=7, color=grey)
    figure.subplots_adjust(0, 0, 1, 1)
    return figure

if __name__ == '__main__':
    draw().savefig(Path(__file__).with_suffix('.svg'), metadata={'Date': None}, facecolor='white')
