"""A model before it is trained: cost, shapes, hooks, launch plan."""
