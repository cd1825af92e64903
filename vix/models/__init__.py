"""Model families. Each takes ``image_size``, ``channels``, ``classes`` and the builders ``embedding``, ``posenc`` and ``attention``
(see :mod:`vix.build`), then keyword-only options, and maps ``images_BCYX`` to ``logits_BK``."""
