"The emoji: drawn again where the font is, named apart, split as documented"
import importlib, sys
from collections import Counter
from pathlib import Path
import pytest
from conftest import root

folder = root/'data/emoji'
splits = ('train', 'held_out_compositions', 'held_out_bases')
drawn_again = '😀 👋 👋🏾 👩🏽‍🚒 🧑🏿‍🚀 👨🏻‍🦰 👫 🧑🏻‍❤️‍💋‍🧑🏿 🫱🏼‍🫲🏿 👨‍👩‍👧 🏃🏽‍♀️‍➡️ 🇯🇵 🏴󠁧󠁢󠁳󠁣󠁴󠁿 🏳️‍🌈 #️⃣ 🔟 ❤️ ▪️ 🕰️ 🚒'.split()

@pytest.fixture(scope='module')
def examples():
    pq = pytest.importorskip('pyarrow.parquet')
    return {s: pq.read_table(folder/f'{s}.parquet').to_pylist() for s in splits}

@pytest.fixture(scope='module')
def every(examples): return [r for s in splits for r in examples[s]]

@pytest.fixture(scope='module')
def draw():
    pytest.importorskip('emoji', reason='needs the package `emoji`')
    sys.path.insert(0, str(folder))
    try: return importlib.import_module('draw')
    finally: sys.path.remove(str(folder))

def test_counts_and_sizes(examples):
    assert [len(examples[s]) for s in splits] == [3356, 208, 206]   # 3,770 together
    sizes = [p.stat().st_size for p in folder.iterdir() if p.is_file()]
    assert sum(sizes) < 13*2**20 and max(sizes) < 15*2**20

def test_images_and_captions_are_apart(every):
    assert len({r['emoji'] for r in every}) == len({r['name'] for r in every}) == len({r['image']['bytes']
        for r in every}) == len(every)
    captions = [c for r in every for c in r['captions']]
    assert len(set(captions)) == len(captions), [c for c, n in Counter(captions).items() if n > 1][:5]
    assert all(6 <= len(r['captions']) <= 12 for r in every)
    assert not [c for c in captions if '  ' in c or c != c.strip() or '_' in c or ' a a ' in f' {c}' or ' ,' in c
                or c.endswith(',')]

def test_tone_and_sex_are_said(every):
    said = dict(man='man men male merman prince Claus', woman='woman women female mermaid princess Claus')
    for r in every:
        for c in r['captions']:
            for t in filter(None, r['tone'].split(', ')): assert t in c, c
            for s in set(r['sex'].split()) & set(said): assert any(w in c for w in said[s].split()), c

def test_held_out_bases_are_unseen_in_every_variant(examples, every):
    seen = {r['base'] for r in examples['train'] + examples['held_out_compositions']}
    assert not seen & {r['base'] for r in examples['held_out_bases']}
    assert .05 <= len(examples['held_out_bases'])/len(every) < .06

def test_every_part_of_an_unseen_composition_is_trained_on(examples):
    trained = examples['train']
    who, tones, together = ({tuple(r[k] for k in keys) for r in trained} for keys in (('base', 'look', 'sex'),
        ('base', 'tone'), ('tone', 'sex')))
    for r in examples['held_out_compositions']:
        assert (r['base'], r['look'], r['sex']) in who         # the same person at the same activity, in another tone
        assert (r['base'], r['tone']) in tones                 # the activity in that tone, by another person
        assert (r['tone'], r['sex']) in together               # such a person in that tone, at another activity
    mixed = sum(bool(r['tone'] or r['sex']) for r in trained) + len(examples['held_out_compositions'])
    assert .095 <= len(examples['held_out_compositions'])/mixed <= .105
    assert not {(r['base'], r['look'], r['sex'], r['tone']) for r in examples['held_out_compositions']} & {(r['base'],
        r['look'], r['sex'], r['tone']) for r in trained}

def test_split_can_be_made_again(examples, every, draw):
    again = draw.split(sorted(every, key=lambda r: (r['base'], r['name'])))
    assert Counter(again) == {s: len(examples[s]) for s in splits}
    assert {r['name'] for r, s in zip(sorted(every, key=lambda r: (r['base'], r['name'])), again)
            if s == 'held_out_bases'} == {r['name'] for r in examples['held_out_bases']}

def test_names_can_be_made_again(every, draw):
    for r in every:
        assert draw.full_name(r['emoji']) == r['name'] and draw.captions(r['emoji']) == r['captions'], r['name']

def test_drawn_again(every, draw):
    import io, numpy as np
    from PIL import Image, features
    if not Path(draw.font_path).is_file():
        pytest.skip(f'needs {draw.font_path} (Debian package fonts-noto-color-emoji)')
    if not features.check('raqm'): pytest.skip('needs Pillow with Raqm')
    font, stored = draw.load_font(), {r['emoji']: r['image']['bytes'] for r in every}
    assert len(drawn_again) == 20
    for e in drawn_again:
        kept = np.array(Image.open(io.BytesIO(stored[e])).convert('RGB')).astype(int)
        # 2 levels: other versions of FreeType
        assert kept.shape == (64, 64, 3) and abs(np.array(draw.rendered(e, font)) - kept).max() <= 2, e
    # a flag and a sequence that it does not know
    assert not draw.known('🇨🇶', font) and not draw.known('\U0001FAE8\u200D\U0001F697', font)

def test_datasets_reads_it():
    "Straight from the folder, by the metadata in README.md and in the files"
    datasets = pytest.importorskip('datasets')
    schema = datasets.Features.from_arrow_schema(__import__(
        'pyarrow.parquet').parquet.read_schema(folder/'train.parquet'))
    assert isinstance(schema['image'], datasets.Image) and set(schema) == {'image', 'captions', 'emoji', 'name', 'base',
        'tone', 'sex', 'look'}

def test_loader(examples):
    from v2flow_nbdev.data.sources import emoji
    unseen, small = emoji('held_out_bases'), emoji('held_out_bases', size=32)
    assert [r['name'] for r in unseen] == [r['name'] for r in examples['held_out_bases']]
    assert {r['image'].size for r in unseen} == {(64, 64)} and {r['image'].size for r in small} == {(32,
        32)} and unseen[0]['image'].mode == 'RGB'
    with pytest.raises(ValueError, match='held_out_compositions'): emoji('test')

def test_loader_says_where_the_images_are(tmp_path):
    from v2flow_nbdev.data.sources import emoji
    with pytest.raises(FileNotFoundError, match='draw.py'): emoji(folder=tmp_path)
