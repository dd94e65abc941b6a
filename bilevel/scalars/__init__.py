"""Numbers read from tensors, that a recorded step can follow: what they are, and functions of them.

`scalar` is such a number and what notes its operations; `functions` stand in the place of those of
`math` and of `min` and `max`, which would make plain numbers of it; `table` keeps trees by such a
number. No tensor is computed here.
"""
