"""A pretrained language model: its vocabulary and its parameters by reference, what was trained beside it; frozen ids
are computed once; a flow decoder that is trained further"""
import copy, json, os, shutil
import pytest, torch
from PIL import Image
from conftest import root, shipped, v2flow
from v2flow_nbdev.base.files import read_json, read_tensors, write_json
from v2flow_nbdev.base.gguf import cache_folder, llm_folder, packaged
from v2flow_nbdev.language.pipeline import V2FlowPipeline, load_llm
from v2flow_nbdev.language.text_models import collate, count_targets, small_llama, toy_llama, toy_v2flow
from v2flow_nbdev.language.visual_tokens import VisualTokens, add_visual_tokens
from v2flow_nbdev.models.latents import PixelLatents
from v2flow_nbdev.models.tokenizer import V2Flow, V2FlowConfig
from v2flow_nbdev.models.tokenizer_training import TokenizerTraining, TokenizerTrainingConfig
from v2flow_nbdev.models.vocabulary import Vocabulary

captions = ['a handwritten seven', 'the digit 3', 'a small nine']

def ended(done):
    "A command that worked"
    assert done.returncode == 0, done.stderr[-2000:]
    return done

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A pretrained LLaMA, a tokenizer that names its table, and a pipeline that names its base: by the commands"
    home = tmp_path_factory.mktemp('pretrained')
    for part in toy_llama(captions*4): part.save_pretrained(home/'llama')
    quick = ['training.evaluate_every=0', 'training.trackers=[]', 'training.log_every=1']
    ended(v2flow('train-tokenizer', '--config', 'configs/smollm2-digits-tokenizer.yaml', '--out', home/'tok', *quick,
                 f'vocabulary={home}/llama', f'data.cache={home}/latents', 'data.copies=0', 'training.steps=5',
                 'tokenizer.codebook_size=32', 'training.batch_size=16', 'tokenizer_training.freeze_codes_at=0.5'))
    ended(v2flow('train-llm', '--config', 'configs/digits-llm.yaml', '--out', home/'run', *quick, 'data.copies=0',
                 f'image_tokenizer={home}/tok/model', f'llm.pretrained={home}/llama', 'llm.train=lora', 'llm.rank=2',
                 'llm.store_base=false', 'training.steps=2', 'training.batch_size=4'))
    return home

def test_a_model_is_a_tokenizer_an_adapter_and_two_names(whole):
    """Neither the table nor the base is in the folder; images are generated without the vocabulary, read with it, and
    the saved model is the trained one"""
    model = whole/'run/model'
    names = {str(p.relative_to(model)) for p in model.rglob('*') if p.is_file()}
    assert {'llm/base.json', 'llm/adapter_model.safetensors', 'llm/adapter_config.json'} <= names
    assert not names & {'llm/model.safetensors', 'llm/tokenizer.json', 'image_tokenizer/vocabulary.safetensors'}
    assert read_json(model/'llm/base.json')['base'] == str(whole/'llama')
    ended(v2flow('generate', 'a six', '--model', model, '--out', whole/'six.png'))
    assert Image.open(whole/'six.png').size == (8, 8)
    ended(v2flow('caption', whole/'six.png', '--model', model))
    pipe = V2FlowPipeline.from_pretrained(model)
    assert pipe.image_tokenizer.vocab is None
    pipe('a six', generator=torch.Generator().manual_seed(0))
    assert pipe.image_tokenizer.vocab is None                                      # decoding needs none
    ids = pipe.image_tokenizer.encode(torch.zeros(1, 1, 8, 8))
    assert ids.shape == (1, 16) and len(pipe.image_tokenizer.vocabulary) == len(Vocabulary.from_pretrained(
        whole/'llama'))
    pipe.save_pretrained(whole/'copy')                                             # merged: an ordinary folder
    again = V2FlowPipeline.from_pretrained(whole/'copy')
    for p, q in zip(pipe.llm.parameters(), again.llm.parameters()): assert torch.equal(p, q)
    assert torch.equal(again.image_tokenizer.encode(torch.zeros(1, 1, 8, 8)), ids)

def test_a_vocabulary_by_reference_is_opened_by_the_page_and_by_the_alignment(whole):
    "The page starts without it, and reads it when an image is to be encoded"
    import threading
    from v2flow_nbdev.apps.app import describe_image, make_app
    from v2flow_nbdev.apps.guards import data_url
    from v2flow_nbdev.apps.tokens_page import token_mixtures
    from v2flow_nbdev.evaluation.alignment import tokens_in_codes
    def fresh(): return V2FlowPipeline.from_pretrained(whole/'run/model')
    pipe = fresh(); known = len(Vocabulary.from_pretrained(whole/'llama'))
    shown = json.dumps(make_app(pipe).get_config_file(), default=str)
    assert f'{known} text tokens' in shown and 'v2-picker' in shown and pipe.image_tokenizer.vocab is None
    *_, (said, tokens, answer) = describe_image(pipe, threading.Event(), data_url(Image.new('L', (8, 8))), 1, 1)
    assert '16 tokens' in said and 'Mixture of text tokens' in tokens and '<img' in answer
    assert len(token_mixtures(fresh().image_tokenizer, torch.zeros(1, 1, 8, 8))) == 16
    assert tokens_in_codes(fresh().image_tokenizer, torch.zeros(1, 1, 8, 8))
    bare = fresh().image_tokenizer; bare.config.vocab_source = ''
    with pytest.raises(ValueError, match='without its vocabulary'): tokens_in_codes(bare, torch.zeros(1, 1, 8, 8))

def test_a_file_that_is_not_there_is_called_a_file(tmp_path):
    for command in (['generate', 'a six', '--out', tmp_path/'x.png'], ['evaluate']):
        done = v2flow(*command, '--model', 'nowhere.gguf')
        assert done.returncode == 1 and done.stderr.strip() == 'v2flow: nowhere.gguf: no such file', done.stderr

def spoil(whole, folder, moved):
    "The same model beside another base: every embedding moved, or none there"
    shutil.copytree(whole/'run/model', folder/'model')
    if moved:
        llm, tokenizer = load_llm(whole/'llama')
        with torch.no_grad(): llm.get_input_embeddings().weight.add_(1e-3)
        llm.save_pretrained(folder/'llama'); tokenizer.save_pretrained(folder/'llama')
    base = str(folder/'llama')
    write_json(folder/'model/llm/base.json', read_json(folder/'model/llm/base.json') | dict(base=base))
    config = folder/'model/image_tokenizer/config.json'
    write_json(config, read_json(config) | dict(vocab_source=base))
    return folder/'model'

@pytest.mark.parametrize('moved', [True, False])
def test_another_base_is_refused_in_one_line(whole, tmp_path, moved):
    model = spoil(whole, tmp_path, moved)
    done = v2flow('generate', 'a six', '--model', model, '--out', tmp_path/'x.png')
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and not (tmp_path/'x.png').exists(), done.stderr
    assert ('does not fit its base' if moved else 'no such model folder') in done.stderr
    tok = V2Flow.from_pretrained(model, 'image_tokenizer')
    with pytest.raises(OSError, match='not the one' if moved else 'no such model folder'):
        tok.encode(torch.zeros(1, 1, 8, 8))
    assert tok.decode(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 1, 8, 8)

def test_a_packaged_model_that_is_missing_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv('V2FLOW_CACHE', str(tmp_path)); monkeypatch.setattr('importlib.util.find_spec', lambda n: None)
    for call in (llm_folder, Vocabulary.from_pretrained):
        with pytest.raises(FileNotFoundError, match='make smollm2'): call('smollm2')
    done = v2flow('train-llm', '--config', 'configs/digits-llm.yaml', '--out', tmp_path/'run',
                  'llm.pretrained=smollm2x', 'image_tokenizer=data/checkpoints/digits')
    assert done.returncode == 1 and 'smollm2x: no such folder' in done.stderr.splitlines()[-1]

@pytest.mark.parametrize('wrong, why', [('llm.train=all', 'all parameters were trained'),
                                        ('llm.store_base=maybe', 'true or false')])
def test_what_cannot_be_stored_by_reference_is_said(tmp_path, wrong, why):
    done = v2flow('train-llm', '--config', 'configs/digits-llm.yaml', '--out', tmp_path/'run',
                  'llm.train=lora', 'llm.store_base=false', wrong)
    assert done.returncode == 2 and why in done.stderr

def small_training(freeze_codes_at=0.5):
    torch.manual_seed(0)
    vocabulary = Vocabulary([f't{i}' for i in range(50)], torch.randn(50, 16))
    model = TokenizerTraining(V2Flow(V2FlowConfig(codebook_size=16, dim=32, depth=1), vocabulary),
                              TokenizerTrainingConfig(freeze_codes_at=freeze_codes_at, noise=0))
    model.tok.quantizer.initialised.fill_(True)
    model.tok.quantizer.codebook.copy_(torch.nn.functional.normalize(torch.randn(16, 16), dim=-1))
    return model

def test_frozen_ids_are_computed_once_and_change_no_loss():
    "The flow decoder's gradients are those that it has without"
    latents = torch.randn(70, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    numbers, grads, asked = torch.tensor([69, 3, 5, 3]), [], []
    for known in (False, True):
        model = small_training(); model.before_step(0.9); assert model.frozen
        if known: model.examples = [dict(latents=z) for z in latents]
        own = model.tok.mixtures
        model.tok.mixtures = lambda *a, **k: asked.append(len(a[0])) or own(*a, **k)
        for _ in range(2):
            out = model(latents=latents[numbers], numbers=numbers, generator=torch.Generator().manual_seed(2))
        out.flow_loss.backward()
        grads.append([p.grad.clone() for p in model.tok.masked.parameters() if p.grad is not None])
        if known: assert torch.equal(out.ids, model.tok.encode(latents=latents[numbers]))
    assert asked[:4] == [4, 4, 64, 6], asked                                       # twice four; then all, once
    for a, b in zip(*grads): torch.testing.assert_close(a, b)

def test_a_flow_decoder_is_trained_further():
    from v2flow_nbdev.training.tokenizer_recipes import continue_decoder
    old = small_training().tok
    def one(**other): return V2Flow(V2FlowConfig(codebook_size=16, dim=32, depth=1, **other), Vocabulary(
        [f't{i}' for i in range(50)], torch.randn(50, 24)))
    new = one()
    assert continue_decoder(new, old) == ['masked.code_in.weight']                 # codes are 24 wide here
    for name, p in old.velocity.state_dict().items(): assert torch.equal(new.velocity.state_dict()[name], p)
    with pytest.raises(ValueError, match='another shape'): continue_decoder(one(velocity_width=64), old)

@pytest.mark.skipif(not (cache_folder()/'smollm2/config.json').is_file(), reason='make smollm2')
def test_smollm2_knows_the_capital_of_france():
    "The real one: its copy answers as the model does, and its text table is 49,152 embeddings less the special ones"
    llm, tokenizer = load_llm(llm_folder('smollm2'), torch.bfloat16)
    asked = tokenizer('The capital of France is', return_tensors='pt')
    assert 'Paris' in tokenizer.decode(llm.generate(**asked, max_new_tokens=4, do_sample=False)[0])
    vocabulary = Vocabulary.from_pretrained('smollm2')
    assert len(vocabulary) == 49152 - 17 and vocabulary.embeddings.shape[1] == 576

@pytest.mark.skipif(not (cache_folder()/'smollm2/config.json').is_file(), reason='make smollm2')
def test_the_shipped_adapter_draws_and_reads(tmp_path):
    "By the commands, from a folder that names its base; and SmolLM2 still knows the capital of France"
    model = root/'data/checkpoints/smollm2'
    assert read_json(model/'llm/base.json')['base'] == 'smollm2'
    ended(v2flow('generate', 'a red heart', '--model', model, '--out', tmp_path/'heart.png'))
    assert Image.open(tmp_path/'heart.png').size == (64, 64)
    assert ended(v2flow('caption', tmp_path/'heart.png', '--model', model)).stdout.strip()
    llm, tokenizer = load_llm(model/'llm', torch.bfloat16)
    asked = tokenizer('The capital of France is', return_tensors='pt')
    assert 'Paris' in tokenizer.decode(llm.generate(**asked, max_new_tokens=4, do_sample=False)[0])

@pytest.mark.skipif(not (cache_folder()/'smollm2/config.json').is_file(), reason='make smollm2')
def test_smollm2_says_what_a_word_is_near_to():
    "Without any training, and of words that are in no caption; a name that is near to all words would be first each time"
    from v2flow_nbdev.data.sources import emoji
    from v2flow_nbdev.language.adapters import word_scores
    llm, tokenizer = load_llm(llm_folder('smollm2'))
    near = {'lemons': 'lemon', 'guitarist': 'guitar', 'kitty': 'cat face', 'schools': 'school', 'automobile': 'automobile'}
    names = sorted({r['base'] for r in emoji('train')})[::3] + [*near.values()]
    found = word_scores(llm, tokenizer, [*near], names, 'an emoji of a {}').topk(3).indices.tolist()
    right = sum(name in [names[i] for i in row] for name, row in zip(near.values(), found))
    assert right >= 4 and len({row[0] for row in found}) >= 4, [[names[i] for i in row] for row in found]

def coarse_model(tied=False):
    "A LLaMA with 32 visual tokens and 10 coarse ones, and its parts"
    llm, tokenizer = toy_llama(captions*4)
    if tied: llm = small_llama(tokenizer, 64, 2, 2, 128, tie_word_embeddings=True)
    return llm.eval(), tokenizer, add_visual_tokens(llm, tokenizer, toy_v2flow(llm, tokenizer), coarse=10)

def test_a_coarse_token_is_written_first_and_left_out_of_the_ids():
    "Both loops agree, the callback sees visual tokens alone, and each token is chosen among its own kind"
    from v2flow_nbdev.language.generation import generate_image_ids
    llm, tokenizer, visual = coarse_model()
    assert len(visual.coarse) == 10 and visual.names()[32:42] == [f'<|c{i}|>' for i in range(10)]
    visual.check(tokenizer); assert visual.coarse.stop == visual.begins[0] and VisualTokens.of(llm) == visual
    seen = []
    fast, plain = (generate_image_ids(llm, tokenizer, captions, temperature=0, guidance_scale=1.5,
                                      callback=lambda ids: seen.append(ids.shape[1]), **how)
                   for how in ({}, dict(static_cache=True)))
    assert torch.equal(fast, plain) and fast.shape == (3, 16) and 0 <= fast.min() <= fast.max() < 32
    assert seen == [*range(1, 17)]*2
    asked, own = [], llm.model.forward
    llm.model.forward = lambda input_ids=None, **k: asked.append(input_ids[:, -1]) or own(input_ids=input_ids, **k)
    generate_image_ids(llm, tokenizer, captions[:1], temperature=0, static_cache=True)
    assert asked[1].item() in visual.coarse and all(i.item() < visual.first + 32 for i in asked[2:])

def test_coarse_tokens_start_apart_from_each_other_and_near_the_mean():
    "A fiftieth of a text token's distance; and an image that leaves no position for its coarse token is refused"
    llm, tokenizer, visual = coarse_model()
    table = llm.get_input_embeddings().weight.detach()
    text = table[:visual.first]
    rows, usual = table[list(visual.coarse)] - text.mean(0), (text - text.mean(0)).norm(dim=-1).mean()
    assert torch.linalg.matrix_rank(rows) == 10 and (rows.norm(dim=-1) < usual/25).all()
    llm, tokenizer = toy_llama(captions*4)                                         # it takes 128 tokens
    with pytest.raises(ValueError, match='an image of 124 visual tokens is too long'):
        add_visual_tokens(llm, tokenizer, toy_v2flow(llm, tokenizer), grids=[(4, 4), (4, 31)], coarse=1)
    add_visual_tokens(llm, tokenizer, toy_v2flow(llm, tokenizer), grids=[(4, 4), (4, 31)])

def test_the_loss_of_a_coarse_token_is_over_coarse_tokens():
    "By hand, with weights; and what it is a mean over"
    from v2flow_nbdev.language.losses import TargetLoss
    from v2flow_nbdev.language.sequences import text_to_image
    llm, tokenizer, visual = coarse_model()
    prompt, target = text_to_image(visual, 0, [5, 6], torch.arange(16).view(4, 4), coarse=3)
    assert target[0] == visual.coarse[3] and len(target) == 18
    batch, first, c = collate([(prompt, target)]), visual.first, visual.coarse
    with torch.no_grad():
        logits = llm(batch['input_ids']).logits[0, len(prompt) - 1:-1].double().log_softmax(-1)
        lead = -(logits[0, target[0]] - logits[0, c.start:c.stop].logsumexp(-1))
        free = [i for i in range(first, logits.shape[1]) if i not in c]
        rest = [-(l[t] - l[free].logsumexp(-1)) for l,t in zip(logits[1:], target[1:])]
        loss = TargetLoss(llm, coarse_weight=8)(**batch).loss
    torch.testing.assert_close(loss.double(), (8*lead + sum(rest))/(8 + 17), atol=1e-5, rtol=1e-5)
    assert count_targets(batch, first, coarse=c, coarse_weight=8) == 25

@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('train', ['new', 'lora'])
def test_visual_tokens_are_scored_with_what_peft_trains(train, tied):
    "`peft` keeps new rows beside the table: they are scored, they get gradients, and merging changes no loss"
    from v2flow_nbdev.language.adapters import choose_trained, merge
    from v2flow_nbdev.language.losses import TargetLoss
    from v2flow_nbdev.language.sequences import image_to_text, text_to_image
    llm, tokenizer, visual = coarse_model(tied)
    ids = torch.arange(16).view(4, 4)
    batch = collate([text_to_image(visual, 0, [5, 6], ids, coarse=3), image_to_text(visual, 0, ids, [5, 1])])
    model = choose_trained(llm, train, rank=2)
    torch.manual_seed(0)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained: p.data += 0.1*torch.randn_like(p)
    loss = TargetLoss(model)(**batch).loss; loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    with torch.no_grad(): torch.testing.assert_close(TargetLoss(merge(model))(**batch).loss, loss.detach())

def test_new_embeddings_alone_cannot_forget():
    "`new` leaves text as it was, so its divergence is 0, and stays it"
    from v2flow_nbdev.language.adapters import choose_trained
    from v2flow_nbdev.language.losses import TargetLoss
    model = TargetLoss(choose_trained(coarse_model()[0], 'new'), distillation=True)
    for p in model.parameters(): p.data += 0.1*p.requires_grad
    assert abs(model(**collate([([0], [7, 9, 30, 1])])).loss.item()) < 1e-6

@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('chosen', [False, True])
def test_plain_text_keeps_the_distribution_before(packed, chosen, monkeypatch):
    "By hand: the KL divergence from the model without its adapter on plain text, in the place of cross-entropy; 0 at first"
    from v2flow_nbdev.language import losses
    from v2flow_nbdev.language.adapters import choose_trained
    from v2flow_nbdev.language.sequences import image_to_text, pack, text_to_image
    monkeypatch.setattr(losses, 'may_choose', lambda device: chosen)
    llm, tokenizer, visual = coarse_model(False)
    ids = torch.arange(16).view(4, 4)
    images = [text_to_image(visual, 0, [5, 6], ids, coarse=3), image_to_text(visual, 0, ids, [5, 1])]
    texts = [([0], [7, 9, 30, 8, 1]), ([0], [11, 12, 1])]
    joined = (lambda examples: pack(examples, 32)) if packed else collate
    model = choose_trained(llm, 'lora', rank=2)
    loss_of = lambda distillation, examples: losses.TargetLoss(model, 6., coarse_weight=8.,
                                                                 distillation=distillation)(**joined(examples)).loss
    assert abs(loss_of(True, texts).item()) < 1e-6 < loss_of(False, texts).item()
    torch.manual_seed(0)
    for n,p in model.named_parameters(): p.data += 0.1*torch.randn_like(p)*('lora' in n)
    def by_hand(prompt, target):
        with torch.no_grad():
            after = model(torch.tensor([prompt + target])).logits[0, :-1, :visual.first].log_softmax(-1)
            with model.disable_adapter(): q = model(torch.tensor([prompt + target])).logits[0, :-1, :visual.first].softmax(-1)
        return (q*(q.log() - after)).sum().item()
    divergence, n, m = sum(by_hand(*t) for t in texts), 8, count_targets(joined(images), visual.first, 6., visual.coarse, 8.)
    assert divergence > 0.01
    torch.testing.assert_close(loss_of(True, texts).item(), divergence/n, atol=1e-5, rtol=1e-4)
    images_alone = loss_of(True, images)
    torch.testing.assert_close(images_alone, loss_of(False, images))               # a caption is no plain text
    expect = (6*divergence + m*images_alone.item())/(6*n + m)
    found = loss_of(True, images + texts); found.backward()
    torch.testing.assert_close(found.item(), expect, atol=1e-5, rtol=1e-4)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match='train lora or new'): losses.TargetLoss(coarse_model()[0], distillation=True)

def test_a_field_of_the_data_becomes_coarse_tokens(whole, tmp_path):
    "By the command, with LoRA; a model trained further keeps them; what does not go together is refused"
    def run(out, llm, *settings):
        return v2flow('train-llm', '--config', 'configs/digits-llm.yaml', '--out', tmp_path/out,
                      f'image_tokenizer={whole}/tok/model', f'llm.pretrained={llm}', 'training.evaluate_every=0',
                      'training.trackers=[]', 'data.copies=0', 'training.steps=2', 'training.batch_size=4', *settings)
    ended(run('a', whole/'llama', 'llm.coarse=label', 'llm.train=lora', 'llm.store_base=false',
              'llm.visual_softmax=true', 'llm.write_noise=0.3', 'llm.own_texts=60', 'llm.text_share=0.3',
              'llm.text_loss=distillation'))
    assert len((tmp_path/'a/own_texts.txt').read_text().splitlines()) == 60
    trained = tmp_path/'a/model/llm'
    assert len(VisualTokens.of(load_llm(trained)[0]).coarse) == 10
    ended(v2flow('generate', 'a six', '--model', tmp_path/'a/model', '--out', tmp_path/'six.png'))
    ended(run('b', trained, 'llm.coarse=label'))
    done = run('c', trained)
    assert done.returncode != 0 and 'has 10 coarse tokens already, for other values than the 0' in done.stderr
    done = run('d', whole/'llama', 'llm.coarse=nothing')
    assert done.returncode == 2 and "llm.coarse='nothing': examples of this data have no such field" in done.stderr
    done = run('e', whole/'llama', 'llm.coarse=label', 'data.name=ids', f'data.folder={tmp_path}')
    assert done.returncode == 2 and "llm.coarse='label': a folder of ids keeps captions alone" in done.stderr
    done = run('f', whole/'llama', 'llm.own_texts=60')
    assert done.returncode == 2 and 'own_texts=60: needs at least 50, a text_share, and no texts' in done.stderr
    done = run('g', whole/'llama', 'llm.text_loss=distillation', 'llm.text_share=0.3')
    assert done.returncode == 2 and "text_loss='distillation' with train='all'" in done.stderr

def test_words_that_the_model_knows_are_in_the_mix(whole, tmp_path):
    "By the command; the answers are kept, so that a run which continues does not ask again; wrong settings are refused in a line"
    (tmp_path/'exam.txt').write_text('Sevens and digits')
    def run(out, *settings):
        return v2flow('train-llm', '--config', 'configs/digits-llm.yaml', '--out', tmp_path/out, f'image_tokenizer={whole}/tok/model',
                      f'llm.pretrained={whole}/llama', 'training.evaluate_every=0', 'training.trackers=[]', 'data.copies=0',
                      'training.steps=2', 'training.batch_size=4', 'llm.word_frame=a handwritten {}', *settings)
    known = 'llm.coarse=label', 'llm.train=lora', 'llm.store_base=false', 'llm.word_share=0.5', f'llm.held_out_words={tmp_path}/exam.txt'
    assert 'is asked what it knows of' in ended(run('a', *known)).stderr
    assert len(VisualTokens.of(load_llm(tmp_path/'a/model/llm')[0]).coarse) == 10
    scores = read_tensors(tmp_path/'a/words.safetensors')['scores']
    assert scores.shape[1] == 10 and scores.float().mean(0).abs().max() < 0.01
    assert 'is asked what it knows of' not in ended(run('a', '--resume', *known)).stderr
    for settings, why in ((['llm.word_share=0.5'], 'word_frame='), (['llm.coarse=label', 'llm.held_out_words=none.txt'], 'none.txt'),
                          (['llm.coarse=label', 'llm.word_frame=a word'], 'needs {} once'),
                          (['llm.coarse=label', 'llm.word_share=0.7', 'llm.text_share=0.7'], 'no more than 1 in all')):
        done = run('b', *settings)
        assert done.returncode != 0 and why in done.stderr.splitlines()[-1], done.stderr

def test_rows_begin_as_what_the_model_knows_where_peft_keeps_them(tmp_path):
    "The rows of the first field alone, in a table of their own and in a tied one; the adapter's folder has them"
    from v2flow_nbdev.language.adapters import choose_trained, name_by_knowledge, save_adapter
    from v2flow_nbdev.language.losses import rows_of
    for tied in (False, True):
        llm, tokenizer, visual = coarse_model(tied)
        words, scores = ['six', 'seven', 'digit', 'image'], torch.randn(4, 10)
        for train in ('new', 'lora'):
            model = choose_trained(copy.deepcopy(llm), train, rank=2)
            before = rows_of(model.get_output_embeddings()).detach().clone()
            name_by_knowledge(model, tokenizer, words, scores, 'a handwritten {}')
            changed = (rows_of(model.get_output_embeddings()).detach() != before).any(1).nonzero()[:, 0].tolist()
            assert changed == [*visual.coarse_fields[0]], (tied, train)
            save_adapter(model, tmp_path/f'{tied}-{train}', 'x')
            stored = read_tensors(tmp_path/f'{tied}-{train}'/'adapter_model.safetensors')
            rows = rows_of(model.get_output_embeddings()).detach()[visual.first:]
            assert any(t.shape == rows.shape and torch.allclose(t.float(), rows, atol=1e-5) for t in stored.values()), (tied, train)

def test_own_texts_are_the_base_s(tmp_path):
    "An adapter that is trained further may have forgotten: it is switched off while texts are written"
    from v2flow_nbdev.language.adapters import choose_trained
    from v2flow_nbdev.training.llm_data import LLMConfig, texts_of_its_own
    llm, tokenizer, _ = coarse_model()
    tuning = LLMConfig(pretrained='x', train='lora', own_texts=50, text_share=0.1)
    base = texts_of_its_own(tuning, llm, tokenizer, tmp_path/'base')
    model = choose_trained(llm, 'lora', rank=2)
    for n,p in model.named_parameters(): p.data += 10*('lora' in n)
    assert texts_of_its_own(tuning, model, tokenizer, tmp_path/'adapter') == base

def test_an_adapter_is_trained_further_as_itself(whole, tmp_path):
    """It begins where it ended, its base stays the one that it names, and another rank is refused in a line; a step
    of length 0 changes nothing"""
    def run(out, *settings):
        return v2flow('train-llm', '--config', 'configs/digits-llm.yaml', '--out', tmp_path/out,
                      f'image_tokenizer={whole}/tok/model', f'llm.pretrained={whole}/run/model/llm', 'llm.train=lora',
                      'llm.store_base=false', 'training.evaluate_every=0', 'training.trackers=[]', 'data.copies=0',
                      'training.steps=1', 'training.batch_size=4', 'training.warmup=0', *settings)
    first = read_tensors(whole/'run/model/llm/adapter_model.safetensors')
    ended(run('still', 'llm.rank=2', 'training.lr=0')); ended(run('on', 'llm.rank=2', 'training.lr=0.01'))
    for name in ('still', 'on'):
        folder = tmp_path/name/'model/llm'
        again = read_tensors(folder/'adapter_model.safetensors')
        assert again.keys() == first.keys() and read_json(folder/'base.json')['base'] == str(whole/'llama')
        assert all(torch.equal(p, again[n]) for n, p in first.items()) == (name == 'still')
    two = 'llm.rank=2', 'training.steps=2', 'training.checkpoint_every=1', 'training.warmup=0'
    ended(run('two', *two))                                                        # and a run that was killed goes on
    killed = shutil.copytree(tmp_path/'two', tmp_path/'killed')
    for part in ('model', 'checkpoints/step-00000002'): shutil.rmtree(killed/part)
    ended(run('killed', *two, '--resume'))
    one, other = (read_tensors(tmp_path/n/'model/llm/adapter_model.safetensors') for n in ('two', 'killed'))
    assert all(torch.equal(p, other[n]) for n, p in one.items())
    plan = ended(run('plan', 'llm.rank=2', '--dry-run'))                            # of its base
    assert 'parameters' in plan.stdout
    done = run('other', 'llm.rank=3')
    assert done.returncode != 0 and 'that adapter was trained with lora, rank 2' in done.stderr.splitlines()[-1]
    done = run('new', 'llm.train=new')
    assert done.returncode != 0 and 'that adapter was trained with lora, rank 2' in done.stderr.splitlines()[-1]

def test_an_adapter_is_cut_to_a_lower_rank(whole, tmp_path):
    "By the command: the best of that rank, and a folder that can be loaded; a higher rank is refused in a line"
    import subprocess, sys
    from benchmarks.shrink import lower_rank
    torch.manual_seed(0)
    weights = {'x.lora_A.weight': torch.randn(4, 20), 'x.lora_B.weight': torch.randn(30, 4)}
    cut, lost = lower_rank(weights, dict(r=4, lora_alpha=8), 2)
    full, low = (w['x.lora_B.weight'] @ w['x.lora_A.weight']*8/r for w, r in ((weights, 4), (cut, 2)))
    kept = torch.linalg.svdvals(full)[:2].square().sum()/full.square().sum()
    assert cut['x.lora_A.weight'].shape == (2, 20) and abs(lost - (1 - kept)) < 1e-5
    torch.testing.assert_close((full - low).square().sum(), (1 - kept)*full.square().sum())
    byte, rounded = lower_rank(weights, dict(r=4, lora_alpha=8), 4, torch.float8_e4m3fn)
    assert byte['x.lora_A.weight'].element_size() == 1 and 1e-5 < rounded < 0.005
    def shrink(rank, *more): return subprocess.run([sys.executable, '-m', 'benchmarks.shrink', whole/'run/model', tmp_path/'small',
                                                    '--rank', str(rank), *more], cwd=root, capture_output=True, text=True)
    assert 'rank 2 → 2' in ended(shrink(2, '--float8')).stdout
    near, was = (V2FlowPipeline.from_pretrained(f).llm.state_dict() for f in (tmp_path/'small', whole/'run/model'))
    for n,p in was.items(): torch.testing.assert_close(near[n], p, atol=0.05*p.abs().max().item(), rtol=0.1)
    from peft import PeftModel
    from v2flow_nbdev.language.adapters import add_adapter
    base, words = load_llm(whole/'llama')
    room, _ = add_adapter(base, words, base.get_input_embeddings().weight.detach().clone(), tmp_path/'small/llm', merged=False)
    theirs = PeftModel.from_pretrained(room, tmp_path/'small/llm').merge_and_unload().state_dict()   # as anybody loads it
    for n,p in theirs.items(): torch.testing.assert_close(near[n], p, atol=1e-5, rtol=1e-4)
    assert 'rank 2 → 1' in ended(shrink(1)).stdout
    assert V2FlowPipeline.from_pretrained(tmp_path/'small')('a six').images[0].size == (8, 8)
    assert shrink(3).stderr == 'benchmarks.shrink: --rank 3: the adapter has rank 2\n'

def bench(name, *args):
    import subprocess, sys
    return subprocess.run([sys.executable, '-m', f'benchmarks.{name}', *map(str, args)], cwd=root, capture_output=True, text=True)

def test_the_same_architecture_from_random_parameters(whole, tmp_path):
    "Other parameters and the same codes: its image tokenizer decodes what the first one encoded, and it is trained on these ids"
    ended(bench('from_scratch', whole/'tok/model', tmp_path/'scratch', '--llm', whole/'llama'))
    (was, words), (llm, same) = (load_llm(f) for f in (whole/'llama', tmp_path/'scratch/llm'))
    assert words.get_vocab() == same.get_vocab() and llm.config.num_hidden_layers == was.config.num_hidden_layers
    assert not any(torch.equal(p, q) for p, q in zip(was.parameters(), llm.parameters()) if p.dim() > 1)
    first, second = (V2Flow.from_pretrained(f) for f in (whole/'tok/model', tmp_path/'scratch/image_tokenizer'))
    ids = torch.arange(16)[None]
    assert torch.equal(*(t.decode_latents(ids, generator=torch.Generator().manual_seed(0)) for t in (first, second)))
    shutil.copytree(whole/'run/ids', tmp_path/'run/ids')
    ended(v2flow('train-llm', '--config', 'configs/digits-llm.yaml', '--out', tmp_path/'run', 'data.copies=0', 'training.evaluate_every=0',
                 'training.trackers=[]', f'image_tokenizer={tmp_path}/scratch/image_tokenizer', f'llm.pretrained={tmp_path}/scratch/llm',
                 'llm.train=all', 'llm.start=random', 'training.steps=1', 'training.batch_size=4'))
    theirs = bench('from_scratch', tmp_path/'nothing', tmp_path/'other', '--llm', whole/'llama')
    assert theirs.returncode and theirs.stderr.splitlines()[-1].startswith('benchmarks.from_scratch: ') and not (tmp_path/'other').exists()

def test_a_tokenizer_without_a_vocabulary_is_trained_to_the_end(whole, tmp_path):
    "By the config of one with a vocabulary; its scores are the last line"
    done = ended(bench('without_vocabulary', '--config', 'configs/smollm2-digits-tokenizer.yaml', '--out', tmp_path/'run', '--whole',
                       f'vocabulary={whole}/llama', f'data.cache={whole}/latents', 'data.copies=0', 'training.steps=5', 'training.trackers=[]',
                       'tokenizer.codebook_size=32', 'training.batch_size=16', 'tokenizer_training.freeze_codes_at=0.5'))
    scores = json.loads(done.stdout.splitlines()[-1])
    assert {'psnr_db', 'ssim', 'codebook_usage', 'codebook_perplexity'} <= scores.keys() and 0 < scores['codebook_usage'] <= 1

def test_layers_are_compiled_one_by_one_on_a_cpu():
    "And nothing around them; nothing is compiled before it is called"
    from v2flow_nbdev.training.processes import compile_parts
    llm, *_ = coarse_model()
    compile_parts(llm, torch.device('cpu'))
    assert llm._compiled_call_impl is None and all(l._compiled_call_impl for l in llm.model.layers)

def test_layers_share_one_graph_in_training(monkeypatch):
    "With a cache of keys and values, which `transformers` makes by default, every layer would have a graph of its own"
    from torch._dynamo.testing import CompileCounter
    from v2flow_nbdev.training.processes import compile_parts
    torch._dynamo.reset()
    llm, *_ = coarse_model()
    count, plain = CompileCounter(), torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: plain(self, backend=count))
    compile_parts(llm.train(), torch.device('cpu'))
    batch = collate([([0, 5], [6, 7]), ([0, 8], [9, 4])])
    assert len(llm.model.layers) > 1
    llm(**batch).loss.backward()
    assert count.frame_count == 1
    made = llm.eval().generate(torch.tensor([[0, 5]]), max_new_tokens=3, return_dict_in_generate=True)
    assert made.past_key_values is not None
    torch._dynamo.reset()

def test_coarse_tokens_keep_what_they_stand_for():
    "A model is trained further on the same values alone: as many others would mix them up"
    from v2flow_nbdev.training.llm_recipes import known_visual_tokens, values_checksum
    model, tokenizer = toy_llama(captions*4)
    tok, values = toy_v2flow(model, tokenizer), ['cat', 'dog']
    visual = add_visual_tokens(model, tokenizer, tok, coarse=2)
    assert known_visual_tokens(model, tok, (), ['boat', 'dog']) == visual          # nothing is known: trust it
    model.config.v2flow = dict(model.config.v2flow, coarse_values=values_checksum(values))
    assert known_visual_tokens(model, tok, (), values).coarse_values
    for other in (['boat', 'dog'], ['cat'], []):
        with pytest.raises(ValueError, match='for other values'): known_visual_tokens(model, tok, (), other)

def test_a_base_in_bfloat16_is_loaded_so_where_that_is_fast(whole, tmp_path, monkeypatch):
    "On a CPU without such instructions, and for models of one's own, it is float32 as ever"
    from v2flow_nbdev.language import loading
    model = whole/'run/model'
    assert V2FlowPipeline.from_pretrained(model, dtype=None).dtype == torch.float32  # its base is
    llm, tokenizer = load_llm(whole/'llama')
    for part in (llm.bfloat16(), tokenizer): part.save_pretrained(tmp_path/'llama')
    shutil.copytree(model, tmp_path/'model')
    base = read_json(tmp_path/'model/llm/base.json')
    write_json(tmp_path/'model/llm/base.json', base | dict(base=str(tmp_path/'llama')))
    for fast in (True, False):
        monkeypatch.setattr(loading, 'multiplies_bf16', lambda device: fast)
        assert loading.own_dtype(tmp_path/'model', None) == (torch.bfloat16 if fast else torch.float32)
        assert loading.own_dtype(shipped, None) == torch.float32

def fields_model():
    "The same with two coarse fields, of four and of three values"
    llm, tokenizer = toy_llama(captions*4)
    return llm.eval(), tokenizer, add_visual_tokens(llm, tokenizer, toy_v2flow(llm, tokenizer), coarse=[4, 3])

def test_each_field_has_a_range_of_coarse_tokens(tmp_path):
    "Side by side between codes and begins; a saved folder and an old entry tell the same"
    llm, tokenizer, visual = fields_model()
    start = visual.first + 32
    assert visual.coarse == range(start, start + 7) and visual.coarse_sizes == (4, 3)
    assert visual.coarse_fields == (range(start, start + 4), range(start + 4, start + 7))
    assert visual.names()[32:39] == [f'<|c{i}|>' for i in range(7)]; visual.check(tokenizer)
    for part in (llm, tokenizer): part.save_pretrained(tmp_path/'whole')
    saved = read_json(tmp_path/'whole/config.json')
    assert saved['v2flow']['coarse_sizes'] == [4, 3] and VisualTokens.of(load_llm(tmp_path/'whole')[0]) == visual
    for old in (lambda e: e.pop('coarse_sizes'), lambda e: e.update(coarse_sizes=[])):
        entry = dict(saved['v2flow']); old(entry)
        assert VisualTokens.from_entry(entry).coarse_fields == (visual.coarse,)    # one field, before there were more
        none = entry | dict(begins=[start], end=start + 1)
        assert VisualTokens.from_entry(none).coarse_fields == VisualTokens.from_entry(none).coarse_sizes == ()
    for wrong in ([4, 4], [4], [7, 0], [8, -1], [3.5, 3.5], 7):
        llm.config.v2flow = saved['v2flow'] | dict(coarse_sizes=wrong)
        with pytest.raises(ValueError, match='config.json is damaged'): VisualTokens.of(llm)
    llm, tokenizer = toy_llama(captions*4)                                         # a place for each: it takes 128
    tok = toy_v2flow(llm, tokenizer)
    with pytest.raises(ValueError, match='too long'): add_visual_tokens(llm, tokenizer, tok, grids=[(4, 4), (1, 123)], coarse=[4, 3])
    with pytest.raises(ValueError, match='coarse_sizes'): add_visual_tokens(llm, tokenizer, tok, coarse=[4, 0])
    assert len(tokenizer) == len(toy_llama(captions*4)[1])                         # left as it was
    assert add_visual_tokens(llm, tokenizer, tok, grids=[(4, 4), (1, 122)], coarse=[4, 3]).coarse_sizes == (4, 3)

def test_an_adapter_keeps_the_coarse_fields(tmp_path):
    from v2flow_nbdev.language.adapters import choose_trained, save_adapter
    for part in toy_llama(captions*4): part.save_pretrained(tmp_path/'base')
    llm, tokenizer = load_llm(tmp_path/'base')
    visual = add_visual_tokens(llm, tokenizer, toy_v2flow(llm, tokenizer), coarse=[4, 3])
    save_adapter(choose_trained(llm, 'lora', rank=2), tmp_path/'adapter', str(tmp_path/'base'))
    assert VisualTokens.of(load_llm(tmp_path/'adapter')[0]) == visual

def test_coarse_tokens_stand_in_the_order_of_their_fields():
    from v2flow_nbdev.language.sequences import ImageTextSequences, text_to_image
    (llm, tokenizer, visual), ids = fields_model(), torch.arange(16).view(4, 4)
    prompt, target = text_to_image(visual, 0, [5, 6], ids, coarse=[3, 2])
    base, tone = visual.coarse_fields
    assert prompt == [0, 5, 6, visual.begin((4, 4))] and target == [base[3], tone[2], *range(visual.first, visual.first + 16), visual.end]
    assert text_to_image(visual, 0, [5, 6], ids)[1] == target[2:]
    for wrong in ([3], 3, [3, 2, 0], [4, 0], [0, 3], [-1, 0], [3, None]):
        with pytest.raises(ValueError, match='coarse='): text_to_image(visual, 0, [5], ids, coarse=wrong)
    one = coarse_model()[2]
    assert text_to_image(one, 0, [5], ids, coarse=7) == text_to_image(one, 0, [5], ids, coarse=[7])
    cut = ImageTextSequences([dict(ids=ids, captions=['a handwritten seven']*2, coarse=[1, 1])], tokenizer, visual, write_share=1.,
                             caption_dropout=0., longest=24, write_noise=.5)[0]
    assert len(cut[0]) + len(cut[1]) == 23 and cut[1][:2] == cut[2][:2] == [base[1], tone[1]]

def test_values_of_several_fields_get_numbers():
    "In each field's order; nothing is a value beside others, and an image of which nothing is known has no token"
    from v2flow_nbdev.training.llm_data import WithCoarse
    ids = [dict(ids=i) for i in range(4)]
    told = WithCoarse(ids, ['cat', 'dog', None, 'ant'], ['dark', None, None, 'light'])
    assert [told[i]['coarse'] for i in range(4)] == [[1, 1], [2, 0], None, [0, 2]]
    assert [WithCoarse(ids, ['b', None, 'a', 'b'])[i]['coarse'] for i in range(4)] == [[1], None, [0], [1]]

def test_the_loss_of_a_coarse_token_is_over_its_own_field():
    "By hand, and where no position may be left out, as on a GPU"
    from v2flow_nbdev.language import losses
    from v2flow_nbdev.language.sequences import text_to_image
    llm, tokenizer, visual = fields_model()
    prompt, target = text_to_image(visual, 0, [5, 6], torch.arange(16).view(4, 4), coarse=[3, 2])
    batch, first = collate([(prompt, target)]), visual.first
    found = []
    with torch.no_grad():
        logits = llm(batch['input_ids']).logits[0, len(prompt) - 1:-1].double()
        def kind(i): return next((f for f,r in enumerate(visual.coarse_fields) if i in r), None)
        each = [l[[i for i in range(first, len(l)) if kind(i) == kind(t)]].logsumexp(-1) - l[t] for l,t in zip(logits, target)]
        for choose in (True, False):
            with pytest.MonkeyPatch.context() as m:
                m.setattr(losses, 'may_choose', lambda device: choose)
                found.append(losses.TargetLoss(llm, coarse_weight=8)(**batch).loss)
    for loss in found: torch.testing.assert_close(loss.double(), (8*sum(each[:2]) + sum(each[2:]))/(16 + 17), atol=1e-5, rtol=1e-5)
    assert count_targets(batch, first, coarse=visual.coarse, coarse_weight=8) == 33

@pytest.mark.parametrize('guidance, temperature', [(1., 0.), (1.5, 0.), (1.5, 1.)])
def test_each_coarse_token_is_chosen_among_its_own_field(guidance, temperature):
    "In both loops, which agree; the caller sees ids alone"
    from v2flow_nbdev.language.generation import VisualTokenProcessor, generate_image_ids
    (llm, tokenizer, visual), chosen = fields_model(), []
    llm.get_output_embeddings().weight.data[visual.first:visual.coarse[0]] *= 3    # no range is likely by itself
    with pytest.MonkeyPatch.context() as m:
        choose = VisualTokenProcessor.choose
        def noted(self, scores, done):
            chosen.append((done, out := choose(self, scores, done))); return out
        m.setattr(VisualTokenProcessor, 'choose', noted)
        seen, made = [], []
        for how in ({}, dict(static_cache=True)):
            made.append(generate_image_ids(llm, tokenizer, captions, guidance_scale=guidance, temperature=temperature,
                                           generator=torch.Generator().manual_seed(0), callback=lambda ids: seen.append(ids.shape[1]), **how))
    assert torch.equal(*made) and made[0].shape == (3, 16) and 0 <= made[0].min() <= made[0].max() < 32
    assert seen == [*range(1, 17)]*2 and [done for done, _ in chosen] == [*range(18)]*2
    ranges = [*visual.coarse_fields] + [range(visual.first, visual.first + 32)]*16
    assert all(visual.first + i in ranges[done] for done, out in chosen for i in out.flatten().tolist())

def test_several_fields_of_the_data_become_coarse_tokens(whole, tmp_path, monkeypatch):
    "By the recipe; the fields are kept, and a run or a model with others is refused"
    from v2flow_nbdev.training import llm_recipes
    from v2flow_nbdev.training.config import TrainConfig
    from v2flow_nbdev.training.failures import RunFailed
    from v2flow_nbdev.training.recipes import DataConfig
    load = llm_recipes.load_data
    def told(source): return tuple([{**r, 'size': ('small', '')[i % 2], 'odd': r['label'] % 2} for i,r in enumerate(part)] for part in load(source))
    monkeypatch.setattr(llm_recipes, 'load_data', told)
    def run(out, coarse, llm=whole/'llama', **more):
        training = TrainConfig(steps=2, batch_size=4, evaluate_every=0, trackers=())
        tuning = llm_recipes.LLMConfig(str(llm), train='lora', rank=2, store_base=False, coarse=coarse)
        recipe = llm_recipes.LLMRecipe(DataConfig('digits', copies=0), str(whole/'tok/model'), tuning, training)
        return llm_recipes.train_llm(recipe, tmp_path/out, **more)
    pipe = run('a', 'label size')
    assert VisualTokens.of(pipe.llm).coarse_sizes == (10, 2)
    trained = V2FlowPipeline.from_pretrained(tmp_path/'a/model')
    visual = VisualTokens.of(trained.llm)
    assert visual.coarse_sizes == (10, 2) and visual.coarse_values
    trained('a six', generator=torch.Generator().manual_seed(0))
    with pytest.raises(RunFailed, match="llm.*label odd"): run('a', 'label odd', resume=True)
    for other in ('label', 'label odd', 'size label', 'label size odd'):
        with pytest.raises(RunFailed, match=r'has 10 \+ 2 coarse tokens already, for other values'): run('b', other, tmp_path/'a/model/llm')
    run('c', 'label size', tmp_path/'a/model/llm')
    with pytest.raises(ValueError, match="llm.coarse='nothing': examples of this data have no such field"): run('d', 'label nothing')
    with pytest.raises(ValueError, match="coarse='label label'"): run('d', 'label label')
