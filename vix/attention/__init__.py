"""Token mixers, one a file, behind one contract.

A mixer is an ``nn.Module`` whose constructor takes

    dim       width D of the tokens,
    tokens    the :class:`vix.tokens.TokenGrid` they form,
    rotary    (only where queries and keys exist) ``None``, or a function that takes the head width and returns a module
              which turns (B, H, N, E) by position: ``posenc=rotary`` with a mixer that has no such parameter is refused,

and then keyword-only options, which are exactly the keys of its file in ``conf/attention/``. Its ``forward`` takes
``x_BND`` and returns the same shape. An option that cannot work raises a ``ValueError`` that starts with the option's
name. A mixer with a method ``on_train_step(step)`` has it called before every training step.
"""
