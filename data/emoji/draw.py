"""Draw the Noto Color Emoji font as captioned 64×64 images: data/emoji/*.parquet

    python data/emoji/draw.py [--font PATH] [--out DIR]

Needs Pillow with Raqm, the package `emoji` (names) and pyarrow. Nothing is random: the same versions give the same bytes.
"""
import argparse, hashlib, io, json
from collections import Counter
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
from emoji import EMOJI_DATA, STATUS
from PIL import Image, ImageDraw, ImageFont
from wording import captions, cldr, full_name, is_flag, parts

font_path = '/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf'   # Debian package fonts-noto-color-emoji
nowhere = '\U0001F1E6\U0001F1E6'   # the flag of AA, which is no country
side, splits = 64, ('train', 'held_out_compositions', 'held_out_bases')

# ---- images

def load_font(path=font_path):
    return ImageFont.truetype(str(path), 109, layout_engine=ImageFont.Layout.RAQM)   # 109: the only size that the font has

def known(e, font):
    "One glyph of the font; unknown sequences are two or more of them wide, unknown characters have no height, unknown flags carry a '?'"
    return font.getbbox(e) == (0, 0, 136, 128) and not (is_flag(e) and rendered(e, font) == rendered(nowhere, font))

def rendered(e, font):
    "The middle 128×128 of the glyph's 136×128 (the margins are empty) on white, half as large"
    canvas = Image.new('RGB', (136, 128), 'white')
    ImageDraw.Draw(canvas).text((0, 0), e, font=font, embedded_color=True, anchor='lt')
    return canvas.crop((4, 0, 132, 128)).resize((side, side), Image.Resampling.LANCZOS)

def webp(image):
    out = io.BytesIO()
    image.save(out, 'WEBP', lossless=True, quality=75, method=4)
    return out.getvalue()

def examples(font):
    "All images, sorted by base and name; of images that are equal the one with the shortest name stays (but not the bare 'family')"
    seen, named = {}, [e for e, d in EMOJI_DATA.items() if d['status'] == STATUS['fully_qualified'] and known(e, font)]
    for e in sorted(named, key=lambda e: (cldr(e) == 'family', len(cldr(e)), cldr(e))): seen.setdefault(rendered(e, font).tobytes(), e)
    def example(pixels, e):
        p, image = parts(e), Image.frombytes('RGB', (side, side), pixels)
        return dict(image=dict(bytes=webp(image), path=None), captions=captions(e), emoji=e, name=full_name(e), **{k: p[k] for k in ('base', 'tone', 'sex', 'look')})
    return sorted((example(*i) for i in seen.items()), key=lambda r: (r['base'], r['name']))

# ---- splits

def order(text): return hashlib.sha256(text.encode()).hexdigest()

def split(examples, share_bases=.05, share_compositions=.1, largest=60):
    "→ one split name per row; which, is decided by SHA-256 of the names"
    variants = Counter(r['base'] for r in examples)
    unseen, n = set(), 0
    for base in sorted(variants, key=order):
        if n >= share_bases*len(examples): break
        if variants[base] <= largest: unseen.add(base); n += variants[base]
    rest = [r for r in examples if r['base'] not in unseen]
    mixed = sorted((r for r in rest if r['tone'] or r['sex']), key=lambda r: order(r['name']))
    held, left = set(), Counter(k for r in rest for k in evidence(r))
    for r in mixed:
        if len(held) >= share_compositions*len(mixed): break
        if all(left[k] > 1 for k in evidence(r)): held.add(r['name']); left.subtract(evidence(r))
    return ['held_out_bases' if r['base'] in unseen else 'held_out_compositions' if r['name'] in held else 'train' for r in examples]

def evidence(r):
    "What training must still contain when this image is held out: who does it, in which tone, and the two together"
    return {('who', r['base'], r['look'], r['sex']), ('tone', r['base'], r['tone']), ('pair', r['tone'], r['sex'])}

# ---- files

def table(examples):
    "Rows → Arrow table with the metadata by which `datasets` decodes the images"
    text = {'dtype': 'string', '_type': 'Value'}
    columns = {k: pa.string() for k in ('emoji', 'name', 'base', 'tone', 'sex', 'look')}
    schema = pa.schema([('image', pa.struct([('bytes', pa.binary()), ('path', pa.string())])), ('captions', pa.list_(pa.string())), *columns.items()])
    features = {'image': {'_type': 'Image'}, 'captions': {'feature': text, '_type': 'List'}, **{k: text for k in columns}}
    return pa.Table.from_pylist(examples, schema.with_metadata({'huggingface': json.dumps({'info': {'features': features}})}))

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--font', default=font_path, help='NotoColorEmoji.ttf, with bitmaps')
    parser.add_argument('--out', default=Path(__file__).parent, type=Path, help='folder for the Parquet files')
    args = parser.parse_args()
    drawn = examples(load_font(args.font))
    where = split(drawn)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in splits:
        path = args.out/f'{name}.parquet'
        pq.write_table(table([r for r, s in zip(drawn, where) if s == name]), path, compression='zstd', row_group_size=512)
        print(f'{path}: {where.count(name):,} images, {path.stat().st_size/2**20:.2f} MiB')

if __name__ == '__main__': main()
