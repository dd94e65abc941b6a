"""What is fine-tuned: backbones, vision encoders, tokenizers, and how they are warmed up.

`tiny` and `checkpoint` are registered models, `encoders` registered vision encoders; `network` is
what all of them become. No bilevel problem here: which variables are upper is in `formulations`.
"""
