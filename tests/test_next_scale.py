"TokenFlow's language model: scale by scale, both directions, its training, its folder and its commands"
import json, math
import pytest, torch, torch.nn.functional as F
from conftest import root
from v2flow_nbdev.language.generation import left_pad, sample_codes
from v2flow_nbdev.language.text_models import small_llama, train_text_tokenizer
from v2flow_nbdev.systems.next_scale import NextScale, at_side, block_causal_mask, generate_scales, narrowing
from v2flow_nbdev.systems.teacher import Teacher, TeacherConfig
from v2flow_nbdev.systems.tokenflow import TokenFlow, TokenFlowConfig
from v2flow_nbdev.systems.tokenflow_pipeline import TokenFlowPipeline
from v2flow_nbdev.systems.tokenflow_quantizer import MultiScaleQuantizer
from v2flow_nbdev.systems.understanding import (
    DirectionExamples, Reader, TokenFlowLLM, collate_directions, count_directions, sights, write_captions)

S, P, K, sides, counts = 6, 4, 32, (1, 2, 4), [1, 4, 16]
ends = [1, 5, 21]

def gen(seed=0): return torch.Generator().manual_seed(seed)

def some_ids(b=2, seed=0): return torch.randint(K, (b, 21), generator=gen(seed))

def quantizer():
    torch.manual_seed(0)
    q = MultiScaleQuantizer(K, S, P, sides)
    q.initialised.fill_(True); q.gains.copy_(torch.tensor([[2., 1.], [1., .7], [.5, .6]]))
    return q

tokenizer = train_text_tokenizer(['a red cat', 'a blue dog', 'two green birds'], 300)

def model(kind=TokenFlowLLM, attention='sdpa', **settings):
    torch.manual_seed(1)
    llm = small_llama(tokenizer, 32, 2, 2, 64, 64, attention=attention)
    return (kind(llm, quantizer()) if kind is NextScale else kind(llm, quantizer(), 0, **settings)).eval()

texts = [[0, 5, 6, 7], [0, 9]]                                                     # of two lengths

# ---- what a scale is shown

def test_features_are_the_tokenizers_own_partial_sums_and_theirs_are_not():
    m, ids = model(NextScale), some_ids()
    q = m.quantizer
    seen = []
    m.project.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    m.inputs(ids[:, :5], range(3))
    sums = q.partial_sums(ids)
    for k, x in enumerate(seen): torch.testing.assert_close(x, at_side(sums[k], sides[k + 1]), rtol=0, atol=0)
    # what the tokenizer subtracts before it looks for the codes of scale k
    h = torch.randn(2, S + P, 4, 4, generator=gen())
    for k, left, _, _ in q.pyramid(h):
        if k: torch.testing.assert_close(at_side(h, sides[k]) - at_side(q.partial_sums(q.ids(h + q.centre[:, None, None]))[k - 1], sides[k]), left)
    # enlarged in a chain from scale to scale, as in the public code, over nine scales
    nine = MultiScaleQuantizer(K, S, P, (1, 2, 4, 6, 8, 10, 12, 14, 16)); nine.initialised.fill_(True)
    ids, total = torch.randint(K, (4, sum(nine.counts_of_ids)), generator=gen()), None
    for k, part in enumerate(ids.split(nine.counts_of_ids, 1)):
        codes = nine.table()[part].mT.unflatten(2, (nine.sides[k],)*2)
        total = codes if k == 0 else F.interpolate(total, codes.shape[-2:], mode='bicubic') + codes
    own = nine.codes_to_map(ids)
    assert .1 < (total - own).norm()/own.norm() < .2

@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_a_code_moves_the_logits_of_later_scales_alone(attention):
    m, ids, batch = model(NextScale, attention), some_ids(), left_pad(texts)
    with torch.no_grad():
        logits = m.code_logits(**batch, ids=ids)
        assert logits.shape == (2, 21, K) and logits.isfinite().all()
        for k, (start, end) in enumerate(zip([0, *ends], ends)):
            for i in (start, end - 1):
                other = ids.clone(); other[:, i] = (other[:, i] + 1) % K
                moved = [part.abs().max() > 0 for part in (m.code_logits(**batch, ids=other) - logits).split(counts, 1)]
                assert moved == [j > k for j in range(3)]
        # text moves all, padding nothing
        longer = {n: F.pad(t, (3, 0)) for n, t in batch.items()}
        torch.testing.assert_close(m.code_logits(**longer, ids=ids), logits, atol=1e-5, rtol=1e-4)
        batch['input_ids'][:, -1] = 8
        assert all(part.abs().max() > 0 for part in (m.code_logits(**batch, ids=ids) - logits).split(counts, 1))

def test_the_mask_is_that_of_times():
    there = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
    mask = block_causal_mask(there, counts)
    time = [-3, -2, -1, 0] + [1]*4 + [2]*16
    for b in range(2):
        for i in range(24):
            for j in range(24):
                sees = (time[j] <= time[i] and (j > 2 or there[b, j].item())) or i == j
                assert (mask[b, 0, i, j] == 0) == sees

# ---- generation

@pytest.mark.parametrize('attention', ['sdpa', 'eager'])
def test_greedy_generation_is_the_argmax_of_one_pass(attention):
    m = model(NextScale, attention)
    ids = generate_scales(m, texts, temperature=0)
    assert torch.equal(m.code_logits(**left_pad(texts), ids=ids).argmax(-1), ids)

@pytest.mark.parametrize('passes', [1, 2, 5])
def test_the_number_of_passes(passes):
    m, calls = model(NextScale), []
    states = m.states
    m.states = lambda *args: calls.append(args[1].shape[:2]) or states(*args)
    for scale, rows in ((1., 2), (3., 4)):                                         # no second branch without guidance
        calls.clear(); generate_scales(m, texts, [0], scale, passes=passes, generator=gen())
        assert len(calls) == 1 + 2*passes and calls == [(rows, 1)] + [(rows, 4)]*passes + [(rows, 16)]*passes

def test_extra_passes_leave_what_later_scales_look_at_as_it_was():
    m = model(NextScale)
    told = []
    ids = generate_scales(m, texts, temperature=0, passes=3, callback=lambda ids: told.append(ids.shape[1]))
    assert told == ends
    # the last scale's first pass, from all ids before it, as in training: nothing of a second pass is in its keys
    first = m.code_logits(**left_pad(texts), ids=ids)[:, 5:]
    seen, codes = [], m.codes
    m.codes.register_forward_hook(lambda _, args, out: seen.append(out))
    generate_scales(m, texts, temperature=0, passes=3)
    torch.testing.assert_close(seen[4], first, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(seen[5], first, atol=1e-3)                           # the second is shown more

def test_what_a_scale_is_shown_when_it_is_written_again_is_the_same_in_training_and_generation():
    m, seen, batch = model(NextScale), [], left_pad(texts)
    hook = m.codes.register_forward_hook(lambda _, args, out: seen.append(out))
    generate_scales(m, texts, temperature=0, passes=2)
    hook.remove()
    ids = torch.cat([x.argmax(-1) for x in seen[:2]], 1)                           # scale 0, and the first pass of scale 1
    torch.testing.assert_close(m.code_logits(**batch, ids=ids, written=True)[:, 1:], seen[2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(m.code_logits(**batch, ids=ids), torch.cat(seen[:2], 1), atol=1e-5, rtol=1e-4)  # any prefix

def test_guidance_is_absent_at_the_first_scale_and_rises(monkeypatch):
    import v2flow_nbdev.systems.next_scale as module
    m, scales, real = model(NextScale), [], module.guide_logits
    monkeypatch.setattr(module, 'guide_logits', lambda c, n, scale, p: scales.append(scale) or real(c, n, scale, p))
    strong = generate_scales(m, texts, [0], 8.5, generator=[gen(0), gen(1)])
    assert scales == [1., 4.75, 8.5]
    plain = generate_scales(m, texts, [0], 1., generator=[gen(0), gen(1)])
    assert torch.equal(strong[:, :1], plain[:, :1]) and not torch.equal(strong, plain)

def test_an_image_does_not_depend_on_its_batch_and_every_setting_counts():
    m = model(NextScale)
    base = dict(null=[0], guidance_scale=3., temperature=1., top_k=20, top_p=.9, min_p=.01, passes=2)
    both = generate_scales(m, texts, generator=[gen(0), gen(1)], **base)
    assert torch.equal(generate_scales(m, texts[1:], generator=[gen(1)], **base)[0], both[1])
    for other in (dict(null=[0, 4]), dict(guidance_scale=1.), dict(temperature=.2), dict(top_k=2), dict(top_p=.1), dict(min_p=.9), dict(passes=1)):
        assert not torch.equal(generate_scales(m, texts, generator=[gen(0), gen(1)], **base | other), both), other
    for wrong in (dict(passes=0), dict(top_k=0), dict(temperature=-1)):
        with pytest.raises(ValueError, match=next(iter(wrong))): generate_scales(m, texts, **wrong)

def test_top_k_narrows_evenly_in_its_logarithm():
    assert [narrowing(r, 3, 1200) for r in range(3)] == [1200, round(1200**.5), 1]
    assert [narrowing(r, 1, 7) for r in range(1)] == [7]

@pytest.mark.parametrize('settings', [(0, None, None), (1., 3, None), (.7, None, .6), (1., 5, .8)])
def test_codes_of_a_grid_are_sampled_as_row_by_row(settings):
    logits = torch.randn(3, 5, 16, generator=gen())
    torch.manual_seed(0); whole = sample_codes(logits, *settings, None)
    torch.manual_seed(0); rows = sample_codes(logits.flatten(0, 1), *settings, None)
    assert torch.equal(whole.flatten(0, 1), rows)

# ---- both directions

def test_halves_are_shown_alone_and_ids_without_their_codes():
    q, ids = quantizer(), some_ids()
    before = {n: see(q, ids) for n, see in sights.items()}
    assert {n: tuple(x.shape[1:]) for n, x in before.items()} == dict(map=(16, 10), semantic=(16, 6), pixel=(16, 4), scales=(21, 10), ids=(21,))
    torch.testing.assert_close(before['map'], torch.cat([before['semantic'], before['pixel']], -1))
    torch.testing.assert_close(before['scales'][:, -16:], before['map'])
    q.codebook[:, :S] = q.codebook.flip(0)[:, :S]
    assert {n for n, see in sights.items() if torch.equal(see(q, ids), before[n])} == {'pixel', 'ids'}
    for sees in sights: assert Reader(q, 8, sees)(q, ids).shape == (2, Reader(q, 8, sees).length(q), 8)

def examples():
    return [dict(ids=i, captions=[c]) for i, c in zip(some_ids(3), ('a red cat', 'a blue dog', 'two green birds'))]

def test_a_mixed_batch_is_the_mean_of_its_parts_and_all_that_is_trained_has_a_gradient():
    for weight in (1., 3.):
        m = model(text_weight=weight)
        data = DirectionExamples(examples(), tokenizer, K, texts=['a red cat'], text_share=.2, caption_dropout=.3, id_noise=.1, write_noise=.3)
        torch.manual_seed(3)
        drawn = [data[i % 3] for i in range(14)]
        assert {e[0] for e in drawn} == {'write', 'read', 'text'}
        batch = collate_directions(drawn)
        out = m(**batch)
        alone = [(m(**(b := collate_directions([e]))).loss.item(), count_directions(b, weight)) for e in drawn]
        total = sum(n for _, n in alone)
        assert out.loss.item() == pytest.approx(sum(l*n for l, n in alone)/total, abs=1e-4)
        assert count_directions(batch, weight) == pytest.approx(total)
        out.loss.backward()
        assert [n for n, p in m.named_parameters() if p.requires_grad and p.grad is None] == []
        assert not any(p.requires_grad for p in m.quantizer.parameters())

def test_captions_are_dropped_and_rare_images_are_written_more_often():
    data = DirectionExamples(examples(), tokenizer, K, write_share=1., caption_dropout=.3, often=[1., 0., 1.])
    torch.manual_seed(0)
    drawn = [data[1] for _ in range(600)]
    assert .2 < sum(e[1] == [0] for e in drawn)/600 < .4
    assert not any(torch.equal(e[2], some_ids(3)[1]) for e in drawn)
    kept = DirectionExamples(examples(), tokenizer, K, write_share=1., caption_dropout=0.)
    assert all(len(kept[i % 3][1]) > 1 for i in range(60))

def test_a_fraction_of_batches_ends_with_a_scale_that_is_shown_itself():
    data = DirectionExamples(examples(), tokenizer, K, write_share=1., rewrite_share=.4, counts=counts)
    torch.manual_seed(0)
    batches = [collate_directions([data[i % 3] for i in range(4)]) for _ in range(300)]
    again = [b for b in batches if b['write_again']]
    assert .3 < len(again)/300 < .5 and {b['write_ids'].shape[1] for b in again} == {5, 21}
    assert all(torch.equal(b['write_ids'], b['write_shown']) for b in batches if not b['write_again'])
    for b in again:
        start = 1 if b['write_ids'].shape[1] == 5 else 5
        assert torch.equal(b['write_ids'][:, :start], b['write_shown'][:, :start])
    assert .15 < torch.cat([(b['write_ids'] != b['write_shown'])[:, -4:].flatten() for b in again]).float().mean() < .5
    m = model()
    assert m(**again[0]).loss.isfinite() and count_directions(again[0]) == again[0]['write_ids'].numel()

def test_a_caption_sees_its_image_and_the_words_before():
    m, ids = model(), some_ids()
    text = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 0]])
    with torch.no_grad():
        logits = m.caption_logits(ids, text)
        other = text.clone(); other[:, 2] = 4
        moved = (m.caption_logits(ids, other) - logits).abs().amax((0, 2)) > 0
        assert logits.shape == (2, 4, len(tokenizer)) and moved.tolist() == [False, False, False, True]
        assert ((m.caption_logits(some_ids(seed=1), text) - logits).abs().amax(2) > 0).all()
        torch.testing.assert_close(m.caption_logits(ids[1:], text[1:, :3]), logits[1:, :3], atol=1e-5, rtol=1e-4)

def test_four_images_are_written_and_described_after_a_minute_of_neither():
    m = model(sees='map')
    data = DirectionExamples(examples(), tokenizer, K, caption_dropout=.1)
    optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 4e-3)
    torch.manual_seed(0)
    for step in range(90):
        loss = m.train()(**collate_directions([data[i % 3] for i in range(9)])).loss
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    m.eval()
    captions = [e['captions'][0] for e in examples()]
    prompts = [[0, *tokenizer(c, add_special_tokens=False)['input_ids']] for c in captions]
    assert (generate_scales(m, prompts, temperature=0) == some_ids(3)).float().mean() > .95
    assert write_captions(m, tokenizer, some_ids(3)) == captions

# ---- the folder and the commands

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "An untrained tokenizer of 32 pixels, and an untrained LLaMA"
    folder = tmp_path_factory.mktemp('parts')
    torch.manual_seed(0)
    teacher = Teacher(TeacherConfig(width=16, dim=32, depth=1, heads=2, embed_dim=16, llm='none'))
    tok = TokenFlow(TokenFlowConfig(image_size=(32, 32), sides=(1, 2, 4), codebook_size=K, width=16, project_width=16), teacher)
    tok.quantizer.initialised.fill_(True)
    tok.save_pretrained(folder/'tok')
    small_llama(tokenizer, 32, 2, 2, 64, 40).save_pretrained(folder/'llm'); tokenizer.save_pretrained(folder/'llm')
    return folder

def call(capsys, *args):
    "What a subcommand prints, in this process"
    from v2flow_nbdev.apps.cli import app
    capsys.readouterr()
    app([str(a) for a in args], standalone_mode=False)
    return capsys.readouterr().out

def training(parts, out, *more):
    return ['train-tokenflow-llm', '--config', root/'configs/tokenflow-emoji-llm.yaml', '--out', out, 'data={name: shapes, n: 12, size: 32}', f'image_tokenizer={parts/"tok"}',
            f'llm={{pretrained: {parts/"llm"}, text_share: 0.2, write_noise: 0.3, rewrite_share: 0.5, save_dtype: float32}}', 'training.steps=4', 'training.batch_size=4', 'training.checkpoint_every=2', 'training.evaluate_every=0', 'training.trackers=[]', *more]

def test_the_commands_train_generate_caption_and_evaluate(parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    out = tmp_path/'run'
    plan = call(capsys, *training(parts, out, '--dry-run'))
    assert '21 positions in 3 scales to write, 16 to read (map)' in plan and '16' in plan
    call(capsys, *training(parts, out))
    folder = out/'model'
    assert json.loads((folder/'model_index.json').read_text())['_class_name'] == 'TokenFlowPipeline'
    assert json.loads((folder/'model_index.json').read_text())['defaults']['guidance_scale'] == 2.
    last = json.loads((out/'log.jsonl').read_text().splitlines()[-1])
    assert {'loss', 'image_loss', 'text_loss', 'text_perplexity'} <= set(last)
    with pytest.raises(Exception, match='already holds a run'): call(capsys, *training(parts, out))
    made = json.loads(call(capsys, 'generate', 'a red circle', '--model', folder, '--out', tmp_path/'a.png', '--json'))
    assert len(made['ids'][0]) == 21 and (tmp_path/'a.png').is_file()
    assert made == json.loads(call(capsys, 'generate', 'a red circle', '--model', folder, '--out', tmp_path/'a.png', '--json'))
    assert isinstance(json.loads(call(capsys, 'caption', tmp_path/'a.png', '--model', folder, '--json'))['caption'], str)
    assert {'psnr_db', 'ssim'} <= set(json.loads(call(capsys, 'reconstruct', tmp_path/'a.png', '--model', folder, '--out', tmp_path/'b.png', '--json')))
    (tmp_path/'ids.json').write_text(call(capsys, 'encode', tmp_path/'a.png', '--model', folder))
    call(capsys, 'decode', tmp_path/'ids.json', '--model', folder, '--out', tmp_path/'c.png')
    from PIL import Image
    assert Image.open(tmp_path/'b.png').tobytes() == Image.open(tmp_path/'c.png').tobytes()
    scores = json.loads(call(capsys, 'evaluate', '--model', folder, '--data', 'shapes', '--n', '2', '--json'))
    assert {'psnr_db', 'usage_4', 'train_accuracy', 'held_out_caption_accuracy'} <= set(scores)
    for wrong, why in ((('generate', 'a', '--size', '64', '64'), 'images of 32×32 alone'), (('demo',), 'the demo shows'), (('evaluate',), 'data=digits')):
        with pytest.raises(ValueError, match=why): call(capsys, *wrong, '--model', folder, *(['--out', tmp_path/'d.png'] if wrong[0] != 'evaluate' else []))

def test_a_run_is_resumed_to_the_bit(parts, tmp_path, capsys, monkeypatch):
    import shutil
    from v2flow_nbdev.base.files import read_tensors
    monkeypatch.setenv('ACCELERATE_USE_CPU', 'true')
    call(capsys, *training(parts, tmp_path/'a'))
    shutil.copytree(tmp_path/'a', tmp_path/'b'); shutil.rmtree(tmp_path/'b/model'); shutil.rmtree(tmp_path/'b/checkpoints/step-00000004')
    call(capsys, *training(parts, tmp_path/'b', '--resume'))
    for name in ('llm/model.safetensors', 'next_scale/model.safetensors'):
        a, b = (read_tensors(tmp_path/run/'model'/name) for run in 'ab')
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a), name

def test_a_folder_survives_casts_and_refuses_other_codes(parts, tmp_path):
    from v2flow_nbdev.language.loading import load_llm
    from v2flow_nbdev.language.pipeline import V2FlowPipeline
    tok, (llm, text) = TokenFlow.from_pretrained(parts/'tok'), load_llm(parts/'llm')
    pipe = TokenFlowPipeline(tok, TokenFlowLLM(llm, tok.quantizer, 0, 'semantic'), text, dict(passes=2))
    pipe.save_pretrained(tmp_path/'p', torch.float16)
    back = TokenFlowPipeline.from_pretrained(tmp_path/'p')
    assert back.defaults['passes'] == 2 and back.model.reader.sees == 'semantic' and back.dtype == torch.float32
    images = torch.rand(2, 3, 32, 32, generator=gen())*2 - 1
    half = TokenFlowPipeline.from_pretrained(tmp_path/'p', dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and torch.equal(half.image_tokenizer.encode(images), tok.encode(images))
    assert len(half(['a cat', 'a dog'], generator=gen()).images) == 2 and len(half.caption(images)) == 2
    with pytest.raises(OSError, match='of a TokenFlowPipeline'): V2FlowPipeline.from_pretrained(tmp_path/'p')
    with pytest.raises(OSError, match='of a V2FlowPipeline'): TokenFlowPipeline.from_pretrained(root/'data/checkpoints/digits')
    other = TokenFlow.from_pretrained(parts/'tok'); other.quantizer.codebook.copy_(other.quantizer.codebook.flip(0))
    other.save_pretrained(tmp_path/'p/image_tokenizer')
    with pytest.raises(OSError, match='not made for each other'): TokenFlowPipeline.from_pretrained(tmp_path/'p')
    with pytest.raises(ValueError, match='not made for each other'): TokenFlowPipeline(other, back.model, text)
    (tmp_path/'p/next_scale/model.safetensors').write_bytes(b'x'); tok.save_pretrained(tmp_path/'p/image_tokenizer')
    with pytest.raises(OSError): TokenFlowPipeline.from_pretrained(tmp_path/'p')

def test_the_pipeline_follows_the_conventions_of_diffusers(parts, tmp_path, capfd):
    "Beside `tests/test_conventions.py`: what differs where an image is written scale by scale"
    from v2flow_nbdev.language.loading import load_llm
    tok, (llm, text) = TokenFlow.from_pretrained(parts/'tok'), load_llm(parts/'llm')
    pipe = TokenFlowPipeline(tok, TokenFlowLLM(llm, tok.quantizer, 0, 'semantic'), text)
    def draw(**how): return pipe('a cat', generator=torch.Generator().manual_seed(0), **how)
    plain = draw(guidance_scale=3.)
    assert torch.equal(draw(guidance_scale=3., negative_prompt='').ids, plain.ids)
    assert not torch.equal(draw(guidance_scale=9., negative_prompt='a dog').ids, draw(guidance_scale=9.).ids)
    assert torch.equal(draw(guidance_scale=3., negative_prompt='a cat').ids, draw(guidance_scale=1.).ids)
    with pytest.raises(ValueError, match='no effect at guidance_scale=1'): draw(negative_prompt='a dog', guidance_scale=1.)
    images, ids = draw(output_type='np', return_dict=False, guidance_scale=3.)
    assert images.shape == (1, 32, 32, 3) and torch.equal(ids, plain.ids)
    other = (plain.ids + 1) % K
    assert torch.equal(draw(callback_on_step_end=lambda p, k, t, found: dict(ids=other) if t == 1 else found).ids, other)
    with pytest.raises(ValueError, match='changed after step 2 alone'): draw(callback_on_step_end=lambda *a: dict(ids=other))
    with pytest.raises(ValueError, match='it may give ids, images'): draw(callback_on_step_end=lambda *a: dict(guidance_scale=1.))
    pipe.save_pretrained(tmp_path/'p')
    assert 'TokenFlowPipeline.from_pretrained' in (tmp_path/'p/README.md').read_text()
    assert not (tmp_path/'p/image_tokenizer/README.md').exists()
    capfd.readouterr(); pipe.set_progress_bar_config(disable=False); draw()
    assert '3/3' in capfd.readouterr().err
