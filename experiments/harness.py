"""The command line of lm-evaluation-harness, with our models as `--model lm`; it needs `pip install -e '.[eval]'`.

  python experiments/harness.py --model lm --model_args path=runs/quickstart --include_path experiments/tasks \
    --tasks lm_everyday,lm_paragraphs --output_path runs/harness --use_cache runs/harness-cache
  python experiments/harness.py --model lm --model_args path=gpt2 --tasks hellaswag --limit 200

All other flags are those of the harness: `python experiments/harness.py run --help`. `path` is a workdir of a run, a
Hugging Face folder, an imported one or an id on the hub; `best=True` takes the best checkpoint of a run, and `mesh` is
the size of each mesh axis, such as mesh=fsdp:4. A mesh of two axes has a comma, and needs --model_args in JSON:
'{"path": "gpt2", "mesh": "fsdp:4,tensor:2"}'. On several hosts, run the same command on each.
"""
import importlib
import os
import sys
from typing import Any

import jax

from lm import load, sharding
from lm.evaluate import harness
from lm.hf import pretrained
from lm.objectives.objective import causal_prompt
from lm.sharding import hosts


def open_client(path: str | None = None, best: bool = False, mesh: str | None = None) -> Any:
  """Opens a model for the harness, on a mesh that it sets. Raises ValueError or OSError if there is none."""
  if path is None:
    raise ValueError('--model_args has no path; give path=, such as path=runs/quickstart')
  jax.set_mesh(sharding.make_mesh(mesh))
  if load.is_run(path):
    loaded = load.open_trained(path, best)
    template, mark = loaded.run.data.template, loaded.run.objective.prompt
  else:
    loaded = pretrained.load(path)
    template, mark = pretrained.folder_template(loaded.folder), causal_prompt
  return harness.client_class()(loaded.model, loaded.params, loaded.tokenizer, template, mark)


def main() -> None:
  """Runs the command line of the harness."""
  hosts.join(None, None, None)
  # All processes run all requests, and the harness lets the one with LOCAL_RANK=0 write.
  os.environ['LOCAL_RANK'] = str(jax.process_index())
  harness.register('lm', open_client, sys.argv[1:])
  importlib.import_module('lm_eval.__main__').cli_evaluate()


if __name__ == '__main__':
  try:
    main()
  except (ValueError, OSError, ImportError) as error:
    sys.exit(f'error: {error}')
