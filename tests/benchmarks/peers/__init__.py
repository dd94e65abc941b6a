"""One module a library: METHODS maps a row of the table and a task to `f(task) -> hypergradient`.

A method copies what it needs of the task and returns the hypergradient of x as a dict.
"""
