"""Values of config fields other than their defaults."""


def other(value):
  """Returns a value of the same type that differs from `value`; of containers, each item that is no string differs."""
  match value:
    case bool():
      return not value
    case int():
      return value // 2 or 2
    case float():
      return value * 64
    case str():
      return 'another'
    case dict():
      return {key: item if isinstance(item, str) else other(item) for key, item in value.items()} or {'x': 1}
    case list():
      return [other(item) for item in value] or [1]
    case None:
      return 3
