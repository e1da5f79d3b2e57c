# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's TimeSformer on our kernels: the forwards of its layers and of the models around them are replaced.

A layer keeps its modules, parameters and names; the work is done by our own block around the very same modules. What a
fused kernel cannot give runs on the layer's own forward, call by call: attention probabilities, dropout of
probabilities or hidden states in training, an activation other than the exact GELU, and layers whose inner modules are
watched by hooks or moved between devices while they run.

The stack of layers runs as our own model does: the last sum of one and the first LayerNorm of the next are one pass,
and for a classifier, which reads nothing but the class row, the last layer projects and passes through its MLP that row
alone. What somebody watches, wraps, checkpoints or asks hidden states of is called as usual, layer by layer.

Two ways, as in Liger-Kernel: without a model the class is patched, for models built before and after; with one, its
parts become instances of subclasses. Subclasses, since from transformers 5 on a layer's class wraps its own
forward for gradient checkpointing, and a forward bound to the instance would silently step around that.
"""

from __future__ import annotations

import copy
from inspect import signature
from types import SimpleNamespace

import torch
from torch import nn

from timesformer_kernels.registry import get as get_backend

from ..layers import DropPath, hooked_everywhere, watched
from ..model import DividedBlock, JointBlock
from ..stream import Stream

_BLOCK = "_timesformer_block"  # of a layer: our block around its modules, outside of the module tree
_OPTIONS = "_timesformer_options"


class _SameDraws(DropPath):
    """Draws what Hugging Face's layer would: the same factors from the same state of the generator."""

    def draw(self, *shape, like):
        keep = 1.0 - self.rate
        return (like.new_empty(shape).uniform_() + keep).floor_().div_(keep)


# --- our block around the modules of a layer -------------------------------------------------------------------------


def _pairs(layer):
    """(our name, module of the layer) of everything the two share."""
    space = layer.attention
    pairs = [
        ("norm1", layer.layernorm_before),
        ("attn.qkv", space.attention.qkv),
        ("attn.proj", space.output.dense),
        ("norm2", layer.layernorm_after),
        ("mlp.fc1", layer.intermediate.dense),
        ("mlp.fc2", layer.output.dense),
    ]
    if layer.attention_type == "divided_space_time":
        time = layer.temporal_attention
        pairs += [
            ("temporal_norm1", layer.temporal_layernorm),
            ("temporal_attn.qkv", time.attention.qkv),
            ("temporal_attn.proj", time.output.dense),
            ("temporal_fc", layer.temporal_dense),
        ]
    return pairs


def _build(layer, backend: str):
    config = layer.config
    kind = DividedBlock if layer.attention_type == "divided_space_time" else JointBlock
    options = dict(qkv_bias=config.qkv_bias, qk_scale=layer.attention.attention.scale, backend=backend)
    heads = layer.attention.attention.num_heads
    with torch.device("meta"):  # its own parameters are replaced at once
        block = kind(config.hidden_size, 1, 0.0, config.layer_norm_eps, num_heads=heads, **options)
    for name, module in _pairs(layer):
        block.set_submodule(name, module)
    block.drop_path = _SameDraws(getattr(layer.drop_path, "drop_prob", 0.0))
    block.train(layer.training)
    block.__dict__["shared"] = [module for _, module in _pairs(layer)]
    block.__dict__["watched"] = [module for module in layer.modules() if module is not layer]
    return block


def _block_of(layer):
    """The layer's block, made anew where somebody has put other modules (adapters, quantised ones) into the layer."""
    block, backend = layer.__dict__.get(_BLOCK), _options(layer).backend
    stale = block is None or block.backend != backend
    if stale or any(ours is not theirs for ours, (_, theirs) in zip(block.shared, _pairs(layer), strict=True)):
        block = layer.__dict__[_BLOCK] = _build(layer, backend)
    return block


def _servable(layer, block) -> bool:
    """False where a call has to take the layer's own forward."""
    config = layer.config
    if layer.training and (config.attention_probs_dropout_prob > 0 or config.hidden_dropout_prob > 0):
        return False
    if config.hidden_act != "gelu":
        return False
    return not any(watched(m) or "_hf_hook" in m.__dict__ for m in block.watched)


# --- what replaces the library's methods -----------------------------------------------------------------------------


def _layer_forward(self, hidden_states, output_attentions=False, frames=None):
    """frames: of the clip, where it is known and differs from the config's, which the library takes for granted."""
    block = None if output_attentions else _block_of(self)
    if block is None or not _servable(self, block):
        layer = self if frames is None else _with_frames(self, frames)
        return _known.layer_forward(layer, hidden_states, output_attentions)
    return (block(hidden_states, _frames_of(self, frames)),)


def _frames_of(layer, told: int | None) -> int:
    """Joint and space-only layers attend to every token they are given: one frame of all of them."""
    return (told or layer.config.num_frames) if layer.attention_type == "divided_space_time" else 1


def _with_frames(layer, frames: int):
    """The same layer by another config, for the library's own forward."""
    twin = copy.copy(layer)
    twin.config = copy.copy(layer.config)
    twin.config.num_frames = frames
    return twin


def _layer_train(self, mode=True):
    nn.Module.train(self, mode)
    if block := self.__dict__.get(_BLOCK):
        block.train(mode)
    return self


def _model_forward(
    self,
    pixel_values,
    output_attentions=None,
    output_hidden_states=None,
    return_dict=None,
    class_row_only=False,
    **kwargs,
):
    """TimesformerModel.forward through our stack of layers, or the library's where it has to be.

    class_row_only: last_hidden_state may be the class row alone, [B, 1, D]; asked for by our classifier.
    """
    frames, config = pixel_values.shape[1], self.config
    default = (config.output_attentions, config.output_hidden_states, getattr(config, "return_dict", True))
    wanted = (output_attentions, output_hidden_states, return_dict)
    output_attentions, output_hidden_states, return_dict = (
        own if asked is None else asked for asked, own in zip(wanted, default, strict=True)
    )
    divided = config.attention_type == "divided_space_time"
    usual = not divided or frames == config.num_frames
    told = frames if _options(self).fix_num_frames and not usual else None
    merged = (usual or told) and not (output_attentions or output_hidden_states)
    merged = merged and _ordinary(self.encoder, _known.encoder_forward)
    if not (told or merged):
        return _known.model_forward(self, pixel_values, *wanted, **kwargs)
    x, states, attentions = self.embeddings(pixel_values), [], []
    if merged:
        x = _through_layers(self.encoder.layer, x, told, class_row_only)
    else:
        for layer in self.encoder.layer:
            states.append(x)
            x, *probabilities = layer(x, output_attentions, told)
            attentions += probabilities
    states.append(x)
    x = x if self.layernorm is None else self.layernorm(x)
    extra = (tuple(states) if output_hidden_states else None, tuple(attentions) if output_attentions else None)
    if not return_dict:
        return (x, *(value for value in extra if value is not None))
    return _known.output(last_hidden_state=x, hidden_states=extra[0], attentions=extra[1])


def _ordinary(module, forward) -> bool:
    """True where calling the module runs that forward, its class's, and nobody looks on."""
    own = type(module).forward is forward and "forward" not in module.__dict__
    return own and not watched(module) and not hooked_everywhere()


def _through_layers(layers, x, told: int | None, class_row_only: bool):
    """x [B, S, D] -> the sum after the last layer, or its class row alone [B, 1, D].

    told: frames of the clip, where they are not the config's.
    """
    stream, last = Stream(x), len(layers) - 1
    for i, layer in enumerate(layers):
        checkpointed = layer.training and getattr(layer, "gradient_checkpointing", False)
        ordinary = not checkpointed and _ordinary(layer, _known.patched_layer.forward)
        block = _block_of(layer) if ordinary else None
        if block is not None and _servable(layer, block):
            block.run(stream, _frames_of(layer, told), class_row_only and i == last)
        else:
            stream = Stream(layer(stream.sum(), False, *([] if told is None else [told]))[0])
    return stream.sum()


class _ReadsClassRow:
    """Stands for a classifier in the library's own forward: its model is asked for the class row alone."""

    def __init__(self, classifier):
        self.config, self.num_labels, self.classifier = classifier.config, classifier.num_labels, classifier.classifier
        self.whole = classifier

    def timesformer(self, *args, **options):
        return self.whole.timesformer(*args, class_row_only=True, **options)

    def __getattr__(self, name):
        return getattr(self.whole, name)


def _classifier_forward(
    self, pixel_values=None, labels=None, output_attentions=None, output_hidden_states=None, return_dict=None, **kwargs
):
    """TimesformerForVideoClassification.forward, whose model may give the class row alone where nobody sees it."""
    model = self.timesformer
    unseen = _ordinary(model, _known.patched_model.forward)
    unseen = unseen and (model.layernorm is None or _ordinary(model.layernorm, nn.LayerNorm.forward))
    stands_in = _ReadsClassRow(self) if unseen else self
    options = (output_attentions, output_hidden_states, return_dict)
    return _known.classifier_forward(stands_in, pixel_values, labels, *options, **kwargs)


# --- the library -----------------------------------------------------------------------------------------------------


class _Library:
    """The library's classes with the methods they came with, and the subclasses of what is patched."""

    def __init__(self):
        try:
            from transformers.modeling_outputs import BaseModelOutput
            from transformers.models.timesformer import modeling_timesformer as library
        except ImportError as error:
            raise ImportError(f"transformers with TimeSformer is needed: pip install transformers ({error})") from error
        self.layer, self.model, self.output = library.TimesformerLayer, library.TimesformerModel, BaseModelOutput
        self.classifier = library.TimesformerForVideoClassification
        self.layer_forward, self.model_forward = self.layer.forward, self.model.forward
        self.encoder_forward, self.classifier_forward = library.TimesformerEncoder.forward, self.classifier.forward
        # Trainer reads from the signature what it may pass.
        _model_forward.__signature__ = signature(self.model_forward)
        _classifier_forward.__signature__ = signature(self.classifier_forward)
        # Subclassing lets the library wrap our forward as it wraps its own.
        self.patched_layer = _subclass(self.layer, "PatchedLayer", forward=_layer_forward, train=_layer_train)
        self.patched_model = _subclass(self.model, "PatchedModel", forward=_model_forward)
        self.patched_classifier = _subclass(self.classifier, "PatchedClassifier", forward=_classifier_forward)
        originals = (self.layer, self.model, self.classifier)
        self.patched = dict(
            zip(originals, (self.patched_layer, self.patched_model, self.patched_classifier), strict=True)
        )


def _subclass(base, name: str, **methods):
    """A subclass by the name of its base, which is what `_no_split_modules` looks for; pickled by its own."""
    return type(base.__name__, (base,), {**methods, "__module__": __name__, "__qualname__": name})


_known: _Library | None = None  # the forwards read it: a cached function would be traced again by the compiler


def _library() -> _Library:
    global _known
    _known = _known or _Library()
    return _known


def __getattr__(name):
    """The classes by which a pickled model finds what its parts are."""
    if name in ("PatchedLayer", "PatchedModel", "PatchedClassifier"):
        return getattr(_library(), "patched_" + name.removeprefix("Patched").lower())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_everywhere = SimpleNamespace(backend="auto", fix_num_frames=False)  # options of the patched classes


def _options(module) -> SimpleNamespace:
    return module.__dict__.get(_OPTIONS, _everywhere)


# --- public ----------------------------------------------------------------------------------------------------------


def accelerate_transformers(
    model: nn.Module | None = None, *, backend: str = "auto", fix_num_frames: bool = False
) -> nn.Module | None:
    """Run Hugging Face's TimeSformer on our kernels: same parameters, outputs and gradients. Returns `model`.

    model: a `Timesformer*` model, or any module around one (PEFT, Trainer, DDP are applied afterwards); it alone is
        patched. None patches the classes: models built before and after.
    backend: "auto" or a name of `timesformer_kernels.available_backends()`, which then runs or raises.
    fix_num_frames: take the number of frames from the clip. The library takes it from the config and gives clips of
        another length a silently wrong result (transformers#38027); with True these become right, and change.

    Calling it again changes the options; `restore` undoes it. A call with output_attentions=True, one in training with
    dropout, or with hooks inside a layer, takes the library's own forward. Raises ImportError without transformers,
    ValueError for a model without TimeSformer layers or an unknown backend, RuntimeError for one already sharded.
    """
    if backend != "auto":
        get_backend(backend)
    library = _library()
    options = SimpleNamespace(backend=backend, fix_num_frames=bool(fix_num_frames))
    if model is None:
        _everywhere.__dict__.update(options.__dict__)
        library.layer.forward, library.layer.train = library.patched_layer.forward, _layer_train
        library.model.forward = library.patched_model.forward
        library.classifier.forward = library.patched_classifier.forward
        return None
    parts = _parts(model)
    if not any(isinstance(part, library.layer) for part in parts):
        raise ValueError(f"model: got {type(model).__name__}, expected one with Hugging Face's TimesformerLayer in it")
    for part in parts:
        own = isinstance(part, library.classifier)  # a subclass of the user's keeps its forward, and works
        if not own and type(part) not in (*library.patched, *library.patched.values()):
            raise RuntimeError(f"model: has a {type(part).__name__}; accelerate the model before it is sharded")
    for part in parts:
        part.__class__ = library.patched.get(type(part), type(part))
        part.__dict__[_OPTIONS] = options
        if isinstance(part, library.layer):  # ahead of the first call, which a compiler may trace
            part.__dict__[_BLOCK] = _build(part, backend)
    return model


def restore(model: nn.Module | None = None) -> nn.Module | None:
    """Undo `accelerate_transformers`, of a model or of the classes. Returns `model`."""
    library = _library()
    if model is None:
        library.layer.forward, library.model.forward = library.layer_forward, library.model_forward
        library.classifier.forward = library.classifier_forward
        if "train" in library.layer.__dict__:
            del library.layer.train
        _everywhere.__dict__.update(backend="auto", fix_num_frames=False)
        return None
    original = {patched: own for own, patched in library.patched.items()}
    for part in _parts(model):
        part.__class__ = original.get(type(part), type(part))
        for name in (_BLOCK, _OPTIONS):
            part.__dict__.pop(name, None)
    return model


def _parts(model: nn.Module) -> list[nn.Module]:
    """The layers, models and classifiers of the library within a module."""
    return [module for module in model.modules() if isinstance(module, tuple(_library().patched))]
