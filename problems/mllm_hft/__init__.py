"""Hierarchical fine-tuning of a multimodal language model, as a bilevel problem.

`problem` is what a recipe names; `formulations` say what is upper and lower, `losses` and
`batches` what is minimised on what. `sources/` are the data, `models/` the networks,
`evaluation/` the measures.
"""
