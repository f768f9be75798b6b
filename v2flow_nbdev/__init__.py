"""V²Flow (arXiv 2503.07493): an image tokenizer whose tokens live in a language model's embedding space.

The names below are what most programs need; each is imported with its module when it is first used."""
__version__ = "0.2.0"

_modules = {
    'V2Flow': 'models.tokenizer', 'V2FlowConfig': 'models.tokenizer_config',
    'TokenizerTraining': 'models.tokenizer_training',
    'AutoencoderLatents': 'models.latents', 'Vocabulary': 'models.vocabulary',
    'VocabularyResampler': 'models.resampler', 'VectorQuantizer': 'models.quantizer',
    'VisualTokens': 'language.visual_tokens',
    'add_visual_tokens': 'language.visual_tokens', 'V2FlowPipeline': 'language.pipeline',
    'image_folder': 'data.folders', 'hub': 'data.hub', 'to_tensor': 'base.images', 'to_pil': 'base.images',
    'TrainConfig': 'training.config', 'train': 'training.loop'}
__all__ = ['__version__', *_modules]


def __getattr__(name):
    if name not in _modules: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    value = globals()[name] = getattr(import_module(f'{__name__}.{_modules[name]}'), name)
    return value


def __dir__(): return sorted({*globals(), *__all__})
