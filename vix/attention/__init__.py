"""Token mixers, one per file, behind one contract.

A mixer is an ``nn.Module`` whose constructor takes

    dim       width D of the tokens,
    tokens    their :class:`vix.layers.tokens.TokenGrid`: a mixer that needs the 2-D map makes it with ``tokens.split``,

then, where it supports them, the arguments that a position encoding provides
(:meth:`vix.layers.posenc.PositionEncoding.attention_kwargs`), None by default:

    rotary           for queries and keys: a function from the head width E to a module that rotates (B, H, N, E),
    position_bias    for attention logits: a function from the number of heads H to a module that returns the bias (H, N, N)
                     when called without arguments,

and then keyword-only options, which are exactly the keys of its file in ``conf/attention/``. A position encoding that
provides what a mixer's constructor does not take is refused. ``forward`` maps ``x_BND`` to the same shape. An invalid option
raises a ``ValueError`` that starts with the option's name. Where the options ``heads`` and ``dim_head`` exist, families may
set them per stage (:func:`vix.build.mixer_builder`). A method ``on_train_step(step)`` is called before every training step.

A mixer that weighs values by queries and keys has two methods of which ``forward`` is composed
(:class:`vix.layers.heads.MultiHeadMixer`), so that its attention can be inspected (:mod:`vix.attention.inspection`):

    qkv(x_BND)         queries (B, H, N, E), and keys and values (B, G, M, E), after any rotation; H is a multiple of G, the
                       heads of the keys, and M is N unless keys stand in other places than queries,
    attend(q, k, v)    the mixing alone: (B, H, N, E), linear in the values.
"""
