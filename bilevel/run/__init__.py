"""One run: what it is made of, where it is, and the generator of events that takes its steps.

`setup` has Setup and State, `batches` what draws them, `upper` the upper level, `refusals` what
cannot work together, `warnings` what a step is warned of, `engine` the loop. No file is written
here and nothing is printed.
"""
