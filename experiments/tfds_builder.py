"""Adds text files to TensorFlow Datasets, as a data set `local_text` with splits train and validation (seconds).

  python experiments/tfds_builder.py --text='books/**/*.txt' --data_dir=tfds

`corpora.tfds('tfds/local_text')` is then the corpus, also where this file is not; the flag `tfds` of pretrain.py takes
the same folder.
"""
import pathlib
from typing import Literal

import tensorflow_datasets as tfds

from lm import launch
from lm.data.text.corpus_flags import corpus
from lm.data.text.source import Source


class LocalText(tfds.core.GeneratorBasedBuilder):
  """A builder is three methods. Copy it for a corpus of your own, and give each document's fields in `_info`."""
  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, source: Source | None = None, **options):
    self._source = source  # needed to prepare the data, not to read them
    super().__init__(**options)

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({'text': tfds.features.Text()}),
                                 metadata=tfds.core.MetadataDict(source=self._source and self._source.fingerprint))

  def _split_generators(self, download):
    return {split: self._generate_examples(documents) for split, documents in self._source.splits.items()}

  def _generate_examples(self, documents):
    for key, document in enumerate(documents):
      yield key, {'text': document}


def build(*, data_dir: pathlib.Path, text: str | None = None, separator: str | None = None,
          encoding_errors: Literal['strict', 'replace', 'drop'] = 'strict', jsonl: str | None = None,
          parquet: str | None = None, key: str = 'text', validation: float = 0.05,
          decompressed_limit: float = 64.) -> None:
  r"""Prepares the data set.

  Args:
    data_dir: the folder to keep it in, as local_text/1.0.0.
    text: files of text, a glob pattern (** for folders below); or of --jsonl or --parquet.
    separator: what separates documents within a text file, such as \n\n (two newlines; \t is a tab).
    encoding_errors: what happens to text that is no UTF-8, an error, repair, or dropping the document.
    jsonl: files of JSON lines, .gz and .zst too, a glob pattern.
    parquet: Parquet files, a glob pattern.
    key: the field that holds the text, in all but plain text.
    validation: share of the documents that goes into the validation split.
    decompressed_limit: GiB that a compressed file may unpack to.
  """
  if sum(pattern is not None for pattern in (text, jsonl, parquet)) != 1:
    raise ValueError('a data set is built from files of one kind; give one of --text, --jsonl and --parquet')
  source = corpus(text, separator, encoding_errors, jsonl, parquet, None, key, (), True, validation,
                  decompressed_limit)
  sizes = {split: len(documents) for split, documents in source.splits.items()}  # read before a folder is made
  builder = LocalText(source=source, data_dir=data_dir, file_format='array_record')  # needs no TensorFlow
  if (builder.info.metadata or {}).get('source') != source.fingerprint:
    raise ValueError(f'{builder.data_path} was made from other files or settings; delete it to make it from '
                     f'{source.name}, or choose another --data_dir')
  builder.download_and_prepare()
  for name, size in sizes.items():
    print(f'{name}: {size} documents in {builder.data_path}')


if __name__ == '__main__':
  launch.tool(build)
