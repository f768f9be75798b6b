"DiTo: what SYSTEMS says of it as properties; one loss and nothing else; and it can be called as the rows of the comparison are"
from dataclasses import replace
import pytest, torch, torch.nn.functional as F
from einops import rearrange
from torch import nn
from benchmarks import comparison as cmp
from v2flow_nbdev.models.flow import rf_path
from v2flow_nbdev.models.tokenizer_config import V2FlowConfig
from v2flow_nbdev.models.tokenizer_training import TokenizerTrainingConfig
from v2flow_nbdev.systems import dito
from v2flow_nbdev.systems.dito import DiTo, DiToTraining, image_flow_loss, image_velocity, read_codes, synchronise_noise

shape = V2FlowConfig(resampler_width=16, resampler_depth=1, codebook_size=32, vocab_dim=12, dim=16, depth=1, heads=2, velocity_width=16,
                     velocity_depth=1, pool=2, n_steps=4)

def seed(n): return torch.Generator().manual_seed(n)

def made(**changes):
    "Untrained, but no layer gives 0"
    torch.manual_seed(0)
    tok = DiTo(replace(shape, **changes)).eval()
    for p in tok.velocity.parameters(): nn.init.normal_(p, std=0.2)
    tok.quantizer.initialised.fill_(tok.config.codebook_size > 0)
    return tok

@pytest.fixture(params=[32, 0], ids=['ids', 'numbers'])
def tok(request): return made(codebook_size=request.param)

def latents(n=3, side=4): return torch.randn(n, 4, side, side, generator=seed(1))

# ---- the code

@pytest.mark.parametrize('side', [4, 6, 8])
def test_every_code_has_mean_0_and_variance_1_at_any_size(tok, side):
    for scale in (1., 30.):
        code = tok.mixtures(latents(side=side)*scale)
        assert code.shape == (3, (side//2)**2, 12)
        torch.testing.assert_close(code.mean((1, 2)), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(code.var((1, 2), correction=0), torch.ones(3), atol=1e-3, rtol=0)

def test_the_norm_is_of_an_image_and_has_no_parameters(tok):
    "Not of a token, whose variances stay different; and the batch does not matter"
    z = latents()
    assert tok.mixtures(z).var(-1).std() > 1e-3
    torch.testing.assert_close(tok.mixtures(z)[:1], tok.mixtures(z[:1]), atol=1e-5, rtol=0)
    plain = dito.PlainVQ(tok.config)
    assert {n: p.shape for n,p in plain.named_parameters()} == {n: p.shape for n,p in tok.named_parameters()}

# ---- the path

def test_an_oracle_leads_from_any_noise_to_the_image_in_50_steps(tok, monkeypatch):
    "Up to rounding; an end at the published σ = 1e-5 would be off by σ·|noise|"
    z = latents()
    x1 = rearrange(z, 'b c h w -> b (h w) c')
    monkeypatch.setattr(dito, 'image_velocity', lambda m, v, known, x, t: (x1 - x)/(1 - t)[:, None, None])
    back = tok.decode_latents(tok.encode(latents=z), n_steps=50, generator=seed(0))
    assert (back - z).abs().max() < 3e-5

def test_the_same_code_and_noise_give_the_same_image(tok):
    code = tok.encode(latents=latents())
    def of(n, temperature=1., code=code): return tok.decode_latents(code, generator=seed(n), temperature=temperature)
    assert torch.equal(of(0), of(0)) and not torch.allclose(of(0), of(1)) and torch.equal(of(0, 0.), of(1, 0.))
    one_each = tok.decode_latents(code, generator=[seed(0)]*3, temperature=1.)
    torch.testing.assert_close(one_each[:1], of(0, code=code[:1]), atol=1e-5, rtol=0)

def test_the_velocity_is_of_the_whole_image_and_of_no_other():
    "Each noisy latent, each code and the time reach every velocity of the image"
    tok = made()
    x, codes, t = torch.randn(2, 16, 4), torch.randn(2, 4, 12), torch.tensor([0.3, 0.6])
    def of(x, codes, t): return image_velocity(tok.masked, tok.velocity, read_codes(tok.masked, codes, (4, 4)), x, t)
    def moved(x, at): return x.index_put((torch.tensor(0), torch.tensor(at)), x[0, at] + 1)
    was = of(x, codes, t)
    changed = [of(moved(x, i), codes, t) for i in range(16)] + [of(x, moved(codes, i), t) for i in range(4)]
    for new in [*changed, of(x, codes, torch.tensor([0.4, 0.6]))]:
        far = (new - was).abs().amax(-1)
        assert (far[0] > 1e-6).all() and far[1].max() < 1e-5

# ---- noise synchronisation

def test_synchronised_images_are_no_further_than_their_codes():
    "In our time, data at 1: t ≤ τ, t/τ uniform; the others have their code as it is and t uniform"
    z = torch.randn(40_000, 1, 2, generator=seed(0))
    noisy, t, tau = synchronise_noise(z, 0.1, seed(1))
    synced = tau < 1
    assert abs(synced.float().mean() - 0.1) < 0.01 and torch.equal(noisy[~synced], z[~synced]) and (t <= tau).all() and t.min() >= 0
    def uniform(u, eps): return abs(u.mean() - 1/2) < eps and abs(u.var() - 1/12) < eps
    assert uniform(t[~synced], 0.01) and uniform(tau[synced], 0.02) and uniform((t/tau)[synced], 0.02)
    assert abs(torch.corrcoef(torch.stack([tau, t/tau])[:, synced])[0, 1]) < 0.06
    added = ((noisy - tau[:, None, None]*z)/(1 - tau[:, None, None]))[synced & (tau < 0.98)]
    assert abs(added.std() - 1) < 0.03 and abs(added.mean()) < 0.05
    assert (synchronise_noise(z, 0., seed(1))[2] == 1).all() and (synchronise_noise(z, 1., seed(1))[2] < 1).all()

# ---- one loss

def test_it_is_one_mean_squared_error_and_nothing_else():
    "By hand, with the same draws; no module beside the tokenizer has a parameter"
    tok, z = made(codebook_size=0).train(), latents()
    lesson = DiToTraining(tok, TokenizerTrainingConfig(noise=0.), sync=0.5)
    lesson.train()
    assert all(n.startswith('tok.') for n,_ in lesson.named_parameters())
    _, flow, aux, commitment, ids = out = lesson.losses(z, 1., 0., 0, 1, seed(5))
    assert out[0] == flow and aux == commitment == 0 and ids is None
    g, x1 = seed(5), rearrange(z, 'b c h w -> b (h w) c')
    code, t, _ = synchronise_noise(tok.mixtures(z), 0.5, g)
    x0 = torch.randn(x1.shape, generator=g)
    xt = (1 - t)[:, None, None]*x0 + t[:, None, None]*x1
    by_hand = F.mse_loss(image_velocity(tok.masked, tok.velocity, read_codes(tok.masked, code, (4, 4)), xt, t), x1 - x0)
    torch.testing.assert_close(flow, by_hand)

def test_the_true_velocity_has_no_loss(monkeypatch):
    z = rearrange(latents(), 'b c h w -> b (h w) c')
    tok = made()
    monkeypatch.setattr(dito, 'image_velocity', lambda m, v, known, x, t: (z - x)/(1 - t)[:, None, None])
    assert image_flow_loss(tok.masked, tok.velocity, torch.randn(3, 4, 12), z, (4, 4), generator=seed(0)) < 1e-6

def test_it_reaches_all_that_it_trains(tok):
    lesson = DiToTraining(tok.train(), TokenizerTrainingConfig(noise=0.)).train()
    lesson(latents=latents(), generator=seed(0)).loss.backward()
    assert {n for n,p in lesson.named_parameters() if p.grad is None or not p.grad.any()} == {'tok.masked.null_code'}

def test_ids_have_no_noise_to_be_synchronised_with_unless_it_is_asked_for(tok):
    "No flow generates them; the code without a quantizer has DiTo's"
    numbers = not tok.config.codebook_size
    assert DiToTraining(tok).sync == (0.1 if numbers else 0.) and DiToTraining(tok, sync=0.3).sync == 0.3

def test_with_a_quantizer_codes_are_frozen_without_one_never():
    some = latents(64)
    z = some[:8]
    for k, learning in ((32, False), (0, True)):
        lesson = DiToTraining(made(codebook_size=k), TokenizerTrainingConfig(noise=0.)).train()
        lesson.examples = [dict(latents=x) for x in some]
        lesson.tok.quantizer.initialised.fill_(False)
        for progress in (0., 0.2, 0.3, 0.9):                         # before codes, k-means, learning, frozen
            lesson.before_step(progress); lesson.zero_grad()
            out = lesson(latents=z, numbers=torch.arange(8), generator=seed(0))
            out.loss.backward(); lesson.after_step()
            if k and progress == 0.3: assert out.ids.shape == (8, 4) and out.loss > out.flow_loss    # quantized, and committed
        assert lesson.frozen is not learning and (out.ids is None) is learning
        assert any(p.grad is not None and p.grad.any() for p in lesson.tok.resampler.parameters()) is learning
        if k:
            assert torch.equal(out.ids, lesson.tok.encode(latents=z)) and out.commitment_loss == 0
            assert out.flow_loss == lesson(latents=z, generator=seed(0)).flow_loss           # ids that are known, or found

# ---- an image tokenizer like the others

def test_every_id_is_read():
    tok, ids = made(), torch.arange(4)[None]
    was = tok.decode_latents(ids, generator=seed(0))
    for i in range(4): assert not torch.allclose(tok.decode_latents(ids.index_fill(1, torch.tensor(i), 9), generator=seed(0)), was)

def test_a_folder_in_half_the_bits_gives_the_same_ids(tok, tmp_path):
    images = torch.rand(3, 1, 8, 8, generator=seed(2))*2 - 1
    tok.save_pretrained(tmp_path, torch.float16)
    back, ids = DiTo.from_pretrained(tmp_path), tok.encode(images)
    assert torch.equal(back.encode(images), ids) and torch.equal(ids, tok.encode(images))
    torch.testing.assert_close(back.decode(ids, generator=seed(0)), tok.decode(ids, generator=seed(0)), atol=0.05, rtol=0)
    low = DiTo.from_pretrained(tmp_path, dtype=torch.bfloat16)       # the code does not follow a cast
    assert torch.equal(low.encode(images), ids) and low.decode(ids, generator=seed(0)).isfinite().all()
    card = (tmp_path/'README.md').read_text()
    assert 'arxiv:2501.18593' in card and 'from v2flow_nbdev.systems.dito import DiTo' in card
    assert ('4 ids of 32 codes' in card) if tok.config.codebook_size else ('4 vectors of 12 numbers' in card and ' ids' not in card)

def test_what_it_cannot_do_is_said(tok):
    code = tok.encode(latents=latents())
    with pytest.raises(ValueError, match='one path and no guidance'): tok.decode_latents(code, guidance_scale=2.)
    with pytest.raises(ValueError, match='one path and no guidance'): tok.decode_latents(code, n_iter=4)
    with pytest.raises(ValueError, match='not negative'): tok.decode_latents(code, temperature=-1.)
    wrong = code[:, :2] if code.is_floating_point() else code.float()
    with pytest.raises(ValueError, match='need its code|must be integers'): tok.decode_latents(wrong)
    assert (tok.config.n_iter, tok.config.guidance_scale) == (1, 1.)

def test_it_is_a_row_of_the_comparison(tmp_path):
    "Its FLOPs are counted, it begins with the decoder of its seed, is trained, stored and scored as the others are"
    tiny = cmp.Settings(steps=12, batch_size=4, codebook_size=32, resampler_width=16, resampler_depth=1, dim=16, depth=1, velocity_width=16,
                        velocity_depth=1, n_iter=2, n_steps=2, n_train=24, n_test=4)
    task = cmp.make_task('shapes', tiny, tmp_path)
    ours, other = (cmp.lesson_of(task, tiny, 64, s, 0).tok for s in ('dito', 'v2flow'))
    assert type(ours) is DiTo
    for part in ('masked', 'velocity'):
        a, b = (getattr(t, part).state_dict() for t in (ours, other))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    s = cmp.Settings()
    assert 0.5 < cmp.flops_a_step(task, s, 64, 'dito')/cmp.flops_a_step(task, s, 64, 'v2flow') < 1.5
    tok = cmp.train_cell(task, tiny, 64, 'dito', 0, 1e-3, tmp_path/'run')
    z = task.real['test'].latents
    back = cmp.restored('dito', tok, task, z, 0.25)
    assert type(tok) is DiTo and tok.config.n_steps == 2 and tok.quantizer.ready and back.shape == z.shape
    assert torch.equal(back, cmp.restored('dito', tok, task, z, 0.25)) and not torch.equal(back, cmp.restored('dito', tok, task, z, 1.))
