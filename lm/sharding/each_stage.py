"""Programs that are traced for one stage of a pipeline, and computed by each stage with its own arrays."""
import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

_for_each_stage = contextvars.ContextVar('for_each_stage', default=False)


def is_for_each_stage() -> bool:
  """Returns whether what is traced is for each stage on its own: the mesh axis of stages then splits nothing."""
  return _for_each_stage.get()


@contextlib.contextmanager
def scope(is_for_each: bool) -> Iterator[None]:
  """A context in which what is traced is for each stage on its own, or is not."""
  token = _for_each_stage.set(is_for_each)
  try:
    yield
  finally:
    _for_each_stage.reset(token)


def for_each_stage(function: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a function that is computed for each entry [S] of its arguments, on the devices of that stage."""
  def traced(*args):
    with scope(True):
      return function(*args)
  return jax.vmap(traced)


def custom_vjp(function: Callable[..., Any], forward: Callable[..., Any], backward: Callable[..., Any],
               nondiff_argnums: tuple[int, ...] = ()) -> Callable[..., Any]:
  """Returns `jax.custom_vjp` of a function, whose rules are traced in the scope in which the function is called.

  JAX traces them later, when this scope has ended.
  """
  @functools.partial(jax.custom_vjp, nondiff_argnums=(0, *(number + 1 for number in nondiff_argnums)))
  def scoped(is_for_each, *args):
    return in_scope(function, is_for_each, *args)

  def in_scope(rule, is_for_each, *args):
    with scope(is_for_each):
      return rule(*args)

  scoped.defvjp(functools.partial(in_scope, forward), functools.partial(in_scope, backward))
  return lambda *args: scoped(is_for_each_stage(), *args)
