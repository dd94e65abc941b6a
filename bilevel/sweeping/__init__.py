"""Many settings of one recipe, tried and ranked: Optuna chooses them, each trial is a run with a folder.

`space` reads what is varied, `request` is what was asked for, kept so that another is refused, `study` is
Optuna's side of it (samplers, pruners, the journal), `drive` starts trials and tells what became of them,
`result` ranks them, `figure` draws them. A sweep lives in one folder, runs/<name>-sweep/. Nothing here searches
by itself, and no run is made here: the command line gives what runs a trial.
"""

FILE = "sweep.yaml"
"""What the folder of a sweep holds, and no other."""
