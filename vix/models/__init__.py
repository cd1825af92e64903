"""Model families, one per file, with a common interface.

The constructor takes

    image_size: side of the square images, in pixels,
    channels: number C of image channels,
    classes: number K of classes,
    embedding, posenc, attention: builders of the embedding, the position encoding and the mixers (:mod:`vix.build`),

then keyword-only options. ``forward`` maps ``images_BCYX`` to ``logits_BK``.

Other parts of the program find by name the classifier ``head`` (Muon leaves it to AdamW, and weights for other classes may lack
it) and the ``class_token``; and by their class the blocks (:class:`vix.layers.checkpointing.Block`), whose activations can be
recomputed.

In families with stages, ``depth`` is a list of the number of blocks per stage. Every other option of a stage is one value for
all stages, or a list with one value per stage.
"""
