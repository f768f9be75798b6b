"One set of rules for an image, however it comes; metadata never costs an image; nothing is lost without a name"
import csv, io, json, os, pickle, shutil, struct, sys, threading, warnings, zlib
from pathlib import Path
import numpy as np, pytest
from PIL import Image, ImageCms, PngImagePlugin
from v2flow_nbdev.data import folders
from v2flow_nbdev.data.batches import ImageBatches
from v2flow_nbdev.base.files import Report, check_writable
from v2flow_nbdev.data.sources import FewCaptions, Subset
from v2flow_nbdev.base.images import as_image, load_image, image_grid, read_image, to_pil, to_tensor
from v2flow_nbdev.base.random import random_tensor
from v2flow_nbdev.data.hub import HubDataset, hub, hub_example
from v2flow_nbdev.data.folders import image_folder

r = np.random.RandomState(0)
rgb = r.randint(0, 256, (6, 8, 3)).astype('uint8')
grey16 = np.linspace(0, 65535, 48).round().reshape(6, 8).astype('uint16')
holes = np.dstack([rgb, np.where(np.arange(8) < 4, 0, 255)*np.ones((6, 1), int)]).astype('uint8')

def saved(image, kind='PNG', **how): f = io.BytesIO(); image.save(f, kind, **how); return f.getvalue()
def same(a, b): return a.mode == b.mode == 'RGB' and a.size == b.size and a.tobytes() == b.tobytes()
def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))
def png(width, height, depth, colour, lines, *extra):
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0,
                                                             0)) + b''.join(extra) + chunk(b'IDAT',
                                                                 zlib.compress(lines)) + chunk(b'IEND', b'')
def inserted(content, *chunks): return content[:33] + b''.join(chunks) + content[33:]         # behind a PNG's IHDR
def on_white(rgba): a = rgba[..., 3:]/255; return (rgba[..., :3]*a + 255*(1 - a))

def palette_png():
    im = Image.fromarray(rgb).quantize(6); return saved(im, transparency=bytes([0, 255, 128, 255, 0, 255]))
def grey_key(depth, key):
    values = [key, 0 if key else 1]*4
    bits = ''.join(format(v, f'0{depth}b') for v in values)
    return png(8, 1, depth, 0, b'\0' + bytes(int(bits[i:i + 8], 2) for i in range(0, len(bits), 8)),
               chunk(b'tRNS', struct.pack('>H', key)))
def deep_key():
    return png(3, 1, 16, 2, b'\0' + struct.pack('>9H', 0x1234, 0x5678, 0x9abc, 0x1234, 0x5678, 0x9abd, 9, 9, 9),
               chunk(b'tRNS', struct.pack('>3H', 0x1234, 0x5678, 0x9abc)))
def exif(orientation): e = Image.Exif(); e[0x0112] = orientation; return e

files = {
    'plain': saved(Image.fromarray(rgb)), 'rgba': saved(Image.fromarray(holes)),
    'la': saved(Image.fromarray(holes).convert('LA')), 'palette': palette_png(),
    'grey': saved(Image.fromarray(rgb).convert('L')),
    '1': saved(Image.fromarray(rgb).convert('1')), '16': saved(Image.fromarray(grey16)),
    '16 tiff': saved(Image.fromarray(grey16), 'TIFF'), 'cmyk': saved(Image.fromarray(rgb).convert('CMYK'), 'JPEG'),
    'cmyk tiff': saved(Image.fromarray(rgb).convert('CMYK'), 'TIFF'), 'lab': saved(Image.fromarray(rgb).convert('LAB'),
        'TIFF'), 'rgba tiff': saved(Image.fromarray(holes), 'TIFF'),
    'rgba webp': saved(Image.fromarray(holes), 'WEBP', lossless=True, exact=True),
    'gif': saved(Image.fromarray(rgb), 'GIF', save_all=True, append_images=[Image.new('RGB', (8, 6), 'blue')]),
    'bmp': saved(Image.fromarray(rgb), 'BMP'),
    'tga': saved(Image.fromarray(holes), 'TGA'),
    'ico': saved(Image.fromarray(np.kron(holes, np.ones((4, 4, 1), 'uint8'))[:24, :24]), 'ICO', sizes=[(24, 24)]),
    'ppm': saved(Image.fromarray(rgb), 'PPM'),
    'apng': saved(Image.fromarray(rgb), 'PNG', save_all=True, append_images=[Image.new('RGB', (8, 6), 'blue')]),
    'text behind': saved(Image.fromarray(rgb))[:-12] + chunk(b'zTXt', b'a\0\0' + zlib.compress(b'x'*3_000_000))
    + chunk(b'IEND', b''),
    **{f'grey key {d}': grey_key(d, k) for d, k in ((1, 1), (2, 2), (4, 7), (8, 100), (16, 30000))},
    'deep key': deep_key(), 'rgb key': saved(Image.fromarray(rgb), transparency=tuple(map(int, rgb[2, 3]))),
    **{f'turned {o} {kind}': saved(Image.fromarray(rgb), kind, exif=exif(o)) for o in range(1, 9)
       for kind in ('JPEG', 'PNG', 'TIFF', 'WEBP')}}

@pytest.mark.parametrize('name', files)
def test_an_image_is_the_same_however_it_comes(name, tmp_path):
    content, path = files[name], tmp_path/'a.bin'
    path.write_bytes(content)
    one = read_image(content)
    assert one.mode == 'RGB' and not one.info and not one.getexif()
    def loaded(): im = Image.open(path); im.load(); return im
    f = io.BytesIO(content); f.read(3)
    waiting = Image.open(path)
    ways = dict(path=path, str=str(path), array_of_bytes=bytearray(content), file=f, opened=waiting, again=waiting,
                from_memory=Image.open(io.BytesIO(content)), by_bytes=dict(bytes=content, path=None),
                by_path=dict(bytes=None, path=str(path)),
                example=dict(image=Image.open(path), captions=['']), result=one, array=np.asarray(one))
    # Pillow has lost what it needs, or fails itself
    if name not in ('text behind', 'deep key', 'grey key 2', 'grey key 4'):
        ways['loaded'] = loaded(); ways['copied'] = loaded().copy()
    for way, source in ways.items(): assert same(as_image(source), one), way
    x = to_tensor([one])
    for source in (path, Image.open(path), dict(image=dict(bytes=content, path=None))):
        assert np.array_equal(to_tensor([source]), x) and np.array_equal(ImageBatches([]).at([source], one.size[::-1]),
            x) and image_grid([source]).tobytes() == image_grid([one]).tobytes()
    batch = ImageBatches([dict(image=Image.open(path), captions=['a'])], flip=True, sizes=[one.size[::-1]])
    seen = [batch.collate([dict(image=i, mirror=0, size=0, seed=0)])['images'] for i in (batch[0]['image'],
        Image.open(path))]
    assert all(np.array_equal(s, x) for s in seen)
    f = tmp_path/'set'; f.mkdir(); (f/'a.png').write_bytes(content)
    assert same(image_folder(f)[0]['image'], one) and same(hub_example(dict(i=dict(bytes=content, path=None)), 'i', '',
        'example')['image'], one)

def test_the_rules_give_what_they_say():
    def near(name, want, by=1):
        assert np.abs(np.asarray(read_image(files[name])).astype(float) - want).max() <= by, name
    for name in ('plain', 'bmp', 'ppm', 'apng'): near(name, rgb, 0)
    for name in ('rgba', 'rgba tiff', 'rgba webp', 'tga'): near(name, on_white(holes))
    near('la', on_white(np.asarray(Image.fromarray(holes).convert('LA').convert('RGBA'))))
    near('16', (grey16/257).round()[..., None], 0); near('16 tiff', (grey16/257).round()[..., None], 0)
    near('lab', rgb, 60); near('cmyk tiff', rgb, 1)
    p = Image.open(io.BytesIO(files['palette'])); near('palette', on_white(np.asarray(p.convert('RGBA'))))
    for d, k in ((2, 2), (2, 0), (4, 7), (4, 15), (8, 100), (8, 0), (16, 30000), (16, 0)):
        example, shown = np.asarray(read_image(grey_key(d, k)))[0, :, 0], round((0 if k else 1)*255/(2**d - 1))
        assert (example[::2] == 255).all() and (example[1::2] == shown).all(), (d, k)
    assert np.asarray(read_image(grey_key(1, 1))).min() == 0 and np.asarray(read_image(grey_key(1, 0))).min() == 255
    # the second differs in the last bit alone
    assert np.asarray(read_image(files['deep key'])).tolist() == [[[255]*3, [0x12, 0x56, 0x9a], [0]*3]]
    want = rgb.copy(); want[2, 3] = 255; near('rgb key', want, 0)
    assert np.asarray(read_image(files['gif'])).std() > 20  # the first frame, not the blue one

turns = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.swapaxes(0, 1),
         6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).swapaxes(0, 1), 8: np.rot90}

@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'WEBP', 'JPEG'])
def test_all_eight_orientations(kind):
    how = dict(lossless=True) if kind == 'WEBP' else {}
    flat = np.asarray(Image.open(io.BytesIO(saved(Image.fromarray(rgb), kind, **how))).convert('RGB'))
    for o, turn in turns.items():
        notes, content = [], saved(Image.fromarray(rgb), kind, exif=exif(o), **how)
        assert np.array_equal(np.asarray(as_image(content, note=notes.append)), turn(flat)), o
        assert ('EXIF rotation: turned upright' in notes) == (o > 1)
        im = Image.open(io.BytesIO(content)); im.load(); assert np.array_equal(np.asarray(as_image(im)), turn(flat)), o

def every_mode():
    base = Image.fromarray(holes)
    for mode in 'RGB RGBA L LA 1 P CMYK YCbCr HSV LAB'.split(): yield mode, base.convert(mode)
    yield 'PA', base.convert('PA')
    yield 'La', base.convert('LA').convert('La')
    yield 'RGBa', base.convert('RGBa')
    yield 'RGBX', Image.merge('RGBX', (*base.convert('RGB').split(), Image.new('L', (8, 6))))
    for mode, order in (('I;16', '<'), ('I;16L', '<'), ('I;16B', '>'), ('I;16N', '=')):
        yield mode, Image.frombytes(mode, (8, 6), grey16.astype(order + 'u2').tobytes())
    yield 'I', Image.fromarray(grey16.astype('int32'))
    for name, key in (('L', 100), ('RGB', (1, 2, 3)), ('P', 3), ('P', bytes([0, 9])), ('1', 255)):
        im = base.convert(name); im.info['transparency'] = key; yield f'{name} {key}', im
    for name, key in (('L', b'\0'), ('RGB', 7), ('P', (1, 2, 3)), ('CMYK', 3), ('P', 999), ('YCbCr', 'x'),
                      ('RGB', (300, 2, 3))):
        im = base.convert(name); im.info['transparency'] = key; yield f'{name} odd {key}', im

@pytest.mark.parametrize('name,image', every_mode())
def test_every_mode_in_memory_and_the_callers_image_stays(name, image):
    before = image.mode, image.size, image.tobytes(), dict(image.info), image.palette and (image.palette.mode,
        bytes(image.palette.palette))
    one = as_image(image)
    assert one.mode == 'RGB' and one.size == (8, 6) and same(as_image(one), one)
    assert before == (image.mode, image.size, image.tobytes(), dict(image.info), image.palette and (image.palette.mode,
        bytes(image.palette.palette)))
    if name.startswith('I'): assert np.array_equal(np.asarray(one)[..., 0], (grey16/257).round())
    if name in ('RGBA', 'PA', 'RGBa'):
        assert (np.asarray(one)[:, :4] == 255).all() and np.asarray(one)[:, 4:].std() > 20
    if name in ('LA', 'La'): assert (np.asarray(one)[:, :4] == 255).all()

def test_an_opened_image_is_left_waiting(tmp_path):
    for name in ('plain', 'palette', 'gif', 'turned 6 TIFF', 'turned 6 JPEG'):
        im = Image.open(io.BytesIO(files[name])); tile, at = list(im.tile), im.fp.tell()
        as_image(im); assert list(im.tile) == tile and im.fp.tell() == at
        second = Image.open(io.BytesIO(files['gif'])); second.seek(1)
    assert np.asarray(as_image(second)).reshape(-1, 3).mean(0).argmax() == 2  # the frame it stands at

def test_arrays():
    for a, want in ((rgb, rgb), (rgb[..., 0], rgb[..., :1]), (rgb[..., :1], rgb[..., :1]), (rgb > 99, None),
                    (holes, on_white(holes)), (grey16, (grey16/257).round()[..., None]),
                    (grey16.astype('>u2'), (grey16/257).round()[..., None]),
                    (holes.astype('uint16')*257, on_white(holes)), (rgb[::-1, ::2], rgb[::-1, ::2]),
                    (rgb[..., 0] > 99, (rgb[..., :1] > 99)*255)):
        if want is None: want = a*255
        assert np.abs(np.asarray(as_image(a)).astype(float)
                      - want).max() <= 1 and np.array_equal(np.asarray(as_image(a)).shape[:2], a.shape[:2])
    for bad in (rgb/255, rgb.astype('int64'), rgb.astype('int8'), rgb.astype('uint32'), rgb[..., :2], rgb[0, 0],
                rgb[None], rgb[:0], rgb.astype(complex), np.array('a'), np.array([['a']]),
                np.zeros((3, 8, 8), 'uint8')[..., :5]):
        with pytest.raises(ValueError, match='need .H, W'): as_image(bad)
    for bad in (5, 1.5, [1], (rgb,), object(), {'image': 1}, {}, to_tensor([rgb])):
        with pytest.raises(ValueError): as_image(bad)
    for bad in (None, dict(image=None), dict(bytes=None, path=None), dict(bytes=None, path=''), b'', io.BytesIO()):
        with pytest.raises(OSError): as_image(bad)
    with pytest.raises(ValueError, match='rb'): as_image(io.StringIO('a'))

def damaged_metadata():
    plain, jpeg = saved(Image.fromarray(rgb)), saved(Image.fromarray(rgb), 'JPEG', exif=exif(1))
    for n, size in ((b'zTXt', 3_000_000), (b'zTXt', 70_000_000)):
        yield f'huge {n} {size}', inserted(plain, chunk(n, b'workflow\0\0' + zlib.compress(b'x'*size)))
    yield 'huge iTXt', inserted(plain, chunk(b'iTXt', b'XML:com.adobe.xmp\0\1\0\0\0' + zlib.compress(b'x'*3_000_000)))
    yield 'many texts', inserted(plain, *[chunk(b'zTXt', b'%d\0\0' % i + zlib.compress(b'x'*1_000_000))
                                          for i in range(80)])
    for kind in b'iCCP eXIf tIME pHYs gAMA cHRM sRGB sBIT bKGD hIST sPLT tEXt zTXt iTXt tRNS acTL fcTL prVt'.split():
        for body in (b'', b'x', b'\xff'*7, b'a\0\7' + b'junk'*9):
            yield f'{kind} {body[:4]}', inserted(plain, chunk(kind, body))
        yield f'{kind} wrong sum', inserted(plain, chunk(kind, b'12345678')[:-4] + b'oops')
        yield f'{kind} behind', plain[:-12] + chunk(kind, b'x')[:-4] + b'oops' + plain[-12:]
    yield 'cut in a text behind', plain[:-12] + chunk(b'zTXt', b'x'*90)[:40]
    e = exif(1); e[0x010f] = 'maker'; block = e.tobytes()
    for i in range(0, len(block), 3): yield f'EXIF cut at {i}', saved(Image.fromarray(rgb), 'JPEG', exif=block[:i])
    for i in range(100):
        yield f'EXIF noise {i}', saved(Image.fromarray(rgb), 'JPEG', exif=b'Exif\0\0' + block[6:14]
                                       + bytes(r.randint(0, 256, 60).astype('uint8')))
    # GPS nowhere; a directory that holds itself
    odd = b'Exif\0\0MM\0*\0\0\0\x08' + struct.pack('>HHHIIHHIII', 2, 0x8825, 4, 1, 0xffffffff, 0x8769, 4, 1, 8, 0)
    for kind in ('JPEG', 'PNG', 'WEBP'):
        yield f'odd GPS {kind}', saved(Image.fromarray(rgb), kind, exif=odd,
                                       **(dict(lossless=True) if kind == 'WEBP' else {}))
    def segment(n, body, length=None):
        return jpeg[:2] + bytes([0xff, n]) + struct.pack('>H',
                                                         len(body) + 2 if length is None else length) + body + jpeg[2:]
    for n in range(0xe0, 0xf0):
        for body in (b'', b'JFIF', b'Adobe', b'Exif\0\0', b'ICC_PROFILE\0', b'ICC_PROFILE\0\1', b'MPF\0II*\0',
                     b'Photoshop 3.0\x008BIM\x03\xed\0', b'http://ns.adobe.com/xap/1.0/\0<', b'FPXR\0'):
            yield f'APP{n - 0xe0} {body[:12]}', segment(n, body)
        yield f'APP{n - 0xe0} too short', segment(n, b'', 1)
        yield f'APP{n - 0xe0} cut off', segment(n, b'Exif\0\0II*\0', 60)
    yield 'JPEG profile', saved(Image.fromarray(rgb), 'JPEG', icc_profile=b'no profile')
    yield 'PNG profile', saved(Image.fromarray(rgb), icc_profile=b'no profile')
    yield 'TIFF profile', saved(Image.fromarray(rgb), 'TIFF', icc_profile=b'no profile')
    for tag in (282, 283, 296, 306, 700, 33723, 34377, 34665, 34675, 34853, 36867):
        for kind, n, value in ((2, 4, 0x41414141), (5, 1, 0xfffffff0), (7, 0x7fffffff, 1), (4, 1, 8), (12, 1, 0),
                               (99, 1, 1)):
            yield f'TIFF tag {tag} {kind}', tiff(tag, kind, n, value)
    webp = saved(Image.fromarray(rgb), 'WEBP', lossless=True, exif=exif(1), icc_profile=b'none', xmp=b'<x')
    yield 'WebP cut in XMP', webp[:-1]; yield 'WebP', webp

def tiff(tag, kind, n, value):
    "Uncompressed RGB, with one more tag"
    tags = sorted([(256, 3, 1, 8), (257, 3, 1, 6), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 200),
                   (277, 3, 1, 3), (278, 3, 1, 6), (279, 4, 1, 144), (tag, kind, n, value)])
    table = struct.pack('<H', len(tags)) + b''.join(struct.pack('<HHII', *t) for t in tags) + bytes(4)
    return (b'II*\0\x08\0\0\0' + table).ljust(200, b'\0') + rgb.tobytes()

def test_metadata_never_costs_an_image(tmp_path):
    from collections import Counter
    flat = {k: np.asarray(Image.open(io.BytesIO(saved(Image.fromarray(rgb), k))).convert('RGB')) for k in ('JPEG',)}
    limits, filters, lost, told = (PngImagePlugin.MAX_TEXT_CHUNK,
                                   PngImagePlugin.MAX_TEXT_MEMORY), list(warnings.filters), {}, Counter()
    for name, content in damaged_metadata():
        try: got = np.asarray(read_image(content, note=lambda text: told.update([text])))
        except OSError as e: lost[name] = str(e); continue
        want = flat['JPEG'] if content[:2] == b'\xff\xd8' else rgb
        if got.shape != want.shape or not np.array_equal(got, want): lost[name] = 'other pixels'
    # noise may say how to turn it
    lost = {n: e for n, e in lost.items() if not (n.startswith('EXIF noise') and e == 'other pixels')}
    assert not lost, f'{len(lost)}: {lost}'
    assert told['metadata damaged: ignored'] > 20 and (PngImagePlugin.MAX_TEXT_CHUNK,
                                                       PngImagePlugin.MAX_TEXT_MEMORY) == limits and list(
                                                           warnings.filters) == filters

def test_damaged_metadata_still_turn_an_image():
    for kind in ('PNG', 'JPEG', 'WEBP'):
        how = dict(lossless=True) if kind == 'WEBP' else {}
        flat = np.asarray(Image.open(io.BytesIO(saved(Image.fromarray(rgb), kind, **how))).convert('RGB'))
        # a maker and a GPS that are nowhere
        block = b'Exif\0\0MM\0*\0\0\0\x08' + struct.pack('>HHHIIHHIHHHHII', 3, 0x010f, 2, 99, 0xfffff0, 0x0112, 3, 1, 6,
                                                         0, 0x8825, 4, 1, 0xfffffff0)
        content = saved(Image.fromarray(rgb), kind, exif=block, **how)
        assert np.array_equal(np.asarray(read_image(content)), turns[6](flat)), kind
        worse = dict(PNG=lambda c: inserted(c, chunk(b'zTXt', b'a\0\0' + zlib.compress(b'x'*3_000_000))),
                     JPEG=lambda c: c[:2] + b'\xff\xee\0\x07Adobe' + c[2:], WEBP=lambda c: c[:-3])[kind](content)
        if kind != 'WEBP': assert np.array_equal(np.asarray(read_image(worse)), turns[6](flat)), kind

def test_damaged_pixels_are_an_error_in_words():
    for kind in ('PNG', 'JPEG', 'WEBP', 'GIF', 'TIFF', 'BMP'):
        content = saved(Image.fromarray(r.randint(0, 256, (64, 64, 3)).astype('uint8')), kind)
        for share in (0.3, 0.6, 0.8):
            for source in (content[:int(len(content)*share)], io.BytesIO(content[:int(len(content)*share)])):
                with pytest.raises(OSError, match='^a photo: '): as_image(source, 'a photo')
    bad = bytearray(saved(Image.fromarray(r.randint(0, 256, (64, 64, 3)).astype('uint8')))); bad[200:400] = bytes(200)
    with pytest.raises(OSError, match='damaged'): as_image(bytes(bad))
    im = Image.open(io.BytesIO(saved(Image.fromarray(r.randint(0, 256, (64, 64, 3)).astype('uint8')))[:900]))
    with pytest.raises(OSError, match='damaged'): as_image(im)
    with Image.open(io.BytesIO(files['plain'])) as closed: pass
    with pytest.raises(OSError): as_image(closed)

def test_a_later_frame_does_not_matter():
    for kind in ('GIF', 'TIFF', 'PNG'):
        content = saved(Image.fromarray(rgb), kind, save_all=True,
                        append_images=[Image.fromarray(r.randint(0, 256, (6, 8, 3)).astype('uint8')),
                                       Image.new('RGB', (8, 6), 'red')])
        first = read_image(content)
        for n in range(1, 60, 4):
            if kind == 'GIF': assert same(read_image(content[:-n]), first), n
    assert same(as_image(files['apng']), as_image(files['plain']))

eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n'
others = dict(PostScript=eps, PDF=b'%PDF-1.4\n' + b'x'*99,
              SVG=b'<?xml version="1.0"?>\n<!-- a -->\n<svg xmlns="http://www.w3.org/2000/svg"/>',
              WMF=b'\xd7\xcd\xc6\x9a' + bytes(99), FITS=b'SIMPLE  =                    T' + b' '*3000,
              HEIC=b'\0\0\0\x18ftypheic' + bytes(99))

@pytest.mark.parametrize('kind', others)
def test_only_listed_formats_are_opened(kind, tmp_path, monkeypatch):
    def no(*a, **k): raise AssertionError('another program was started')
    for name in ('Popen', 'call', 'check_call', 'check_output', 'run'): monkeypatch.setattr(f'subprocess.{name}', no)
    monkeypatch.setattr(os, 'system', no)
    for suffix in ('png', 'jpg', 'gif', 'tif', 'ico', 'tga'):
        (tmp_path/f'a.{suffix}').write_bytes(others[kind])
        with pytest.raises(OSError, match=f'{kind} is not opened'): load_image(tmp_path/f'a.{suffix}')
    if kind == 'PostScript':
        with pytest.raises(OSError, match='EPS is not opened'): as_image(Image.open(io.BytesIO(eps)))

def test_size_is_checked_before_anything_is_decoded(monkeypatch):
    huge, large = (png(n, n, 1, 0, b'\0') for n in (30_000, 9000))
    icon = b'\0\0\1\0\1\0' + struct.pack('<BBBBHHII', 0, 0, 0, 0, 1, 32, len(huge), 22) + huge
    bitmap = b'\0\0\1\0\1\0' + struct.pack('<BBBBHHII', 0, 0, 0, 0, 1, 32, 40, 22) + struct.pack('<IiiHHIIiiII', 40,
        20_000, 40_000, 1, 32, 0, 0, 0, 0, 0, 0)
    tall = icon.replace(huge, large)
    decoded = []
    from PIL import ImageFile
    true = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, 'load', lambda im: decoded.append(im) or true(im))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for content in (huge, large, icon, bitmap, tall, b'P5 20000 20000 255\n', b'GIF89a' + struct.pack('<HH', 60_000,
            60_000) + b'\0\0\0,' + struct.pack('<HHHH', 0, 0, 60_000, 60_000) + b'\0\x08\0;'):
            with pytest.raises(OSError, match='far too large'): as_image(content)
        with pytest.raises(OSError, match='far too large'): as_image(Image.open(io.BytesIO(large)))
        with pytest.raises(OSError, match='far too large'): as_image(np.broadcast_to(np.uint8(0), (9000, 9000)))
    assert not decoded
    with pytest.raises(OSError, match='without pixels'): as_image(Image.new('RGB', (0, 5)))

def test_threads_leave_the_warnings_as_they_were(tmp_path):
    before, contents = list(warnings.filters), [files['rgba'], files['palette'], files['turned 6 TIFF']]*40
    def many(): [as_image(c) for c in contents]
    threads = [threading.Thread(target=many) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert list(warnings.filters) == before

def test_lists_of_images():
    a, b = Image.fromarray(rgb), Image.fromarray(rgb[:4])
    with pytest.raises(ValueError, match='4×8, 6×8'): to_tensor([a, b])
    assert to_tensor([a, b], 3, (5, 5)).shape == (2, 3, 5, 5)
    for f in (lambda: to_tensor([]), lambda: to_tensor([], size=(4, 4)), lambda: image_grid([]),
              lambda: ImageBatches([]).at([], (4, 4)), lambda: ImageBatches([]).collate([]), lambda: to_tensor(a),
              lambda: to_tensor('a.png'), lambda: to_tensor([a], size=(0, 4)),
              lambda: image_grid([a, b], ['one']), lambda: image_grid([a], ['one', 'two']),
              lambda: Subset([1, 2], [0, 2]), lambda: FewCaptions([1], 0), lambda: to_pil(to_tensor([a])[0]),
              lambda: to_pil(to_tensor([a]).byte())):
        with pytest.raises(ValueError): f()
    import torch
    g = [torch.Generator() for _ in range(3)]
    for shape, some in (((4, 2), g), ((4, 2), []), ((), g), (5, g)):
        with pytest.raises(ValueError, match='one for each image'): random_tensor(torch.randn, shape, some)
    assert random_tensor(torch.randn, (6, 2), g).shape == (6, 2)

def folder_of(f, *names):
    for i, n in enumerate(names):
        (f/n).parent.mkdir(parents=True, exist_ok=True); Image.new('RGB', (4, 4), (i, 0, 0)).save(f/n, 'PNG')
    return f

def said(examples): return json.dumps([examples.report.left_out, examples.report.changed], ensure_ascii=False)
def captions(examples): return {Path(examples.name(p)).as_posix(): c for p, c in zip(examples.paths, examples.captions)}

def test_a_table_cannot_name_files_outside_its_folder(tmp_path):
    f = folder_of(tmp_path, 'out.png', 'set/in.png', 'set/sub/b.png', 'set/sub/deep/c.png', 'store/linked.png')/'set'
    (f/'linked.png').symlink_to(tmp_path/'store/linked.png'); (f/'more').symlink_to(tmp_path/'store')
    names = ['../out.png', str(tmp_path/'out.png'), 'sub/../../out.png', './../set/in.png', 'sub/../in.png',
             './sub//b.png', 'linked.png', 'more/linked.png', 'nul\0.png', 'x'*300 + '.png', '\ud800.png']
    (f/'metadata.jsonl').write_text('\n'.join(json.dumps(dict(file_name=n, text=f'{i}')) for i, n in enumerate(names)))
    (f/'sub/metadata.csv').write_text('file_name,text\n../in.png,sneaked\ndeep/c.png,fine\n')
    examples = image_folder(f)
    assert captions(examples) == {'in.png': ['4'], 'linked.png': ['6'], 'more/linked.png': ['7'], 'sub/b.png': ['5'],
                              'sub/deep/c.png': ['fine']}
    for n in (*names[:4], 'sub/../in.png'):
        assert examples.report.left_out[Path(n).as_posix()].startswith('outside of the folder'), n
    assert len(examples.report.left_out) == 5 + 3 and json.loads(
        json.dumps(examples.report.left_out)) and 'sneaked' not in said(examples)

def test_links_are_followed_once_and_cycles_end(tmp_path):
    f = folder_of(tmp_path, 'set/a.png', 'set/real/b.png', 'store/c.png', 'store/deep/d.png')/'set'
    for name, to in (('again', f/'real'), ('around', f), ('up', tmp_path/'store'), ('nowhere', tmp_path/'none'),
                     ('self', f/'self'), ('lost.png', tmp_path/'none.png')):
        (f/name).symlink_to(to)
    (tmp_path/'store/deep/back').symlink_to(f/'up')
    examples = image_folder(f)
    assert [Path(examples.name(p)).as_posix() for p in examples.paths] == ['a.png', 'real/b.png', 'up/c.png',
        'up/deep/d.png']
    assert {'again', 'around', 'up/deep/back',
            'lost.png'} <= set(examples.report.left_out) and examples.report.left_out[
                'lost.png'] == 'no such image file'

def test_what_looks_like_an_image_or_a_caption_is_used_or_named(tmp_path):
    f = folder_of(tmp_path, 'DSC_1.jpg', 'b.png', 'c.png', 'd.jpg', 'd.png', 'noend', 'odd.jpg_large', 'f.JPEG')
    for n in 'x.heic x.HEIF x.svg x.eps x.cr2 x.NEF x.dng x.psd x.jxl'.split(): (f/n).write_bytes(b'123')
    for n, t in (('DSC_1.TXT', 'loud'), ('b.png.txt', 'by its whole name'), ('c.txt', 'one'), ('c.caption', 'two'),
                 ('d.txt', 'both'), ('lonely.txt', 'x'), ('README.txt', 'x'), ('.hidden.png', 'x'),
                 ('f.txt', 'a\u2028b\r\nc\rd\n\n')):
        (f/n).write_bytes(t.encode())
    (f/'folder.png').mkdir()
    (f/'folder.txt').mkdir(); (f/'metadata.parquet').write_bytes(b'PAR1'); (f/'notes.md').write_text('x')
    if hasattr(os, 'mkfifo'): os.mkfifo(f/'pipe.png')
    examples = image_folder(f)
    assert captions(examples) == {'DSC_1.jpg': ['loud'], 'b.png': ['by its whole name'], 'c.png': ['two', 'one'],
                              'd.jpg': ['both'], 'd.png': ['both'], 'f.JPEG': ['a b', 'c', 'd']}
    want = {'x.heic', 'x.HEIF', 'x.svg', 'x.eps', 'x.cr2', 'x.NEF', 'x.dng', 'x.psd', 'x.jxl', 'lonely.txt', 'noend',
            'odd.jpg_large', 'metadata.parquet'} | ({'pipe.png'} if hasattr(os, 'mkfifo') else set())
    assert set(examples.report.left_out) == want and examples.report.left_out[
        'x.heic'] == 'HEIC is not opened; save it as PNG or JPEG'
    with pytest.raises(OSError, match='strict reading ends here'): image_folder(f, strict=True)
    g = tmp_path/'phone'; g.mkdir(); (g/'a.heic').write_bytes(b'1')
    with pytest.raises(OSError, match='no images below this folder that can be opened; 1 left out .1 × HEIC'):
        image_folder(g)

def test_strange_lines_of_a_table_are_named_and_the_others_used(tmp_path):
    f = folder_of(tmp_path, *(f'{c}.png' for c in 'abcdefgh'))
    lines = ['{"file_name": "z.png"}', '{"file_name": "a.png", "text": "a cat,\u2028asleep\u0085\u2029now"}', '{broken',
             '[' * 100_000, '', '[1]', '"a"', 'null',
             '{"file_name": "b.png", "captions": ["one\\ntwo", 3, null, "three"]}', '{"file_name": "c.png", "text": 5}',
             '{"file_name": "d.png", "text": null, "caption": "by the other column"}', '{"file_name": 7, "text": "x"}',
             '{"file_name": "e.png", "text": "half \\ud83d"}', '{"file_name": "f.png", "text": {"a": 1}}',
             '{"file_name": "g.png", "text": "first"}', '{"file_name": "g.png", "text": "second"}']
    for end in ('\n', '\r\n'):
        (f/'metadata.jsonl').write_bytes(('\ufeff' + end.join(lines) + end).encode())
        examples = image_folder(f)
        assert captions(examples) == {'a.png': ['a cat, asleep now'], 'b.png': ['one two', 'three'], 'c.png': [''],
                                  'd.png': ['by the other column'], 'e.png': [''], 'f.png': [''],
                                  'g.png': ['first', 'second'], 'h.png': ['']}
        assert {'z.png', 'metadata.jsonl, line 3', 'metadata.jsonl, line 4'} == set(examples.report.left_out)
        assert examples.report.changed['example without file_name: passed over'] == [f'metadata.jsonl, example {i}'
            for i in (6, 7, 8, 12)]
        assert examples.report.changed['caption not a text: dropped'] == ['b.png', 'c.png',
            'f.png'] and examples.report.changed['caption not UTF-8: dropped'] == ['e.png']

def test_a_caption_with_a_line_break_is_one_caption_in_a_table(tmp_path):
    f = folder_of(tmp_path, 'a.png', 'b.png', 'c.png', 'sub/d.png')
    with open(f/'metadata.csv', 'w', newline='', encoding='utf-8') as g:
        csv.writer(g).writerows([['file_name', 'text'], ['a.png', 'a cat\nthat sits\r\n on a mat'],
                                 ['b.png', 'x\u2028y\x85z'], ['c.png'], [], ['sub/d.png', 'of the table']])
    (f/'sub/d.txt').write_text('of the text')
    (f/'metadata.jsonl').write_text(json.dumps(dict(file_name='a.png', text='of the other table')))
    assert captions(image_folder(f)) == {'a.png': ['a cat that sits on a mat', 'of the other table'],
                                         'b.png': ['x y z'], 'c.png': [''],
                                         'sub/d.png': ['of the text', 'of the table']}
    (f/'metadata.csv').write_text('file_name,text\na.png,"a ""big"" dog\nat home"\n\nb.png,"open\nc.png,a '
                                  'cat\nsub/d.png,a bird')
    examples = image_folder(f); assert examples.report.left_out == {'metadata.csv, line 5': 'a quote is not closed'}
    assert captions(examples) == {'a.png': ['a "big" dog at home', 'of the other table'], 'b.png': [''],
                                  'c.png': ['a cat'],
                              'sub/d.png': ['of the text', 'a bird']}
    (f/'metadata.csv').write_bytes(b'file_name,text\na.png,' + b'x'*200_000 + b'\nb.png,fine\nc.png,\xff\n')
    examples = image_folder(f)
    assert captions(examples)[
        'b.png'] == ['fine'] and 'metadata.csv, line 2' in examples.report.left_out and examples.report.changed[
            'caption not '
            'UTF-8: dropped'] == ['c.png']

@pytest.mark.skipif(sys.platform != 'linux', reason='other systems have no such names')
def test_names_that_are_not_utf8(tmp_path, capsys):
    f = folder_of(tmp_path, 'good.png', 'set/good.png')
    raw = os.fsencode(f/'set')
    os.rename(f/'good.png', raw + b'/caf\xe9_one.png')
    (f/'set/bad.png').write_text('x')
    os.rename(f/'set/bad.png', raw + b'/b\xe4d.png')
    (f/'set/x').write_text('x'); os.rename(f/'set/x', raw + b'/t\xe4xt.heic')
    examples = image_folder(f/'set')
    assert captions(examples) == {'caf\\xe9_one.png': ['caf\ufffd one'],
                              'good.png': ['good']} and set(examples.report.left_out) == {'b\\xe4d.png',
                                  't\\xe4xt.heic'}
    assert 'file name not UTF-8' in str(examples.report); print(examples.report, examples.report.left_out)
    odd = Report()
    odd.leave_out(os.fsdecode(b'\xe9.png'), 'x')
    odd.change(os.fsdecode(b'\xe9.png'), 'y'); odd.leave_out('a', 'x'); odd.leave_out('a', 'z'); print(odd)
    for report in (examples.report, odd):
        report.save(f/'report.json')
        assert json.loads((f/'report.json').read_text(encoding='utf-8'))['left_out'] == report.left_out
    assert odd.left_out['a'] == 'x' and odd.left_out['a (2)'] == 'z'
    os.rename(f/'set', os.fsencode(f) + b'/s\xe9t'); g = Path(os.fsdecode(os.fsencode(f) + b'/s\xe9t'))
    for fail in (lambda: image_folder(g, strict=True), lambda: image_folder(g/'none'), lambda: load_image(g/'none.png'),
                 lambda: check_writable(g/'none/x'), lambda: check_writable(g),
                 lambda: read_image(b'x', os.fsdecode(b'\xe9'))):
        with pytest.raises(OSError) as e: fail()
        str(e.value).encode('utf-8')
    (g/'metadata.csv').write_text('x\n')
    with pytest.raises(OSError) as e: image_folder(g)
    str(e.value).encode('utf-8')
    (g/'metadata.csv').write_bytes(b'file_name,text\ncaf\xe9_one.png,found\n')
    assert captions(image_folder(g))['caf\\xe9_one.png'] == ['found']

def test_a_copy_has_the_same_fingerprint_and_any_change_another(tmp_path, monkeypatch):
    f = folder_of(tmp_path, 'set/a.png', 'set/sub/b.png')/'set'
    (f/'a.txt').write_text('a cat'); (f/'broken.png').write_text('x')
    first = image_folder(f); before = first.fingerprint
    shutil.copytree(f, tmp_path/'copy', copy_function=shutil.copyfile)
    for p in (tmp_path/'copy').rglob('*.png'): os.utime(p, (1, 1))
    assert image_folder(tmp_path/'copy').fingerprint == before == pickle.loads(pickle.dumps(first)).fingerprint
    # what is left out does not count
    (f/'broken.png').unlink(); assert image_folder(f, check=False).fingerprint == before
    reads, true = [], folders.file_bytes
    monkeypatch.setattr(folders, 'file_bytes', lambda p, n: reads.append(p) or true(p, n))
    examples = image_folder(f); examples.fingerprint; examples.fingerprint; assert len(reads) == 2  # once each
    content, date = (f/'sub/b.png').read_bytes(), os.stat(f/'sub/b.png')
    bad = bytearray(content)
    bad[-5] ^= 1
    (f/'sub/b.png').write_bytes(bytes(bad)); os.utime(f/'sub/b.png', ns=(date.st_atime_ns, date.st_mtime_ns + 10**9))
    assert examples.fingerprint != before and image_folder(f, check=False).fingerprint != before
    (f/'sub/b.png').write_bytes(content); assert image_folder(f).fingerprint == before
    (f/'a.txt').write_text('a Cat'); assert image_folder(f).fingerprint != before
    (f/'a.txt').write_text('a cat'); (f/'sub/b.png').rename(f/'sub/c.png'); assert image_folder(f).fingerprint != before

def test_an_unchecked_row_that_breaks_is_an_error_that_names_it(tmp_path):
    f = folder_of(tmp_path, 'a.png', 'b.png')
    (f/'b.png').write_bytes((f/'a.png').read_bytes()[:44]); (f/'gone.png').write_bytes(b'x')
    examples = image_folder(f, check=False); (f/'gone.png').unlink()
    for i, name in ((1, 'b.png'), (2, 'gone.png')):
        with pytest.raises(OSError, match=f'^{name}: '): examples[i]
    assert len(examples.fingerprint) == 16

def test_rows_of_the_hub(tmp_path):
    import datasets
    f = folder_of(tmp_path/'set', 'a.png')
    (f/'metadata.csv').write_text('file_name,text\na.png,a cat\n')
    broken = [None, dict(bytes=None, path=None), dict(bytes=b'', path='x'), dict(bytes=b'junk', path=None),
              dict(bytes=None, path=str(f/'none.png')), 5, [1], {}, 'nowhere.png', rgb/255,
              dict(bytes='text', path=None)]
    for stored in broken:
        with pytest.raises(OSError, match='^(example 3|x|nowhere.png|.*none.png): '):
            hub_example(dict(i=stored), 'i', '', 'example 3')
    for stored in (dict(bytes=files['rgba'], path='a.png'), Image.fromarray(holes), np.asarray(holes), str(f/'a.png')):
        assert hub_example(dict(i=stored), 'i', 't', 'example 3')['captions'] == ['']
    examples = hub('imagefolder', data_dir=str(f), cache_dir=str(tmp_path/'1'))
    shutil.copytree(f, tmp_path/'copy', copy_function=shutil.copyfile)
    assert hub('imagefolder', data_dir=str(tmp_path/'copy'),
               cache_dir=str(tmp_path/'2')).fingerprint == examples.fingerprint
    (tmp_path/'copy/metadata.csv').write_text('file_name,text\na.png,a dog\n')
    assert hub('imagefolder', data_dir=str(tmp_path/'copy'),
               cache_dir=str(tmp_path/'3')).fingerprint != examples.fingerprint
    class Torn:
        def __getitem__(self, i):
            if i > 4: raise IndexError(i)
            raise RuntimeError('page is corrupt')
    with pytest.raises(OSError, match='example 3: cannot be read'): HubDataset(Torn(), 'i', '')[3]

def test_a_part_of_rows_that_have_no_fingerprint_has_none():
    "Else two data sets in memory would have one, and share a cache"
    from v2flow_nbdev.data.cache import fingerprint
    from v2flow_nbdev.data.sources import FewCaptions
    def examples(colour): return [dict(image=Image.new('RGB', (4, 4), colour), captions=['a', 'b'])]*3
    for part in (lambda r: Subset(Subset(r, [0, 1]), [1]), lambda r: FewCaptions(Subset(r, [0, 1]), 1),
                 lambda r: Subset(FewCaptions(r, 1), [0])):
        assert fingerprint(part(examples('red'))) != fingerprint(
            part(examples('blue'))) and fingerprint(part(examples('red'))) == fingerprint(part(examples('red')))
