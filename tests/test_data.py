"Real files are dirty: one of every kind, and ten thousand of which one in twenty is broken"
import io, json, random
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from conftest import v2flow
from v2flow_nbdev.data.batches import ImageBatches, ImageStream, names_sides
from v2flow_nbdev.data.hub import hub
from v2flow_nbdev.data.folders import image_folder
from v2flow_nbdev.data.sources import usable

colour = Image.new('RGB', (30, 20), (200, 30, 30))

def png(image, **how):
    f = io.BytesIO(); image.save(f, 'PNG', **how); return f.getvalue()

def save_broken(f, i, kind):
    "A file that cannot be used"
    path = f/f'{i:05}.png'
    if kind == 'truncated': path.write_bytes(png(Image.effect_noise((40, 40), 60))[:700])
    if kind == 'empty': path.touch()
    if kind == 'text': path.write_text('<html>404 not found</html>')
    if kind == 'huge': path.write_bytes(huge)
    if kind == 'header': path.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(range(60)))
    return path.name

huge = png(Image.new('1', (9000, 9000)))
broken = dict(truncated='damaged or truncated', empty='empty (0 bytes)', text='not an image', huge='far too large',
              header='not an image')

def test_one_of_every_kind(tmp_path):
    f = tmp_path
    exif = Image.Exif(); exif[0x0112] = 6
    half = np.zeros((20, 30, 4), 'uint8'); half[:, :15] = (0, 0, 255, 255)
    deep = Image.fromarray(np.linspace(0, 65535, 600).reshape(20, 30).astype('uint16'))
    colour.save(f/'plain.png')
    colour.save(f/'turned.jpg', exif=exif)
    Image.fromarray(half).save(f/'clear.png'); colour.convert('L').save(f/'grey.png')
    colour.convert('P').save(f/'palette.png'); colour.convert('CMYK').save(f/'ink.jpg'); deep.save(f/'deep.png')
    colour.save(f/'moving.gif', save_all=True, append_images=[Image.new('RGB', (30, 20), 'blue')])
    names = [save_broken(f, i, kind) for i, kind in enumerate(broken)]
    (f/'plain.txt').write_bytes(b'a red thing\n\xff\xfe broken\n')
    (f/'grey.txt').write_text('a grey thing\nin two wordings\n', encoding='utf-8')
    examples = image_folder(f)
    assert [p.name for p in examples.paths] == ['clear.png', 'deep.png', 'grey.png', 'ink.jpg', 'moving.gif',
                                                'palette.png',
                                            'plain.png', 'turned.jpg']
    by = {p.name: examples[i] for i, p in enumerate(examples.paths)}
    assert all(r['image'].mode == 'RGB' for r in by.values())
    assert by['turned.jpg']['image'].size == (20, 30) and by['clear.png']['image'].getpixel((25, 5)) == (255, 255,
        255) and by['clear.png']['image'].getpixel((5, 5)) == (0, 0, 255)
    # clipping would make it white
    grey = np.asarray(by['deep.png']['image'])[..., 0]
    assert grey.min() == 0 and grey.max() == 255 and abs(grey.mean() - 127.5) < 1
    assert by['moving.gif']['image'].getpixel((5, 5))[0] > 150  # the first frame, not the blue one
    assert by['plain.png']['captions'] == ['a red thing'] and by['grey.png']['captions'] == ['a grey thing',
        'in two wordings'] and by['ink.jpg']['captions'] == ['']
    assert examples.report.left_out.keys() == set(names)
    for name, reason in zip(names, broken.values()): assert reason in examples.report.left_out[name], name
    for what in ('EXIF rotation', 'transparent', 'grayscale', 'palette', 'CMYK', '16 bits', 'several frames',
                 'caption not UTF-8', 'caption missing'):
        assert what in str(examples.report)
    (f/'grey.txt').unlink(); (f/'plain.txt').unlink()
    with pytest.raises(OSError, match='strict reading ends here'): image_folder(f, strict=True)

def test_captions_as_hugging_face_reads_them(tmp_path):
    for kind in ('csv', 'jsonl'):
        f = tmp_path/kind; (f/'sub').mkdir(parents=True)
        for n in ('a.png', 'sub/b.png', 'c.png'): colour.save(f/n)
        if kind == 'csv':
            (f/'metadata.csv').write_text('file_name,text\na.png,"red, and wide"\nsub/b.png,b\nlost.png,x\n')
        else:
            (f/'metadata.jsonl').write_text('\n'.join(json.dumps(r)
                                                      for r in (dict(file_name='a.png', captions=['red, and wide']),
                                                                dict(file_name='sub/b.png', captions=['b']),
                                                                dict(file_name='lost.png', captions=['x']))))
        examples = image_folder(f)
        assert examples.captions == [['red, and wide'], [''],
                                 ['b']] and examples.report.left_out == {'lost.png': 'no such image file'}
    (f/'metadata.jsonl').write_text('{"file_name": "a.png", "text": "red"}\n{"text": "nobody"}\n[1]\n{"file_name": '
                                    '"c.png", "text": 5}')
    examples = image_folder(f)
    assert examples.captions == [['red'], [''],
                             ['']] and examples.report.changed[
                                 'example without file_name: passed over'] == ['metadata.jsonl, '
                                 'example 2', 'metadata.jsonl, example 3']
    (f/'metadata.jsonl').write_text('{"name": 1}')
    with pytest.raises(OSError, match='needs the columns file_name and text'): image_folder(f)

def test_ten_thousand_files_of_which_one_in_twenty_is_broken(tmp_path):
    r, good = random.Random(0), png(Image.effect_noise((12, 12), 60).convert('RGB'))
    bad = {i: r.choice(list(broken)) for i in r.sample(range(10_000), 500)}
    for i in range(10_000):
        if i in bad: save_broken(tmp_path, i, bad[i])
        else: (tmp_path/f'{i:05}.png').write_bytes(good)
    examples = image_folder(tmp_path, progress=False)
    assert [p.name for p in examples.paths] == [f'{i:05}.png' for i in range(10_000) if i not in bad]
    assert examples.report.left_out.keys() == {f'{i:05}.png' for i in bad}
    for i, kind in bad.items(): assert broken[kind] in examples.report.left_out[f'{i:05}.png']

def test_files_that_break_later_are_replaced_and_named(tmp_path):
    "Without the first reading, or when a file is damaged while the run goes on"
    from types import SimpleNamespace
    import torch
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.loop import train
    for i in range(8): Image.new('RGB', (8, 8), (30*i, 0, 0)).save(tmp_path/f'{i}.png')
    (tmp_path/'3.png').write_text('gone')
    seen = []
    class Mean(torch.nn.Module):
        def __init__(self): super().__init__(); self.m = torch.nn.Parameter(torch.zeros(3))
        def forward(self, images):
            seen.append(images[:, 0, 0, 0]); return SimpleNamespace(loss=(images.mean((2, 3)) - self.m).square().mean())
    for workers in (0, 1):
        seen.clear()
        data = ImageBatches(image_folder(tmp_path, check=False), 3, [(8, 8)])
        train(Mean(), data, TrainConfig(steps=20, batch_size=4, num_workers=workers, mixed_precision='no'),
              data.collate, out=tmp_path/f'run{workers}', progress=False)
        state = json.loads(max((tmp_path/f'run{workers}/checkpoints').glob('step-*/state.json')).read_text())
        assert len(state['unusable']) == 1 and state['unusable'][
            0].startswith('3.png: not an image') and torch.cat(seen).unique().numel() == 7

@pytest.fixture(scope='module')
def parquet(tmp_path_factory):
    "A data set in the format of the Hub"
    import datasets
    f = tmp_path_factory.mktemp('hub')
    images = [dict(bytes=png(Image.new('RGB', (8, 8), (10*i, 0, 0))), path=None) for i in range(20)]
    images[5] = dict(bytes=b'broken', path=None)
    features = datasets.Features(dict(image=datasets.Image(), text=datasets.Value('string'),
                                      number=datasets.Value('int64')))
    datasets.Dataset.from_dict(dict(image=images, text=[f'red {i}' if i else None for i in range(20)],
                                    number=list(range(20))), features=features).to_parquet(f/'train.parquet')
    return f

def test_hub_rows_and_streams(parquet):
    examples = hub(str(parquet))
    assert len(examples) == 20 and examples[3]['captions'] == ['red 3'] and examples[3]['image'].getpixel((0,
        0)) == (30, 0,
        0) and examples.captions[0] == ['']
    with pytest.raises(OSError, match='example 5: not an image'): examples[5]
    good = usable(examples)
    assert len(good) == 19 and good.report.left_out == {
        'example 5': 'not an image that Pillow can read'} and good.report.changed == {
            'caption missing: left empty': ['example 0']}
    with pytest.raises(OSError, match='strict reading ends here'): usable(examples, strict=True)
    flow = hub(str(parquet), streaming=True, held_out=4, seed=1)
    assert [r['captions'][0] for r in flow.take(3)] == ['', 'red 1', 'red 2']
    def some(start, n): return [(p, example.args[0]['number']) for (p, example, _), _ in zip(flow.stream(start), range(n))]
    first = some(0, 40)
    # two passes, in two orders
    assert sorted(n for _, n in first[:16]) == list(range(4, 20)) == sorted(n for _,
        n in first[16:32]) and first[:16] != first[16:32]
    assert some(19, 21) == first[19:]  # picked up anywhere
    with pytest.raises(OSError, match='no data set could be loaded'): hub('./nowhere')
    with pytest.raises(ValueError, match='no column of images'): hub(str(parquet), image='photo')

@pytest.mark.parametrize('files, held_out', [(6, 0), (6, 4), (6, 13), (1, 4), (1, 0)])
def test_each_process_reads_its_part_of_a_stream(files, held_out, tmp_path):
    """Every example once in a pass, and none that is held out, whether files divide evenly among processes or not; with
    files of its own a process reads nothing else"""
    datasets = pytest.importorskip('datasets')
    for f in range(files):
        datasets.Dataset.from_dict(dict(image=[b'x']*10, text=[str(10*f + i) for i in range(10)])).to_parquet(tmp_path/f'train-{f:05d}.parquet')
    data = datasets.load_dataset('parquet', data_files=sorted(map(str, tmp_path.glob('*.parquet'))), split='train',
                                 streaming=True, cache_dir=str(tmp_path/'cache'))
    from v2flow_nbdev.data.hub import HubStream
    flow = HubStream(data, 'image', 'text', held_out=held_out, buffer=5)
    def part(part, parts, n, start=0):
        return [int(example.args[0]['text']) for (_, example, _), _ in zip(flow.stream(start, part, parts), range(n))]
    n, expected = 10*files - held_out, list(range(held_out, 10*files))
    for parts in (1, 2, 3, 4):
        sizes = [len({i for i in part(p, parts, 2*n)}) for p in range(parts)]                # all of it, and more than once
        found = [part(p, parts, size) for p, size in enumerate(sizes)]
        assert sorted(sum(found, [])) == expected, (parts, found)
        assert part(parts - 1, parts, 7, start=3) == part(parts - 1, parts, 10)[3:]
    if files == 6 and held_out < 10: assert {i//10 % 2 for i in part(1, 2, 40)} == {1}

def counted_stream(files, read, buffer=20):
    "Files of 50 examples each, as a stream that notes in a list which were read"
    datasets = pytest.importorskip('datasets')
    def examples(files):
        for f in files:
            for i in range(50*f, 50*f + 50): read.append(i); yield dict(image=b'x', text=str(i))
    from v2flow_nbdev.data.hub import HubStream
    data = datasets.IterableDataset.from_generator(examples, gen_kwargs=dict(files=list(range(files))))
    return HubStream(data, 'image', 'text', held_out=4, buffer=buffer, seed=3)

class Texts:
    "A stream's captions as numbers: what `ImageStream` is for images"
    def __init__(self, examples): self.examples = examples
    def stream(self, *args): return self.examples.stream(*args)
    def later(self, example): return int(example.args[0]['text'])

@pytest.mark.parametrize('files', [8, 5])                  # files of its own for each of two processes, or not
def test_a_resumed_stream_reads_a_block_and_not_what_is_before_it(files):
    "In each of two processes, across passes and at the borders of blocks; batches are equal to the bit"
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.processes import make_loader
    read, config = [], TrainConfig(steps=80, batch_size=5)
    data = Texts(counted_stream(files, read))
    for part in (0, 1):
        whole = list(make_loader(data, config, list, 0, part, 2)[0])
        for start in (1, 3, 4, 5, 30, 39, 40, 41, 79):
            where = json.loads(json.dumps(whole[start - 1][2]))                       # as a checkpoint holds it
            read.clear()
            resumed = iter(make_loader(data, config, list, start, part, 2, where)[0])
            first = next(resumed); reads = len(read)
            assert [first, *resumed] == whole[start:], start
            # a file from its beginning, as `datasets` does, and the block, or two if it ends in the batch; where files do
            # not divide evenly another process has every second example
            assert reads <= 50 + 2*(4 + 25*(1 if files == 8 else 2)), (start, reads)
        read.clear(); assert next(iter(make_loader(data, config, list, 30, part, 2)[0])) == whole[30] and len(read) > 150

def test_a_stream_is_read_once_whatever_the_number_of_workers(tmp_path):
    "One process reads, the workers make batches; what they read is the same, and where they are comes with it"
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.processes import make_loader
    def batches(workers, start=0, where=None):
        config = TrainConfig(steps=12, batch_size=5, num_workers=workers)
        return list(make_loader(Texts(counted_stream(2, Log(tmp_path/'read'))), config, list, start, where=where)[0])
    none, two = batches(0), batches(2)
    assert none == two and batches(2, 7, none[6][2]) == none[7:]
    read = [line for line in (tmp_path/'read').read_text().split()]
    assert max(map(read.count, read)) <= 3                                        # one time in each of the three loaders
    from v2flow_nbdev.data.batches import to_bytes
    with pytest.raises(ValueError, match='cannot be sent to another process'): to_bytes([(0, lambda: 0)])

class Log:
    "A list's `append` into a file, which several processes share"
    def __init__(self, path): self.path = path
    def append(self, item):
        with open(self.path, 'a') as f: f.write(f'{item}\n')

def test_a_stream_can_be_trained_on_killed_and_resumed(parquet, tmp_path, capsys):
    from types import SimpleNamespace
    import torch
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.loop import train
    class Mean(torch.nn.Module):
        def __init__(self): super().__init__(); self.m = torch.nn.Parameter(torch.zeros(3))
        def forward(self, images): return SimpleNamespace(loss=(images.mean((2, 3)) - self.m).square().mean())
    data = ImageStream(hub(str(parquet), streaming=True), 3, [(8, 8)])
    data.examples.buffer = 7
    def run(out, fail=None, workers=0):
        def evaluate(m):
            if fail and float(m.m.abs().sum()) and (tmp_path/out/'checkpoints').exists(): raise KeyboardInterrupt
            return {}
        try:
            return train(Mean(), data, TrainConfig(steps=20, batch_size=3, num_workers=workers, checkpoint_every=1,
                                                   evaluate_every=7, mixed_precision='no', trackers=[]), data.collate,
                                                   evaluate, tmp_path/out, resume=True, progress=False)
        except KeyboardInterrupt: return None
    whole = run('a')
    starts, stream = [], data.examples.stream
    def noted(start=0, part=0, parts=1, where=None): starts.append((start, where)); return stream(start, part, parts, where)
    data.examples.stream = noted
    assert run('b', fail=True) is None and torch.equal(run('b').m, whole.m)
    assert starts[0] == (0, None) and starts[1][0] == 18 and starts[1][1]['block'] == 2
    del data.examples.stream
    assert torch.equal(run('c', workers=2).m, whole.m)
    # of another number of processes: the part is another one, and is read up to the position of the run
    assert run('d', fail=True) is None
    for state in (tmp_path/'d/checkpoints').glob('*/state.json'):
        kept = json.loads(state.read_text())
        assert len(kept['stream']) == 1; state.write_text(json.dumps(dict(kept, stream=kept['stream']*2)))
    capsys.readouterr()
    assert torch.equal(run('d').m, whole.m) and 'has 1 process, its checkpoint is of 2' in capsys.readouterr().err

def test_images_are_mirrored_only_where_captions_allow():
    import torch
    assert names_sides(['a star to the LEFT of a ring']) and not names_sides(['a leftover', 'bright'])
    half = Image.new('RGB', (8, 8)); half.paste((255, 255, 255), (0, 0, 4, 8))
    for caption, kinds in (('a half', 2), ('white on the left', 1)):
        data = ImageBatches([dict(image=half, captions=[caption])], 1, [(8, 8)], flip=True)
        torch.manual_seed(0)
        assert len({data.collate([data[0]])['images'][0, 0, 0, 0].item() for _ in range(20)}) == kinds
