"""Parameters that several ranks hold together, each its rows of every entry.

`parts` says who holds what, cuts and gathers, and has the functions by which a gathered tensor is
differentiated at any order; `again` gathers what a graph keeps anew instead of keeping it; `states`
makes saved states whole and cuts them. No problem and no solver: those see trees of parts.
"""
