"""URLs are refused where files are read and written through a mounted file system."""
import pathlib

import pytest
from absl import flags

from lm import launch, load, paths
from lm.data.text import prepared, source_files
from lm.evaluate.people import system_outputs
from lm.hf import bleurt_checkpoints, files, tf_checkpoint
from lm.workdir import checkpoint


@pytest.mark.parametrize('use', [
    lambda url: launch.parse([_function], ['', f'--workdir={url}']),
    lambda url: launch.parse([_function], ['', f'--files=here,{url}']),
    lambda url: load.run_or_model(None, url, False), load.open_base, load.open_trained,
    source_files.matching, lambda url: system_outputs.named_files([f'system={url}']),
    lambda url: checkpoint.Checkpoints(pathlib.Path(url), create=False),
    bleurt_checkpoints.load, files.Weights, lambda url: files.new_folder(url).__enter__(), tf_checkpoint.Variables,
    lambda url: prepared.prepared(url, None), lambda url: prepared.prepared('texts', url)])
@pytest.mark.parametrize('url', ['gs://bucket/run', 's3://bucket/run'])
def test_a_url_is_refused_with_what_to_mount(use, url):
  with pytest.raises((paths.Remote, flags.Error), match='3?:/.*bucket/run is a URL.* mount.* give the path there'):
    use(url)


@pytest.mark.parametrize('text', ['runs/a', '/mnt/bucket/run', '~no-user/run', 'a:b/c', 'C:/run', 'x/gs:/y'])
def test_other_paths_are_kept(text):
  assert paths.local(text) == pathlib.Path(text)
  assert launch.parse([_function], ['', f'--workdir={text}'])[0][0]['workdir'] == pathlib.Path(text)


def _function(*, workdir: pathlib.Path | None = None, files: tuple[pathlib.Path, ...] = ()):
  del workdir, files
