"""Makes a TensorFlow data set `local_text` from text files, with the splits train and validation, in seconds.

  python experiments/tfds_builder.py --text='books/**/*.txt' --data_dir=tfds

Use it as the corpus with pretrain.py --tfds=tfds/local_text, or with `corpora.tfds('tfds/local_text')` in Python. The
data set can be read without this script.
"""
import pathlib

import tensorflow_datasets as tfds

from lm import launch, options
from lm.data.text.source import Source


class LocalText(tfds.core.GeneratorBasedBuilder):
  """A builder with one field, the text. Copy it for your own corpus, and declare its fields in `_info`."""
  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, source: Source | None = None, **options):
    self._source = source  # only needed to prepare the data
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
    data_dir: folder for the data set, which is stored in its subfolder local_text/1.0.0.
    validation: share of the documents in the validation split.
  """
  if corpus.tfds or sum(pattern is not None for pattern in (corpus.text, corpus.jsonl, corpus.parquet)) != 1:
    raise ValueError('a data set is made from files of one kind; give one of --text, --jsonl and --parquet')
  source = corpus.source()
  # The splits are read before the folder is made, so that errors in the files come first.
  sizes = {split: len(documents) for split, documents in source.splits.items()}
  builder = LocalText(source=source, data_dir=data_dir, file_format='array_record')  # needs no TensorFlow
  if (builder.info.metadata or {}).get('source') != source.fingerprint:
    raise ValueError(f'{builder.data_path} was made from other files or settings; delete it, or choose '
                     'another --data_dir')
  builder.download_and_prepare()
  for name, size in sizes.items():
    print(f'{name}: {size} documents in {builder.data_path}')


if __name__ == '__main__':
  launch.tool(build)
