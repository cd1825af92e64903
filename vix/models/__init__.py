"""Model families, one a file.

Contract: the constructor takes ``image_size``, ``channels``, ``classes`` and the builders ``embedding``, ``posenc`` and
``attention`` (see :mod:`vix.build`), then keyword-only options; ``forward`` maps ``images_BCYX`` to ``logits_BK``.
"""
