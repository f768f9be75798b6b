"What draws names out of a pretrained language model: every choice changes one thing, and a miniature goes through some"
import json
import pytest, torch
from benchmarks import naming
from v2flow_nbdev.base.text import text_ids
from v2flow_nbdev.data.sources import emoji
from v2flow_nbdev.language.text_models import first_id, toy_llama, toy_v2flow
from v2flow_nbdev.language.visual_tokens import add_visual_tokens

def test_every_choice_changes_settings_that_there_are():
    for name, changed in naming.choices.items():
        assert set(changed) <= set(naming.base) and all(naming.base[k] != v for k,v in changed.items()), name

def named(**how):
    llm, tokenizer = toy_llama(['a red cat', 'the dog'])
    visual = add_visual_tokens(llm, tokenizer, toy_v2flow(llm, tokenizer), coarse=[2])
    examples = [dict(captions=['a red cat'], base='cat')]*9 + [dict(captions=['the dog'], base='dog')]
    return llm, tokenizer, visual, naming.Names(examples, tokenizer, visual, [0]*9 + [1], **how)

def test_a_sequence_is_a_caption_and_the_token_of_its_base():
    "No image; a base with one example comes up as √1 to √9; plain text as often as asked"
    llm, tokenizer, visual, data = named()
    torch.manual_seed(0)
    seen = [data[0] for _ in range(400)]
    cat, dog = text_ids(tokenizer, ['a red cat', 'the dog'])
    assert {tuple(p) for p, _ in seen} == {(first_id(tokenizer), *ids, visual.begin(visual.grid)) for ids in (cat, dog)}
    assert all(t == [visual.coarse[int(p[1:-1] == dog)]] for p, t in seen)
    assert 0.18 < sum(t == [visual.coarse[1]] for _, t in seen)/400 < 0.32
    data = named(texts=['some words'], text_share=0.5)[-1]
    assert 0.4 < sum(len(t) > 1 for _, t in (data[0] for _ in range(400)))/400 < 0.6
    _, tokenizer, visual, data = named(words=[('a word', torch.tensor([0., 1.]))], word_share=0.5)
    told = [t for p, t in (data[0] for _ in range(400)) if p[1:-1] == text_ids(tokenizer, ['a word'])[0]]
    assert 0.4 < len(told)/400 < 0.6 and all(t == [visual.coarse[1]] for t in told)

def test_rows_begin_as_names_and_noise_is_of_the_training():
    llm, tokenizer, visual, _ = named()
    before = llm.get_input_embeddings().weight.detach().clone()
    naming.rows_as_names(llm, tokenizer, visual, ['red cat', 'dog'])
    table = llm.get_input_embeddings().weight.detach(); mean = table[:visual.first].mean(0)
    off = table[text_ids(tokenizer, [' red cat'])[0]].mean(0) - mean
    assert torch.cosine_similarity(table[visual.coarse[0]] - mean, off, dim=0) > 0.999
    assert torch.equal(table[:visual.coarse[0]], before[:visual.coarse[0]])
    naming.noisy(llm, 5.); ids = torch.tensor([[1, 2, 3]])
    embed = llm.get_input_embeddings()
    assert torch.equal(embed.eval()(ids), table[ids]) and (embed.train()(ids) - table[ids]).abs().max() <= 5/(3*table.shape[1])**.5

def test_the_miniature_is_measured_and_not_run_twice(small_pretrained, tmp_path, monkeypatch, capsys):
    whole = naming.one_run
    monkeypatch.setattr(naming, 'one_run', lambda *args: whole(*args, n=20, batch_size=4))
    call = ['run', '--llm', str(small_pretrained/'llm'), '--tokenizer', str(small_pretrained/'tok'), '--steps', '4', '--only', 'base',
            'new embeddings alone', 'rows begin as their names', '--results', str(tmp_path/'found.json')]
    naming.main(call)
    found = json.loads((tmp_path/'found.json').read_text())
    assert [[p['step'] for p in r['points']] for r in found] == [[1, 2, 3, 4]]*3
    assert len({r['points'][-1]['loss'] for r in found}) == 3 and all(0 <= p['named'] <= 1 for r in found for p in r['points'])
    monkeypatch.setattr(naming, 'one_run', lambda *args: pytest.fail('trained again'))
    naming.main(call)
    capsys.readouterr(); naming.main(['table', '--results', str(tmp_path/'found.json')])
    assert '| new embeddings alone | 1 | 16 |' in capsys.readouterr().out
    naming.main(['plot', '--results', str(tmp_path/'found.json')])
    assert (tmp_path/'found.png').stat().st_size > 1000

def test_wrong_calls_end_with_a_line(capsys):
    with pytest.raises(SystemExit): naming.main(['run', '--only', 'bsae'])
    assert 'invalid choice' in capsys.readouterr().err
