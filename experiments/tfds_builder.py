"""Adds text files to TensorFlow Datasets, as a data set `local_text` with splits train and validation (seconds).

  python experiments/tfds_builder.py --text='books/**/*.txt' --data_dir=tfds

`corpora.tfds('tfds/local_text')` is then the corpus, also where this file is not; the flag `tfds` of pretrain.py takes
the same folder.
"""
import pathlib

import tensorflow_datasets as tfds

from lm import launch, options
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


def build(*, data_dir: pathlib.Path, corpus: options.Corpus = options.Corpus()) -> None:
  """Prepares the data set.

  Most runs set: text, jsonl, parquet, key, data_dir.

  Args:
    data_dir: the folder to keep it in, as local_text/1.0.0.
    validation: share of the documents that goes into the validation split.
  """
  if corpus.tfds or sum(pattern is not None for pattern in (corpus.text, corpus.jsonl, corpus.parquet)) != 1:
    raise ValueError('a data set is built from files of one kind; give one of --text, --jsonl and --parquet')
  source = corpus.source()
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
