"""Programs before they are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax


def equations(jaxpr: Any) -> Iterator[Any]:
    """Every equation, those inside other equations' parameters included."""
    for equation in jaxpr.eqns:
        yield equation
        for parameter in equation.params.values():
            for value in parameter if isinstance(parameter, tuple | list) else (parameter,):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def looked_at(loss: Callable[..., Any], *arguments: Any) -> tuple[set[str], int]:
    """The primitives of a gradient's forward and backward pass, and the entries of its largest array."""
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=tuple(range(len(arguments)))))(*arguments)
    found = list(equations(jaxpr.jaxpr))
    sizes = [getattr(variable.aval, "size", 0) for equation in found for variable in equation.outvars]
    return {equation.primitive.name for equation in found}, max(sizes)
