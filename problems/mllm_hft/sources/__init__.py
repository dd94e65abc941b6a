"""Where pictures, captions and hallucinated captions come from; `protocol` says what a source is.

`shapes` and `photos` are registered; `scenes` and `language` make and word what they show. No
model and no measure.
"""
