"""A stand-in for the coordination service of a cluster."""


class Service:
  """Keeps values until they are read, once. A value that is not there yet is an error instead of a wait."""

  def __init__(self):
    self.values = {}

  def key_value_set(self, key, value):
    assert key not in self.values
    self.values[key] = value

  def blocking_key_value_get(self, key, milliseconds):
    return self.values.pop(key)
