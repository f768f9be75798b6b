"A generator without ids: what it may see, what it is scored on, how often it runs, and that it heeds captions"
from statistics import NormalDist
import pytest, torch
from torch import nn
from conftest import root
from v2flow_nbdev.base.text import load_text_tokenizer
from v2flow_nbdev.models.masked import MaskedTransformer
from v2flow_nbdev.models.tokenizer_config import V2FlowConfig
from v2flow_nbdev.models.tokenizer_training import TokenizerTrainingConfig
from v2flow_nbdev.models.vocabulary import Vocabulary
from v2flow_nbdev.systems.mar import MAR, MARTraining
from v2flow_nbdev.training.config import TrainConfig
from v2flow_nbdev.training.loop import train
from v2flow_nbdev.training.tokenizer_recipes import stack_latents

home = root/'data/checkpoints/digits'
a, b, short = 'the digit one on the number two', 'the digit two on the number one', 'a 3'

@pytest.fixture(scope='module')
def language(): return Vocabulary.load(home/'image_tokenizer'), load_text_tokenizer(home/'llm')

def new(language, fresh=False, **changes):
    "A small one; a `fresh` velocity MLP gives 0 everywhere"
    torch.manual_seed(0)
    mar = MAR(V2FlowConfig(**dict(dict(dim=32, depth=1, heads=2, velocity_width=32, velocity_depth=1), **changes)), *language).eval()
    for p in () if fresh else mar.velocity.parameters(): nn.init.normal_(p, std=0.1)
    return mar

def seeds(*numbers): return [torch.Generator().manual_seed(n) for n in numbers]

def slots(mar, *captions): return mar.condition(mar.prepare(list(captions)))

# ---- the condition

def test_a_caption_is_a_sequence_and_not_a_bag_of_tokens(language):
    "Every token embedding in its slot, whatever else is in the batch; the mean of a and b is the same"
    mar, (vocabulary, tokenizer) = new(language), language
    x, y, z = slots(mar, a, b, short)
    torch.testing.assert_close(x.sum(0), y.sum(0)); assert (x - y).abs().max() > 0.1
    torch.testing.assert_close(z, slots(mar, short)[0])
    ids = tokenizer(a, add_special_tokens=False).input_ids
    where = [vocabulary.tokens.index(t) for t in tokenizer.convert_ids_to_tokens(ids)]
    unit = vocabulary.centred*vocabulary.embeddings.shape[1]**0.5/vocabulary.code_scale
    torch.testing.assert_close(x[:len(ids)], unit[where]); assert not x[len(ids):].any()
    assert 0.5 < x[:len(ids)].std() < 2                                # as codes are

def test_captions_that_do_not_fit_are_refused(language):
    mar = new(language)
    with pytest.raises(ValueError, match='18 tokens for 16 slots'): mar.generate('a ' + 'small '*16 + 'digit')
    with pytest.raises(ValueError, match='is not in the vocabulary'): mar.generate('a giraffe')
    with pytest.raises(ValueError, match='caption is empty'): mar.generate('')
    with pytest.raises(ValueError, match='2 generators for 1 captions'): mar.generate(a, generator=seeds(0, 1))
    with pytest.raises(ValueError, match='has no caption'): MARTraining(mar, [[a], []])

def test_it_is_the_decoder_of_v2flow_without_one_layer(language):
    "At 16 slots for 64 latents"
    mar = new(language, image_size=(16, 16), pool=2)
    whole = MaskedTransformer(4, 128, 32, 1, 2, main=(8, 8), pool=2)
    def shapes(m): return {n: p.shape for n,p in m.named_parameters()}
    assert shapes(whole).keys() - shapes(mar.masked).keys() == {'split.weight', 'split.bias'}
    assert shapes(mar.masked).items() <= shapes(whole).items() and mar.slots == 16

# ---- what may be seen, and what is scored

def test_hidden_latents_are_seen_by_nobody(language):
    "Only visible ones and the caption count; and the caption counts at every hidden position"
    mar, order, z = new(language), torch.randperm(16)[None], torch.randn(1, 16, 4)
    visible, hidden = order[:, :5], order[:, 5:]
    def known(caption, z): return mar.masked(slots(mar, caption), z, visible, hidden, (4, 4))
    def changed(at): return z.scatter(1, at[..., None].expand(-1, -1, 4), float('nan') if at is hidden else 7.)
    assert torch.equal(known(a, z), known(a, changed(hidden)))
    for other in (known(a, changed(visible)), known(b, z)): assert (known(a, z) - other).abs().amax(-1).min() > 1e-6

def lesson_of(mar, captions, **config): return MARTraining(mar, captions, TokenizerTrainingConfig(**config))

def test_loss_is_that_of_masked_positions_alone(language):
    "A fresh velocity MLP gives 0 and hears no condition: the gradient shows which latents are scored. Later all are heeded"
    for fresh, expected in ((True, 12), (False, 16)):
        lesson = lesson_of(new(language, fresh), [[a], [b]])
        z = torch.randn(2, 4, 4, 4, requires_grad=True)
        lesson.losses(z, lesson.prepared[:2].long(), 12).backward()
        assert z.grad.abs().amax(1).flatten(1).count_nonzero(1).tolist() == [expected]*2
    lesson(z.detach(), torch.tensor([0, 1])).loss.backward()
    assert all(p.grad is not None for p in lesson.parameters())

def test_mask_ratio_follows_its_law(language):
    "A normal at 1, standard deviation 0.25, truncated to [0.7, 1]: mean and distribution function of 1,000 batches"
    lesson, seen, g = lesson_of(new(language, image_size=(32, 32), pool=4), [[a]]), [], torch.Generator().manual_seed(0)
    lesson.losses = lambda z, slots, n_hidden, generator: seen.append(n_hidden/256)
    for _ in range(1000): lesson(torch.zeros(1, 4, 16, 16), torch.tensor([0]), g)
    law, seen = NormalDist(1, 0.25), torch.tensor(seen)
    whole = law.cdf(1) - law.cdf(0.7)
    mean = 1 + 0.25**2*(law.pdf(0.7) - law.pdf(1))/whole
    assert seen.min() >= 0.699 and seen.max() <= 1 and abs(seen.mean() - mean) < 0.012
    for at in (0.8, 0.9, 0.95): assert abs((seen < at).float().mean() - (law.cdf(at) - law.cdf(0.7))/whole) < 0.05

def test_each_step_draws_one_of_the_examples_own_captions(language):
    captions, seen = [['a 1', 'a 2', 'a 3'], ['the digit 4'], ['a 5', 'the digit 5']], set()
    lesson = lesson_of(new(language), captions).train()
    lesson.losses = lambda z, slots, n_hidden, generator: seen.update((int(i), tuple(s)) for i,s in zip((2, 0, 1, 0), slots.tolist()))
    for k in range(40): lesson(torch.zeros(4, 4, 4, 4), torch.tensor([2, 0, 1, 0]), torch.Generator().manual_seed(k))
    assert seen == {(i, tuple(s)) for i,own in enumerate(captions) for s in lesson.mar.prepare(own).tolist()}

# ---- drawing

def test_the_transformer_runs_once_a_round_and_twice_with_guidance(language):
    mar, runs = new(language), []
    mar.masked.register_forward_hook(lambda module, given, out: runs.append(out.shape[1]))
    for scale, passes in ((1., 1), (3., 2), (0., 2)):
        for rounds in (1, 4, 16) if scale == 1 else (1, 3):
            runs.clear(); mar.generate([a, b], n_iter=rounds, n_steps=1, guidance_scale=scale)
            assert len(runs) == passes*rounds and runs[0] == 16 and runs == sorted(runs, reverse=True)
    with pytest.raises(ValueError, match='need 1 to 16 rounds'): mar.generate(a, n_iter=17)

def test_guidance_1_is_the_conditional_alone(language):
    "The null condition may then be anything; above 1 it counts"
    mar = new(language)
    def drawn(scale): return mar.generate([a, short], guidance_scale=scale, n_steps=2, generator=seeds(0, 1))
    plain, guided = drawn(1.), drawn(3.)
    with torch.no_grad(): mar.masked.null_code.fill_(float('nan'))
    assert torch.equal(drawn(1.), plain) and drawn(3.).isnan().any() and not torch.equal(plain, guided)

def test_a_seed_gives_the_same_image_in_any_batch(language):
    mar, how = new(language), dict(n_iter=5, n_steps=3, guidance_scale=2.)
    alone = mar.generate(a, generator=seeds(3), **how)
    several = mar.generate([b, a, short], generator=seeds(1, 3, 2), **how)
    torch.testing.assert_close(several[1:2], alone, atol=1e-4, rtol=1e-4)
    assert not torch.equal(mar.generate(a, generator=seeds(4), **how), alone)
    torch.testing.assert_close(mar.generate([a, a], generator=seeds(3, 4), temperature=0., **how)[0], mar.generate(
        a, generator=seeds(3), temperature=0., **how)[0], atol=1e-4, rtol=1e-4)
    image, = mar(a, generator=seeds(3), **how).images
    assert image.size == (8, 8) and len(mar([a, b], 2).images) == 4 and mar(a).ids is None

def test_few_captions_are_heeded_and_so_is_the_order_of_their_tokens(language):
    "Four images whose captions have the same tokens: only a sequence can tell them apart. The trained lesson's own captions, then others'"
    captions = [f'the {x} {m} the {y} {n}' for x,y in (('digit', 'number'), ('number', 'digit')) for m,n in (('one', 'two'), ('two', 'one'))]
    z = 1.5*torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0)).sign()
    lesson = lesson_of(new(language, fresh=True, dim=64, heads=4, velocity_width=64), [[c] for c in captions], n_draws=2)
    config = TrainConfig(steps=900, batch_size=24, lr=3e-3, ema_decay=0.95, mixed_precision='no', evaluate_every=0, checkpoint_every=0,
                         trackers=())
    mar = train(lesson, [dict(latents=x, number=i) for i,x in enumerate(z)], config, stack_latents, progress=False).mar
    def nearest(**how):
        drawn = mar.generate([c for c in captions for _ in range(5)], n_iter=4, generator=torch.Generator().manual_seed(0), **how)
        return torch.cdist(drawn.flatten(1), z.flatten(1)).argmin(1)
    right = torch.arange(4).repeat_interleave(5)
    assert (nearest() == right).float().mean() >= 0.9
    assert len(nearest(guidance_scale=0., guidance_schedule=lambda scale, done: scale).unique()) > 1   # unheard: any of them

# ---- the folder

def test_a_folder_gives_the_same_images(language, tmp_path):
    mar = new(language, n_iter=3, n_steps=2)
    def drawn(m): return m.generate([a, short], generator=seeds(0, 1))
    mar.save_pretrained(tmp_path/'a'); mar.save_pretrained(tmp_path/'b', torch.float16)
    back, half = MAR.from_pretrained(tmp_path/'a'), MAR.from_pretrained(tmp_path/'b')
    assert torch.equal(drawn(back), drawn(mar)) and back.config == mar.config and not back.training
    torch.testing.assert_close(drawn(half), drawn(mar), atol=0.05, rtol=0.05)
    half.save_pretrained(tmp_path/'a', torch.float16)                                 # one over another
    assert torch.equal(drawn(MAR.from_pretrained(tmp_path/'a')), drawn(half))
    assert 'text-to-image' in (tmp_path/'a/README.md').read_text(encoding='utf-8')
    (tmp_path/'b/model.safetensors').write_bytes(b'')
    with pytest.raises(OSError, match='model.safetensors'): MAR.from_pretrained(tmp_path/'b')
    other = Vocabulary(language[0].tokens, language[0].embeddings + 1)
    with pytest.raises(ValueError, match='the vocabulary is another'): MAR(mar.config, other, language[1])

def test_the_latents_of_an_autoencoder(language, tmp_path):
    "It is stored beside, and its latents decoded; without it latents come out"
    from v2flow_nbdev.models.latents import AutoencoderLatents
    autoencoder = AutoencoderLatents.from_pretrained(root/'data/checkpoints/emoji/image_tokenizer/autoencoder')
    c = V2FlowConfig(image_size=(64, 64), image_channels=3, patch_size=4, latent_channels=6, pool=4, dim=16, depth=1, heads=2, n_iter=1,
                     n_steps=1, velocity_width=16, velocity_depth=1)
    mar = MAR(c, *language, autoencoder).eval()
    mar.save_pretrained(tmp_path, torch.float16)
    image, = MAR.from_pretrained(tmp_path)(a, generator=seeds(0)).images
    assert image.size == (64, 64) and mar.slots == 16 and mar.generate(a).shape == (1, 6, 16, 16)
    with pytest.raises(RuntimeError, match='made without the autoencoder'): MAR(mar.config, *language)(a)
