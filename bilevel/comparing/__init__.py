"""Estimators side by side on one problem, each measured in a process of its own.

`plan` says what there is to measure, `launch` starts the processes and keeps what they found,
`scene` and `cell` are what runs in them, `memory` is how a peak is read, `table` and `figure` are
what is made of it. A comparison lives in one folder, runs/compare-<name>-<hash6>/. Nothing here
takes a derivative or a step of its own.
"""
