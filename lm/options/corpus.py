"""Flags that name a corpus."""
import dataclasses

from lm.data.text import compressed, corpora
from lm.data.text.mixture import mixture
from lm.data.text.source import Source, unescaped


@dataclasses.dataclass(frozen=True)
class Corpus:
  r"""Corpus; without any of its files, Python's own library.

  Args:
    text: files of text, a glob pattern (** for folders below).
    separator: text between the documents of a file, such as \n\n (two newlines; \t is a tab).
    encoding_errors: treatment of text that is not valid UTF-8, an error, repair, or dropping the document.
    jsonl: files of JSON lines, .gz and .zst too, a glob pattern.
    parquet: Parquet files, a glob pattern.
    tfds: a TensorFlow data set, the folder of a prepared one or a TFDS name.
    key: the field that holds the text, in JSON, Parquet and TFDS.
    weights: share of each corpus in the training tokens, in the order text, jsonl, parquet, tfds; 0 leaves it out.
    repeat: whether a corpus of a mixture starts again at its end; otherwise training stops where the first one ends.
    validation: share of the documents that is held out; a TFDS set with a validation split keeps its own.
    decompressed_limit: limit on the size of a file after decompression, in GiB.
  """
  text: str | None = None
  separator: str | None = None
  encoding_errors: corpora.Errors = 'strict'
  jsonl: str | None = None
  parquet: str | None = None
  tfds: str | None = None
  key: str = 'text'
  weights: tuple[float, ...] = ()
  repeat: bool = True
  validation: float = 0.05
  decompressed_limit: float = 64.

  def source(self) -> Source:
    """Returns the source, or a mixture of sources; without flags, Python's own library. No file is read yet.

    Raises:
      ValueError: flags contradict one another.
    """
    files = {name: getattr(self, name) for name in ('text', 'jsonl', 'parquet', 'tfds')}
    for name, value in {**files, 'separator': self.separator, 'key': self.key}.items():
      is_blank = value is not None and not value.strip()
      if value == '' or (is_blank and name != 'separator'):
        raise ValueError(f'--{name}={value} is empty, perhaps an unset shell variable; leave it out or give it a value')
    if self.separator and not self.text:
      raise ValueError(f'--separator={self.separator} cuts the files of --text, which is not given; give that too, or '
                       'leave it out')
    corpora.check_validation(self.validation)
    compressed.check_limit(self.decompressed_limit)
    sources = [self._source_of(name) for name, pattern in files.items() if pattern]
    self._check_mixture(len(sources))
    if len(sources) > 1:
      return mixture(list(zip(sources, self.weights or (1.,) * len(sources))), self.repeat)
    return sources[0] if sources else corpora.python_library(self.validation)

  def _source_of(self, name: str) -> Source:
    match name:
      case 'text':
        separator = self.separator and unescaped(self.separator)
        return corpora.text(self.text, self.validation, separator, self.encoding_errors)
      case 'jsonl':
        return corpora.jsonl(self.jsonl, self.key, self.validation, self.encoding_errors, self.decompressed_limit)
      case 'parquet':
        return corpora.parquet(self.parquet, self.key, self.validation, self.encoding_errors)
    return corpora.tfds(self.tfds, self.key, self.validation, encoding_errors=self.encoding_errors)

  def _check_mixture(self, size: int) -> None:
    weights, written = self.weights, f'--weights={",".join(map(str, self.weights))}'
    if weights and size < 2:
      raise ValueError(f'{written} is for a mixture of several corpora; leave it out')
    if weights and len(weights) != size:
      raise ValueError(f'{written} has {len(weights)} numbers for {size} corpora; give one for each')
    if not all(0 <= weight < float('inf') for weight in weights):
      raise ValueError(f'{written} has a weight that is negative or not finite; give each corpus its share, or 0 to '
                       'leave it out')
    if weights and not any(weights):
      raise ValueError(f'{written} leaves all corpora out; give a weight above 0 to one of them at least')
    if not self.repeat and size < 2:
      raise ValueError('--repeat=false is for a mixture of several corpora; leave it out, and lower the steps to read '
                       'one corpus once')
