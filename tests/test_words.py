"""The exam on words that no training caption holds: it gives full marks to the right images and chance to others, its
standard error is the one in the books, and its test split is run once"""
import json, sys
from collections import Counter
import numpy as np, pyarrow.parquet as pq, pytest, torch
from PIL import Image
from benchmarks import words
from conftest import root
from v2flow_nbdev.evaluation.likelihood import heeding, naming_marks
from v2flow_nbdev.evaluation.pretrained import (
    KeywordExam, candidate_bases, caption_distances, exam_marks, in_frame, keyword_sheet,
    load_keywords, mean_and_error, name_states, permuted_captions, retrieve_captions)
from v2flow_nbdev.language.pipeline import V2FlowPipeline
from v2flow_nbdev.language.text_models import toy_llama, toy_v2flow
from v2flow_nbdev.language.visual_tokens import VisualTokens, add_visual_tokens

names = [f'thing{i:02}' for i in range(60)]

@pytest.fixture(scope='module')
def exam():
    "60 bases of two images each, with captions"
    rng = np.random.default_rng(0)
    def image(): return Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    return KeywordExam(None, [dict(image=image(), base=b, captions=[f'{b} emoji', f'an emoji of a {b}']) for b in names
                              for _ in range(2)])

def asked(n=60): return [dict(keyword=f'word {i}', base=names[i % 60]) for i in range(n)]

def real(exam, keywords):
    "The second training image of each base, as a tensor"
    pixels = {r['base']: torch.from_numpy(np.array(r['image'])) for r in exam.examples}
    return torch.stack([pixels[r['base']] for r in keywords]).permute(0, 3, 1, 2)/127.5 - 1

@pytest.fixture(scope='module')
def toy():
    "An untrained pipeline with a coarse token for each base"
    llm, tokenizer = toy_llama([f'an emoji of a {n}' for n in names]*4)
    tok = toy_v2flow(llm, tokenizer)
    add_visual_tokens(llm, tokenizer, tok, coarse=60)
    return V2FlowPipeline(tok, llm.eval(), tokenizer)

def test_standard_error_by_hand():
    """Deviations from ¾ are ¼, -¾ | ¼ | ¼, their sums -½, ¼, ¼, the squares' sum ⅜, times 3/2 the square of ¾, over 4;
    with a keyword a base it is the ordinary one"""
    mean, se = mean_and_error([1, 0, 1, 1], ['a', 'a', 'b', 'c'])
    assert mean == 0.75 and se == pytest.approx(0.1875)
    x = np.array([0, 1, 1/3, 1, 0])
    assert mean_and_error(x, range(5))[1] == pytest.approx(x.std(ddof=1)/5**.5)
    assert np.isnan(mean_and_error([1, 0], ['a', 'a'])[1])

def test_an_oracle_has_all_right_and_permuted_captions_chance(exam):
    keywords = asked(120)
    images = real(exam, keywords)
    m = exam.marks(images, keywords)['pixels']
    assert m['accuracy'] == 1 and m['se'] == 0 and m['right'].shape == (120, 1) and m['chance'] < 0.04
    assert [exam.bases[i] for i in m['nearest'][:, 0]] == [r['base'] for r in keywords]
    wrong = exam.marks(images[permuted_captions([r['base'] for r in keywords], np.random.default_rng(1))], keywords)['pixels']
    assert wrong['accuracy'] < 0.1 > wrong['chance']
    both = torch.stack([images, images.roll(1, 0)], 1).flatten(0, 1)
    half = exam.marks(both, keywords)['pixels']
    assert 0.5 <= half['accuracy'] < 0.55 and half['right'][:, 0].all()            # one of two images is right
    with pytest.raises(ValueError, match='as many of each'): exam.marks(images[:7], keywords[:2])
    assert keyword_sheet(both, keywords, half, exam, 3).size[0] > 3*88

def test_a_tie_is_wrong_and_so_is_what_is_not_a_number():
    for value in (1., torch.nan):
        assert exam_marks(torch.full((60, 3, 60), value), asked(), names)['accuracy'] == 0

def test_candidates_are_the_right_base_and_fifty_others():
    train = sorted({b.as_py() for b in pq.read_table(root/'data/emoji/train.parquet', columns=['base'])['base']})
    wanted = [r['base'] for s in ('dev', 'test') for r in load_keywords(s)]
    found = candidate_bases(train, wanted)
    assert found.shape == (1550, 51) and [train[i] for i in found[:, 0]] == wanted
    assert all(len(set(row)) == 51 for row in found.tolist())
    assert torch.equal(candidate_bases(train, wanted[70:73]), found[70:73])        # whatever else is asked
    assert Counter(map(tuple, found.tolist())).most_common(1)[0][1] == Counter(wanted).most_common(1)[0][1]
    with pytest.raises(ValueError, match='no training image of unicorn ship'): candidate_bases(train, ['unicorn ship'])
    for few in (train[:50], train[:51] + train[:1]):
        with pytest.raises(ValueError, match='51 or more, each once'): candidate_bases(few, few[:1])

def test_captions_are_permuted_among_bases():
    groups, rng = [*'aaaabbcde'], np.random.default_rng(0)
    for _ in range(100):
        p = permuted_captions(groups, rng)
        assert sorted(p) == [*range(9)] and all(groups[i] != groups[j] for i, j in enumerate(p))
    with pytest.raises(ValueError, match='3 of 4 belong to one base'): permuted_captions([*'aaab'], rng)
    assert exam_marks(torch.rand(3, 1, 60), [asked()[0]]*3, names)['chance'] is None

@pytest.mark.parametrize('word, article', [
    ('hippo', 'a'), ('empanada', 'an'), ('universal', 'a'), ('unlucky', 'an'), ('us', 'a'), ('eu', 'an'), ('once', 'a'),
    ('hr', 'an'), ('nz', 'an'), ('dk', 'a'), ('uhh', 'an'), ('8ball', 'an'), ('hour', 'an'), ('ewe', 'a'), ('ee', 'an'), ('ill', 'an')])
def test_articles(word, article): assert in_frame(word) == f'an emoji of {article} {word}'

def test_the_words_are_read_whole_or_not_at_all(tmp_path):
    assert len(load_keywords()) == 789 and load_keywords('dev', 5) == load_keywords('dev', 5) != load_keywords('dev')[:5]
    assert not {r['base'] for r in load_keywords()} & {r['base'] for r in load_keywords('test')}
    with pytest.raises(ValueError, match='use dev or test'): load_keywords('train')
    with pytest.raises(ValueError, match='n=0'): load_keywords(n=0)
    for text, why in (('', 'missing'), ('[1]', 'not a JSON object'), ('{"dev": [{"keyword": "x"}], "test": []}', 'no list')):
        path = tmp_path/'words.json'
        if text: path.write_text(text)
        with pytest.raises(OSError, match=f'words.json.*{why}'): load_keywords('dev', path=path)

def test_states_are_those_of_each_caption_alone_and_a_caption_finds_itself(exam, toy):
    "Batches pad, and may not change anything; the name's tokens are those behind `an emoji of a`"
    captions = ['an emoji of a thing01', 'an emoji of an ill thing02 and thing03', 'an emoji of thing04']
    together = name_states(toy.llm, toy.tokenizer, captions)
    for i, c in enumerate(captions): torch.testing.assert_close(name_states(toy.llm, toy.tokenizer, [c])[:, 0], together[:, i])
    ids = toy.tokenizer(captions[0], add_special_tokens=False).input_ids
    start = len(toy.tokenizer('an emoji of a', add_special_tokens=False).input_ids)
    table = toy.llm.get_input_embeddings().weight
    torch.testing.assert_close(together[0, 0], table[ids[start:]].mean(0).detach())
    known = torch.randn(80, 12, generator=torch.Generator().manual_seed(0))
    d = caption_distances(known*3, known, 8)
    assert d.shape == (80, 80) and caption_distances(known, known, 8).diagonal().abs().max() < 1e-5
    numbers, marks, layer, by_layer = retrieve_captions(toy.llm, toy.tokenizer, [dict(keyword=n, base=n) for n in names], exam)
    assert marks['accuracy'] == 1 and len(by_layer) == 3 and by_layer[layer] == 1
    assert [exam.examples[i]['base'] for i in numbers] == names

def test_naming_is_read_from_the_coarse_tokens(toy):
    "A head that was solved for it names every base; an untrained one is at chance"
    keywords = [dict(keyword=n, base=n) for n in names]
    assert naming_marks(toy.llm, toy.tokenizer, keywords, names)['accuracy'] < 0.15
    visual, states = VisualTokens.of(toy.llm), []
    hook = toy.llm.get_decoder().register_forward_hook(lambda m, a, out: states.append(out.last_hidden_state))
    for n in names:
        ids = toy.tokenizer(f'an emoji of a {n}', add_special_tokens=False).input_ids
        with torch.no_grad(): toy.llm(torch.tensor([[toy.tokenizer.bos_token_id, *ids, visual.begin(visual.grid)]]))
    hook.remove()
    rows = toy.llm.get_output_embeddings().weight.data[visual.coarse.start:visual.coarse.stop]
    before = rows.clone()
    rows.copy_(torch.linalg.pinv(torch.stack([s[0, -1] for s in states]).double()).T)
    try: assert naming_marks(toy.llm, toy.tokenizer, keywords, names, 7)['accuracy'] == 1
    finally: rows.copy_(before)
    with pytest.raises(ValueError, match='60 coarse tokens, there are 59 bases'):
        naming_marks(toy.llm, toy.tokenizer, keywords, names[:59])

def test_heeding_is_the_difference_of_two_losses(toy):
    "Of a model's own loss, among the tokens of each kind, sequence by sequence"
    rng = np.random.default_rng(3)
    examples = [dict(image=Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)), base=n, captions=[f'an emoji of a {n}'])
                for n in names[:10]]
    found, visual = heeding(toy, examples, names, batch_size=4), VisualTokens.of(toy.llm)
    def loss(caption, example, base):
        ids = toy.image_tokenizer.encode(toy.prepare(example['image']))[0]
        text = toy.tokenizer(caption, add_special_tokens=False).input_ids
        prompt = [toy.tokenizer.bos_token_id, *text, visual.begin(visual.grid)]
        row = torch.tensor([[*prompt, visual.coarse[base], *(visual.first + ids).tolist()]])
        with torch.no_grad(): logits = toy.llm(row).logits[0, len(prompt) - 1:-1]
        fine = torch.nn.functional.cross_entropy(logits[1:, visual.first:visual.coarse.start], ids, reduction='sum')
        return -logits[0, visual.coarse.start:visual.coarse.stop].log_softmax(-1)[base] + fine
    own = np.mean([loss(r['captions'][0], r, i).item() for i, r in enumerate(examples)])
    assert found['own'] == pytest.approx(own, rel=1e-4)
    assert found['heeding'] == pytest.approx(found['other'] - found['own']) and found['se'] > 0 and abs(found['coarse']) < 1

def test_naming_and_heeding_with_several_fields():
    "Naming asks the first field's tokens; heeding counts each coarse token among its own field's"
    llm, tokenizer = toy_llama([f'an emoji of a {n}' for n in names]*4)
    tok, rng = toy_v2flow(llm, tokenizer), np.random.default_rng(3)
    visual = add_visual_tokens(llm, tokenizer, tok, coarse=[60, 3])
    pipe = V2FlowPipeline(tok, llm.eval(), tokenizer)
    examples = [dict(image=Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)), base=n, tone=t, sex='',
                     captions=[f'an emoji of a {n}']) for n, t in zip(names, ['', 'dark', 'light']*20)]
    assert words.values_of(visual, examples) == (values := dict(base=names, tone=['', 'dark', 'light']))
    keywords = [dict(keyword=n, base=n) for n in names]
    assert naming_marks(llm, tokenizer, keywords, names)['accuracy'] < 0.15
    with pytest.raises(ValueError, match='60 coarse tokens, there are 59 bases'): naming_marks(llm, tokenizer, keywords, names[:59])
    found = heeding(pipe, examples[:10], values, batch_size=4)
    def losses(caption, example):
        ids = tok.encode(pipe.prepare(example['image']))[0]
        prompt = [tokenizer.bos_token_id, *tokenizer(caption, add_special_tokens=False).input_ids, visual.begin(visual.grid)]
        coarse = [f[v.index(example[k])] for f, (k, v) in zip(visual.coarse_fields, values.items())]
        row = torch.tensor([[*prompt, *coarse, *(visual.first + ids).tolist()]])
        with torch.no_grad(): logits = llm(row).logits[0, len(prompt) - 1:-1].double()
        kinds = [*visual.coarse_fields] + [range(visual.first, visual.first + 32)]*16
        return [-(l[k.start:k.stop].log_softmax(-1)[t - k.start]).item() for l, k, t in zip(logits, kinds, row[0, len(prompt):].tolist())]
    own = np.array([losses(r['captions'][0], r) for r in examples[:10]])
    said = permuted_captions(names[:10], (again := np.random.default_rng(0), [again.integers(1) for _ in range(10)])[0])
    other = np.array([losses(examples[j]['captions'][0], r) for j, r in zip(said, examples)])
    assert found['own'] == pytest.approx(own.sum(1).mean(), rel=1e-4) and found['other'] == pytest.approx(other.sum(1).mean(), rel=1e-4)
    assert found['coarse'] == pytest.approx((other - own)[:, :2].sum(1).mean(), abs=1e-4)
    for wrong in (names, dict(tone=values['tone'], base=names), {}):
        with pytest.raises(ValueError, match='60 [+] 3 coarse tokens'): heeding(pipe, examples[:10], wrong)

def run(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['words', *map(str, args)])
    with pytest.raises(SystemExit) as e: words.main()
    return e.value.code

def test_the_test_split_is_run_once(tmp_path, monkeypatch, capsys):
    out = tmp_path/'words.json'
    words.write_row(out, dict(name='a', split='test', n=3))
    words.write_row(out, dict(name='a', split='dev', n=3))
    words.write_row(out, dict(name='a', split='dev', naming_accuracy=.5))
    before = out.read_text()
    assert json.loads(before) == [dict(name='a', split='test', n=3), dict(name='a', split='dev', n=3, naming_accuracy=.5)]
    assert run(monkeypatch, 'nowhere', '--name', 'a', '--split', 'test', '--out', out) == 2
    assert 'has a test row already' in capsys.readouterr().err
    with pytest.raises(ValueError, match='run once'): words.write_row(out, dict(name='a', split='test'))
    assert out.read_text() == before
    assert run(monkeypatch, 'nowhere', '--split', 'test', '--retrieval', '--out', out) == 2
    assert 'dev has to choose the layer' in capsys.readouterr().err

def test_a_wrong_call_says_so_in_one_line(tmp_path, monkeypatch):
    (tmp_path/'other.json').write_text('{"rows": 1}')
    assert 'holds no rows' in run(monkeypatch, 'x', '--out', tmp_path/'other.json')
    assert 'nowhere' in (why := run(monkeypatch, tmp_path/'nowhere', '--out', tmp_path/'w.json')) and '\n' not in why
    assert run(monkeypatch, 'x', '--name', '../x') == run(monkeypatch, 'x', '--images', '0') == 2
    assert not (tmp_path/'w.json').exists()

def test_prose_is_measured_beside_that_of_the_base(small_pretrained, tmp_path):
    "An adapter that has learned nothing yet has the perplexity of its base; a model without one is told so in a line"
    from types import SimpleNamespace
    from v2flow_nbdev.language.adapters import choose_trained, save_adapter
    from v2flow_nbdev.language.loading import load_llm
    from v2flow_nbdev.language.visual_tokens import add_visual_tokens
    from v2flow_nbdev.models.tokenizer import V2Flow
    llm, tokenizer = load_llm(small_pretrained/'llm')
    add_visual_tokens(llm, tokenizer, V2Flow.from_pretrained(small_pretrained/'tok'))
    model = choose_trained(llm, 'lora', rank=2)
    save_adapter(model, tmp_path/'llm', str(small_pretrained/'llm'))
    pipe = SimpleNamespace(llm=model.get_base_model(), tokenizer=tokenizer, device=torch.device('cpu'))
    found = words.prose_of(pipe, tmp_path)
    assert found['prose'] == pytest.approx(found['prose_before'], rel=1e-4) and found['prose'] > 50
    with pytest.raises(OSError, match='base.json'): words.prose_of(pipe, tmp_path/'other')
