"The three shipped models give what they gave: see golden.py"
import pytest, torch
import golden

@pytest.fixture(scope='module', params=list(golden.decoded))
def shipped_model(request): return request.param, golden.load(request.param), *golden.read(request.param)

def test_held_out_images_have_the_same_ids(shipped_model):
    name, pipe, kept, _ = shipped_model
    assert torch.equal(golden.ids_of(pipe, name), kept['ids'])

def test_ids_give_the_same_pixels(shipped_model):
    name, pipe, kept, _ = shipped_model
    assert (golden.pixels_of(pipe, name, kept['ids']) - kept['pixels']).abs().max() <= 1e-5

def test_captions_give_the_same_visual_tokens(shipped_model):
    name, pipe, kept, said = shipped_model
    assert golden.prompts(name) == said['prompts']
    assert torch.equal(golden.tokens_of(pipe, name, False), kept['greedy'])
    assert torch.equal(golden.tokens_of(pipe, name, True), kept['sampled'])

def test_ids_give_the_same_captions(shipped_model):
    name, pipe, kept, said = shipped_model
    assert golden.captions_of(pipe, kept['ids']) == said['captions']
