"The page that says how to add a system to the comparison: its example runs, is short, and scores what the page says"
import re
from types import SimpleNamespace
import pytest, torch
from conftest import root

page = (root/'docs/adding_a_system.md').read_text(encoding='utf-8')
code = re.search(r'```python\n(.*?)```', page, re.S).group(1)

@pytest.fixture(scope='module')
def toy():
    "What the example has made, and what it has printed"
    said = []
    names = dict(print=said.append)
    exec(compile(code, 'toy.py', 'exec'), names)
    return SimpleNamespace(**names, table=said[0])

def test_the_example_is_short():
    lines = code.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120

def numbers(text): return [float(n) for n in re.findall(r'\d+(?:\.\d+)?', text)]

def test_the_page_says_what_the_example_scores(toy):
    "To what another machine's k-means may change"
    measured = {key: numbers(row)[0] for key, row in re.findall(r'\(`(\w+)`\) \|[^|]*\| ([^|]*) \|', toy.table)}
    said = {key: numbers(cell)[0] for key, cell in re.findall(r'\(`(\w+)`\) \| ([^|]*) \|', page)}
    assert len(said) == 7
    for key, value in said.items(): assert measured[key] == pytest.approx(value, rel=0.03), key

def test_the_shipped_model_scores_what_the_page_says():
    readme = (root/'data/checkpoints/digits/README.md').read_text(encoding='utf-8')
    shipped = dict(re.findall(r'\(`(\w+)`\) \|[^|]*\| ([^|]*?)(?: of [\d,]+)? \|', readme))
    said = dict(re.findall(r'\(`(\w+)`\) \|[^|]*\| ([^|]*) \|', page[page.index('| what | toy |'):]))
    assert len(said) == 7 and {k: shipped[k] for k in said} == said

def test_the_example_keeps_to_what_the_page_says_of_systems(toy):
    from v2flow_nbdev import to_tensor
    images = [e['image'] for e in toy.digits('test')[:3]]
    x, tok, pipe = to_tensor(images, channels=1), toy.tok, toy.pipe
    ids = tok.encode(x)
    assert ids.shape == (3, 16) and ids.dtype == torch.int64 and torch.equal(tok.encode(tok.decode(ids)), ids)
    assert tok.decode(ids).shape == x.shape and tok.decode(ids).abs().max() <= 1
    made = [pipe(['a seven', 'an 8'], generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert len(made[0].images) == 2 and torch.equal(made[0].ids, made[1].ids) and not torch.equal(made[0].ids, made[2].ids)
    assert pipe.caption(images[0]) == pipe.caption(images)[0] and len(pipe.caption(images)) == 3
    with pytest.raises(ValueError, match='no digit'): pipe('a cat')
