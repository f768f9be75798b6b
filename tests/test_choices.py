"What makes a language model learn to draw sooner: every choice is one that a training takes, and a miniature goes through all"
import json
import pytest
from benchmarks import choices

@pytest.mark.parametrize('name', choices.choices)
def test_a_choice_changes_settings_of_a_training_and_nothing_else(name):
    one, base = (choices.recipe_of(n, 'tok', 100, 3) for n in (name, 'base'))
    changed = {k for part in ('llm', 'training') for k,v in vars(getattr(one, part)).items() if vars(getattr(base, part))[k] != v}
    assert changed == {k for k,v in choices.choices[name].items()}
    assert one.training.seed == 3 and one.data == base.data

def test_the_miniature_learns_measures_and_is_not_run_twice(small_pretrained, tmp_path, monkeypatch, capsys):
    small = dict(pretrained=str(small_pretrained/'llm'), batch_size=4, compile=False, copies=0)
    whole, measure = choices.one_run, choices.measure
    monkeypatch.setattr(choices, 'one_run', lambda *args: whole(*args, **small))
    monkeypatch.setattr(choices, 'measure', lambda pipe: measure(pipe, 10))
    call = ['run', '--tokenizer', str(small_pretrained/'tok'), '--steps', '2', '--only', 'base', 'no coarse token',
            '--ids', str(tmp_path/'ids'), '--results', str(tmp_path/'found.json')]
    choices.main(call)
    found = json.loads((tmp_path/'found.json').read_text())
    assert [r['choice'] for r in found] == ['base', 'no coarse token'] and all([p['step'] for p in r['points']] == [1, 2] for r in found)
    assert all(0 <= p['drawn'] <= 1 and 0 <= p['read'] <= 1 for r in found for p in r['points'])
    assert found[0]['points'][-1]['loss'] != found[1]['points'][-1]['loss']
    monkeypatch.setattr(choices, 'one_run', lambda *args: pytest.fail('trained again'))
    choices.main(call)
    capsys.readouterr(); choices.main(['table', '--results', str(tmp_path/'found.json')])
    assert '| no coarse token | 1 | 64 |' in capsys.readouterr().out
    choices.main(['plot', '--results', str(tmp_path/'found.json')])
    assert (tmp_path/'found.png').stat().st_size > 1000

def test_wrong_calls_end_with_a_line(capsys):
    for call, said in ((['run'], 'needs --tokenizer'), (['run', '--tokenizer', 'x', '--only', 'bsae'], 'invalid choice')):
        with pytest.raises(SystemExit): choices.main(call)
        assert said in capsys.readouterr().err
