"""Adds text files to TensorFlow Datasets, as a data set `local_text` with splits train and validation (seconds).

  python experiments/tfds_builder.py --pattern='books/**/*.txt' --data_dir=/tmp/tfds

`corpora.tfds('local_text', data_dir='/tmp/tfds')` is then the corpus, also where this file is not.
"""
import tensorflow_datasets as tfds

from lm import launch
from lm.data import corpora


class LocalText(tfds.core.GeneratorBasedBuilder):
  """A builder is three methods. Copy it for a corpus of your own, and give each document's fields in `_info`."""
  VERSION = tfds.core.Version('1.0.0')

  def __init__(self, *, pattern: str = '', **options):
    self._pattern = pattern  # needed to prepare the data, not to read them
    super().__init__(**options)

  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({'text': tfds.features.Text()}))

  def _split_generators(self, download):
    return {split: self._generate_examples(documents)
            for split, documents in corpora.text(self._pattern).splits.items()}

  def _generate_examples(self, documents):
    for key, document in enumerate(documents):
      yield key, {'text': document}


def build(*, pattern: str, data_dir: str):
  builder = LocalText(pattern=pattern, data_dir=data_dir, file_format='array_record')  # needs no TensorFlow
  builder.download_and_prepare()
  for name, split in builder.info.splits.items():
    print(f'{name}: {split.num_examples} documents in {builder.data_path}')


if __name__ == '__main__':
  launch.tool(build)
