"""The flags of scripts that name a corpus, as one source."""
from lm.data.text import corpora, source
from lm.data.text.mixture import mixture


def corpus(text: str | None, separator: str | None, encoding_errors: corpora.Errors, jsonl: str | None,
           parquet: str | None, tfds: str | None, key: str, weights: tuple[float, ...], repeat: bool,
           validation: float, decompressed_limit: float) -> source.Source:
  """The source, or mixture of sources, that the flags name; Python's own library where they name none.

  ValueError for flags that contradict one another, before any file is read.
  """
  flags = {'text': text, 'jsonl': jsonl, 'parquet': parquet, 'tfds': tfds}
  for name, given in {**flags, 'separator': separator, 'key': key}.items():
    if given == '' or given and name != 'separator' and not given.strip():
      raise ValueError(f'--{name}={given} is empty, perhaps an unset shell variable; leave it out or give it a value')
  if separator and not text:
    raise ValueError(f'--separator={separator} cuts the files of --text, which is not given')
  corpora.check_validation(validation)
  corpora.check_limit(decompressed_limit)
  make = {'text': lambda: corpora.text(text, validation, separator and source.unescaped(separator), encoding_errors),
          'jsonl': lambda: corpora.jsonl(jsonl, key, validation, encoding_errors, decompressed_limit),
          'parquet': lambda: corpora.parquet(parquet, key, validation, encoding_errors),
          'tfds': lambda: corpora.tfds(tfds, key, validation, encoding_errors=encoding_errors)}
  sources = [make[name]() for name, given in flags.items() if given]
  written = f'--weights={",".join(map(str, weights))}'
  if weights and len(sources) < 2:
    raise ValueError(f'{written} is for a mixture of several corpora; leave it out')
  if weights and len(weights) != len(sources):
    raise ValueError(f'{written} has {len(weights)} numbers for {len(sources)} corpora')
  if not all(0 <= weight < float('inf') for weight in weights):
    raise ValueError(f'{written} has a weight that is negative or not finite; give each corpus its share, or 0 to '
                     'leave it out')
  if weights and not any(weights):
    raise ValueError(f'{written} leaves all corpora out; give a weight above 0 to one of them at least')
  if not repeat and len(sources) < 2:
    raise ValueError('--repeat=false is for a mixture of several corpora; lower --steps to read one corpus once')
  if len(sources) > 1:
    return mixture(list(zip(sources, weights or (1.,) * len(sources))), repeat)
  return sources[0] if sources else corpora.python_library(validation)
