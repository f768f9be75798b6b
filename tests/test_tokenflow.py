"TokenFlow: one index for two codebooks over a pyramid of scales; the tokenizer, its training and its folder"
import copy, json, math
import pytest, torch, torch.nn.functional as F
from conftest import root, shipped, v2flow
from v2flow_nbdev.models.quantizer import nearest
from v2flow_nbdev.systems.teacher import Teacher, TeacherConfig
from v2flow_nbdev.systems.tokenflow import TokenFlow, TokenFlowConfig
from v2flow_nbdev.systems.tokenflow_quantizer import MultiScaleQuantizer, scale_scores, shared_index, unit_halves
from v2flow_nbdev.systems.tokenflow_training import (
    TokenFlowTraining, TokenFlowTrainingConfig, adversarial_losses, patch_discriminator)

S, P, K, sides = 5, 3, 24, (1, 2, 4)

def gen(seed=0): return torch.Generator().manual_seed(seed)

def some_maps(b=16, norm=1., side=4):
    "Maps with structure at every scale, and a mean that is not zero"
    coarse = sum(F.interpolate(torch.randn(b, S + P, k, k, generator=gen(k)), (side, side), mode='bicubic') for k in (1, 2, 4))
    return norm*(coarse + torch.randn(S + P, generator=gen(9))[:, None, None])

def fitted(maps, updates=6, **settings):
    torch.manual_seed(0)
    vq = MultiScaleQuantizer(**dict(codebook_size=K, semantic_dim=S, pixel_dim=P, sides=sides) | settings).train()
    if vq.learned: return vq
    vq(maps); vq.init_codebook(gen())
    for _ in range(updates): vq(maps); vq.update(gen())
    return vq

# ---- one index

@pytest.mark.parametrize('w', [0., .25, 1., 4., 1e6])
def test_the_index_is_that_of_brute_force_and_of_one_search_in_the_joined_codebook(w):
    s, p, a, b = (torch.randn(n, d, generator=gen(n + d), dtype=torch.float64) for n, d in ((200, S), (200, P), (K, S), (K, P)))
    slow = torch.stack([torch.stack([(F.normalize(s[i], dim=0) - F.normalize(a[k], dim=0)).square().sum()
                                     + w*(F.normalize(p[i], dim=0) - F.normalize(b[k], dim=0)).square().sum() for k in range(K)])
                        for i in range(40)]).argmin(-1)
    # the halves come in any norm
    x, codes = unit_halves(torch.cat([s*7, p/9], -1), S), unit_halves(torch.cat([a/3, b*5], -1), S)
    found = shared_index(x, codes, S, w)
    assert torch.equal(found[:40], slow)
    joined = torch.tensor([1.]*S + [w**.5]*P, dtype=torch.float64)
    assert torch.equal(found, torch.cdist(x*joined, codes*joined).argmin(-1))

def test_either_codebook_alone_is_a_limit():
    x, codes = (unit_halves(torch.randn(n, S + P, generator=gen(n)), S) for n in (300, K))
    for w, half in ((0, slice(S)), (math.inf, slice(S, None)), (1e7, slice(S, None))):
        assert torch.equal(shared_index(x, codes, S, w), nearest(F.normalize(x[:, half], dim=-1), F.normalize(codes[:, half], dim=-1)))

@pytest.mark.parametrize('learned', [False, True])
def test_halves_are_normalised_in_search_and_look_up(learned):
    vq = fitted(some_maps(), learned=learned).eval()
    if learned:  # whatever a gradient has done to their norms
        ids, old = vq.ids(some_maps()), vq.codes_to_map(vq.ids(some_maps()))
        with torch.no_grad(): vq.codebook[:, :S] *= 3; vq.codebook[:, S:] *= .2
        assert torch.equal(vq.ids(some_maps()), ids)
        torch.testing.assert_close(vq.codes_to_map(ids), old)
    for half in vq.table().split([S, P], -1): torch.testing.assert_close(half.norm(dim=-1), torch.ones(K))

# ---- the pyramid

@pytest.mark.parametrize('learned', [False, True])
def test_decoding_ids_gives_the_sum_of_enlarged_codes_and_every_prefix_decodes(learned):
    maps = some_maps()
    vq = fitted(maps, learned=learned).eval()
    found = vq(maps)
    assert found.ids.shape == (16, 21) and torch.equal(found.ids, vq.ids(maps))
    assert torch.allclose(found.map, vq.codes_to_map(found.ids), atol=1e-6)
    total, residual = 0, vq.centred(maps)
    for k, (side, ids) in enumerate(zip(sides, found.ids.split([1, 4, 16], 1))):
        expected = shared_index(unit_halves(F.interpolate(residual, (side, side), mode='area').flatten(2).mT, S), vq.table(), S)
        assert torch.equal(expected, ids)                                          # areas of what is left, once detached
        codes = vq.table()[ids]*torch.cat([vq.gains[k, :1].expand(S), vq.gains[k, 1:].expand(P)])
        added = F.interpolate(codes.mT.unflatten(2, (side, side)), (4, 4), mode='bicubic') if side < 4 else codes.mT.unflatten(2, (4, 4))
        total, residual = total + added, residual - added
        n = sum(s*s for s in sides[:k + 1])
        torch.testing.assert_close(vq.codes_to_map(found.ids[:, :n]), total)       # a prefix
    torch.testing.assert_close(found.map, vq.centred(maps) - residual)         # = the map less what is left
    with pytest.raises(ValueError, match='n one of 1, 5, 21'): vq.codes_to_map(found.ids[:, :7])
    with pytest.raises(ValueError, match='the codebook has 0 to 23'): vq.codes_to_map(found.ids + K)

def test_codes_are_enlarged_directly_not_from_scale_to_scale():
    "Partial sums enlarged in a chain, as the public language model is fed, are another map"
    finer = (1, 2, 4, 6, 8)
    vq = fitted(some_maps(side=8), sides=finer, updates=0).eval()
    vq.gains.fill_(1.)
    ids = torch.randint(K, (4, 121), generator=gen())
    def to(x, side): return F.interpolate(x, (side, side), mode='bicubic')
    chain = 0
    for k, (side, part) in enumerate(zip(finer, ids.split([1, 4, 16, 36, 64], 1))):
        codes = (vq.table()[part]*torch.cat([vq.gains[k, :1].expand(S), vq.gains[k, 1:].expand(P)])).mT.unflatten(2, (side, side))
        chain = codes if k == 0 else to(chain, side) + codes
    direct = vq.codes_to_map(ids)
    assert (chain - direct).norm() > .02*direct.norm()
    torch.testing.assert_close(vq.partial_sums(ids)[-1], direct)

def test_a_single_scale_is_plain_vector_quantization():
    maps = some_maps()
    vq = fitted(maps, sides=(4,), updates=0).eval()
    vq.gains.fill_(1.)
    x = vq.centred(maps).flatten(2).mT
    ids = shared_index(unit_halves(x, S), vq.codebook, S)
    found = vq(maps)
    assert torch.equal(found.ids, ids)
    torch.testing.assert_close(found.map, vq.codebook[ids].mT.unflatten(2, (4, 4)))

def test_one_scale_is_dropped_at_times_and_never_the_first():
    vq, dropped = fitted(some_maps()), []
    for seed in range(400):
        torch.manual_seed(seed)
        dropped.append(vq.scale_to_drop())
    assert {None, 1, 2} == set(dropped) and 20 < sum(d is not None for d in dropped) < 64
    vq.scale_to_drop = lambda: 2
    found = vq(some_maps())
    assert (found.ids[:, 5:] == -1).all() and (found.ids[:, :5] >= 0).all()
    torch.testing.assert_close(found.map, vq.codes_to_map(found.ids[:, :5]))
    assert (vq.eval()(some_maps()).ids >= 0).all()

# ---- gradients and updates

def test_gradients_go_straight_through_and_each_loss_pulls_one_side():
    vq, weigh = fitted(some_maps(), learned=True, scale_dropout=0.), torch.randn(16, S + P, 4, 4, generator=gen(3))
    x = some_maps().requires_grad_()
    found = vq(x)
    gx, gc = torch.autograd.grad((found.map*weigh).sum(), [x, vq.codebook], retain_graph=True, allow_unused=True)
    assert torch.equal(gx, weigh) and gc is None                                   # to both encoders, as if nothing were there
    gx, gc = torch.autograd.grad(found.codebook_loss, [x, vq.codebook], retain_graph=True, allow_unused=True)
    assert gx is None and gc.abs().sum() > 0
    gx, gc = torch.autograd.grad(found.commitment_loss, [x, vq.codebook], retain_graph=True, allow_unused=True)
    assert gx.abs().sum() > 0 and gc is None
    losses = [F.mse_loss(x, total) for total in vq.partial_sums(found.ids)]        # means over the scales, of the sums so far
    torch.testing.assert_close(found.commitment_loss, torch.stack(losses).mean())
    torch.testing.assert_close(found.codebook_loss, found.commitment_loss)

def test_nothing_pulls_on_a_mean_that_is_subtracted():
    "Straight-through would push the maps on for ever; the gradient is that of before, less its mean, with codes and before there are any"
    weigh = torch.randn(16, S + P, 4, 4, generator=gen(3)) + 2.
    for vq in (fitted(some_maps(), scale_dropout=0.), MultiScaleQuantizer(K, S, P, (1, 2, 4)).train()):
        x = some_maps().requires_grad_()
        found = vq(x)
        grad, = torch.autograd.grad((found.map*weigh).sum() + found.commitment_loss, x, retain_graph=True)
        torch.testing.assert_close(grad.mean((0, 2, 3)), torch.zeros(S + P), atol=1e-6, rtol=0)
        through, = torch.autograd.grad((found.map*weigh).sum(), x)
        torch.testing.assert_close(through, weigh - weigh.mean((0, 2, 3), keepdim=True))

@pytest.mark.parametrize('norm', [.1, 1., 10.])
def test_what_is_left_shrinks_with_every_scale_whatever_the_norm_of_the_map(norm):
    maps = some_maps(norm=norm)
    vq = fitted(maps, updates=20).eval()
    h = vq.centred(maps)
    left = [1.] + [((h - total).norm()/h.norm()).item() for total in vq.partial_sums(vq.ids(maps))]
    assert all(b < a for a, b in zip(left, left[1:])) and left[-1] < .7, left

def test_codes_of_norm_one_let_it_grow_where_the_map_is_small():
    vq, maps = fitted(some_maps(), learned=True), some_maps(norm=.02)
    left = [((maps - total).norm()/maps.norm()).item() for total in vq.partial_sums(vq.ids(maps))]
    assert left[0] > 3

def test_forward_changes_nothing_and_half_batches_do_what_the_whole_does():
    vq = fitted(some_maps(), scale_dropout=0., threshold_dead_code=0.)
    before = {n: t.clone() for n, t in vq.state_dict().items()}
    whole, halves, still, skipped = (copy.deepcopy(vq) for _ in range(4))
    still.eval()
    more = some_maps()*1.1 + .2
    whole(more); whole.update(); halves(more[:8]); halves(more[8:]); halves.update(); still(more); still.update()
    skipped(more*float('nan')); skipped.update(taken=torch.tensor(False))          # a step that was not taken
    for n, t in before.items():
        assert torch.equal(still.state_dict()[n], t) and torch.equal(skipped.state_dict()[n], t), n
        torch.testing.assert_close(whole.state_dict()[n], halves.state_dict()[n])
    assert not torch.equal(whole.codebook, before['codebook']) and not torch.equal(whole.gains, before['gains'])

def test_more_codes_than_vectors_are_revived_later():
    vq = fitted(some_maps(4), codebook_size=200, updates=0, balance=0.)
    for seed in range(40): vq(some_maps(4)*(1 + .3*torch.randn(4, 1, 1, 1, generator=gen(seed)))); vq.update(gen(seed))
    assert vq.codebook.isfinite().all() and vq.ready

def test_the_balance_decides_how_much_the_coarse_scales_count():
    vq = fitted(some_maps(), balance=1.)
    vq.collected.clear()
    found = list(vq.pyramid(vq.centred(some_maps())))
    _, weights = vq.flat(found)
    torch.testing.assert_close(torch.stack([w.sum() for w in weights.split([16, 64, 256])]), torch.full((3,), 16.))

def test_what_cannot_be_is_refused():
    def made(**settings): return MultiScaleQuantizer(**dict(codebook_size=K, semantic_dim=S, pixel_dim=P, sides=sides) | settings)
    for wrong in ((), (2, 1), (0, 1), (1, 1)):
        with pytest.raises(ValueError, match='sides='): made(sides=wrong)
    with pytest.raises(ValueError, match='pixel_weight='): made(pixel_weight=-1.)
    with pytest.raises(ValueError, match='a map of shape'): made()(torch.zeros(2, S + P, 8, 8))

def test_usage_is_told_scale_by_scale():
    ids = torch.tensor([[0, 0,1,2,3], [0, 3,2,1,0]])
    found = scale_scores(ids, (1, 2), 4)
    assert (found['usage_1'], found['usage_2'], found['codebook_usage']) == (.25, 1., 1.)
    assert found['perplexity_1'] == pytest.approx(1) and found['perplexity_2'] == pytest.approx(4)

# ---- the tokenizer

def small_teacher(seed=0):
    torch.manual_seed(seed)
    return Teacher(TeacherConfig(width=16, dim=32, depth=1, heads=2, embed_dim=16, llm='none')).eval().requires_grad_(False)

def shape(**settings):
    return TokenFlowConfig(**dict(image_size=(32, 32), sides=(1, 2, 4, 8), codebook_size=32, width=16, project_width=16) | settings)

def images(b=6, seed=0):
    return F.interpolate(torch.rand(b, 3, 6, 6, generator=gen(seed))*2 - 1, (32, 32), mode='bicubic').clamp(-1, 1)

def in_training(config=None, **settings):
    teacher = small_teacher()
    losses = TokenFlowTrainingConfig(**dict(semantic_width=16, semantic_depth=1, discriminator_width=8, adversarial_from=0.) | settings)
    return TokenFlowTraining(TokenFlow(config or shape(), teacher), teacher, losses).train()

def with_codes(**settings):
    model = in_training(shape(scale_dropout=0., **settings))
    model.before_step(1.); model(images()); model.after_step()
    return model

def test_the_student_begins_as_the_teacher_on_the_same_images():
    model = in_training()
    torch.testing.assert_close(model.tok.encoders.semantic(images())[0], model.teacher.image(images())[0], rtol=0, atol=0)
    assert all(p is not q for p, q in zip(model.tok.encoders.semantic.parameters(), model.teacher.image.parameters()))

def test_maps_are_aligned_when_the_patches_differ():
    tok = in_training().tok
    tokens = tok.encoders.project(tok.encoders.semantic(images())[0])              # 4×4 of 8 pixels each, beside 8×8 of 4
    assert tokens.shape[1] == 16
    s, p = tok.encoders(images()).split([16, 8], 1)
    torch.testing.assert_close(s, F.interpolate(tokens.mT.unflatten(2, (4, 4)), (8, 8), mode='bilinear'))
    torch.testing.assert_close(p, tok.encoders.pixel(images()))
    same = in_training(shape(sides=(1, 2, 4))).tok                                 # one grid: nothing is resized
    torch.testing.assert_close(same.encoders(images())[:, :16].flatten(2).mT, same.encoders.project(same.encoders.semantic(images())[0]))

def test_each_decoder_sees_its_own_half_alone():
    model = with_codes()
    tok, maps = model.tok, model.tok.quantizer.codes_to_map(model.tok.encode(images()))
    for half, drawn_changes in ((slice(16), False), (slice(16, None), True)):
        other = maps.clone(); other[:, half] += 1
        told = [model.semantic_decoder(m[:, :16], 4) for m in (maps, other)]
        assert torch.equal(tok.draw(maps), tok.draw(other)) != drawn_changes
        assert torch.equal(*told) == drawn_changes

def test_a_step_gives_gradients_to_all_that_is_trained_and_to_nothing_else():
    for learned in (False, True):
        model = with_codes(learned=learned)
        output = model(images())
        output.loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        assert ('tok.quantizer.codebook' in dict(model.named_parameters())) == learned
        assert output.discriminator_loss > 0 and output.codebook_loss.item() > 0 or not learned
    assert not any('teacher' in n for n in model.state_dict()) and all(p.grad is None for p in model.teacher.parameters())

def test_no_train_reaches_the_teacher_and_its_dropout():
    model = in_training()
    model.teacher.image.blocks.insert(0, torch.nn.Dropout(.5)).eval()
    model.train()
    assert torch.equal(model.teacher.perceptual_distance(images(), -images()), model.teacher.perceptual_distance(images(), -images()))
    model.eval().train()
    assert not any(m.training for m in model.teacher.modules())

def test_both_sides_of_the_adversarial_loss_wait_at_the_gate():
    model = in_training(adversarial_from=.5, perceptual=0.)
    for progress, is_open in ((.49, False), (.5, True)):
        model.before_step(progress); model.zero_grad(set_to_none=True)
        output = model(images()); output.loss.backward()
        assert (output.adversarial_loss.item() != 0, output.discriminator_loss.item() != 0) == (is_open, is_open)
        assert all((p.grad is not None) == is_open for p in model.discriminator.parameters())
    assert in_training(adversarial=0.).discriminator is None

def test_one_step_takes_both_turns_with_the_hinge():
    real, restored = images(), images(seed=1).requires_grad_()
    torch.manual_seed(0)
    d = patch_discriminator(8, 2)
    fooled, judged = adversarial_losses(d, real, restored)
    score_real, score_restored = d(real), d(restored)
    torch.testing.assert_close(fooled, -score_restored.mean())
    torch.testing.assert_close(judged, (F.relu(1 - score_real).mean() + F.relu(1 + score_restored).mean())/2)
    def grads(loss): return torch.autograd.grad(loss, [restored, *d.parameters()], retain_graph=True, allow_unused=True)
    for_decoder, for_judge = grads(fooled), grads(judged)
    assert all(g is None for g in for_decoder[1:]) and for_judge[0] is None
    torch.testing.assert_close(for_decoder[0], torch.autograd.grad(-d(restored).mean(), restored)[0])
    score = d(torch.cat([real[:1], real[1:]]))                                     # a score does not depend on its batch
    torch.testing.assert_close(score[:1], d(real[:1]))

def test_the_loss_is_the_weighted_sum_and_every_weight_counts():
    weights = dict(pixel=1.1, perceptual=.7, semantic=.3, codebook=.9, commitment=.2, adversarial=.4)
    model = in_training(shape(learned=True, scale_dropout=0.), **weights)
    out = model(images())
    expected = sum(w*getattr(out, f'{n}_loss') for n, w in weights.items()) + .4*out.discriminator_loss
    torch.testing.assert_close(out.loss, expected)
    target = model.teacher.image(images())[0]
    torch.testing.assert_close(out.perceptual_loss, model.teacher.perceptual_distance(images(), model.tok.draw(model.tok.quantizer(model.tok.encoders(images())).map)).mean())
    assert 0 < out.semantic_loss < 2 and target.shape == (6, 16, 32)

def test_ids_decode_scale_by_scale_and_survive_folders_casts_and_autocast(tmp_path):
    tok = with_codes().tok.eval()
    ids = tok.encode(images())
    assert ids.shape == (6, 85) and ids.dtype == torch.int64 and torch.equal(ids, tok.train().encode(images()))
    tok.eval()
    rough = [tok.decode(ids[:, :n]) for n in (1, 5, 21, 85)]
    assert all(x.shape == (6, 3, 32, 32) and x.abs().max() <= 1 for x in rough) and not torch.equal(rough[0], rough[1])
    tok.save_pretrained(tmp_path/'tok', torch.float16)
    back = TokenFlow.from_pretrained(tmp_path/'tok')
    assert not back.training and torch.equal(back.encode(images()), ids)
    torch.testing.assert_close(back.decode(ids), rough[-1], atol=.05, rtol=0)
    for tok_ in (copy.deepcopy(tok).half(), tok.double().float(), TokenFlow.from_pretrained(tmp_path/'tok', dtype=torch.bfloat16)):
        assert torch.equal(tok_.encode(images()), ids) and tok_.decode(ids).dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(tok.encode(images()), ids)
    with pytest.raises(ValueError, match='takes'): tok.encode(images()[..., :16])
    with pytest.raises(ValueError, match='n one of 1, 5, 21, 85'): tok.decode(ids[:, :3])
    with pytest.raises(RuntimeError, match='no codes yet'): in_training().tok.encode(images())
    with pytest.raises(OSError, match='not of a TokenFlow'): TokenFlow.from_pretrained(shipped.parent/'emoji/image_tokenizer')
    (tmp_path/'tok/model.safetensors').write_bytes(b'x')
    with pytest.raises(OSError, match='damaged'): TokenFlow.from_pretrained(tmp_path/'tok')

@pytest.mark.parametrize('settings', [dict(sides=(8,)), dict(pixel_weight=math.inf), dict(learned=True, adapt=False)])
def test_its_forms_train(settings):
    model = with_codes(**settings)
    optimizer, losses = torch.optim.AdamW(model.parameters(), 2e-3), []
    for _ in range(12):
        model.before_step(0.); out = model(images())
        optimizer.zero_grad(); out.loss.backward(); optimizer.step(); model.after_step()
        losses.append(out.pixel_loss.item())
    assert losses[-1] < losses[0] and out.ids.shape == (6, sum(s*s for s in model.tok.config.sides))

# ---- the command

def test_the_command_trains_resumes_and_evaluates(tmp_path):
    small_teacher().save_pretrained(tmp_path/'teacher')
    args = ['train-tokenflow', '--config', root/'configs/tokenflow-emoji.yaml', '--out', tmp_path/'run', f'teacher={tmp_path/"teacher"}', 'data={name: shapes, n: 24, size: 32}',
            'tokenflow={image_size: [32, 32], sides: [1, 2, 4, 8], codebook_size: 32, width: 16, project_width: 16}',
            'tokenflow_training={semantic_width: 16, semantic_depth: 1, discriminator_width: 8, quantize_from: 0.3}', 'training.steps=4', 'training.batch_size=4', 'training.trackers=[]']
    planned = v2flow(*args, '--dry-run')
    assert planned.returncode == 0 and '85 ids of 32 codes' in planned.stdout, planned.stderr
    done = v2flow(*args)
    assert done.returncode == 0 and (tmp_path/'run/model/config.json').is_file(), done.stderr
    log = [json.loads(l) for l in (tmp_path/'run/log.jsonl').read_text().splitlines()]
    assert {'usage_1', 'usage_8', 'perplexity_1', 'psnr_db', 'psnr_db_first_21', 'semantic_loss', 'discriminator_loss'} <= set(log[-1])
    assert v2flow(*args).returncode == 1 and v2flow(*args, '--resume').returncode == 0
    scored = v2flow('evaluate', '--model', tmp_path/'run/model', '--data', 'shapes', '--json')
    assert scored.returncode == 0 and {'psnr_db', 'ssim', 'codebook_usage', 'usage_1', 'parameters'} <= set(json.loads(scored.stdout)), scored.stderr
    wrong = v2flow(*args[:4], tmp_path/'other', f'teacher={tmp_path}', *args[6:])
    assert wrong.returncode == 1 and wrong.stderr.count('\n') == 1, wrong.stderr
