"""Directions of stochastic single-loop methods: what is kept of past draws, and how.

A file is named as what it registers; `oracles` draws the gradients and products, `tracker` moves
along them. `estimators/single_loop` composes. No step length and no lower solver is known here.
"""

from typing import TYPE_CHECKING

from bilevel.registry.exports import exports

if TYPE_CHECKING:
    from bilevel.directions.average import Average as Average
    from bilevel.directions.plain import Plain as Plain
    from bilevel.directions.saga import Saga as Saga
    from bilevel.directions.spider import Spider as Spider
    from bilevel.directions.storm import Storm as Storm
else:
    __getattr__, __dir__ = exports(__name__, "directions")
