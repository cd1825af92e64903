"""Token mixers, one a file, behind one contract.

A mixer is an ``nn.Module`` whose constructor takes

    dim       width D of the tokens,
    tokens    the :class:`vix.layers.tokens.TokenGrid` they form: a mixer that needs their map makes it with ``tokens.split``,

then, where it can use them, what a position encoding has to give (:meth:`vix.layers.posenc.PositionEncoding.offers`), None by default:

    rotary           where there are queries and keys: a function from the head width E to a module that turns (B, H, N, E),
    position_bias    where pairs of tokens have logits: a function from the number of heads H to a module that returns the
                     bias (H, N, N) on them when called with nothing,

and then keyword-only options, which are exactly the keys of its file in ``conf/attention/``. A posenc that gives what a
mixer's constructor does not take is refused. Its ``forward`` takes ``x_BND`` and returns the same shape. An option that
cannot work raises a ``ValueError`` that starts with the option's name. Where the options ``heads`` and ``dim_head`` exist,
families may set them per stage (:func:`vix.build.mixer_builder`). A mixer with a method ``on_train_step(step)`` has it
called before every training step.

A mixer that weighs values by queries and keys has two methods of which ``forward`` is made, so that what it computes can be
looked at (:mod:`vix.attention.inspection`):

    qkv(x_BND)         queries (B, H, N, E), and keys and values (B, G, M, E), as they are after any rotation; H is a multiple
                       of G, the heads of the keys, and M is N unless keys stand in other places than queries,
    attend(q, k, v)    their mixing alone (B, H, N, E), linear in the values: attention weights, whatever makes them, times v.
"""
