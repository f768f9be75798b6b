"TiTok: an image as a short sequence of learned tokens. One token, one code; two stages; a number of tokens that no grid has"
import math
from dataclasses import replace
import pytest, torch
from benchmarks import comparison
from v2flow_nbdev.models.tokenizer import V2Flow
from v2flow_nbdev.models.tokenizer_config import V2FlowConfig
from v2flow_nbdev.models.tokenizer_training import TokenizerTrainingConfig
from v2flow_nbdev.systems.plainvq import regression_decoding
from v2flow_nbdev.systems.titok import TiTok, TiTokConfig, TiTokFlowTraining, TiTokTraining, id_sensitivity, proxy_loss
from v2flow_nbdev.training.config import TrainConfig
from v2flow_nbdev.training.loop import train
from v2flow_nbdev.training.tokenizer_recipes import stack_latents

shape = TiTokConfig(n_tokens=6, resampler_width=16, resampler_depth=1, codebook_size=24, vocab_dim=12, dim=16, depth=1, heads=2,
                    velocity_width=16, velocity_depth=1, **regression_decoding)      # 8×8 pixels, 4×4 latents of 4 numbers
latents = torch.randn(40, 4, 4, 4, generator=torch.Generator().manual_seed(0))

def awake(tok):
    "A new decoder gives 0 everywhere; this one does not"
    for p in tok.velocity.parameters(): torch.nn.init.normal_(p, std=0.1)
    tok.quantizer.initialised.fill_(True)
    return tok.eval()

def new(kind=TiTok, **changes):
    torch.manual_seed(0)
    return awake(kind(replace(shape, **changes)))

def lesson_of(tok, kind=TiTokTraining, n_proxies=20, examples=latents):
    torch.manual_seed(0)
    lesson = kind(tok, TokenizerTrainingConfig(noise=0., code_dropout=0.), n_proxies).train()
    lesson.examples = [dict(latents=z, number=i) for i,z in enumerate(examples)]
    return lesson

# ---- one latent token, one code

def codes_touched(tok):
    "(N, N) bool: does code j's input change with what the encoder gives for latent token i alone?"
    r, found = tok.resampler, []
    before = tok.mixtures(latents[:1])
    for i in range(tok.config.n_tokens):
        def change(module, args, out, i=i): return out.index_add(1, torch.tensor([i]), torch.ones_like(out[:, :1]))
        hook = r.norm.register_forward_hook(change)
        found.append(((tok.mixtures(latents[:1]) - before).abs() > 1e-6).any(-1)[0])
        hook.remove()
    return torch.stack(found)

class Unpermuted(TiTok):
    "The default of the public code: tokens × width read as width × tokens, without a permutation"
    def mixtures(self, latents, *args, **kwargs):
        r = self.resampler
        x = r.tokens(latents)
        return r.readout(x.reshape(len(x), x.shape[2], x.shape[1]).mT)

def test_a_latent_token_is_one_code():
    assert torch.equal(codes_touched(new()), torch.eye(6).bool())

def test_a_reshape_without_a_permutation_is_caught():
    "Width 16, 6 tokens: each token is spread over all six codes"
    assert codes_touched(new(Unpermuted)).all()

def test_looked_up_codes_are_unit_vectors():
    tok = new()
    torch.testing.assert_close(tok.quantizer.codebook[tok.encode(latents=latents)].norm(dim=-1), torch.ones(40, 6))

# ---- tokens without positions in the image

def test_each_token_sees_the_whole_image_and_each_latent_all_tokens():
    tok = new()
    z = latents[:2].clone().requires_grad_()
    for j in range(6):
        grad, = torch.autograd.grad(tok.train().resampler.tokens(z)[:, j].square().sum(), z, retain_graph=False)
        assert (grad.abs().sum(1) > 0).all()
    tok.eval()
    ids = tok.encode(latents=latents[:1])
    for j in range(6):
        other = ids.clone(); other[:, j] = (ids[:, j] + 1) % 24
        assert ((tok.decode_latents(other) - tok.decode_latents(ids)).abs().sum(1) > 0).all()

def test_tokens_differ_and_their_order_counts():
    "Far from their start, where they lie close together"
    tok = new()
    for p in (tok.resampler.latent_tokens, tok.masked.code_positions): torch.nn.init.normal_(p)
    ids = torch.arange(6)[None]
    assert (tok.decode_latents(ids.flip(1)) - tok.decode_latents(ids)).abs().max() > 1e-3
    x = tok.resampler.tokens(latents[:1])[0]
    assert torch.pdist(x).min() > 1e-2

@pytest.mark.parametrize('n', [1, 6, 16, 23, 64])
def test_the_number_of_tokens_is_free_of_the_grid(n):
    tok = new(n_tokens=n)
    ids = tok.encode(latents=latents)
    assert ids.shape == (40, n) and tok.config.grid == (1, n) and tok.config.latent_grid == (4, 4)
    assert tok.decode_latents(ids).shape == latents.shape and torch.equal(ids, tok.encode(latents=latents))

def test_as_many_tokens_as_the_grid_of_another_tokenizer():
    "What the comparison passes: a config with `pool`"
    tok = TiTok(V2FlowConfig(image_size=(32, 32), pool=4, vocab_dim=12))
    assert tok.config.n_tokens == 16 and tok.config.pool == 1 and tok.config.latent_grid == (16, 16)

def test_sensitivity_counts_changed_ids():
    "By hand: ids that read one latent each change there and nowhere else; equal latents change nothing"
    class Corner:
        def encode(self, latents): return torch.stack([latents[:, 0, 0, 0] > 0, latents[:, 0, 3, 2] > 0], 1).long()
    found = id_sensitivity(Corner(), latents, latents.flip(0))
    assert found.shape == (2, 4, 4)
    for j, at in enumerate([(0, 0), (3, 2)]):
        x = latents[:, 0, at[0], at[1]] > 0
        assert found[j][at] == (x != x.flip(0)).float().mean() > 0 and (found[j] > 0).sum() == 1
    assert not id_sensitivity(new(), latents, latents).any()

# ---- two stages

def step(lesson, progress, lr=1e-2):
    lesson.before_step(progress)
    out = lesson(**stack_latents(lesson.examples[:32]))
    lesson.zero_grad(); out.loss.backward()
    with torch.no_grad():
        for p in lesson.parameters():
            if p.grad is not None: p -= lr*p.grad
    lesson.after_step()
    return out

def moved(lesson, progress):
    "Which parts learn in a step?"
    before = {n: p.clone() for n,p in lesson.named_parameters()}
    step(lesson, progress)
    return {n.removeprefix('tok.').split('.')[0] for n,p in lesson.named_parameters() if not torch.equal(p, before[n])}

def test_stage_one_begins_as_a_guess_among_the_proxies_and_learns_no_latents():
    lesson = lesson_of(new())
    lesson.tok.quantizer.initialised.fill_(False)
    out = step(lesson, 0.)
    assert abs(out.aux_loss.item() - math.log(20)) < 0.1 and out.flow_loss == 0 and out.ids is None
    assert lesson.proxies.any() and moved(lesson, 0.2) == {'resampler', 'masked', 'aux_decoder'}
    assert lesson.tok.quantizer.ready

def test_proxy_codes_are_the_nearest_kmeans_centres_of_each_latent():
    "A readout that knows them has no loss; the same with all proxies moved by one has a large one"
    lesson = lesson_of(new())
    step(lesson, 0.)
    z = latents.flatten(2).mT
    near = torch.cdist(z, lesson.proxies.expand(40, -1, -1)).argmin(-1)
    known = torch.nn.functional.one_hot(near, 20)*50.
    def loss(logits): return proxy_loss(lambda *a: logits, torch.nn.Identity(), None, z, (4, 4), lesson.proxies).item()
    assert loss(known) < 1e-4 and loss(known.roll(1, -1)) > 40
    assert (lesson.proxies[near] - z).square().mean() < 0.6*z.var()

def test_stage_one_needs_examples():
    lesson = lesson_of(new())
    lesson.examples = None
    with pytest.raises(ValueError, match='set `examples`'): lesson(latents=latents)

@pytest.mark.parametrize('kind', [TiTokTraining, TiTokFlowTraining])
def test_stage_two_trains_the_decoder_alone_and_leaves_ids_as_they_are(kind):
    lesson = lesson_of(new(), kind)
    for progress in (0., 0.2, 0.3): step(lesson, progress)
    ids, codes = lesson.tok.encode(latents=latents), lesson.tok.quantizer.codebook.clone()
    assert moved(lesson, 0.5) == {'masked', 'velocity'}
    for progress in (0.6, 0.9):
        out = step(lesson, progress)
        assert out.aux_loss == out.commitment_loss == 0 and out.loss == out.flow_loss > 0
        assert torch.equal(out.ids.long(), ids[:32])
    assert torch.equal(lesson.tok.encode(latents=latents), ids) and torch.equal(lesson.tok.quantizer.codebook, codes)

def test_what_stage_two_scores_is_what_is_decoded():
    lesson = lesson_of(new())
    lesson.before_step(0.5)
    out = lesson.eval()(latents=latents)
    back = lesson.tok.decode_latents(lesson.tok.encode(latents=latents))
    torch.testing.assert_close(out.flow_loss, (back - latents).square().mean(), rtol=1e-5, atol=1e-6)

def test_four_images_are_remembered():
    "Tiny overfit, both stages through the common loop: far below the error of the mean image"
    four = latents[:4].repeat(10, 1, 1, 1)
    torch.manual_seed(0)
    tok = TiTok(replace(shape, resampler_width=32, dim=32, velocity_width=32))
    lesson = lesson_of(tok, n_proxies=32, examples=four)
    config = TrainConfig(steps=150, batch_size=16, lr=2e-2, optimizer='muon', ema_decay=0.9, evaluate_every=0, checkpoint_every=0,
                         trackers=(), mixed_precision='no')
    tok = train(lesson, lesson.examples, config, stack_latents, progress=False).tok
    z = latents[:4]
    error, floor = (tok.decode_latents(tok.encode(latents=z)) - z).square().mean(), (z - z.mean(0)).square().mean()
    assert error < 0.05*floor, (error, floor)

# ---- called as the others are

def test_a_folder_gives_the_same_ids_and_images(tmp_path):
    tok = new(n_tokens=5)
    tok.save_pretrained(tmp_path, torch.float16)
    back = TiTok.from_pretrained(tmp_path)
    ids = tok.encode(latents=latents)
    assert isinstance(back.config, TiTokConfig) and back.config.n_tokens == 5 and torch.equal(back.encode(latents=latents), ids)
    torch.testing.assert_close(back.decode_latents(ids), tok.decode_latents(ids), atol=2e-2, rtol=1e-2)
    card = (tmp_path/'README.md').read_text()
    assert '5 ids of 24 codes' in card and '2406.07550' in card and 'from v2flow_nbdev.systems.titok import TiTok' in card
    with pytest.raises(OSError, match='n_tokens'): V2Flow.from_pretrained(tmp_path)

def test_ids_stay_under_a_cast():
    tok = new()
    ids = tok.encode(latents=latents)
    assert torch.equal(tok.to(torch.bfloat16).encode(latents=latents), ids)
    assert tok.resampler.latent_tokens.dtype == torch.float32 and tok.dtype == torch.bfloat16

def test_the_judges_of_the_comparison_can_call_it():
    tok = new()
    z, generator = comparison.restored('titok', tok, None, latents, 0.25), torch.Generator().manual_seed(0)
    torch.testing.assert_close(z, tok.decode_latents(tok.encode(latents=latents), temperature=0.25, generator=generator))
    images = torch.rand(3, 1, 8, 8)*2 - 1
    assert tok.decode(tok.encode(images)).shape == images.shape

def test_a_step_is_counted_without_being_computed():
    "As `step_flops` does, on the meta device"
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device('meta'):
        lesson, z, ids, flops = TiTokTraining(TiTok(shape), TokenizerTrainingConfig(noise=0., code_dropout=0.)).train(), \
            torch.empty(8, 4, 4, 4), torch.zeros(8, 6).long(), []
    for ready, progress in ((False, 0.), (True, 0.1), (True, 0.4)):
        lesson.tok.quantizer.initialised = torch.tensor(ready)
        lesson.before_step(progress)
        with FlopCounterMode(display=False) as counter:
            lesson.losses(z, 1., 0., 0, 12, None, ids if lesson.frozen else None)[0].backward()
        flops.append(counter.get_total_flops())
    assert min(flops) > 0 and flops[2] < flops[1]

def test_what_does_not_fit_is_refused_in_one_line():
    tok = new()
    with pytest.raises(ValueError, match=r'need \(B, 6\)'): tok.decode_latents(torch.zeros(2, 5).long())
    with pytest.raises(ValueError, match=r'need \(B, 6\)'): tok.decode_latents(torch.zeros(2, 8).long(), grid=(2, 4))
    with pytest.raises(ValueError, match='4×4'): tok.encode(latents=torch.randn(1, 4, 4, 8))
    with pytest.raises(ValueError, match='n_tokens=0'): replace(shape, n_tokens=0)
    with pytest.raises(ValueError, match='give no vocabulary'): TiTok(shape, 'words')
