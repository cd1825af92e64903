"""Token mixers, one per file, with a common interface.

A mixer is an ``nn.Module``. Its constructor takes

    dim: width D of the tokens,
    tokens: :class:`vix.layers.tokens.TokenGrid` of the tokens; ``tokens.split`` returns the 2-D map,

then, if the mixer supports them, the arguments that a position encoding provides
(:meth:`vix.layers.posenc.PositionEncoding.attention_kwargs`), None by default:

    rotary: for queries and keys, a function from the head width E to a module that rotates (B, H, N, E),
    position_bias: for attention logits, a function from the number of heads H to a module that returns the bias (H, N, N) when
        called without arguments,

and, if it differs between blocks, ``layer``, the index of the block in the model, from 0;

then keyword-only options, exactly the keys of its file in ``conf/attention/``. A config is refused if its position encoding
provides an argument that the mixer's constructor does not take.

``forward`` maps ``x_BND`` to the same shape. An invalid option raises a ``ValueError`` that starts with the option's name.
Families may set the options ``heads`` and ``dim_head``, where they exist, per stage (:func:`vix.build.mixer_builder`). A
method ``on_train_step(step)``, if there is one, is called before every training step. An attribute ``no_weight_decay`` names
parameters with more than one axis that get no weight decay where the option ``no_decay_on_norm_and_bias`` is true. With the
class attribute ``map_only = True`` a mixer passes nothing to a class token, and is refused with one; with ``needs_norm = True``
its values grow without norms, and it is refused in LeViT.

A mixer with queries, keys and values implements ``forward`` by two methods (:class:`vix.layers.heads.MultiHeadMixer`), so that
its attention can be inspected (:mod:`vix.attention.inspection`):

    qkv(x_BND): returns queries (B, H, N, E), keys and values (B, G, M, E), after any rotation. H is a multiple of G, and M is
        N unless the keys are on another grid than the queries.
    attend(q, k, v): the mixing alone; returns (B, H, N, E), linear in the values.

One that weighs channels instead of tokens sets ``has_attention_weights = False``.
"""
