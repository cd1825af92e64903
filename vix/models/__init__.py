"""Model families, one a file.

Contract: the constructor takes ``image_size``, ``channels``, ``classes`` and the builders ``embedding``, ``posenc`` and
``attention`` (see :mod:`vix.build`), then keyword-only options; ``forward`` maps ``images_BCYX`` to ``logits_BK``.

Where a family has stages, ``depth`` is a list with the blocks of each, and every other option of a stage is one number for
all stages or such a list.
"""
