"""The "size" that the paper prints for a model: what the layer summary *torchsummary* says of the published modules.

4 bytes · (image + 2 · outputs of all layers + counted parameters), for one image, in MB of 2²⁰ bytes. A layer is every module
but ``nn.Sequential``, ``nn.ModuleList`` and the model itself; what mere functions compute (a residual sum, an einsum) has no
layer. So it follows how a model is cut into modules, and the published ones are cut in another way than ours: wrappers for
norms, a dropout of 0 behind most linear layers, and softmax attention whose N×N matrix is a layer. This module counts their
layers, from the shapes of ours: all 38 published sizes come out within 0.007 MB.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from vix.attention.cvt import CvTAttention
from vix.attention.fourier import Fourier
from vix.attention.levit import LeViTAttention
from vix.attention.linformer import Linformer
from vix.attention.nystrom import Nystrom
from vix.attention.performer import Performer
from vix.attention.softmax import Softmax
from vix.attention.token_mlp import TokenMLP
from vix.layers import embedding
from vix.layers.blocks import PreNormBlock
from vix.layers.posenc import Rotary
from vix.models.cct import CCT, CCTBlock
from vix.models.counts import Shape
from vix.models.cvt import ConvEmbed, CvT
from vix.models.levit import LeViT
from vix.models.pit import ConvHeadPooling, PiT
from vix.models.vit import ViT

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Call(NamedTuple):
    """Shapes, with a batch of one image, of what a module was given and what it returned."""

    input: Shape
    output: Shape


Calls = Mapping[nn.Module, list[Call]]


def paper_megabytes(model: nn.Module, calls: Calls, counted_parameters: int) -> float:
    """The paper's size figure in MB (2²⁰ bytes), from the calls of all modules in a forward pass of one image.

    Modules that the paper has no counterpart of (LinearAttention, a user's own) count with their outputs and their layers'.
    """
    outputs = PublishedLayers(model, calls).outputs(model)
    return 4 * (math.prod(calls[model][0].input) + 2 * outputs + counted_parameters) / 2**20


class PublishedLayers:
    """Counts the elements that the layers of the published ``model`` put out.

    In the code n is the size of a module's own output; a multiple of it stands for so many layers with outputs of that shape,
    which the comment names, those of n after the last semicolon.
    """

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        self.model, self.calls = model, calls
        self.is_mlp_mixer = isinstance(model, ViT) and model.class_token is None

    def size(self, module: nn.Module | None) -> int:
        """Elements that this module of ours put out, in all its calls."""
        return sum(math.prod(call.output) for call in self.calls.get(module, [])) if module else 0

    def outputs(self, module: nn.Module) -> int:
        """Elements that the published counterpart of this module and of all modules in it put out."""
        n = self.size(module)
        match module:
            case ViT() | LeViT() | CCT() | CvT() | PiT():
                return self.family(module)
            case PreNormBlock() | CCTBlock():
                return self.block(module)
            case Softmax():  # qkv, softmax; linear, its dropout, the whole
                return self.size(module.to_qkv) + module.heads * self.tokens(module) ** 2 + 3 * n
            case LeViTAttention():  # q, k, v and their norms, softmax, GELU; linear, norm, dropout, the whole
                qkv = self.size(module.to_qkv)
                return 2 * qkv + module.heads * self.tokens(module) ** 2 + qkv // 3 + 4 * n
            case CvTAttention():  # twice convolution and norm, linear and all three; softmax; linear, dropout, the whole
                convolved = self.size(module.to_q.conv) + self.size(module.to_kv.conv)
                projected = self.size(module.to_q.project) + self.size(module.to_kv.project)
                # The softmax has its heads on the axis of the batch, of which the summary sees one item: one N×M matrix.
                keys = self.calls[module.to_kv.project][0].output[1]
                return 2 * convolved + 2 * projected + self.tokens(module) * keys + 3 * n
            case Performer():  # q, k, v, kernel attention; linear, dropout, the whole
                return self.size(module.to_qkv) * 4 // 3 + 3 * n
            case Linformer():  # q, k, v, dropout of the attention weights; linear, the whole
                matrix = module.heads * self.tokens(module) * module.length_k.shape[1]
                return self.size(module.to_q) + self.size(module.to_k) + self.size(module.to_v) + matrix + 2 * n
            case Nystrom():  # qkv, convolution, linear, dropout, all of tokens padded to a multiple of landmarks; the whole
                padded = self.padded_tokens(module)
                return (self.size(module.to_qkv) + self.size(module.conv) + 2 * n) * padded // self.tokens(module) + n
            case Fourier():
                return n
            case TokenMLP():  # linear, GELU, dropout; linear, dropout
                return 3 * self.size(module.expand) + 2 * n
            case embedding.PatchEmbed():  # cutting into patches (PiT: in two layers), linear
                pixels = math.prod(self.calls[module][0].input)
                return (2 if isinstance(self.model, PiT) else 1) * pixels + n
            case embedding.ConvStem():  # convolutions; map to tokens, where the family has tokens
                return self.outputs(module.layers) + (n if isinstance(self.model, ViT | PiT) else 0)
            case embedding.CCTTokenizer():  # convolutions, ReLUs and poolings; map to tokens, the whole
                return self.outputs(module.layers) + 2 * n
            case ConvEmbed():  # convolution, norm
                return 2 * n
            case ConvHeadPooling():  # both convolutions and their whole; the class token's linear layer; the whole
                return 3 * self.size(module.pool[1]) + self.size(module.proj) + n
            case nn.Identity():
                return 0
            case _:
                return (0 if isinstance(module, CONTAINERS) else n) + sum(map(self.outputs, module.children()))

    def tokens(self, mixer: nn.Module) -> int:
        """Number N of tokens that a mixer mixes."""
        return self.calls[mixer][0].input[1]

    def padded_tokens(self, mixer: nn.Module) -> int:
        """The same, padded to a multiple of the landmarks by the published Nyström attention."""
        tokens = self.tokens(mixer)
        return math.ceil(tokens / mixer.landmarks) * mixer.landmarks if isinstance(mixer, Nystrom) else tokens

    def family(self, model: ViT | LeViT | CCT | CvT | PiT) -> int:
        """A whole model. Of the head, of which a layer has no more than its channels, only the last layer is counted."""
        first, last = self.size(model.posenc), self.size(model.blocks)
        total = self.outputs(model.embedding) + self.outputs(model.blocks) + self.size(model.head)
        if isinstance(model.posenc, Rotary):  # the table of angles, made once, where ours has their cosines and sines
            mixer = next(block.mixer for block in model.blocks if isinstance(block, PreNormBlock | CCTBlock))
            angles = sum(buffer.numel() for buffer in model.posenc.buffers())
            total += angles * self.padded_tokens(mixer) // self.tokens(mixer)
        if self.is_mlp_mixer:  # norm
            return total + last
        if isinstance(model, CCT):  # dropout of the tokens, norm, weights of the pooling
            return total + first + last + self.size(model.attention_pool)
        steps = [step for step in model.blocks if not isinstance(step, PreNormBlock)]
        total += sum(math.prod(self.calls[step][0].input) for step in steps) + last  # each stage as a whole
        # CvT: norm; LeViT: none; ViT and PiT: dropout of the tokens.
        return total if isinstance(model, LeViT) else total + first

    def block(self, block: PreNormBlock | CCTBlock) -> int:
        """A mixer and an MLP, with norms and wrappers."""
        n, hidden = self.size(block), self.size(next(block.mlp.children()))
        mixer = self.outputs(block.mixer)
        if isinstance(block, CCTBlock):  # linear, dropout; 2 norms, linear, dropout, stochastic depth twice, the whole
            return mixer + 2 * hidden + 7 * n
        total = mixer + 3 * hidden + 2 * n  # linear, GELU, dropout; linear, dropout
        if not self.is_mlp_mixer:  # the MLP as a whole
            total += n
        if not isinstance(self.model, LeViT):  # 2 norms and 2 wrappers of what they are before
            total += 4 * n
        if isinstance(self.model, LeViT | CvT) and not isinstance(block.mixer, LeViTAttention | CvTAttention):
            total += 2 * n  # map to tokens and back
        return total
