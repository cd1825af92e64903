"""The model "size" that the paper prints, as the layer summary *torchsummary* computes it for the published modules.

The size is 4 bytes · (image + 2 · outputs of all layers + counted parameters), for one image, in MB of 2²⁰ bytes. Every module
is a layer, except ``nn.Sequential``, ``nn.ModuleList`` and the model itself. Results of functions, such as a residual sum or an
einsum, do not count.

So the size depends on how a model is divided into modules. The published models differ from this project's: they have wrappers
of norms, dropouts of 0 after most linear layers, and softmax attention with the N×N matrix as a layer's output. This module
counts the published layers from the shapes of this project's modules. All 38 published sizes are reproduced within 0.007 MB.
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
from vix.layers.blocks import PreNormBlock, StochasticDepth
from vix.layers.posenc import Rotary
from vix.models.cct import CCT, CCTBlock
from vix.models.counts import Shape
from vix.models.cvt import ConvEmbed, CvT
from vix.models.levit import LeViT
from vix.models.pit import ConvHeadPooling, PiT
from vix.models.vit import ViT

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Call(NamedTuple):
    """Input and output shape of a module's call, for a batch of one image."""

    input: Shape
    output: Shape


Calls = Mapping[nn.Module, list[Call]]


def paper_megabytes(model: nn.Module, calls: Calls, counted_parameters: int) -> float:
    """The model size as printed in the paper, in MB of 2²⁰ bytes.

    Modules without a counterpart in the paper (LinearAttention, user-defined ones) count with their own and their submodules'
    outputs.

    model: a model of :mod:`vix.models`.
    calls: calls of all its modules in a forward pass of one image (:func:`vix.analysis.model_summary.recorded`).
    counted_parameters: the paper's parameter count, ``weight_bias_params``.
    """
    outputs = PublishedLayers(model, calls).outputs(model)
    return 4 * (math.prod(calls[model][0].input) + 2 * outputs + counted_parameters) / 2**20


class PublishedLayers:
    """Counts the output elements of the published counterparts of a model's layers.

    In the code n is the size of the module's own output, and k · n stands for k published layers with outputs of that size. The
    comments name the counted layers, those with outputs of size n after the last semicolon.

    model: a model of :mod:`vix.models`.
    calls: calls of all its modules in a forward pass of one image.
    """

    def __init__(self, model: nn.Module, calls: Calls) -> None:
        self.model, self.calls = model, calls
        self.is_mlp_mixer = isinstance(model, ViT) and model.class_token is None

    def size(self, module: nn.Module | None) -> int:
        """Output elements of this module, over all its calls."""
        return sum(math.prod(call.output) for call in self.calls.get(module, [])) if module else 0

    def outputs(self, module: nn.Module) -> int:  # noqa: C901  (one line per kind of module)
        """Output elements of the published counterparts of this module and all its submodules."""
        n = self.size(module)
        match module:
            case ViT() | LeViT() | CCT() | CvT() | PiT():
                return self.family(module)
            case PreNormBlock() | CCTBlock():
                return self.block(module)
            case Softmax():  # qkv, softmax; linear, dropout, the mixer itself
                return self.size(module.to_qkv) + module.heads * self.tokens(module) ** 2 + 3 * n
            case LeViTAttention():  # q, k, v and their norms, softmax, GELU; linear, norm, dropout, the mixer itself
                qkv = self.size(module.to_qkv)
                return 2 * qkv + module.heads * self.tokens(module) ** 2 + qkv // 3 + 4 * n
            case CvTAttention():  # twice convolution, norm, linear, all three; softmax; linear, dropout, mixer itself
                convolved = self.size(module.to_q.conv) + self.size(module.to_kv.conv)
                projected = self.size(module.to_q.project) + self.size(module.to_kv.project)
                # The published softmax has the heads in its batch axis, of which torchsummary counts one item: one N×M matrix.
                keys = self.calls[module.to_kv.project][0].output[1]
                return 2 * convolved + 2 * projected + self.tokens(module) * keys + 3 * n
            case Performer():  # q, k, v, kernel attention; linear, dropout, the mixer itself
                return self.size(module.to_qkv) * 4 // 3 + 3 * n
            case Linformer():  # q, k, v, dropout of the attention weights; linear, the mixer itself
                matrix = module.heads * self.tokens(module) * module.length_k.shape[1]
                return self.size(module.to_q) + self.size(module.to_k) + self.size(module.to_v) + matrix + 2 * n
            case Nystrom():  # qkv, convolution, linear, dropout, all with padded tokens; the mixer itself
                padded = self.padded_tokens(module)
                return (self.size(module.to_qkv) + self.size(module.conv) + 2 * n) * padded // self.tokens(module) + n
            case Fourier():
                return n
            case TokenMLP():  # linear, GELU, dropout; linear, dropout
                return 3 * self.size(module.expand) + 2 * n
            case embedding.PatchEmbed():  # rearrangement to patches (PiT: two layers); linear
                pixels = math.prod(self.calls[module][0].input)
                return (2 if isinstance(self.model, PiT) else 1) * pixels + n
            case embedding.ConvStem():  # convolutions; rearrangement to tokens (ViT, PiT)
                return self.outputs(module.layers) + (n if isinstance(self.model, ViT | PiT) else 0)
            case embedding.CCTTokenizer():  # convolutions, ReLUs, poolings; rearrangement to tokens, the tokenizer itself
                return self.outputs(module.layers) + 2 * n
            case ConvEmbed():  # convolution, norm
                return 2 * n
            case ConvHeadPooling():  # both convolutions and their container; the class token's linear; the pooling itself
                return 3 * self.size(module.pool[1]) + self.size(module.proj) + n
            case nn.Identity() | StochasticDepth():
                return 0
            case _:
                return (0 if isinstance(module, CONTAINERS) else n) + sum(map(self.outputs, module.children()))

    def tokens(self, mixer: nn.Module) -> int:
        """Number N of a mixer's input tokens."""
        return self.calls[mixer][0].input[1]

    def padded_tokens(self, mixer: nn.Module) -> int:
        """Number of tokens, for Nyström attention padded to a multiple of the landmarks, as the published one does."""
        tokens = self.tokens(mixer)
        return math.ceil(tokens / mixer.landmarks) * mixer.landmarks if isinstance(mixer, Nystrom) else tokens

    def family(self, model: ViT | LeViT | CCT | CvT | PiT) -> int:
        """Output elements of a whole model. Of the classification head, only the last layer is counted."""
        first, last = self.size(model.posenc), self.size(model.blocks)
        total = self.outputs(model.embedding) + self.outputs(model.blocks) + self.size(model.head)
        if isinstance(model.posenc, Rotary):  # the published module outputs the table of angles once
            mixer = next(block.mixer for block in model.blocks if isinstance(block, PreNormBlock | CCTBlock))
            angles = sum(buffer.numel() for buffer in model.posenc.buffers())
            total += angles * self.padded_tokens(mixer) // self.tokens(mixer)
        if self.is_mlp_mixer:  # final norm
            return total + last
        if isinstance(model, CCT):  # dropout of the tokens; final norm; weights of the pooling
            return total + first + last + self.size(model.attention_pool)
        transitions = [block for block in model.blocks if not isinstance(block, PreNormBlock)]
        total += sum(math.prod(self.calls[t][0].input) for t in transitions) + last  # each stage's container
        # CvT: the embedding's norm; ViT and PiT: dropout of the tokens.
        return total if isinstance(model, LeViT) else total + first

    def block(self, block: PreNormBlock | CCTBlock) -> int:
        """Output elements of a block: mixer and MLP, with norms and wrappers."""
        n, hidden = self.size(block), self.size(next(block.mlp.children()))
        mixer = self.outputs(block.mixer)
        if isinstance(block, CCTBlock):  # linear, dropout; 2 norms, linear, dropout, 2 stochastic depths, the block itself
            return mixer + 2 * hidden + 7 * n
        total = mixer + 3 * hidden + 2 * n  # linear, GELU, dropout; linear, dropout
        if not self.is_mlp_mixer:  # the MLP itself
            total += n
        if not isinstance(self.model, LeViT):  # 2 norms and their 2 wrappers
            total += 4 * n
        if isinstance(self.model, LeViT | CvT) and not isinstance(block.mixer, LeViTAttention | CvTAttention):
            total += 2 * n  # rearrangement to tokens and back
        return total
