"""Directions of stochastic single-loop methods: what is kept of past draws, and how.

A file is named as what it registers; `oracles` draws the gradients and products, `walk` moves
along them. `estimators/single_loop` composes.
"""
