"""The teacher: a frozen language model's states, computed once; which captions are negatives; what it measures with; a
training that is resumed to the bit"""
import json, re, shutil
import pytest, torch, torch.nn.functional as F
from torch import nn
from conftest import root, v2flow
from v2flow_nbdev.base.gguf import cache_folder
from v2flow_nbdev.base.files import read_json, read_tensors, write_json
from v2flow_nbdev.base.images import to_tensor
from v2flow_nbdev.base.text import text_ids
from v2flow_nbdev.data.sources import digits, emoji
from v2flow_nbdev.evaluation.judges import blurred
from v2flow_nbdev.evaluation.pretrained import load_keywords
from v2flow_nbdev.language.text_models import first_id, toy_llama
from v2flow_nbdev.systems import teacher_recipes as chapter
from v2flow_nbdev.systems.text_tower import TextTower, cached_states
from v2flow_nbdev.systems.teacher import Teacher, TeacherConfig
from v2flow_nbdev.systems.teacher_recipes import (
    CaptionedImages, TeacherRecipe, TeacherTraining, contrastive_loss, keyword_exam, retrieval_by_teacher)
from v2flow_nbdev.training.recipes import all_captions, load_data, recipe_from_dict

captions = ['a red heart', 'a small picture of a woman firefighter with dark skin tone', 'a dog', 'the digit 3']
small = TeacherConfig(width=16, dim=32, halvings=2, depth=1, embed_dim=16, text_dim=64)

def random_images(n=4, side=32): return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))*2 - 1

@pytest.fixture(scope='module')
def llama(tmp_path_factory):
    "A folder with a LLaMA of two blocks"
    folder = tmp_path_factory.mktemp('llama')
    for part in toy_llama(captions*4): part.save_pretrained(folder)
    return folder

@pytest.fixture(scope='module')
def toy():
    torch.manual_seed(0)
    return Teacher(small)

# ---- the text tower

@pytest.mark.parametrize('layer', [0, 1, 2])
def test_a_state_is_that_of_the_whole_model(llama, layer):
    "Or the mean over the tokens of what is named; whatever else is in the batch, and without the blocks behind it"
    llm, tokenizer = toy_llama(captions*4)
    found, named = TextTower(llama, layer, 'last')(captions), TextTower(llama, layer)(captions)
    assert found.shape == (4, 64) and found.dtype == torch.float16
    for caption, state, mean in zip(captions, found, named):
        ids = torch.tensor([[first_id(tokenizer), *text_ids(tokenizer, [caption])[0]]])
        with torch.no_grad(): whole = llm(ids, output_hidden_states=True).hidden_states[layer][0]
        torch.testing.assert_close(state.float(), whole[-1], atol=0.02, rtol=0.02)      # bfloat16 products
        before = len(text_ids(tokenizer, ['a small picture of'])[0]) if 'picture' in caption else 0
        torch.testing.assert_close(mean.float(), whole[1 + before:].mean(0), atol=0.02, rtol=0.02)
    assert F.cosine_similarity(found[0].float(), found[2].float(), dim=0) < 0.99        # and not one of all captions
    with pytest.raises(ValueError, match='has 2 blocks'): TextTower(llama, 3)

class Counting:
    "A text tower that counts what it is asked, and may break"
    checksum, layer, pooling = 'x', 1, 'name'
    def __init__(self, breaks_at=10**9): self.asked, self.breaks_at = 0, breaks_at
    def __call__(self, captions):
        if self.asked >= self.breaks_at: raise RuntimeError('killed')
        self.asked += len(captions)
        return torch.tensor([[len(c), hash(c) % 97] for c in captions]).half()

def test_states_are_computed_once_and_a_killed_run_goes_on(tmp_path):
    texts = [f'caption {i}' for i in range(10)]
    with pytest.raises(RuntimeError, match='killed'): cached_states(Counting(4), texts, tmp_path, chunk=4)
    tower = Counting()
    found = cached_states(tower, texts, tmp_path, chunk=4)
    assert tower.asked == 6 and torch.equal(found, Counting()(texts))
    assert torch.equal(cached_states(tower, texts, tmp_path, chunk=4), found) and tower.asked == 6
    sorted(tmp_path.glob('captions-*'))[0].write_bytes(b'damaged')
    assert torch.equal(cached_states(tower, texts, tmp_path, chunk=4), found) and 6 < tower.asked <= 10
    tower, tower.layer = Counting(), 2                                             # other states: nothing is reused
    assert torch.equal(cached_states(tower, texts, tmp_path, chunk=4), found) and tower.asked == 10

def test_our_own_llama_is_a_text_tower_too():
    "Where no pretrained language model is at hand"
    assert TextTower(root/'data/checkpoints/emoji/llm', 3)(captions).shape == (4, 256)

# ---- the loss

def test_loss_is_the_slow_one_and_other_matches_are_no_negatives():
    torch.manual_seed(0)
    u, v, scale = *(F.normalize(torch.randn(5, 8), dim=-1) for _ in range(2)), torch.tensor(7.)
    matches = torch.eye(5, dtype=torch.bool)
    def slowly(matches):
        total = 0
        for a, b, m in ((u, v, matches), (v, u, matches.T)):
            for i in range(5):
                kept = [j for j in range(5) if j == i or not m[i, j]]
                total = total - torch.log(torch.exp(scale*a[i] @ b[i])/sum(torch.exp(scale*a[i] @ b[j]) for j in kept))
        return total/10
    torch.testing.assert_close(contrastive_loss(u, v, scale, matches), slowly(matches))
    matches[1, 3] = True                                                           # caption 3 describes image 1 too
    torch.testing.assert_close(contrastive_loss(u, v, scale, matches), slowly(matches))
    u.requires_grad_()
    # an image twice in a batch, each with its caption: the two do not push each other
    twice = torch.tensor([[1, 1], [1, 1]]).bool()
    assert contrastive_loss(u[:2], v[:2], scale, twice) == 0

def test_captions_of_several_images_are_found(llama):
    "Digits share their captions; no emoji does"
    examples = digits('train')[:12]
    known = all_captions(examples)
    data = CaptionedImages(examples, known, torch.zeros(len(known), 4), 8)
    batch = data.collate([data[i] for i in range(12)] + [data[0]])
    labels = torch.tensor([r['label'] for r in examples] + [examples[0]['label']])
    assert torch.equal(batch['matches'], labels[:, None] == labels)
    assert batch['images'].shape == (13, 3, 8, 8) and batch['states'].shape == (13, 4)
    weights = torch.tensor([0.]*11 + [1.])                                         # drawn by weight: the last one alone
    rare = CaptionedImages(examples, known, torch.zeros(len(known), 4), 8, weights)
    assert [rare[i]['number'] for i in range(3)] == [11]*3
    with pytest.raises(ValueError, match='1 of 2 images have no caption'):
        CaptionedImages([dict(captions=['']), dict(captions=['a'])], ['a'], torch.zeros(1, 4))

# ---- leakage

def test_it_is_trained_on_training_captions_alone(monkeypatch, tmp_path):
    "Images and captions, and what the whitening is measured on; and none of the exam's words is among them"
    seen = {}
    class Tower(Counting):
        def __init__(self, *args): super().__init__()
        def __call__(self, captions): seen.setdefault('asked', []).append(captions); return torch.randn(len(captions), 8)
    def stop(model, data, *args, **kwargs): seen.update(model=model, data=data); raise KeyboardInterrupt
    monkeypatch.setattr(chapter, 'TextTower', Tower)
    monkeypatch.setattr(chapter, 'train', stop)
    recipe = recipe_from_dict(TeacherRecipe, dict(data=dict(name='emoji'), teacher=dict(width=16, dim=32, depth=1),
                                                  training=dict(steps=1)))
    with pytest.raises(KeyboardInterrupt): chapter.train_teacher(recipe, tmp_path/'run')
    train = emoji('train')
    assert len(seen['data']) == len(train) and [r['emoji'] for r in seen['data'].examples] == [r['emoji'] for r in train]
    trained_on = {c for part in seen['asked'][:-1] for c in part}
    assert trained_on == {c for r in train for c in r['captions']}
    assert seen['asked'][-1] == [r['captions'][0] for r in emoji('held_out_bases')]        # scored, never trained on
    states = torch.cat([torch.as_tensor(read_tensors(p)['states']) for p in sorted((tmp_path/'run/captions').glob('*.safetensors'))])
    torch.testing.assert_close(seen['model'].teacher.text.mean, states.float().mean(0), atol=1e-4, rtol=1e-3)
    words = {w for c in trained_on for w in re.findall(r'[^\W_]+', c.lower())}
    for split in ('dev', 'test'):
        assert not [r for r in load_keywords(split) if words & {*re.findall(r'[^\W_]+', r['keyword'].lower())}]

# ---- what it measures with

def test_shapes_and_any_grid(toy):
    for h, w in ((32, 32), (16, 40)):
        tokens, pooled = toy.image(random_images(2, 40)[:, :, :h, :w])
        assert tokens.shape == (2, h*w//16, 32) and pooled.shape == (2, 16)
    with pytest.raises(ValueError, match='need .B, 3, H, W.'): toy.image(torch.zeros(1, 1, 8, 8))

def test_distance_is_zero_on_itself_symmetric_and_has_gradients(toy):
    a, b = random_images(), random_images().flip(0)
    assert torch.equal(toy.perceptual_distance(a, a), torch.zeros(4))
    torch.testing.assert_close(toy.perceptual_distance(a, b), toy.perceptual_distance(b, a))
    assert (toy.perceptual_distance(a, b) > 0).all() and (toy.perceptual_distance(a, b) <= 4).all()
    a.requires_grad_()
    toy.perceptual_distance(a, b).sum().backward()
    assert a.grad.abs().sum() > 0
    with pytest.raises(ValueError, match='same shape'): toy.perceptual_distance(a, b[:2])

def test_dropout_is_off_wherever_the_teacher_is_a_part():
    "TokenFlow's public code measures LPIPS with dropout, for `.train()` of its loss reaches it"
    torch.manual_seed(0)
    teacher = Teacher(small)
    for stage in teacher.image.stages: stage.append(nn.Dropout(0.5))
    a, b = random_images(), random_images().flip(0)
    loss = nn.ModuleDict(dict(perceptual=teacher)).train()
    first = teacher.perceptual_distance(a, b)
    assert torch.equal(teacher.perceptual_distance(a, b), first) and torch.equal(teacher.embed_images(a), teacher.embed_images(a))
    assert loss.training and teacher.training and teacher.image.stages[0][-1].training                # as it was
    assert torch.equal(loss.eval()['perceptual'].perceptual_distance(a, b), first)
    assert not torch.equal(teacher.train().image(a)[1], teacher.image(a)[1])       # so the dropout was there

def test_score_is_a_cosine_and_the_folder_names_the_language_model(toy, llama, tmp_path):
    tower = TextTower(llama, 1)
    torch.manual_seed(1)
    teacher = Teacher(TeacherConfig(**{**vars(small), 'llm': str(llama), 'layer': 1, 'llm_checksum': tower.checksum}))
    teacher.text.fit(torch.cat([tower(captions), torch.randn(40, 64)]))
    teacher.save_pretrained(tmp_path/'teacher')
    assert {p.name for p in (tmp_path/'teacher').iterdir()} == {'config.json', 'model.safetensors'}
    again = Teacher.from_pretrained(tmp_path/'teacher')
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    found = again.score(random_images(), captions)
    by_hand = F.cosine_similarity(again.image(random_images())[1], again.text(tower(captions)), dim=-1).detach()
    torch.testing.assert_close(found, by_hand); assert found.abs().max() <= 1
    torch.testing.assert_close(found, teacher.score(random_images(), captions), atol=2e-3, rtol=0)    # float16 is stored
    with pytest.raises(ValueError, match='3'): again.score(random_images(), captions[:3])
    write_json(tmp_path/'teacher/config.json', {**read_json(tmp_path/'teacher/config.json'), 'llm_checksum': 'another'})
    with pytest.raises(OSError, match='not those of the text tower'): Teacher.from_pretrained(tmp_path/'teacher').score(
        random_images(), captions)
    write_json(tmp_path/'teacher/config.json', {**read_json(tmp_path/'teacher/config.json'), 'dim': 48})
    with pytest.raises(OSError, match='not a whole teacher'): Teacher.from_pretrained(tmp_path/'teacher')

# ---- trainings

def test_eight_images_are_told_apart():
    "A miniature training: images and states that have nothing to do with each other are matched after 60 steps"
    torch.manual_seed(0)
    images = to_tensor([r['image'] for r in emoji('train')[::400][:8]], 3, (32, 32))
    states = torch.randn(8, 64)
    model = TeacherTraining(Teacher(small)).train()
    model.teacher.text.fit(torch.cat([states, torch.randn(100, 64)]))
    before = retrieval_by_teacher(model.teacher, images, states)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(images, states, torch.eye(8, dtype=torch.bool)).loss.backward()
        optimizer.step()
    after = retrieval_by_teacher(model.teacher, images, states)
    assert before['image_to_text_top1'] <= 0.5 and after['image_to_text_top1'] == after['text_to_image_top1'] == 1
    assert not [n for n, p in model.named_parameters() if p.grad is None]

def test_the_command_trains_and_resumes_to_the_bit(llama, tmp_path):
    def trained(out, *more):
        done = v2flow('train-teacher', '--config', 'configs/teacher-emoji.yaml', '--out', tmp_path/out, 'data.name=digits',
                      'data.size=8', f'data.cache={tmp_path}/captions', f'teacher.llm={llama}', 'teacher.layer=1',
                      'teacher.width=16', 'teacher.dim=32', 'teacher.halvings=2', 'teacher.depth=1', 'training.batch_size=8',
                      'training.trackers=[]', 'training.checkpoint_every=2', 'training.evaluate_every=0', *more)
        assert done.returncode == 0, done.stderr[-2000:]
        return read_tensors(tmp_path/out/'model/model.safetensors')
    whole = trained('whole', 'training.steps=4')
    log = [json.loads(l) for l in (tmp_path/'whole/log.jsonl').read_text().splitlines()]
    assert {'image_to_text_top1', 'text_to_image_top5'} <= {*log[-1]} and 'keyword_accuracy' not in log[-1]
    shutil.copytree(tmp_path/'whole', tmp_path/'half')
    last = max((tmp_path/'half/checkpoints').iterdir(), key=lambda p: p.name)
    shutil.rmtree(last); shutil.rmtree(tmp_path/'half/model')                      # killed after step 2
    resumed = trained('half', 'training.steps=4', '--resume')
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[n], resumed[n]) for n in whole)
    teacher = Teacher.from_pretrained(tmp_path/'whole/model')
    assert teacher.config.llm == str(llama) and teacher.config.text_dim == 64
    assert teacher.score(random_images(2, 8), captions[:2]).shape == (2,)
    plan = v2flow('train-teacher', '--config', 'configs/teacher-emoji.yaml', '--dry-run')
    assert plan.returncode == 0 and '0.78 M parameters' in plan.stdout and 'smollm2' in plan.stdout, plan.stderr

def test_the_exam_marks_what_is_nearest(toy):
    "A teacher whose captions lie on an image of their base is always right, whatever the tower"
    examples = emoji('train')[::24]
    keywords = [dict(keyword='x', base=r['base']) for r in {r['base']: r for r in examples}.values()][:30]
    class Oracle(Teacher):
        def embed_captions(self, texts): return images[[next(i for i,r in enumerate(examples) if r['base'] == k['base']) for k in keywords]]
    torch.manual_seed(0)
    oracle = Oracle(small)
    images = oracle.embed_images(to_tensor([r['image'] for r in examples], 3))
    found = keyword_exam(oracle, examples=examples, keywords=keywords)
    assert found['accuracy'] > 0.9 and found['chance'] < 0.2 and found['similarity'].shape == (30, len(examples))

# ---- the one that is shipped

@pytest.fixture(scope='module')
def shipped_teacher(): return Teacher.from_pretrained(root/'data/checkpoints/teacher')

def test_the_shipped_teacher_is_small_and_ranks_changes(shipped_teacher):
    "More blur is further, a larger shift is further, another image is furthest"
    assert sum(p.stat().st_size for p in (root/'data/checkpoints/teacher').glob('*.safetensors')) < 3*2**20
    x = to_tensor([r['image'] for r in emoji('held_out_bases')[::9]], 3)
    def d(y): return shipped_teacher.perceptual_distance(x, y)
    other = d(x.roll(1, 0))
    for changed in ([blurred(x, s) for s in (0.5, 1., 2.)], [x.roll(n, -1) for n in (1, 2, 4)]):
        ranks = torch.stack([*map(d, changed), other])
        assert (ranks.mean(1).diff() > 0).all() and (ranks[:-1] < other).float().mean() > 0.9
    torch.manual_seed(0)
    untrained = Teacher(shipped_teacher.config)
    def ratio(t): return (t.perceptual_distance(x, x.roll(4, -1)).mean()/t.perceptual_distance(x, x.roll(1, 0)).mean()).item()
    assert ratio(shipped_teacher) < 0.7*ratio(untrained)                           # that is what it has been taught

@pytest.mark.skipif(not (cache_folder()/'smollm2/config.json').is_file(), reason='make smollm2')
def test_the_shipped_teacher_knows_its_captions_and_a_word_that_none_holds(shipped_teacher):
    some = {r['base']: r for r in emoji('train')}
    bases = ['hippopotamus', 'rocket', 'pizza', 'dog face']
    images = to_tensor([some[b]['image'] for b in bases], 3)
    own = shipped_teacher.score(images, [some[b]['captions'][0] for b in bases])
    other = shipped_teacher.score(images, [some[b]['captions'][0] for b in bases[1:] + bases[:1]])
    assert (own > other + 0.1).all()
    words = shipped_teacher.embed_captions(['an emoji of a hippo', 'an emoji of a spaceship'])
    assert (words @ shipped_teacher.embed_images(images).T).argmax(1).tolist() == [0, 1]
