"""Codes that are a frozen table times one trained map: the map alone is trained, all codes move at once, and what is shipped is an ordinary codebook"""
import json
import pytest, torch, torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from v2flow_nbdev.models.quantizer import VectorQuantizer
from v2flow_nbdev.models.tokenizer_config import V2FlowConfig
from v2flow_nbdev.models.tokenizer_training import TokenizerTrainingConfig
from v2flow_nbdev.models.vocabulary import Vocabulary
from v2flow_nbdev.systems.plainvq import ComparedTraining, PlainVQ, RegressionTraining, regression_decoding
from v2flow_nbdev.systems.projected import Projected, ProjectedQuantizer, SimVQ, frozen_table
from v2flow_nbdev.training.config import TrainConfig
from v2flow_nbdev.training.loop import train
from v2flow_nbdev.training.tokenizer_recipes import Numbered, stack_latents

words = Vocabulary([f't{i}' for i in range(60)], torch.randn(60, 20, generator=torch.Generator().manual_seed(1)) + 3)
shape = V2FlowConfig(resampler_width=16, resampler_depth=1, codebook_size=48, vocab_dim=12, dim=32, depth=1, heads=2, velocity_width=32,
                     velocity_depth=1, **regression_decoding)
latents = torch.randn(24, 4, 4, 4, generator=torch.Generator().manual_seed(2))

def lesson_of(kind=Projected, lesson=RegressionTraining, vocabulary=words, **kwargs):
    torch.manual_seed(0)
    tok = kind(shape, vocabulary, **kwargs)
    for p in tok.velocity.parameters(): nn.init.normal_(p, std=0.1)      # a new one gives 0 everywhere
    made = lesson(tok, TokenizerTrainingConfig(noise=0., code_dropout=0., aux_decoder_width=16)).train()
    made.examples = Numbered([dict(latents=z) for z in latents])
    return made

def step(lesson, progress=0.1, lr=0.1):
    "One step of SGD as the loop takes it"
    lesson.before_step(progress)
    lesson.zero_grad()
    out = lesson(latents=latents)
    out.loss.backward()
    with torch.no_grad():
        for p in lesson.parameters():
            if p.grad is not None: p -= lr*p.grad
    lesson.after_step(torch.tensor(True))
    return out

def quantizer(rows=48, width=20, dim=12, seed=0):
    torch.manual_seed(seed)
    return ProjectedQuantizer(torch.randn(rows, width), dim).train()

# ---- the table

def test_the_farthest_tokens_have_the_largest_mean_squared_distance_to_all():
    e = words.embeddings
    mean = torch.cdist(e, e).square().mean(1)
    for rows, order in (('farthest', mean.argsort(descending=True)), ('nearest', mean.argsort())):
        want = words.centred[order[:10]]/words.code_scale
        torch.testing.assert_close(frozen_table(words, 10, 0, rows), want)

def test_tables_are_the_same_each_time_and_of_norm_1_on_average():
    for vocabulary, rows in ((words, 'farthest'), (words, 'nearest'), (words, 'sample'), (words, 'matched'), (words, 'random'),
                             (None, 'farthest')):
        torch.manual_seed(0); one = frozen_table(vocabulary, 60, 20, rows)
        torch.manual_seed(1); two = frozen_table(vocabulary, 60, 20, rows)
        assert torch.equal(one, two) and one.shape == (60, 20) and not one.requires_grad
        assert one.norm(dim=1).mean().item() == pytest.approx(1, abs=0.08)
    assert torch.equal(frozen_table(words, 60, 20, 'random'), frozen_table(None, 60, 20))
    with pytest.raises(ValueError, match="rows='near': use one of farthest, nearest, sample, matched, random"): frozen_table(words, 60, 20, 'near')

def test_matched_rows_have_the_covariance_of_the_tokens_and_are_none_of_them():
    table, x = frozen_table(words, 20_000, 0, 'matched'), words.centred/words.code_scale
    torch.testing.assert_close(table.T @ table/len(table), x.T @ x/len(x), atol=5e-3, rtol=0)
    assert torch.cdist(table[:100], x).min() > 0.1

def test_a_vocabulary_smaller_than_the_codebook_is_filled_by_distinct_points_between_two_of_its_tokens():
    table, e = frozen_table(words, 200, 0), words.centred/words.code_scale
    assert table.shape == (200, 20) and len(table.unique(dim=0)) == 200
    assert {tuple(r) for r in e.tolist()} == {tuple(r) for r in table[:60].tolist()}
    far = torch.cdist(e, table[100:101]).flatten()                   # on a segment: its two distances add up to the segment
    assert ((far[:, None] + far - torch.cdist(e, e)).abs() < 1e-4).any() and far.min() > 1e-3

# ---- what is trained

def test_a_step_moves_the_map_and_not_the_table():
    lesson = lesson_of()
    q = lesson.tok.quantizer
    table, weight, codes = q.table.clone(), q.map.weight.detach().clone(), q.codebook.clone()
    assert [n for n,_ in q.named_parameters()] == ['map.weight', 'map.bias']
    step(lesson)
    assert torch.equal(q.table, table) and q.table.grad is None
    assert not torch.equal(q.map.weight, weight) and ((q.codebook - codes).norm(dim=1) > 0).all()      # every code, used or not
    torch.testing.assert_close(q.codebook, F.normalize(table @ q.map.weight.T + q.map.bias, dim=-1))

def test_the_decoder_teaches_the_encoder_straight_through_and_the_map_only_by_the_codebook_loss():
    lesson = lesson_of()
    lesson.before_step(0.1)
    out = lesson(latents=latents)
    given = [lesson.tok.quantizer.map.weight, lesson.tok.resampler.readout.weight]
    through = torch.autograd.grad(out.flow_loss + out.aux_loss, given, retain_graph=True, allow_unused=True)
    assert through[0] is None and through[1].abs().sum() > 0
    own = torch.autograd.grad(out.commitment_loss, given)
    assert own[0].abs().sum() > 0 and own[1].abs().sum() > 0

def test_losses_by_hand():
    "1 for the codebook, 0.25 for the commitment, of squared distances of unit vectors"
    q, x = quantizer(), torch.randn(2, 5, 12, requires_grad=True)
    out, ids, loss = q(x)
    codes = F.normalize(q.map(q.table), dim=-1)[ids]
    distance = (F.normalize(x, dim=-1) - codes).square().sum(-1).mean()
    torch.testing.assert_close(loss, 1.25*distance)
    torch.testing.assert_close(out, codes)
    def grads(y): return torch.autograd.grad(y, [x, q.map.weight], retain_graph=True)
    (gx, gw), (hx, hw) = grads(loss), grads(distance)
    torch.testing.assert_close(gx, 0.25*hx); torch.testing.assert_close(gw, hw)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], torch.autograd.grad(F.normalize(x, dim=-1).sum(), x)[0])

def test_one_chosen_code_moves_all_where_free_codes_stay():
    "After a step of the map, code j is moved by (⟨t_j, t_i⟩ + 1) times the gradient of the chosen code i, before it is normalised"
    q = quantizer()
    codes = q.map(q.table)
    codes.retain_grad()
    (codes[7] - torch.ones(12)).square().sum().backward()
    assert (codes.grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [7]      # free codes: one of them moves
    with torch.no_grad():
        for p in q.map.parameters(): p -= 0.01*p.grad
    moved = q.map(q.table) - codes
    torch.testing.assert_close(moved, -0.01*(q.table @ q.table[7] + 1)[:, None]*codes.grad[7], atol=1e-5, rtol=1e-3)
    assert (moved.abs().sum(1) > 0).all()

def test_frozen_codes_stay_what_they_are():
    lesson = lesson_of()
    for progress in (0.1, 0.39): step(lesson, progress)
    q, before = lesson.tok.quantizer, {n: t.clone() for n,t in lesson.tok.quantizer.state_dict().items()}
    ids = lesson.tok.encode(latents=latents)
    for progress in (0.4, 0.9): out = step(lesson, progress)
    assert lesson.frozen and out.commitment_loss == 0 and torch.equal(lesson.tok.encode(latents=latents), ids)
    for n, t in q.state_dict().items(): assert torch.equal(t, before[n]), n

# ---- the same thing, said otherwise

def test_permuting_the_table_permutes_the_ids():
    q, x, order = quantizer(), torch.randn(2, 9, 12), torch.randperm(48)
    out, ids, loss = q(x)
    q.table.copy_(q.table[order].clone()); q.write()
    other, new_ids, new_loss = q(x)
    assert torch.equal(order[new_ids], ids) and torch.equal(q.ids(x), new_ids)
    torch.testing.assert_close(other, out); torch.testing.assert_close(new_loss, loss)

def test_the_identity_as_map_is_plain_quantization():
    plain = VectorQuantizer(48, 12, initialised=True)
    q = ProjectedQuantizer(plain.codebook.clone(), 12)
    with torch.no_grad(): q.map.weight.copy_(torch.eye(12)); q.map.bias.zero_()
    q.write()
    x = torch.randn(2, 9, 12)
    for a, b in zip(q.train()(x)[:2], plain.train()(x)[:2]): torch.testing.assert_close(a, b)

def test_both_published_forms_are_one_class_with_another_table():
    one, two = lesson_of(Projected).tok, lesson_of(SimVQ).tok
    assert one.quantizer.table.shape == (48, 20) and two.quantizer.table.shape == (48, 12)
    assert torch.equal(two.quantizer.table, lesson_of(Projected, vocabulary=None).tok.quantizer.table)
    assert torch.equal(lesson_of(Projected, rows='nearest').tok.quantizer.table, frozen_table(words, 48, 0, 'nearest'))
    assert 'TA-Tok' in one.describe()['what'] and 'SimVQ' in two.describe()['what']
    out, other = (step(lesson_of(kind)) for kind in (Projected, SimVQ))
    assert out.ids.shape == other.ids.shape == (24, 16)

# ---- what is shipped

@pytest.mark.parametrize('dtype', [None, torch.float16])
def test_a_folder_is_that_of_an_ordinary_codebook_and_needs_no_vocabulary(tmp_path, dtype):
    lesson = lesson_of()
    out = step(lesson, lr=0.)                                        # the ids of a step are those of its codes
    tok = lesson.tok.eval()
    assert torch.equal(tok.encode(latents=latents), out.ids)
    tok.save_pretrained(tmp_path, dtype)
    assert not list(tmp_path.glob('vocabulary.*')) and json.loads((tmp_path/'config.json').read_text())['vocab_size'] == 0
    with safe_open(tmp_path/'model.safetensors', 'pt') as f: assert not [n for n in f.keys() if 'map' in n or 'table' in n]
    assert 'from v2flow_nbdev.systems.projected import Projected' in (tmp_path/'README.md').read_text()
    back = Projected.from_pretrained(tmp_path)
    assert type(back) is PlainVQ and torch.equal(back.encode(latents=latents), out.ids)
    assert torch.equal(back.quantizer.codebook, tok.quantizer.codebook) and back.codebook_checksum == tok.codebook_checksum
    if dtype is None: torch.testing.assert_close(back.decode_latents(out.ids), tok.decode_latents(out.ids))
    assert torch.equal(tok.to_plain().encode(latents=latents), out.ids)

@pytest.mark.parametrize('lesson', [RegressionTraining, ComparedTraining])
def test_it_is_trained_and_called_as_the_others_are(lesson):
    "The whole loop of the comparison; the EMA of the parameters does not part the map from the codes that are shipped"
    made = lesson_of(SimVQ, lesson)
    config = TrainConfig(steps=10, batch_size=6, evaluate_every=0, checkpoint_every=0, trackers=())
    tok = train(made, made.examples, config, stack_latents, progress=False).tok
    assert torch.equal(tok.quantizer.codebook, made.tok.quantizer.codebook)
    torch.testing.assert_close(tok.quantizer.codebook, made.tok.quantizer.codes())
    ids = tok.encode(latents=latents)
    z = tok.decode_latents(ids, temperature=0.25, generator=torch.Generator().manual_seed(0))
    assert ids.shape == (24, 16) and z.shape == latents.shape and torch.equal(ids, tok.encode(latents=latents))

def test_its_cost_can_be_counted_without_computing():
    "As `benchmarks.comparison` does: on `meta`, without a vocabulary; the map is part of a step until the codes are frozen"
    from torch.utils.flop_counter import FlopCounterMode
    flops = []
    for kind in (PlainVQ, Projected):
        with torch.device('meta'):
            lesson = RegressionTraining(kind(shape), TokenizerTrainingConfig(noise=0., aux_decoder_width=16)).train()
            z = torch.empty(24, 4, 4, 4)
        lesson.tok.quantizer.initialised = torch.tensor(True)
        with FlopCounterMode(display=False) as counter: lesson.losses(z, 1., 0., 0, 10, None)[0].backward()
        flops.append(counter.get_total_flops())
    assert flops[1] - flops[0] == 2*2*48*12*12                       # forward, and the gradient of the map
