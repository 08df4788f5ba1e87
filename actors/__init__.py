"""The long-lived processes: students, teachers, the boards between them, the evaluator.

Every module holds a plain class that is tested without Ray and, where it lives in a process of its own, a thin
``@ray.remote`` shell round it. Nothing here imports a dataset or a recipe: what an actor needs reaches it through the
protocols of :mod:`actors.protocols`.
"""
