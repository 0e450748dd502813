"""Prepared data sets of TensorFlow Datasets."""
from typing import Any

from lm import paths


def prepared(name: str, data_dir: str | None) -> Any:
  """Returns the TFDS builder of a prepared data set; a name of the catalogue is downloaded and prepared if necessary.

  Raises ValueError, in one line, if there is no such data set, or if a folder is given by a URL.
  """
  import tensorflow_datasets as library
  path, folder = paths.local(name), paths.local(data_dir or library.core.constants.DATA_DIR)
  try:
    below = ('', '*/', '*/*/', '*/*/*/')  # data_dir/name/config/version
    data_sets = [file.parent for folders in below for file in sorted(path.glob(f'{folders}dataset_info.json'))]
    if len(data_sets) > 1:
      raise ValueError(f'it holds several data sets, give one of {", ".join(map(str, data_sets))}')
    if data_sets:
      return library.builder_from_directory(data_sets[0])
    if path.is_absolute() or name.startswith(('~', '.')):
      raise ValueError('no prepared data set is in this folder (no dataset_info.json)')
    builder = library.builder(name, data_dir=folder)
    if not builder.info.splits:   # array_record can be read at random, and without TensorFlow
      builder = library.builder(name, data_dir=folder, file_format='array_record')
      builder.download_and_prepare()
    return builder
  except ImportError:
    raise
  except library.core.DatasetNotFoundError:
    raise ValueError(f'tfds: no data set {name!r} in data_dir={folder} nor in the catalogue (tensorflow.org/datasets/'
                     f'catalog), nor a prepared one in the folder {path.absolute()}; give the path of one') from None
  except Exception as error:   # tfds raises errors of many classes, with several paragraphs each
    first_paragraph = str(error).split('\n\n')[0] or type(error).__name__
    raise ValueError(f'tfds: {name!r}: {first_paragraph.strip()}'.replace('\n', ' ')) from error
