"""In a cluster, a save that fails in one process fails in all, and all make it again; all read the same checkpoint."""
import json

import pytest
from processes_test import ROOT, address, results, start

PROGRAM = f"""
import contextlib, errno, json, pathlib, sys
sys.path[:0] = ['{ROOT / 'tests'}']
import jax
import numpy as np
from helpers.faults import failing, faults
from lm.sharding import hosts
from lm.train import saver
from lm.workdir import checkpoint, storage

folder, coordinator, number = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
hosts.join(coordinator, 2, number)
mesh = jax.make_mesh((2,), ('rows',), axis_types=(jax.sharding.AxisType.Explicit,))
layout = jax.NamedSharding(mesh, jax.P('rows'))
def state(step):
  w = jax.make_array_from_callback((8,), layout, lambda part: np.arange(8.)[part] + step)
  return {{'params': {{'w': w}}}}

like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0))
saver._wait = lambda seconds: None

def train(name, steps, call=None, pattern='', process=0, times=1):
  # Saves every second step, as the loop of training does, and fails in one process.
  tried, problem, fault = [], '', failing(errno.EIO, times)
  with contextlib.ExitStack() as stack:
    if number == process and call:
      stack.enter_context(faults(call, pattern, fault))
    try:
      with checkpoint.Checkpoints(folder / name, keep=99) as checkpoints:
        first = max(checkpoints.steps_of_all(), default=0)
        saves = saver.Saver(checkpoints, first)
        def begin(step):
          tried.append(step)
          checkpoints.save(step, state(step), {{}})
        for step in range(first + 1, steps + 1):
          saves.check(step)
          if step % 2 == 0 or saves.is_due(step):
            saves.save(step, lambda: begin(step))
        saves.finish(steps, lambda: begin(steps))
    except OSError as error:
      problem = str(error)
  return tried, problem, fault.calls

def restored(name, fails):
  read = storage.Storage.restore
  def restore(self, step, *args):
    if (number, step) == fails:
      raise OSError(errno.EIO, 'cannot be read')
    return read(self, step, *args)
  storage.Storage.restore = restore
  with checkpoint.Checkpoints(folder / name) as checkpoints:
    newest = checkpoints.restore(like)
    shards = newest.state['params']['w'].addressable_shards
    parts = [(shard.index[0].start or 0, np.asarray(shard.data).tolist()) for shard in shards]
  storage.Storage.restore = read
  return newest.step, parts

out = {{
    'files': train('files', 7, 'open', r'/2\\.orbax.*array_metadatas.*process_1', 1),
    'name': train('name', 7, 'rename', r'/2\\.orbax[^/]*$', 0),
    'deleted': train('deleted', 7, 'open', r'/2\\.orbax.*/facts', 0),
    'for good': train('for good', 99, 'open', r'/(?!2\\.)\\d+\\.orbax.*array_metadatas.*process_1', 1, 9),
    'again': train('for good', 8),
    'read': restored('for good', (1, 8)),
}}
for _ in range(250):
  assert hosts.from_all(number) == [0, 1] and hosts.from_process_0(number) == 0
out['keys'] = len(hosts._client().key_value_dir_get('lm/'))
hosts.wait_for_all()
print('results', json.dumps(out), file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.long
def test_what_one_process_cannot_write_or_read_is_repeated_in_all(tmp_path):
  script, coordinator = tmp_path / 'program.py', address()
  script.write_text(PROGRAM)
  ends = results([start([script, tmp_path, coordinator, i], tmp_path) for i in range(2)])
  assert all('results' in err for _, err in ends), ends
  first, second = (json.loads(err.split('results ')[1].splitlines()[0]) for _, err in ends)
  for name, process in ('files', second), ('name', first), ('deleted', first):
    assert first[name][:2] == second[name][:2] and process[name][2] >= 1, name
    (tried, problem, _) = first[name]
    assert tried[0] == 2 and tried[-1] >= 6 and len(tried) >= 3 and not problem, tried
  tried, problem, _ = first['for good']
  assert second['for good'][0] == tried and len(tried) == 6   # one that is good, and five that are not
  for text in problem, second['for good'][1]:
    assert 'process 1 could not write its part; ' in text and 'Input/output error' in text
    assert 'it was tried 5 times' in text and 'newest checkpoint is of step 2' in text
  assert first['again'][:2] == second['again'][:2] == [[4, 6, 8], '']
  assert first['read'] == [6, [[0, [6., 7., 8., 9.]]]] and second['read'] == [6, [[4, [10., 11., 12., 13.]]]]
  assert first['keys'] < 600   # 500 values have 1,500
