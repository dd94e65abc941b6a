"""Problems shipped with bilevel, each found by name through the `bilevel.problems` entry points."""
