"""Arms × seeds × regimes of one question: tuned alike, computed cell by cell, compared with intervals.

`file` reads the study's YAML, `plan` lists its cells in their order and says with what settings each is run, `mixtures`
draws and chooses weights, `results` is what is kept of each cell, `statistics` the hierarchical bootstrap, `summary` the
numbers. `headroom` says what there is to be gained, `costs` what was spent, `effort` what a run is worth in runs of
a sweep, `courses` how weights went; `figure`, `page` and `page_parts` how all of it is shown. Nothing here makes a run: the command line does.
"""
