"""Pictures of the site, each from numbers of the library itself: `python -m docs.pictures [NAME]…`.

Of each the numbers are kept as JSON and the drawing as SVG. A test computes the numbers again (of
the dear ones a part) and draws what is kept, so that no picture outlives what it shows.
"""

from docs.pictures import (
    at_a_glance,
    choice,
    gallery,
    panel,
    quadrants,
    seeds,
    speed,
    steps,
    tables,
    training,
)
from docs.pictures.families import CHARTS
from docs.pictures.keep import Picture

PICTURES = {
    "at_a_glance": Picture(at_a_glance.TITLE, at_a_glance.compute, at_a_glance.draw),
    "steps": Picture(steps.TITLE, steps.compute, steps.draw),
    "choice": Picture(choice.TITLE, choice.compute, choice.draw),
    "benchmarks": Picture(tables.TITLE, tables.compute, tables.draw),
    "quadrants": Picture(quadrants.TITLE, quadrants.compute, quadrants.draw),
    **{f"family_{name}": chart.picture() for name, chart in CHARTS.items()},
    **{name: chart.picture() for name, chart in training.CHARTS.items()},
    **panel.PICTURES,
    **seeds.PICTURES,
    **speed.PICTURES,
    **{f"gallery_{name}": picture for name, picture in gallery.PICTURES.items()},
}
"""By the name of their files."""
