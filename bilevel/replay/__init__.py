"""A pure step recorded once as the tensor operations it takes, and replayed without the Python around them.

`recorder` notes operations, numbers and what they decide; `graph` makes the record shorter; `program`
replays it, and says where a step departs from it. No step is known here, and when one is recorded is
decided in `run`.
"""
