"FlexTok: ids in a sequence, of which every prefix is a whole image. Registers are causal, nested dropout is behind the quantizer"
from dataclasses import replace
import pytest, torch, torch.nn.functional as F
from torch import nn
from benchmarks import comparison
from v2flow_nbdev.base.random import ShardedGenerator
from v2flow_nbdev.models.tokenizer_config import V2FlowConfig
from v2flow_nbdev.models.tokenizer_training import TokenizerTrainingConfig
from v2flow_nbdev.systems.flextok import FlexTok, FlexTokTraining, causal_registers, keep_first, sample_lengths
from v2flow_nbdev.systems.titok import TiTok, TiTokConfig
from v2flow_nbdev.training.config import TrainConfig
from v2flow_nbdev.training.loop import train
from v2flow_nbdev.training.tokenizer_recipes import stack_latents

shape = TiTokConfig(n_tokens=8, resampler_width=16, resampler_depth=2, codebook_size=24, vocab_dim=12, dim=16, depth=1, heads=2,
                    velocity_width=16, velocity_depth=1, n_iter=2, n_steps=2)        # 8×8 pixels, 4×4 latents of 4 numbers
config = TokenizerTrainingConfig(noise=0., code_dropout=0., n_draws=1, aux_decoder_width=16)
latents = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))

def seed(n=0): return torch.Generator().manual_seed(n)

def new(kind=FlexTok, **changes):
    "With a codebook, a flow that does not give 0 everywhere, and registers that differ between images"
    torch.manual_seed(0)
    tok = kind(replace(shape, **changes)).eval()
    tok.quantizer.initialised.fill_(True)
    for p in tok.velocity.parameters(): nn.init.normal_(p, std=0.1)
    for p in tok.resampler.parameters():
        if p.dim() > 1: nn.init.normal_(p, std=0.5)
    return tok

def lesson_of(tok, lengths=None):
    torch.manual_seed(0)
    lesson = FlexTokTraining(tok, config, lengths).train()
    lesson.examples = [dict(latents=z, number=i) for i,z in enumerate(latents)]
    return lesson

# ---- causal registers

def test_who_sees_whom():
    "Latents see latents; register i all latents and the registers up to itself"
    attend = causal_registers(3, 4)
    for q in range(7):
        for j in range(7): assert attend[q, j] == (j < 3 if q < 3 else j <= q), (q, j)

def moved(tok, i):
    "(N,) bool: what changes with register i?"
    r, before = tok.resampler, tok.mixtures(latents)
    r.latent_tokens.data[i] *= -1            # a norm would not see a number added to all of it
    changed = ((tok.mixtures(latents) - before).abs() > 1e-6).any(0).any(-1)
    r.latent_tokens.data[i] *= -1
    return changed

@torch.no_grad()
def test_a_register_changes_itself_and_the_later_ones():
    "And TiTok's, without the mask, all of them: the check can fail"
    for i in range(8):
        assert torch.equal(moved(new(), i), torch.arange(8) >= i), i
        assert moved(new(TiTok), i).all(), i

def test_an_id_is_the_same_whether_more_follow_or_not():
    "The first k registers alone give the first k ids"
    tok = new()
    ids, all_of_them = tok.encode(latents=latents), tok.resampler.latent_tokens
    assert ids.shape == (6, 8) and (ids != ids[:1])[1:].any(1).all()
    for k in range(1, 8):
        tok.resampler.latent_tokens = nn.Parameter(all_of_them[:k].detach())
        assert torch.equal(tok.encode(latents=latents), ids[:, :k])

def test_each_register_sees_the_whole_image():
    tok, z = new().train(), latents[:2].clone().requires_grad_()
    for j in range(8):
        grad, = torch.autograd.grad(tok.mixtures(z)[:, j].square().sum(), z)
        assert (grad.abs().sum(1) > 0).all()

# ---- every prefix decodes

def test_every_prefix_gives_a_whole_image_and_each_id_counts():
    tok = new()
    ids = tok.encode(latents=latents)
    backs = [tok.decode_latents(ids[:, :k], generator=seed()) for k in range(1, 9)]
    assert all(b.shape == latents.shape and b.isfinite().all() for b in backs)
    assert all(((a - b).abs().sum(1) > 0).all() for a, b in zip(backs, backs[1:]))           # everywhere in the image
    images = tok.decode(ids[:, :3], generator=seed())
    assert images.shape == (6, 1, 8, 8) and torch.equal(images, tok.decode(ids[:, :3], grid=(1, 3), generator=seed()))

def test_a_prefix_ignores_the_ids_that_follow():
    "What the decoder says of a prefix is what it said in training, whatever the dropped codes were"
    tok = new()
    codes, z, order = torch.randn(6, 8, 12, generator=seed()), latents.flatten(2).mT, torch.rand(6, 16, generator=seed()).argsort(-1)
    def says(codes): return tok.masked(codes, z, order[:, :4], order[:, 4:], (4, 4))
    for k in range(1, 9):
        kept, other = torch.full((6,), k), codes.clone()
        other[:, k:] = torch.randn(6, 8 - k, 12, generator=seed(k))
        assert torch.equal(says(keep_first(codes, kept)), says(keep_first(other, kept)))
        assert torch.equal(says(codes[:, :k]), says(keep_first(other, kept)))
        assert k == 8 or not torch.equal(says(other), says(codes))

def test_a_missing_code_is_one_learned_vector():
    "The bias of the layer that reads codes: it gets a gradient from what is missing alone"
    tok = new()
    z, order = latents.flatten(2).mT, torch.arange(16).expand(6, -1)
    def says(k): return tok.masked(torch.randn(6, k, 12, generator=seed()), z, order[:, :0], order, (4, 4))
    before = says(1)
    with torch.no_grad(): tok.masked.code_in.bias *= -1
    assert (says(1) - before).abs().max() > 1e-3
    tok.masked.zero_grad()
    tok.masked(torch.zeros(6, 1, 12), z, order[:, :0], order, (4, 4)).square().sum().backward()
    assert tok.masked.code_in.bias.grad.abs().sum() > 0 and not tok.masked.code_in.weight.grad.any()

# ---- nested dropout

def test_k_is_uniform_and_shared_by_processes():
    counts = sample_lengths(8000, list(range(1, 9)), seed()).bincount(minlength=9)
    assert counts[0] == 0 and all(abs(n - 1000) < 5*(1000*7/8)**0.5 for n in counts[1:].tolist())
    assert lesson_of(new()).lengths == list(range(1, 9))
    powers = sample_lengths(4000, [1, 2, 4, 8], seed())
    assert set(powers.tolist()) == {1, 2, 4, 8}
    parts = [sample_lengths(2000, [1, 2, 4, 8], ShardedGenerator(seed(), i, 2)) for i in range(2)]
    assert torch.equal(powers, torch.cat(parts))

def test_ids_and_commitment_do_not_depend_on_what_is_dropped_behind_them():
    lesson, found = lesson_of(new()), []
    lesson.before_step(0.2)
    for lengths in ([1], [8], list(range(1, 9))):
        lesson.lengths = lengths
        found.append(lesson(latents=latents, generator=seed()))
        lesson.tok.quantizer.collected.clear()
    assert all(torch.equal(o.ids, found[0].ids) and o.commitment_loss == found[0].commitment_loss > 0 for o in found)
    assert len({o.flow_loss.item() for o in found}) == len({o.aux_loss.item() for o in found}) == 3      # but the decoders do

def test_dropped_codes_get_no_gradient_and_kept_ones_do():
    "Image by image, in both losses"
    lesson, kept, z = lesson_of(new()), torch.tensor([1, 2, 4, 8, 7, 3]), latents.flatten(2).mT
    for loss in (lambda c: lesson.decoder_loss(c, z, (4, 4), 12, seed()), lambda c: F.mse_loss(lesson.aux_decoder(c, (4, 4)), z)):
        codes = torch.randn(6, 8, 12, generator=seed(), requires_grad=True)
        loss(keep_first(codes, kept)).backward()
        assert torch.equal(codes.grad.abs().sum(-1) > 0, torch.arange(8) < kept[:, None])

def test_both_decoders_get_the_same_prefix(monkeypatch):
    lesson, seen = lesson_of(new()), []
    lesson.before_step(0.2)
    monkeypatch.setattr(lesson.aux_decoder, 'forward', lambda codes, grid: seen.append(codes) or latents.flatten(2).mT)
    monkeypatch.setattr(lesson, 'decoder_loss', lambda codes, *rest: seen.append(codes) or codes.sum())
    lesson(latents=latents, generator=seed())
    assert torch.equal(*seen) and len({n.item() for n in seen[0].any(-1).sum(1)}) > 1                # another k in each image
    lesson.eval()(latents=latents, generator=seed())
    assert seen[-1].any(-1).all()                                                                    # nothing is dropped in a test

def test_the_null_condition_is_no_code_at_all():
    tok = new()
    order, z, drop = torch.arange(16).expand(6, -1), latents.flatten(2).mT, torch.ones(6, dtype=torch.bool)
    a, b = (tok.masked(torch.randn(6, 8, 12, generator=seed(i)), z, order[:, :4], order[:, 4:], (4, 4), drop) for i in (0, 1))
    assert torch.equal(a, b)

# ---- from the parts of the others

def test_parameters_are_those_of_titok():
    own, theirs = ({n: p.shape for n,p in new(kind).named_parameters()} for kind in (FlexTok, TiTok))
    assert own == theirs

def test_it_goes_through_the_common_loop(tmp_path):
    "Codes are found, learn and are frozen; every parameter that encodes or decodes has moved"
    data = [dict(latents=z, number=i) for i,z in enumerate(torch.randn(40, 4, 4, 4, generator=seed()))]
    torch.manual_seed(0)
    lesson = FlexTokTraining(FlexTok(shape), config)
    lesson.examples = data
    before = {n: p.clone() for n,p in lesson.tok.named_parameters()}
    plan = TrainConfig(steps=12, batch_size=4, lr=1e-3, evaluate_every=0, checkpoint_every=0, trackers=())
    tok = train(lesson, data, plan, stack_latents, out=tmp_path, progress=False).tok
    still = {n for n,p in tok.named_parameters() if torch.equal(p, before[n])}
    assert still <= {'masked.null_code'} and tok.quantizer.ready and tok.encode(latents=latents).shape == (6, 8)

def test_a_folder_gives_the_same_ids_and_images(tmp_path):
    "Also in half precision, where what ids depend on is not rounded"
    tok = new()
    ids = tok.encode(latents=latents)
    tok.save_pretrained(tmp_path, torch.float16)
    back = FlexTok.from_pretrained(tmp_path)
    assert isinstance(back.config, TiTokConfig) and torch.equal(back.encode(latents=latents), ids)
    torch.testing.assert_close(back.decode_latents(ids[:, :5], generator=seed()), tok.decode_latents(ids[:, :5], generator=seed()),
                               atol=1e-2, rtol=1e-2)
    card = (tmp_path/'README.md').read_text()
    assert '8 ids of 24 codes' in card and '2502.13967' in card and 'Any first ids' in card
    assert 'from v2flow_nbdev.systems.flextok import FlexTok' in card
    assert torch.equal(tok.bfloat16().encode(latents=latents), ids)

def test_the_judges_of_the_comparison_can_call_it():
    "With a config that has `pool`, as all its cells get"
    tok = FlexTok(V2FlowConfig(image_size=(32, 32), pool=4, vocab_dim=12))
    assert tok.config.grid == (1, 16) and tok.config.latent_grid == (16, 16)
    tok = new()
    z = comparison.restored('flextok', tok, None, latents, 0.25)
    torch.testing.assert_close(z, tok.decode_latents(tok.encode(latents=latents), temperature=0.25, generator=seed()))

def test_a_step_is_counted_without_being_computed():
    "As `step_flops` does, on the meta device"
    from torch.utils.flop_counter import FlopCounterMode
    with torch.device('meta'):
        lesson, z, ids, flops = FlexTokTraining(FlexTok(shape), config).train(), torch.empty(8, 4, 4, 4), torch.zeros(8, 8).long(), []
    for ready, progress in ((False, 0.), (True, 0.1), (True, 0.4)):
        lesson.tok.quantizer.initialised = torch.tensor(ready)
        lesson.before_step(progress)
        with FlopCounterMode(display=False) as counter:
            lesson.losses(z, 1., 0., 0, 12, ShardedGenerator(), ids if lesson.frozen else None)[0].backward()
        flops.append(counter.get_total_flops())
    assert min(flops) > 0 and flops[2] < flops[1]

def test_what_cannot_be_is_said_in_one_line():
    tok = new()
    ids = tok.encode(latents=latents)
    for wrong, why in ((ids[:, :0], '0 ids for each image: need 1 to 8'), (torch.cat([ids, ids], 1), '16 ids for each image: need 1 to 8'),
                       (ids.float(), 'must be integers'), (ids + 24, 'the codebook has 0 to 23'), ([1], 'need a tensor')):
        with pytest.raises(ValueError, match=why): tok.decode_latents(wrong)
    with pytest.raises(ValueError, match='the ids are a sequence, 1×8'): tok.decode_latents(ids, grid=(2, 4))
    with pytest.raises(ValueError, match='4×8'): tok.encode(latents=torch.randn(1, 4, 4, 8))
    for lengths in ([0, 1], [4, 9], [1.5]):
        with pytest.raises(ValueError, match='whole numbers from 1 to 8'): FlexTokTraining(tok, config, lengths)
